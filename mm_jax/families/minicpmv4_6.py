"""MiniCPM-V 4.6 (reference: MiniCPMV4_6ForConditionalGeneration): SigLIP on slices of any shape, whose patches
join on the way, a merger, and Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.media_rule import MEDIA, Arrays, Item, MediaRule, Settings
from mm_jax.data.pieces import slices
from mm_jax.data.pixels import BICUBIC, HALF, PixelRule, resize
from mm_jax.errors import UserError
from mm_jax.families import siglip
from mm_jax.families.family import Family, Names, System, Weight, linear, norm
from mm_jax.families.fields import Fields
from mm_jax.families.minicpmv import PATCH, nearest_places
from mm_jax.families.parts import read_text
from mm_jax.models import MultimodalConfig, NativeViTConfig, ProjectorConfig

DEFAULTS = {
    "text_config": {},
    "vision_config": {},
    "insert_layer_id": 6,
    "drop_vision_last_layer": False,
    "image_token_id": None,
    "video_token_id": None,
    "downsample_mode": "16x",
    "merge_kernel_size": [2, 2],
    "merger_times": 1,
}
TOWER = siglip.DEFAULTS | {"window_kernel_size": [2, 2]}
# of MiniCPMV4_6ImageProcessor
IMAGE_PROCESSOR = {
    "size": {},
    "resample": BICUBIC,
    "image_mean": HALF,
    "image_std": HALF,
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "slice_mode": True,
    "use_image_id": True,
}
SIDES = {"16x": 4, "4x": 2}  # in patches, of the square that a token stands for
THEIRS = "model.vision_tower."


def _system(values: Mapping[str, Any], names: Names) -> System:
    fields = Fields(values, DEFAULTS)
    fields.skip("image_size", "patch_size")  # of its processor; those of the tower count
    tied = "lm_head.weight" not in names
    text = read_text(fields("text_config"), tied, "qwen3_5_text")
    mode = fields("downsample_mode")
    if mode not in SIDES:
        raise fields.unsupported("downsample_mode", "known: " + ", ".join(SIDES))
    if fields("drop_vision_last_layer"):
        raise fields.unsupported("drop_vision_last_layer")
    if fields.square("merge_kernel_size") != 2:
        raise fields.unsupported("merge_kernel_size")
    if fields("merger_times") != 1:
        raise fields.unsupported("merger_times")
    vision = _tower(fields("vision_config"), SIDES[mode], fields("insert_layer_id") + 1)
    merged = 4 * vision.embed_dim
    projector = ProjectorConfig("mlp", merge=(4, 1), hidden_dim=merged, activation="gelu")
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder)
    merger = "model.merger.mlp.0."
    table = (
        *_tower_weights(vision),
        *norm(f"{merger}pre_norm", "image_projector/norm"),
        *linear(f"{merger}linear_1", "image_projector/hidden"),
        *linear(f"{merger}linear_2", "image_projector/out"),
        *text.table("model.language_model.", "lm_head."),
    )
    fields.skip("video_token_id")
    token = fields("image_token_id")
    fields.finish()
    unused = ("mtp.*",) if vision.join_after else ("mtp.*", f"{THEIRS}vit_merger.*")
    rule = partial(PackedSliceRule, vision=vision, token=token)
    return System(config, table, text, unused, rule=rule)


def _tower(values: Mapping[str, Any], side: int, join_after: int) -> NativeViTConfig:
    fields = Fields(values, TOWER, "config.json: vision_config")
    fields.skip("insert_layer_id")  # that of the whole config counts
    if fields.square("window_kernel_size") != 2:
        raise fields.unsupported("window_kernel_size")
    layers, patch = fields("num_hidden_layers"), fields.square("patch_size")
    if not 0 < join_after <= layers:
        raise UserError(f"config.json: insert_layer_id is {join_after - 1}, the tower has {layers} layers")
    return siglip.native(
        fields,
        merge=side,
        table_side=fields.square("image_size") // patch,
        join_after=join_after if side == 4 else 0,
    )


def _tower_weights(config: NativeViTConfig) -> list[Weight]:
    """SigLIP's, with the values of a patch in another order, and those of the joint between two of its layers."""
    table = []
    for weight in siglip.native_weights(config, THEIRS, "vision/", pattern=PATCH):
        table.append(weight)
        if weight.depth and 0 < config.join_after < config.num_layers:
            path = weight.path.replace("vision/layers/", "vision/joined_layers/")
            table.append(replace(weight, path=path, first=config.join_after))
    if config.join_after:
        joint, ours = f"{THEIRS}vit_merger.", "vision/join/"
        table += norm(f"{joint}layer_norm1", f"{ours}attention_norm")
        table += norm(f"{joint}pre_norm", f"{ours}mlp_norm")
        table += linear(f"{joint}linear_1", f"{ours}up") + linear(f"{joint}linear_2", f"{ours}down")
        for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            table += linear(f"{joint}self_attn.{part}_proj", f"{ours}attention/{name}")
    return table


class PackedSliceRule(MediaRule):
    """A view of the whole picture, and slices of it where it is large, as patches of one row; see
    `mm_jax.data.pieces.slices`.

    Args:
      vision: the tower.
      token: the id of a feature.
    """

    names = {"image": ("pixel_values", "target_sizes", "slice_grids")}

    def __init__(self, settings: Settings, *, vision: NativeViTConfig, token: int | None):
        super().__init__(settings)
        self.vision = vision
        self.tokens = {} if token is None else {"image": token}

    @cached_property
    def processor(self) -> dict[str, Any]:
        """Raises UserError where the checkpoint does not say how to prepare pictures, or for other tokens than the
        config's."""
        values = IMAGE_PROCESSOR | {k: v for k, v in self.settings.need("image").items() if v is not None}
        wanted = next(mode for mode, side in SIDES.items() if side == self.vision.merge)
        if values.get("downsample_mode", "16x") != wanted:
            raise UserError(f"preprocessor_config.json: downsample_mode is not that of config.json, {wanted}")
        if values.get("patch_size", 14) != self.vision.patch_size:
            raise UserError(
                f"preprocessor_config.json: patch_size is not {self.vision.patch_size}, the tower's"
            )
        return values

    @cached_property
    def pixels(self) -> PixelRule:
        return replace(PixelRule.read(self.processor, IMAGE_PROCESSOR), size=None)

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        """Pictures to the reference's arrays, and one more.

        Returns:
          pixel_values [1, 3, patch, patch * n], the patches of all slices side by side; target_sizes [slices, 2], rows
          and columns of patches; slice_grids [pictures, 2], rows and columns of slices, zeros for the view alone.
        """
        c, patch, pieces, grids = self.processor, self.vision.patch_size, [], []
        most, unit = c["max_slice_nums"] if c["slice_mode"] else 1, patch * self.vision.merge
        for picture in images:
            plan = slices((picture.shape[1], picture.shape[0]), c["scale_resolution"], unit, most)
            pieces.append(resize(picture, plan.overview[::-1], self.pixels.resample))
            columns, rows = plan.grid or (0, 0)
            grids.append((rows, columns))
            if plan.grid is not None:
                whole = resize(picture, plan.refined[::-1], self.pixels.resample)
                pieces += list(rearrange(whole, "(r h) (c w) d -> (r c) h w d", r=rows, c=columns))
        patches = [
            rearrange(self.pixels.normalise(piece), "(h p) (w q) d -> d p (h w q)", p=patch, q=patch)
            for piece in pieces
        ]
        sizes = [(piece.shape[0] // patch, piece.shape[1] // patch) for piece in pieces]
        return {
            "pixel_values": np.concatenate(patches, axis=2)[None],
            "target_sizes": np.array(sizes, np.int32),
            "slice_grids": np.array(grids, np.int32),
        }

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if "pixel_values" not in arrays or "target_sizes" not in arrays:
            raise UserError("pixel_values and target_sizes belong together; one of them is missing")
        values, sizes = arrays["pixel_values"], arrays["target_sizes"]
        side, patch = self.vision.merge, self.vision.patch_size
        if sizes.ndim != 2 or sizes.shape[1] != 2 or np.any(sizes < 1) or np.any(sizes % side):
            raise UserError(f"target_sizes must be rows and columns of patches that {side} divides")
        needed = (1, 3, patch, int(sizes.prod(axis=1).sum()) * patch)
        if values.shape != needed:
            raise UserError(
                f"pixel_values has shape {list(values.shape)}, {list(needed)} is needed after target_sizes"
            )
        patches = rearrange(values[0], "c p (n q) -> n (c p q)", q=patch).astype(np.float32)
        parts = np.split(patches, np.cumsum(sizes.prod(axis=1))[:-1])
        made = [self._slice(part, grid) for part, grid in zip(parts, sizes, strict=True)]
        grids = arrays.get("slice_grids")  # without them each slice is one item: the text is there already
        found, at = [], 0
        for number in range(len(made) if grids is None else len(grids)):
            rows, columns = (0, 0) if grids is None else map(int, grids[number])
            part = made[at : at + 1 + rows * columns]
            at += len(part)
            for k, one in enumerate(part):
                one["patch_segment_ids"] = one["patch_segment_ids"] + k
            joined = {name: np.concatenate([one[name] for one in part]) for name in part[0]}
            tokens = [len(one["patches"]) // side**2 for one in part]
            text = self._text(number, tokens, columns) if grids is not None else ""
            found.append(Item(np.arange(sum(tokens), dtype=np.int32), sum(tokens), joined, text))
        return found

    def _slice(self, patches: np.ndarray, grid: Sequence[int]) -> dict[str, np.ndarray]:
        """The model's arrays of one slice, whose patches come row by row."""
        (rows, columns), side = map(int, grid), self.vision.table_side
        # squares of two by two, in each square of a token
        inner = {"a": rows // self.vision.merge, "b": columns // self.vision.merge, "p": 2, "q": 2}
        order = np.arange(rows * columns).reshape(rows, columns)
        order = rearrange(order, "(a i p) (b j q) -> (a b i j p q)", **inner)
        row, column = np.divmod(order, columns)
        taken = nearest_places(rows, side)[row] * side + nearest_places(columns, side)[column]
        return {
            "patches": patches[order],
            "patch_segment_ids": np.ones(len(order), np.int32),
            "patch_positions": np.stack([row, column], axis=1).astype(np.int32),
            # one entry, where others mix four
            "patch_table_index": np.pad(taken[:, None], ((0, 0), (0, 3))).astype(np.int32),
            "patch_table_weights": np.tile(np.float32([1, 0, 0, 0]), (len(order), 1)),
        }

    def _text(self, number: int, tokens: Sequence[int], columns: int) -> str:
        view, *cut = tokens
        cells = [f"<slice>{MEDIA * count}</slice>" for count in cut]
        lines = ["".join(cells[k : k + columns]) for k in range(0, len(cells), columns or 1)]
        number = f"<image_id>{number}</image_id>" if self.processor["use_image_id"] else ""
        return f"{number}<image>{MEDIA * view}</image>" + "\n".join(lines)


FAMILY = Family("minicpmv4_6", ("text", "image"), _system)
