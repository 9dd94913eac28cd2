"""Small stand-ins for a source and a processor: examples whose content follows from their id alone."""

import dataclasses
import zlib

import numpy as np

from mm_jax.data.example import Example
from mm_jax.data.messages import BadSample, Conversation, Message, Text
from mm_jax.data.packing import Layout

LAYOUT = Layout(image_tokens=3, image_size=(4, 5), audio_tokens=2, audio_size=(6, 2))
DENSE = dataclasses.replace(LAYOUT, image_labels=(4, 2), audio_labels=(3, 2))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Conversations "name-0" .. "name-(length - 1)"; can be pickled."""

    name: str
    length: int
    pairs: bool = False

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.length:
            raise IndexError(index)
        messages = (Message("user", (Text("?"),)), Message("assistant", (Text(str(index)),)))
        rejected = (Text("no"),) if self.pairs else None
        return Conversation(messages, f"{self.name}-{index}", self.name, rejected)


@dataclasses.dataclass(frozen=True)
class Encode:
    """Conversation -> Example; the first token is the number in the id. Lengths are log-normal around
    `median`."""

    median: int = 12
    longest: int = 60
    images: int = 0  # at most
    audio: int = 0  # at most
    targets: bool = False
    bad: frozenset[str] = frozenset()
    layout: Layout = LAYOUT

    def __call__(self, conversation: Conversation) -> Example:
        if conversation.id in self.bad:
            raise BadSample(f"{conversation.id} is bad", "unreadable_image")
        rng = np.random.default_rng(zlib.crc32(conversation.id.encode()))
        images = int(rng.integers(self.images + 1))
        audio = int(rng.integers(self.audio + 1))
        media = images * self.layout.image_tokens + audio * self.layout.audio_tokens
        text = int(np.clip(rng.lognormal(np.log(self.median), 0.6), 2, self.longest))
        pair = conversation.rejected is not None
        length = media + text * (1 + pair)
        image_index = np.full(length, -1, np.int32)
        image_index[1 : 1 + images * 3] = np.arange(images * 3)
        audio_index = np.full(length, -1, np.int32)
        audio_index[1 + images * 3 : 1 + media] = np.arange(audio * 2)
        tokens = rng.integers(1000, 2000, length)
        tokens[0] = int(conversation.id.rpartition("-")[2])
        segments = np.ones(length, np.int32)
        segments[media + text :] = 2
        return Example(
            tokens=tokens.astype(np.int32),
            loss_weights=(np.arange(length) % 2).astype(np.float32),
            segments=segments,
            positions=np.concatenate([np.arange(media + text), np.arange(text if pair else 0)]).astype(
                np.int32
            ),
            image_index=image_index,
            audio_index=audio_index,
            pixel_values=rng.normal(size=(images, 4, 5, 3)).astype(np.float32),
            audio_values=rng.normal(size=(audio, 6, 2)).astype(np.float32),
            audio_frames=rng.integers(1, 7, audio).astype(np.int32),
            image_labels=rng.integers(0, 2, (images, 4, 2)).astype(np.uint8) if self.targets else None,
            image_boxes=rng.integers(-1, 8, (images, 4, 4)).astype(np.int32) if self.targets else None,
            audio_labels=rng.integers(0, 2, (audio, 3, 2)).astype(np.uint8) if self.targets else None,
            source=conversation.source,
            id=conversation.id,
        )


def example(tokens, *, images=0, audio=0, preference=-1, source="a", segments=None, fill=1.0) -> Example:
    """A literal example: its media placeholders stand in front (3 tokens a picture, 2 a clip), pictures
    first."""
    tokens = np.array(tokens, np.int32)
    media = images * 3 + audio * 2
    index = np.arange(len(tokens), dtype=np.int32)
    segments = np.ones_like(tokens) if segments is None else np.array(segments, np.int32)
    starts = np.where(segments == 2, np.count_nonzero(segments == 1), 0)
    return Example(
        tokens=tokens,
        loss_weights=(index >= media).astype(np.float32),
        segments=segments,
        positions=(index - starts).astype(np.int32),
        image_index=np.where(index < images * 3, index, -1).astype(np.int32),
        audio_index=np.where((index >= images * 3) & (index < media), index - images * 3, -1).astype(
            np.int32
        ),
        pixel_values=np.full((images, 4, 5, 3), fill, np.float32),
        audio_values=np.full((audio, 6, 2), fill, np.float32),
        audio_frames=np.full(audio, 5, np.int32),
        source=source,
        preference=preference,
    )
