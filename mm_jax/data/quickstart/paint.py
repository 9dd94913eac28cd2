"""Colours: the named ones that questions ask about, backgrounds, and readable ink."""

import random

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (222, 36, 36),
    "green": (38, 160, 58),
    "blue": (36, 78, 222),
    "yellow": (240, 216, 36),
    "purple": (148, 48, 178),
    "orange": (246, 136, 26),
}
NEUTRAL: tuple[Colour, ...] = (
    (255, 255, 255),
    (246, 242, 232),
    (214, 216, 220),
    (120, 122, 126),
    (58, 60, 66),
    (12, 12, 14),
)


def shade(rng: random.Random, colour: Colour, amount: int = 12) -> Colour:
    """The colour with each channel moved by at most `amount`."""
    return tuple(min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)


def background(rng: random.Random) -> Colour:
    return shade(rng, rng.choice(NEUTRAL), 6)


def luminance(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def ink_and_paper(rng: random.Random) -> tuple[Colour, Colour]:
    """Dark ink on light paper, both of any hue: luminance 0..90 on 165..255."""
    return _colour(rng, 0, 90), _colour(rng, 165, 255)


def _colour(rng: random.Random, low: float, high: float) -> Colour:
    """A random colour whose luminance lies between `low` and `high`."""
    while True:
        colour = tuple(rng.randint(0, 255) for _ in range(3))
        if low <= luminance(colour) <= high:
            return colour


def pen_and_paper(rng: random.Random) -> tuple[Colour, Colour]:
    """Dark ink on light paper, as people write: black, grey or blue-black on white to cream."""
    grey = rng.randint(0, 70)
    ink = (grey, grey, grey + rng.randint(0, 60))
    white = rng.randint(215, 255)
    return ink, (white, white, white - rng.randint(0, 25))
