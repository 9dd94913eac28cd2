"""MiniCPM-V 2.6 (reference: the authors' MiniCPMV): SigLIP on slices of any shape, a resampler, and Qwen2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.media_rule import MEDIA, Arrays, BoundRule, Item, Settings
from mm_jax.data.pieces import slices
from mm_jax.data.pixels import BICUBIC, PixelRule, resize
from mm_jax.errors import UserError
from mm_jax.families import clip, qwen2, siglip
from mm_jax.families.family import LINEAR, Family, Names, Part, System, Weight, norm
from mm_jax.families.fields import Fields
from mm_jax.models import MultimodalConfig, NativeViTConfig, ProjectorConfig

DEFAULTS = {
    "vision_config": {},
    "query_num": 64,
    "slice_config": {},
    "patch_size": 14,
    "drop_vision_last_layer": False,
    "version": 2.6,
    "slice_mode": True,
    "use_image_id": True,
}
# how many pictures go through the tower at once
RULE = ("batch_vision_input", "image_size", "vision_batch_size")
SLICES = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14}
TOWER = {**siglip.DEFAULTS, "patch_size": 14}
UNKNOWN = 128_244  # <unk> in the released vocabulary, the place of a feature
HEAD_DIM = 128  # of the resampler
PATCH = "d c p q -> (c p q) d"  # the map of the patches, whose values come channel by channel
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RENAMES = ((r"^vpm\.vision_model\.", "vpm."),)


def _system(values: Mapping[str, Any], names: Names) -> System:
    own = {*DEFAULTS, *RULE}
    fields = Fields({k: v for k, v in values.items() if k in own}, DEFAULTS)
    fields.skip(*RULE, "patch_size")
    if str(fields("version")) != "2.6":
        raise fields.unsupported("version", "2.6 is")
    text = qwen2.text({k: v for k, v in values.items() if k not in own}, False, "config.json")
    cut = Fields(fields("slice_config") or {}, SLICES, "config.json: slice_config")
    cut.skip("patch_size")
    pixels, most = cut("scale_resolution"), cut("max_slice_nums")
    cut.finish()
    most, ids = (most if fields("slice_mode") else 1), fields("use_image_id")
    vision = _tower(fields("vision_config"), fields("drop_vision_last_layer"), pixels)
    width = text.decoder.embed_dim
    projector = ProjectorConfig(
        "resampler",
        hidden_dim=width,
        num_queries=fields("query_num"),
        num_heads=width // HEAD_DIM,
        use_bias=False,
        residual=False,
        input_map=vision.embed_dim != width,
    )
    fields.finish()
    table = (
        *siglip.native_weights(vision, "vpm.", "vision/", pattern=PATCH),
        *resampler(projector, "resampler.", "resampler."),
        *text.table("llm.model.", "llm.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder)
    rule = partial(SliceRule, vision=vision, queries=projector.num_queries, side=pixels, most=most, ids=ids)
    return System(config, table, text, clip.unused("vpm."), rule=rule, template=TEMPLATE)


def _tower(values: Mapping[str, Any], drop_last: bool, pixels: int) -> NativeViTConfig:
    fields = Fields(values, TOWER, "config.json: vision_config")
    patch = fields.square("patch_size")
    return siglip.native(
        fields,
        merge=1,
        num_layers=fields("num_hidden_layers") - bool(drop_last),
        table_side=fields.square("image_size") // patch,
        # of a slice of pixels x pixels; an eighth more, for the sides of long ones are rounded up to patches
        slot_patches=(pixels // patch) ** 2 * 9 // 8,
    )


def resampler(config: ProjectorConfig, pool: str, after: str) -> list[Weight]:
    """The tensors of a resampler of this kind; names of what is behind its attention begin with `after`."""
    ours, width = "image_projector/", config.hidden_dim
    table = [
        Weight(f"{pool}query", f"{ours}query"),
        Weight(f"{pool}attn.out_proj.weight", f"{ours}attention/out/kernel", LINEAR),
        Weight(f"{pool}attn.out_proj.bias", f"{ours}attention/out/bias"),
        Weight(f"{after}proj", f"{ours}out/kernel"),
        *norm(f"{pool}ln_q", f"{ours}query_norm"),
        *norm(f"{pool}ln_kv", f"{ours}input_norm"),
        *norm(f"{after}ln_post", f"{ours}out_norm"),
    ]
    for k, name in enumerate(("query", "key", "value")):
        part, path = Part(k * width, (k + 1) * width, 3 * width), f"{ours}attention/{name}"
        table.append(Weight(f"{pool}attn.in_proj_weight", f"{path}/kernel", LINEAR, part=part))
        table.append(Weight(f"{pool}attn.in_proj_bias", f"{path}/bias", part=part))
    if config.input_map:
        table.append(Weight(f"{pool}kv_proj.weight", f"{ours}input/kernel", LINEAR))
    if config.stored_positions:
        table.append(Weight(f"{pool}pos_embed", f"{ours}positions"))
    return table


def buckets(count: int, side: int) -> np.ndarray:
    """Which row (or column) of a table of `side` each of `count` rows of patches takes: int [count].

    The reference compares i / count with the multiples of 1 / side in float32, with the rounding of torch's `arange`,
    which goes by blocks of eight; in some ties it decides otherwise than exact arithmetic would.
    """
    step, index = float(np.float32(1 / count)), np.arange(count)
    start = (index // 8 * 8 * step).astype(np.float32).astype(float)
    blocked = index < count // 8 * 8
    fraction = np.where(blocked, start + index % 8 * step, index * step).astype(np.float32)
    return _between(fraction, side)


def nearest_places(count: int, side: int) -> np.ndarray:
    """`buckets` where the reference divides (MiniCPM-V 4.6)."""
    return _between(np.arange(count, dtype=np.float32) / np.float32(count), side)


def _between(fraction: np.ndarray, side: int) -> np.ndarray:
    boundaries = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    return np.searchsorted(boundaries, fraction, side="right")


def slot(pixels: np.ndarray, grid: Sequence[int], config: NativeViTConfig) -> dict[str, np.ndarray]:
    """The model's arrays of one slice.

    Args:
      pixels: float [3, patch, patch * n], its patches side by side, row by row; more than `grid` has are padding.
      grid: rows and columns of patches.

    Raises UserError: more patches than a slot has.
    """
    (rows, columns), patch, most = grid, config.patch_size, config.slot_patches
    count = rows * columns
    if count > most:
        raise UserError(
            f"a slice of {rows} x {columns} patches is longer than the {most} that this model takes"
        )
    patches = rearrange(pixels[:, :, : count * patch], "c p (n q) -> n (c p q)", q=patch)
    places = np.stack(np.divmod(np.arange(count), columns), axis=1).astype(np.int32)
    taken = buckets(rows, config.table_side)[places[:, 0]] * config.table_side
    taken = taken + buckets(columns, config.table_side)[places[:, 1]]
    index = np.stack([taken, *[np.zeros(count, int)] * 3], axis=1)  # one entry, where others mix four
    arrays = {
        "patches": patches.astype(np.float32),
        "patch_segment_ids": np.ones(count, np.int32),
        "patch_positions": places,
        "patch_table_index": index.astype(np.int32),
        "patch_table_weights": np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
    }
    return {name: np.pad(x, [(0, most - count)] + [(0, 0)] * (x.ndim - 1)) for name, x in arrays.items()}


class SliceRule(BoundRule):
    """A view of the whole picture, and slices of it where it is large; see `mm_jax.data.pieces.slices`.

    Args:
      vision: the tower.
      queries: features of a slice.
      side: a slice has about side x side pixels.
      most: slices that there may be; 1 for the view alone.
      ids: whether the text numbers the pictures.
    """

    names = {"image": ("pixel_values", "tgt_sizes", "slice_grids")}
    placeholders = {"image": "(<image>./</image>)"}
    joined = "\n"
    pieces = "first"
    rows = "slice_row"

    def __init__(
        self, settings: Settings, *, vision: NativeViTConfig, queries: int, side: int, most: int, ids: bool
    ):
        super().__init__(settings)
        self.vision, self.queries, self.side, self.most, self.ids = vision, queries, side, most, ids
        self.tokens = {"image": UNKNOWN}
        self.pixels = PixelRule(None)

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        """Pictures to the reference's arrays, and one more.

        Returns:
          pixel_values [slices, 3, patch, patch * n], zeros behind those of shorter slices; tgt_sizes [slices, 2], rows
          and columns of patches; slice_grids [pictures, 2], columns and rows of slices, zeros for the view alone.
        """
        patch, pieces, grids = self.vision.patch_size, [], []
        for picture in images:
            plan = slices((picture.shape[1], picture.shape[0]), self.side, patch, self.most)
            pieces.append(resize(picture, plan.overview[::-1], BICUBIC))
            grids.append(plan.grid or (0, 0))
            if plan.grid is not None:
                whole = resize(picture, plan.refined[::-1], BICUBIC)
                columns, rows = plan.grid
                pieces += list(rearrange(whole, "(r h) (c w) d -> (r c) h w d", r=rows, c=columns))
        patches = [
            rearrange(self.pixels.normalise(piece), "(h p) (w q) d -> d p (h w q)", p=patch, q=patch)
            for piece in pieces
        ]
        longest = max(array.shape[2] for array in patches)
        values = [np.pad(array, ((0, 0), (0, 0), (0, longest - array.shape[2]))) for array in patches]
        sizes = [(piece.shape[0] // patch, piece.shape[1] // patch) for piece in pieces]
        return {
            "pixel_values": np.stack(values),
            "tgt_sizes": np.array(sizes, np.int32),
            "slice_grids": np.array(grids, np.int32),
        }

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        values, sizes = arrays["pixel_values"], arrays["tgt_sizes"]
        made = [slot(array, size, self.vision) for array, size in zip(values, sizes, strict=True)]
        grids = arrays.get("slice_grids")  # without them each slice is one item: the text is there already
        found, at = [], 0
        for number in range(len(made) if grids is None else len(grids)):
            columns, rows = (0, 0) if grids is None else grids[number]
            count = 1 + columns * rows
            part, at = made[at : at + count], at + count
            found.append(
                Item(
                    np.arange(count * self.queries, dtype=np.int32),
                    count * self.queries,
                    {name: np.stack([one[name] for one in part]) for name in part[0]},
                    self._text(number, columns, rows),
                )
            )
        return found

    def _text(self, number: int, columns: int, rows: int) -> str:
        media = MEDIA * self.queries
        line = f"<slice>{media}</slice>" * columns
        number = f"<image_id>{number}</image_id>" if self.ids else ""
        return f"{number}<image>{media}</image>" + "\n".join([line] * rows)


FAMILY = Family("minicpmv", ("text", "image"), _system, RENAMES)
