"""Bar charts by matplotlib: which bar is highest or lowest, and how much one of them is."""

import functools
import random

import numpy as np
from PIL import Image

from mm_jax.data.quickstart.paint import COLOURS, shade
from mm_jax.data.quickstart.sample import Mark, Picture, Sample, Turn, pick, split_of

LETTERS = "abcdefgh"
HIGHEST = ("which bar is highest?", "which bar is the tallest?", "which letter has the highest bar?")
LOWEST = ("which bar is lowest?", "which bar is the shortest?", "which letter has the lowest bar?")
VALUE = (
    "how much is {bar}?",
    "what is the value of bar {bar}?",
    "how high is bar {bar}?",
    "read the value of {bar}.",
)
TOP = 10
DPI = 100


@functools.cache
def _figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def content(rng: random.Random, split: str) -> dict[str, int]:
    """letter -> value 1..9 of a chart that belongs to the split; the highest and the lowest occur once."""
    while True:
        letters = sorted(rng.sample(LETTERS, rng.choice((2, 3, 3, 4, 4, 5))))
        values = [rng.randint(1, 9) for _ in letters]
        alone = values.count(max(values)) == values.count(min(values)) == 1
        if alone and split_of(f"chart {letters} {values}") == split:
            return dict(zip(letters, values, strict=True))


def chart_picture(rng: random.Random, values: dict[str, int]) -> Picture:
    width, height = rng.choice(((128, 128), (112, 112), (96, 96), (128, 112), (128, 96), (112, 128)))
    figure = _figure()
    figure.clear()
    figure.set_size_inches(width / DPI, height / DPI)
    dark = rng.random() < 0.15
    paper, ink = ("#202226", "#eeeeee") if dark else (rng.choice(("white", "#f6f4ee", "#eef2f8")), "#101010")
    figure.set_facecolor(paper)
    left, bottom = 15 / width, 14 / height
    axes = figure.add_axes((left, bottom, 1 - left - 3 / width, 1 - bottom - 4 / height), frameon=False)
    fills = list(COLOURS.values())
    rng.shuffle(fills)
    if rng.random() < 0.5:
        fills = fills[:1] * len(values)
    fills = [tuple(channel / 255 for channel in shade(rng, fill)) for fill in fills]
    places = range(len(values))
    bars = axes.bar(places, list(values.values()), rng.uniform(0.5, 0.85), color=fills, zorder=2)
    axes.set(xlim=(-0.6, len(values) - 0.4), ylim=(0, TOP))
    size = rng.uniform(6.0, 7.5)
    axes.set_xticks(places, list(values), fontsize=size + 1)
    axes.set_yticks(range(0, TOP + 1, 2), map(str, range(0, TOP + 1, 2)), fontsize=size - 0.5)
    axes.tick_params(length=0, pad=1.5, colors=ink)
    # One collection of lines: a grid needs tick objects, which cost more than all the rest.
    axes.hlines(
        range(TOP + 1), *axes.get_xlim(), color="#666a70" if dark else "#b8bcc2", linewidth=0.5, zorder=0
    )
    written = []
    if rng.random() < 0.35:  # the values are written on the bars
        for x, value in zip(places, values.values(), strict=True):
            at = {"ha": "center", "va": "bottom", "fontsize": size, "color": ink, "zorder": 3}
            written.append(axes.text(x, value + 0.15, str(value), **at))
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    marks = [
        Mark(f"bar_{letter} value_{value}", _box(bar.get_window_extent(), image))
        for (letter, value), bar in zip(values.items(), bars, strict=True)
    ]
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels(), *written):
        text = label.get_text()
        x0, y0, x1, y1 = _box(label.get_window_extent(), image)
        step = (x1 - x0) / max(1, len(text))  # "10": two digits of equal width
        for k, letter in enumerate(text):
            marks.append(Mark(f"glyph_{letter}", (x0 + k * step, y0, x0 + (k + 1) * step, y1)))
    return Picture(image, tuple(marks))


def _box(extent, image: Image.Image) -> tuple[float, float, float, float]:
    """Matplotlib counts y from the bottom."""
    return (
        max(0.0, extent.x0),
        max(0.0, image.height - extent.y1),
        min(float(image.width), extent.x1),
        min(float(image.height), image.height - extent.y0),
    )


def charts(rng: random.Random, split: str, index: int) -> Sample:
    values = content(rng, split)
    bars = list(values)
    rng.shuffle(bars)
    amounts = [Turn("chart_value", pick(rng, VALUE, bar=bar), str(values[bar])) for bar in bars[:2]]
    highest = Turn("chart_highest", pick(rng, HIGHEST), max(values, key=values.get))
    if split == "train":
        lowest = Turn("chart_lowest", pick(rng, LOWEST), min(values, key=values.get))
        turns = [*amounts, rng.choice((highest, highest, lowest))]
        rng.shuffle(turns)
    else:
        turns = [highest if index % 2 else amounts[0]]
    return Sample(tuple(turns), (chart_picture(rng, values),))
