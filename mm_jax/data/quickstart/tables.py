"""Small tables as pictures: a header row, a header column, and look-ups of one cell."""

import random

from PIL import Image, ImageDraw

from mm_jax.data.quickstart.glyphs import centred, fit, random_font
from mm_jax.data.quickstart.paint import luminance, shade
from mm_jax.data.quickstart.sample import Mark, Picture, Sample, Turn, pick, split_of

ROWS, COLUMNS = "abcdef", "uvwxyz"  # two alphabets, so that a name says whether it is a row or a column
CELL = (
    "what is in row {row}, column {column}?",
    "what is the value of column {column} in row {row}?",
    "look up row {row}, column {column}.",
    "which number is in column {column} of row {row}?",
)
PAPERS = ((255, 255, 255), (250, 248, 238), (236, 242, 250), (30, 32, 38))


def content(rng: random.Random, split: str) -> tuple[list[str], list[str], list[list[str]]]:
    """(row names, column names, cells) of a table that belongs to the split."""
    while True:
        rows = sorted(rng.sample(ROWS, rng.choice((1, 2, 2, 3))))
        columns = sorted(rng.sample(COLUMNS, rng.choice((2, 2, 3))))
        top = 99 if rng.random() < 0.25 else 9
        cells = [[str(rng.randint(0, top)) for _ in columns] for _ in rows]
        if split_of(f"table {rows} {columns} {cells}") == split:
            return rows, columns, cells


def table_picture(rng: random.Random, rows: list[str], columns: list[str], cells: list[list[str]]) -> Picture:
    across, down = len(columns) + 1, len(rows) + 1
    cell_width, cell_height = rng.randint(20, 128 // across), rng.randint(18, min(34, 128 // down))
    width, height = max(48, across * cell_width), max(48, down * cell_height)
    paper = shade(rng, rng.choice(PAPERS), 5)
    dark = luminance(paper) < 128
    ink = shade(rng, (235, 235, 235) if dark else (20, 20, 24), 16)
    line = (120, 124, 130) if dark else (150, 154, 160)
    header = (66, 72, 92) if dark else shade(rng, (206, 214, 232), 10)
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    x0, y0 = (width - across * cell_width) // 2, (height - down * cell_height) // 2
    x1, y1 = x0 + across * cell_width - 1, y0 + down * cell_height - 1
    draw.rectangle((x0, y0, x1, y0 + cell_height), fill=header)
    draw.rectangle((x0, y0, x0 + cell_width, y1), fill=header)
    if rng.random() < 0.8:
        for k in range(across + 1):
            draw.line((min(x0 + k * cell_width, x1), y0, min(x0 + k * cell_width, x1), y1), fill=line)
        for k in range(down + 1):
            draw.line((x0, min(y0 + k * cell_height, y1), x1, min(y0 + k * cell_height, y1)), fill=line)
    name = random_font(rng)
    size = min(fit(name, "88", cell_width * 0.72, cell_height * 0.66), rng.randint(14, 22))
    marks = []
    for i, line_of_text in enumerate([["", *columns]] + [[r, *c] for r, c in zip(rows, cells, strict=True)]):
        for j, text in enumerate(line_of_text):
            if text:
                x, y = x0 + (j + 0.5) * cell_width, y0 + (i + 0.5) * cell_height
                where = f"row_{rows[i - 1]} column_{columns[j - 1]}" if i and j else "_header"
                marks += [
                    Mark(f"{mark.label} {where} _place_{k}", mark.box)
                    for k, mark in enumerate(centred(image, text, x, y, name, size, ink))
                ]
    return Picture(image, tuple(marks))


def tables(rng: random.Random, split: str, index: int) -> Sample:
    rows, columns, cells = content(rng, split)
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    rng.shuffle(places)
    turns = tuple(
        Turn("table", pick(rng, CELL, row=rows[i], column=columns[j]), cells[i][j])
        for i, j in places[: 3 if split == "train" else 1]
    )
    return Sample(turns, (table_picture(rng, rows, columns, cells),))
