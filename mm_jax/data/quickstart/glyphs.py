"""Text drawn letter by letter with Pillow, so that the box of every glyph is known."""

import functools
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mm_jax.data.quickstart.sample import Mark

# Matplotlib ships these; the other fonts in its folder hold mathematical symbols only.
FONT_FILES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10",
)  # fmt: skip
DEFAULT = "default"  # Pillow's own font


@functools.lru_cache(maxsize=1024)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == DEFAULT:
        return ImageFont.load_default(size)
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=65536)
def _measure(name: str, size: int, letter: str) -> tuple[float, tuple[int, int, int, int]]:
    """(advance, ink box around a pen at the left of the base line)."""
    face = font(name, size)
    return face.getlength(letter), face.getbbox(letter, anchor="ls")


def random_font(rng: random.Random) -> str:
    return rng.choice((*FONT_FILES, DEFAULT))


def extent(name: str, size: int, text: str) -> tuple[float, float, float, float]:
    """Ink box (x0, y0, x1, y1) of a text whose pen starts at (0, 0) on the base line."""
    x, boxes = 0.0, []
    for letter in text:
        advance, box = _measure(name, size, letter)
        boxes.append((x + box[0], box[1], x + box[2], box[3]))
        x += advance
    return (boxes[0][0], min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def fit(name: str, text: str, width: float, height: float) -> int:
    """The largest font size (6..64) at which the text is at most width x height pixels."""
    box = extent(name, 32, text)
    size = int(32 * min(width / (box[2] - box[0]), height / (box[3] - box[1])))
    while size > 6:
        box = extent(name, size, text)
        if box[2] - box[0] <= width and box[3] - box[1] <= height:
            break
        size -= 1
    return max(6, min(64, size))


def draw_text(image: Image.Image, text: str, x: float, y: float, name: str, size: int, ink) -> list[Mark]:
    """Draws text with its ink box's top left corner at (x, y); returns one `glyph_?` region a letter."""
    pen = ImageDraw.Draw(image)
    left, top, _, _ = extent(name, size, text)
    x, y, marks = x - left, y - top, []
    for letter in text:
        advance, box = _measure(name, size, letter)
        at = (round(x), round(y))
        pen.text(at, letter, font=font(name, size), fill=ink, anchor="ls")
        marks.append(
            Mark(f"glyph_{letter}", (at[0] + box[0], at[1] + box[1], at[0] + box[2], at[1] + box[3]))
        )
        x += advance
    return marks


def centred(image: Image.Image, text: str, x: float, y: float, name: str, size: int, ink) -> list[Mark]:
    """Draws text with the centre of its ink box at (x, y)."""
    left, top, right, bottom = extent(name, size, text)
    return draw_text(image, text, x - (right - left) / 2, y - (bottom - top) / 2, name, size, ink)
