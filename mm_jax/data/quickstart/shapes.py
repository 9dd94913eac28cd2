"""Scenes: one to five coloured shapes that do not overlap, on a plain background."""

import functools
import math
import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mm_jax.data.quickstart.paint import COLOURS, Colour, background, shade
from mm_jax.data.quickstart.sample import Mark, Picture, sides

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
OVERSAMPLE = 3  # drawn three times as large and averaged: smooth edges


@functools.cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape inside the circle of radius 1 around the origin, y down; a circle has none."""
    if shape == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if shape == "triangle":
        return ((0, -0.9), (0.95, 0.75), (-0.95, 0.75))
    if shape == "diamond":
        return ((0, -1), (0.8, 0), (0, 1), (-0.8, 0))
    if shape == "cross":
        a, b = 0.32, 0.95
        return (
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        )
    if shape == "star":
        turns = [(k * math.pi / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return tuple((r * math.sin(t), -r * math.cos(t)) for t, r in turns)
    return ()


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        points = outline(self.shape) or ((-0.9, -0.9), (0.9, 0.9))
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        x, y, r = self.x, self.y, self.radius
        return (x + r * min(xs), y + r * min(ys), x + r * max(xs), y + r * max(ys))


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    paper: Colour
    things: tuple[Thing, ...]

    def count(self, *, colour: str | None = None, shape: str | None = None) -> int:
        return sum(colour in (None, t.colour) and shape in (None, t.shape) for t in self.things)

    def ordered(self) -> list[Thing]:
        """The things from left to right."""
        return sorted(self.things, key=lambda thing: thing.x)

    def unique(self) -> list[Thing]:
        """The things whose colour and shape together name only them."""
        names = Counter(thing.name for thing in self.things)
        return [thing for thing in self.things if names[thing.name] == 1]


def draw_scene(rng: random.Random, number: int | None = None, colours: tuple[str, ...] = ()) -> Scene:
    """A random scene of `number` (else 1..5) things; `colours` restricts the colours."""
    while True:
        wanted = number or rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5))
        # Half of the scenes use few kinds, so that counts above one are as common as counts of one.
        shapes = rng.sample(SHAPES, 2) if rng.random() < 0.5 else SHAPES
        hues = colours or tuple(rng.sample(tuple(COLOURS), rng.choice((2, 3, 6, 6))))
        width, height = sides(rng, 64, 128)
        things: list[Thing] = []
        for _ in range(40):
            radius = max(width, height) * rng.uniform(0.12, 0.21 if wanted < 4 else 0.16)
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 1 for t in things):
                things.append(Thing(rng.choice(hues), rng.choice(shapes), x, y, radius))
                if len(things) == wanted:
                    return Scene(width, height, background(rng), tuple(things))


def place(scene: Scene, thing: Thing) -> str | None:
    """ "top left" and so on, or None where the thing is too near a middle line to tell."""
    x, y = thing.x / scene.width - 0.5, thing.y / scene.height - 0.5
    if min(abs(x), abs(y)) < 0.08:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def absent(scene: Scene, rng: random.Random) -> str:
    """A name that is not in the scene, mostly a near miss.

    Half: a colour and a shape that are both there, on different things. Else the right colour with another
    shape, the right shape with another colour, and rarely a thing of which nothing is there.
    """
    present = {thing.name for thing in scene.things}
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    every = [(c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
    both = [f"{c} {s}" for c, s in every if c in colours and s in shapes]
    one = [f"{c} {s}" for c, s in every if (c in colours) != (s in shapes)]
    none = [f"{c} {s}" for c, s in every if c not in colours and s not in shapes]
    kind = rng.random()
    if both and kind < 0.5:
        return rng.choice(both)
    return rng.choice(none) if none and kind > 0.9 else rng.choice(one)


def paint(rng: random.Random, scene: Scene) -> Picture:
    k = OVERSAMPLE
    image = Image.new("RGB", (scene.width * k, scene.height * k), scene.paper)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        fill = shade(rng, COLOURS[thing.colour])
        if thing.shape == "circle":
            draw.ellipse([value * k for value in thing.box], fill=fill)
        else:
            corners = [
                ((thing.x + thing.radius * x) * k, (thing.y + thing.radius * y) * k)
                for x, y in outline(thing.shape)
            ]
            draw.polygon(corners, fill=fill)
    return Picture(image.reduce(k), tuple(Mark(thing.name, thing.box) for thing in scene.things))
