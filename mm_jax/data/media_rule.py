"""How the media of a system become arrays and tokens: what a file of `mm_jax.families` fills in.

Two ways lead to a batch. Messages go through `images`, `audio` and `videos`, which give the arrays that the
reference's processor returns; and such arrays, whoever made them, go through `items`, which says what the model gets of
each picture, clip or video, and which features its tokens take. So the arrays of a reference's processor and raw
pictures meet before the layout is worked out, and there is one place for it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_jax.data.image import Transform
from mm_jax.data.messages import Box, Part, Text
from mm_jax.data.pixels import PixelRule
from mm_jax.errors import UserError

Arrays = dict[str, np.ndarray]
# stands for the media token in `Item.text`, whatever the tokenizer calls it; a noncharacter, which no text may hold
MOST = 256  # numbered arrays of pictures, of which each has its own size
MEDIA = "\ufdd2"
NOWHERE = -1  # in place of the media token, where the text around is tokenised in pieces


@dataclass(frozen=True)
class Settings:
    """The JSON files of a checkpoint that say how media are prepared.

    Attributes:
      where: the directory, for messages.
      image, video, audio: of the image processor, video processor and feature extractor; None where there is none.
      processor: processor_config.json without those.
    """

    where: str = ""
    image: Mapping[str, Any] | None = None
    video: Mapping[str, Any] | None = None
    audio: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)

    def need(self, kind: str) -> Mapping[str, Any]:
        """The settings of "image", "video" or "audio". Raises UserError where the directory has none."""
        found = getattr(self, kind)
        if found is None:
            raise UserError(
                f"{self.where} has no preprocessor_config.json that says how to prepare {kind}; copy it from the "
                "checkpoint that this one was made from"
            )
        return found

    @classmethod
    def read(cls, directory: str | Path) -> Settings:
        """From preprocessor_config.json, video_preprocessor_config.json and processor_config.json."""
        directory = Path(directory)
        processor, pre = (
            _json(directory / "processor_config.json"),
            _json(directory / "preprocessor_config.json"),
        )
        parts = {name: processor.pop(name, None) for name in ("image_processor", "video_processor")}
        audio = next(
            (v for k in ("feature_extractor", "audio_processor") if (v := processor.pop(k, None))), None
        )
        # old files of pictures call their processors feature extractors too
        if "feature_size" in pre or ("feature_extractor_type" in pre and "image_mean" not in pre):
            audio, pre = audio or pre, pre if "image_processor_type" in pre else {}
        video = parts["video_processor"] or _json(directory / "video_preprocessor_config.json") or None
        return cls(str(directory), parts["image_processor"] or pre or None, video, audio, processor)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


@dataclass(frozen=True)
class Item:
    """One picture, clip or video, as the text and the model see it.

    Attributes:
      index: int32 [T], the feature that each of its media tokens takes, counted from the first feature of this item;
        -2 - k is the k-th of the model's learned markers, such as the image newline. So un-padding, the order of tiles,
        rows that end with a newline are all index arrays.
      features: how many features the encoder makes of it.
      arrays: the model's arrays with a leading axis of slots (`mm_jax.data.example`), such as
        {"pixel_values": [tiles, H, W, 3]} or {"audio_values": [windows, F, mels], "audio_frames": [windows]}.
      taps: int32 and float32 [T, 4], where a token takes a mixture of features: their distances from `index`, and their
        weights.
      text: what takes the place of its placeholder in the text, where that is more than the media tokens alone: MEDIA
        for each of them, and fixed tokens around and between.
    """

    index: np.ndarray
    features: int
    arrays: Arrays
    text: str = ""
    taps: tuple[np.ndarray, np.ndarray] | None = None


class MediaRule:
    """What a system takes besides text; this one takes nothing. Subclasses say more.

    Args:
      settings: of the checkpoint.

    Attributes:
      tokens: the id of the token that stands for one feature, for each kind of media ("image", "audio", "video").
      names: for each kind the arrays that the reference's processor gives.
      pieces: how the text around media becomes tokens. "": all at once, each feature as its token. "first" and "every",
        for references that put features between embeddings: each piece of text alone, with what the tokenizer puts
        around a text around the first piece, or around every piece in which there is something (the last where there is
        nothing in any). Then the tokenizer need not know the token.
      taps: whether some items have taps.
      kept: regular expression of special tokens that answers keep, for `parse` to read.
      opening: regular expression whose group "begun" is what may become a box at the end of an answer that is not
        complete.
      ignored: arrays of the reference's processor that hold nothing new.
      placeholders: what chat templates write for a picture, clip or video, where it is not the media token itself.
      shared: kinds of media whose features stand at the token of another kind, such as {"video": "image"}: in arrays of
        the reference they are among those of that kind.
      joined: for chat templates that take texts alone: what stands between the parts of a message, of which media are
        placeholders. None for those that take parts.
    """

    tokens: Mapping[str, int] = {}
    names: Mapping[str, tuple[str, ...]] = {}
    ignored: tuple[str, ...] = ("token_type_ids", "mm_token_type_ids")
    placeholders: Mapping[str, str] = {}
    shared: Mapping[str, str] = {}
    joined: str | None = None
    pieces = ""
    taps = False
    kept = ""
    opening = ""
    sample_rate = 16_000  # Hz, of the clips that `audio` takes

    def __init__(self, settings: Settings | None = None):
        self.settings = settings or Settings()

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        """Pictures uint8 [H, W, 3] to the reference's arrays, that are the same for each alone, one after the other."""
        raise NotImplementedError

    def conversation_images(self, images: Sequence[np.ndarray]) -> Arrays:
        """`images` of one conversation, for systems where their number matters."""
        return self.images(images)

    def audio(self, clips: Sequence[np.ndarray]) -> Arrays:
        """Clips float32 [T] at `sample_rate` to the reference's arrays."""
        raise NotImplementedError

    def videos(self, videos: Sequence[tuple[np.ndarray, float | None]]) -> Arrays:
        """Videos as frames uint8 [T, H, W, 3] and frames a second (None: unknown) to the reference's arrays."""
        raise NotImplementedError

    def marked(self, input_ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """`input_ids` with the media token wherever a feature goes; for references that say it by another array."""
        return input_ids

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        """What the model gets of each picture, clip or video.

        Args:
          arrays: those of `names[kind]`.
          counts: media tokens of this kind in each row of the batch, which tell the items apart where the arrays
            do not; empty where the text is not known yet.

        Raises UserError for arrays of wrong shapes.
        """
        raise NotImplementedError

    def by_row(self, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[list[Item]] | None:
        """`items` of each row, for arrays of pictures that have an axis of rows; None where they have none."""
        return None

    def seen(self, tokens: np.ndarray, items: Mapping[str, Sequence[Item]]) -> np.ndarray | None:
        """What the tokens [T] of a conversation have to do with its pictures, for decoders that read those beside the
        text: int8 [T, shares of all pictures], see `mm_jax.data.example`."""
        return None

    def given_seen(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray | None:
        """`seen` [rows, T, shares] as the reference's own arrays say it, for input_ids of this shape."""
        return None

    def prepared(self, arrays: Mapping[str, Any]) -> tuple[MediaRule, Mapping[str, Any]]:
        """The arrays of a batch with a media token wherever a feature goes, and the rule that knows this token.

        Most references have such a token already; see `BoundRule` for others.
        """
        return self, arrays

    def told(self, text: str, items: Mapping[str, Sequence[Item]]) -> Mapping[str, Sequence[Item]]:
        """The items of one conversation, for encoders that read its text too.

        Args:
          text: everything but media and the answers that are trained on.
        """
        return items

    def positions(self, tokens: np.ndarray, items: Mapping[str, Sequence[Item]]) -> np.ndarray:
        """int32 [T] or [T, axes]: the decoder's positions of one conversation of tokens [T] with these items."""
        return np.arange(len(tokens), dtype=np.int32)

    def spans(self, longest: int) -> Iterable[int]:
        """Slots that a picture, tile or frame may take which the encoder must see as a whole, for those that prompts of
        at most `longest` tokens have room for."""
        return (1,)

    def transform(self, size: tuple[int, int]) -> Transform:
        """Where the pixels of a picture of (width, height) are in the picture that the text's boxes speak of."""
        return Transform(size, (1.0, 1.0), (0, 0), size)

    def framing(self, size: tuple[int, int]) -> Transform:
        """Where the pixels of a picture of (width, height) are in the picture that the encoder gets; the whole of it
        unless a system says otherwise."""
        return Transform(size, (1.0, 1.0), (0, 0), size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of the media tokens of a picture of (width, height), where they follow from its size."""
        return None

    def write_box(self, box: Box, transform: Transform) -> str:
        """A box of a message in the text format of this system."""
        raise UserError("this system has no format for boxes")

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        """An answer as parts; boxes in pixels of the original picture."""
        return [Text(text)] if text else []


class FixedImage(MediaRule):
    """Pictures of one size that take the same number of tokens each: LLaVA-1.5, BLIP-2, PaliGemma.

    Args:
      token_id: that stands for a feature.
      size: (height, width) of the encoder's picture.
      num_tokens: features of a picture.
      defaults: of the reference's image processor, for settings that the files leave out.
    """

    names = {"image": ("pixel_values",)}

    def __init__(
        self,
        settings: Settings,
        *,
        token_id: int,
        size: tuple[int, int],
        num_tokens: int,
        defaults: Mapping[str, Any] | None = None,
    ):
        super().__init__(settings)
        self.tokens = {"image": token_id}
        self.size, self.num_tokens, self.defaults = size, num_tokens, defaults or {}

    @cached_property
    def rule(self) -> PixelRule:
        return PixelRule.read(self.settings.need("image"), self.defaults)

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        return {"pixel_values": np.stack([self.rule(image).transpose(2, 0, 1) for image in images])}

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        pixels = channels_last(arrays["pixel_values"], self.size)
        index = np.arange(self.num_tokens, dtype=np.int32)
        return [Item(index, self.num_tokens, {"pixel_values": picture[None]}) for picture in pixels]

    def transform(self, size: tuple[int, int]) -> Transform:
        return self.rule.transform(size)

    def framing(self, size: tuple[int, int]) -> Transform:
        return self.rule.transform(size)


class BoundRule(MediaRule):
    """For references that say the places of pictures in arrays of their own, where the ids mean nothing.

    Attributes:
      rows: the name of the array with the row of each picture; image_bound has the columns from and to.
    """

    rows = "image_row"
    ignored = (
        *MediaRule.ignored,
        "image_row",
        "image_bound",
        "im_mask",
        "tiles",
        "hd_num",
        "slice_row",
    ) + tuple(f"image_{k}" for k in range(MOST))

    def prepared(self, arrays: Mapping[str, Any]) -> tuple[MediaRule, Mapping[str, Any]]:
        if "image_bound" not in arrays or "input_ids" not in arrays:
            return self, arrays
        ids = np.array(arrays["input_ids"])
        rule = copy.copy(self)
        free = int(np.setdiff1d(np.arange(ids.size + 1), ids)[0])
        rule.tokens = {"image": free}
        for row, (start, stop) in zip(arrays[self.rows], arrays["image_bound"], strict=True):
            ids[row, start:stop] = free
        return rule, {**arrays, "input_ids": ids}


def channels_last(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[n, 3, H, W] -> [n, H, W, 3]. Raises UserError for pictures of another size."""
    height, width = size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, height, width):
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, [pictures, 3, {height}, {width}] is needed"
        )
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
