"""Handwritten digits: scikit-learn's 1797 scans of 8x8 pixels, single and composed into numbers.

The scans are partitioned once (1257 train, 180 validation, 360 test), so that no digit of the test split is
ever seen in training, in whatever config it appears.
"""

import functools
import random

import numpy as np
from PIL import Image

from mm_jax.data.quickstart.paint import pen_and_paper
from mm_jax.data.quickstart.sample import Mark, Picture, Sample, Turn, pick

DIGIT = (
    "which digit is this?",
    "what digit do you see?",
    "read the digit.",
    "which digit is in the picture?",
)
NUMBER = ("what number is this?", "read the number.", "which number is written here?", "what is the number?")
FIRST = ("what is the first digit?", "which digit comes first?")
LAST = ("what is the last digit?", "which digit comes last?")
LENGTH = ("how many digits are there?", "how many digits does the number have?")


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [1797, 8, 8] in 0..255, int [1797] digits)."""
    from sklearn.datasets import load_digits  # half a second that other kinds do not pay

    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target


@functools.cache
def partition() -> dict[str, tuple[tuple[int, ...], ...]]:
    """split -> for each digit 0..9 the indices of its scans; the splits share none."""
    order = np.random.default_rng(1797).permutation(1797)
    parts = {"test": order[:360], "validation": order[360:540], "train": order[540:]}
    targets = scans()[1]
    return {
        split: tuple(tuple(int(i) for i in part if targets[i] == digit) for digit in range(10))
        for split, part in parts.items()
    }


def scan_mask(rng: random.Random, index: int, size: int, distort: bool) -> Image.Image:
    """The scan as an "L" ink mask of `size` pixels; distorted (turned, sheared, stretched) for training."""
    # The ink touches the border of the scan: an empty pixel around it leaves room to turn it.
    mask = Image.fromarray(np.pad(scans()[0][index], 1)).resize((size, size), Image.Resampling.BICUBIC)
    if not distort:
        return mask
    angle, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    grow_x, grow_y = rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.12)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1 / grow_x, shear], [0, 1 / grow_y]])
    centre = np.array([size / 2, size / 2])
    shift = centre - matrix @ centre
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    return mask.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def paste(image: Image.Image, mask: Image.Image, x: int, y: int, ink: tuple, digit: int) -> Mark:
    """Paints the digit and returns its region: the box of what is visibly inked."""
    image.paste(ink, (x, y), mask)
    left, top, right, bottom = mask.point(lambda value: 255 * (value > 64)).getbbox()
    return Mark(f"digit_{digit}", (x + left, y + top, x + right, y + bottom))


def digit_picture(rng: random.Random, split: str, digit: int) -> Picture:
    """One scan of the digit at a random place and scale, in a square picture of 24..64 pixels."""
    side = rng.randint(24, 64)
    size = round(side * rng.uniform(0.7, 1.0))
    ink, paper = pen_and_paper(rng)
    image = Image.new("RGB", (side, side), paper)
    mask = scan_mask(rng, rng.choice(partition()[split][digit]), size, split == "train")
    mark = paste(image, mask, rng.randint(0, side - size), rng.randint(0, side - size), ink, digit)
    return Picture(image, (mark,))


def digits(rng: random.Random, split: str, index: int) -> Sample:
    digit = index % 10  # every digit equally often
    return Sample((Turn("digit", pick(rng, DIGIT), str(digit)),), (digit_picture(rng, split, digit),))


def number_picture(rng: random.Random, split: str, values: list[int]) -> Picture:
    size = rng.randint(28, 38)
    gap = rng.randint(-size // 4, 0)  # the ink fills about half of the width
    margin_x, margin_y = rng.randint(1, 10), rng.randint(4, 14)
    width = len(values) * size + (len(values) - 1) * gap + 2 * margin_x
    ink, paper = pen_and_paper(rng)
    image = Image.new("RGB", (max(48, width), size + 2 * margin_y), paper)
    x = (image.width - width) // 2 + margin_x
    marks = []
    for value in values:
        mask = scan_mask(rng, rng.choice(partition()[split][value]), size, split == "train")
        y = margin_y + rng.randint(-margin_y // 2, margin_y // 2)
        mark = paste(image, mask, x, y, ink, value)
        marks.append(Mark(f"{mark.label} _place_{len(marks)}", mark.box))
        x += size + gap
    return Picture(image, tuple(marks))


def numbers(rng: random.Random, split: str, index: int) -> Sample:
    length = 2 + index % 3
    values = [rng.randint(1, 9)] + [rng.randint(0, 9) for _ in range(length - 1)]
    read = Turn("number", pick(rng, NUMBER), "".join(map(str, values)))
    if rng.random() < 0.5:
        single = Turn("number_digit", pick(rng, FIRST), str(values[0]))
    else:
        single = Turn("number_digit", pick(rng, LAST), str(values[-1]))
    if split == "train":
        turns = [read, single, Turn("number_length", pick(rng, LENGTH), str(length))]
        rng.shuffle(turns)
    else:
        turns = [single if index % 4 == 3 else read]
    return Sample(tuple(turns), (number_picture(rng, split, values),))
