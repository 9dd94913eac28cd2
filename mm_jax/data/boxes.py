"""Boxes as location tokens: four of `<loc_0>` .. `<loc_{bins-1}>`, x0 y0 x1 y1 of the model's picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mm_jax.errors import UserError


@dataclass(frozen=True)
class BoxFormat:
    """Bins of equal width over 0..1 (Pix2seq, arXiv 2109.10852, section 2.1); first_id: the id of `<loc_0>`.

    >>> boxes = BoxFormat(bins=64, first_id=100)
    >>> boxes.encode((0.0, 0.25, 0.5, 1.0))
    (100, 116, 132, 163)
    >>> boxes.decode((100, 116, 132, 163))
    (0.0078125, 0.2578125, 0.5078125, 0.9921875)
    """

    bins: int
    first_id: int

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise UserError(f"box_bins must be at least 2, not {self.bins}")

    @staticmethod
    def names(bins: int) -> list[str]:
        return [f"<loc_{k}>" for k in range(bins)]

    def encode(self, box: Sequence[float]) -> tuple[int, ...]:
        """(x0, y0, x1, y1) in 0..1 to four token ids."""
        return tuple(self.first_id + min(max(int(v * self.bins), 0), self.bins - 1) for v in box)

    def decode(self, ids: Sequence[int]) -> tuple[float, ...]:
        """Four token ids to (x0, y0, x1, y1) in 0..1, the middles of the bins, put in order."""
        x0, y0, x1, y1 = ((int(k) - self.first_id + 0.5) / self.bins for k in ids)
        return (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))

    def is_location(self, token: int) -> bool:
        return self.first_id <= token < self.first_id + self.bins
