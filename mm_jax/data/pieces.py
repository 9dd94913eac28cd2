"""How the systems cut a picture into pieces that their towers can see: sizes and grids, no pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]  # (width, height) in pixels, or (columns, rows)


@dataclass(frozen=True)
class Canvas:
    """A picture on a canvas of square tiles.

    Attributes:
      size: of the canvas.
      box: where the resized picture is on it: left, top, right, bottom.
      grid: (columns, rows) of tiles.
    """

    size: Size
    box: tuple[int, int, int, int]
    grid: Size


def canvas(size: Size, tile: int, most: int, *, centred: bool, enlarge: bool) -> Canvas:
    """As many tiles as there may be, in the picture's own shape (InternLM-XComposer2-4KHD section 3.2, and 2.5).

    The long side gets s tiles, the largest s with s * ceil(s / ratio) <= most, and the picture is made as long; what
    the short side lacks to whole tiles is filled.

    Args:
      size: of the picture.
      tile: side of a tile.
      most: tiles that there may be.
      centred: the fill is on both sides (4KHD), or behind the picture (2.5).
      enlarge: make small pictures larger (4KHD), or only as long as fills their last tile (2.5).
    """
    width, height = size
    if width < height:
        turned = canvas((height, width), tile, most, centred=centred, enlarge=enlarge)
        left, top, right, bottom = turned.box
        return Canvas(turned.size[::-1], (top, left, bottom, right), turned.grid[::-1])
    ratio, count = width / height, 1
    while count * math.ceil(count / ratio) <= most:
        count += 1
    count -= 1
    if not enlarge:
        count = min(count, math.ceil(width / tile))
    long = count * tile
    short = int(long / ratio)
    rows = math.ceil(short / tile)
    top = (rows * tile - short) // 2 if centred else 0
    return Canvas((long, rows * tile), (0, top, long, top + short), (count, rows))


@dataclass(frozen=True)
class Slices:
    """A view of the whole picture, and slices of a larger one.

    Attributes:
      overview: size of the view.
      grid: (columns, rows) of slices; None for the view alone.
      refined: size of the picture that is cut into them.
    """

    overview: Size
    grid: Size | None = None
    refined: Size | None = None


def slices(size: Size, side: int, patch: int, most: int) -> Slices:
    """Slices of about side x side pixels each, in the grid whose shape is nearest to the picture's (MiniCPM-V 2.6;
    Yao et al. 2024, section 3.2).

    Args:
      size: of the picture.
      patch: sides are multiples of it.
      most: slices that there may be.
    """
    width, height = size
    count = min(math.ceil(width * height / side**2), most)
    if count <= 1:
        return Slices(_fit(width, height, side, patch, enlarge=True))
    grids = [
        (columns, total // columns)
        for total in (count - 1, count, count + 1)
        if 1 < total <= most
        for columns in range(1, total + 1)
        if total % columns == 0
    ]
    ratio = math.log(width / height)
    columns, rows = min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))
    whole = max(round(width / columns) * columns, columns), max(round(height / rows) * rows, rows)
    cell = _fit(whole[0] / columns, whole[1] / rows, side, patch, enlarge=True)
    overview = _fit(width, height, side, patch, enlarge=False)
    return Slices(overview, (columns, rows), (cell[0] * columns, cell[1] * rows))


def _fit(width: float, height: float, side: int, patch: int, *, enlarge: bool) -> Size:
    """The size of about side x side pixels in this shape, in whole patches; a smaller picture keeps its own."""
    if enlarge or width * height > side * side:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return max(round(width / patch) * patch, patch), max(round(height / patch) * patch, patch)


def tiles(size: Size, side: int, least: int, most: int) -> Size:
    """(columns, rows) of square tiles whose shape is nearest to the picture's (InternVL 1.5, section 3.3).

    Of grids equally near, a larger one is taken if the picture has more than half of its pixels.

    Args:
      size: of the picture.
      side: of a tile.
      least, most: tiles that there may be.
    """
    width, height = size
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= columns * rows <= most
    ]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, nearest = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        larger = distance == nearest and width * height > 0.5 * side * side * columns * rows
        if distance < nearest or larger:
            best, nearest = (columns, rows), distance
    return best
