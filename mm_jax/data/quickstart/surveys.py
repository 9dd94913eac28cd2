"""Questions whose answer says something of every thing in a scene, in training only.

A question with a one-word answer asks for one look at the picture, and most of a conversation is then question. A
survey asks for one look a thing: from shape to colour, from a name to its box or place, for all counts, and for what is
there and what is not.
"""

import random
from collections.abc import Callable

from mm_jax.data.quickstart.paint import COLOURS
from mm_jax.data.quickstart.sample import Box, Turn, pick
from mm_jax.data.quickstart.shapes import SHAPES, Scene, absent, place

LIST_COLOURS = ("name the colour of every shape.", "which colour does each shape have?")
LIST_BOXES = ("give the box of every shape.", "locate all shapes.", "draw a box around every shape.")
LIST_PLACES = ("where is every shape?", "in which corner is each shape?")
COUNT_SHAPES = ("count every kind of shape.", "how many shapes of each kind are there?")
COUNT_COLOURS = ("count the shapes of every colour.", "how many shapes of each colour are there?")
CHECK = ("which of these are there: {names}?", "do you see these: {names}?")


def list_colours(scene: Scene, rng: random.Random) -> Turn:
    said = [f"{thing.shape} {thing.colour}" for thing in scene.ordered()]
    return Turn("list_colours", pick(rng, LIST_COLOURS), ", ".join(said))


def list_boxes(scene: Scene, rng: random.Random) -> Turn:
    said: list[str | Box] = []
    for thing in scene.ordered():
        said += [f", {thing.name}" if said else thing.name, thing.box]
    return Turn("list_boxes", pick(rng, LIST_BOXES), said)


def list_places(scene: Scene, rng: random.Random) -> Turn | None:
    said = [f"{thing.name} {place(scene, thing)}" for thing in scene.ordered() if place(scene, thing)]
    if len(said) < len(scene.things):
        return None
    return Turn("list_places", pick(rng, LIST_PLACES), ", ".join(said))


def count_shapes(scene: Scene, rng: random.Random) -> Turn:
    counts = {shape: scene.count(shape=shape) for shape in SHAPES}
    return Turn("count_shapes", pick(rng, COUNT_SHAPES), _counts(counts))


def count_colours(scene: Scene, rng: random.Random) -> Turn:
    counts = {colour: scene.count(colour=colour) for colour in COLOURS}
    return Turn("count_colours", pick(rng, COUNT_COLOURS), _counts(counts))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number)


def check(scene: Scene, rng: random.Random) -> Turn:
    """Three names, each there or not by its own coin."""
    names: dict[str, str] = {}
    while len(names) < 3:
        there = rng.random() < 0.5
        names[rng.choice(scene.things).name if there else absent(scene, rng)] = "yes" if there else "no"
    question = pick(rng, CHECK, names=", ".join(names))
    return Turn("check", question, ", ".join(f"{name} {answer}" for name, answer in names.items()))


SURVEYS: tuple[Callable[[Scene, random.Random], Turn | None], ...] = (
    list_colours,
    list_boxes,
    list_places,
    count_shapes,
    count_colours,
    check,
)
