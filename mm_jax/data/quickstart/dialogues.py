"""Several turns that lean on each other, and questions about two pictures."""

import random
from collections.abc import Callable

from mm_jax.data.quickstart.digits import digit_picture
from mm_jax.data.quickstart.sample import Sample, Turn, pick
from mm_jax.data.quickstart.scenes import article
from mm_jax.data.quickstart.shapes import SHAPES, Scene, absent, draw_scene, paint, place

MORE = (
    "which picture has more {things}, first or second?",
    "where are more {things}, first or second picture?",
)
WHICH = ("which picture shows {name}, first or second?", "in which picture is {name}, first or second?")
HOW_MANY = ("how many shapes are in the {order} picture?", "count the shapes of the {order} picture.")
EQUAL = ("are the two digits equal?", "do both pictures show the same digit?")
LARGER = ("which digit is larger, first or second?", "which picture has the larger digit, first or second?")
READ = ("which digit is in the {order} picture?", "read the {order} digit.")
SUM = ("what is the sum of the two digits?", "add the two digits.")
ORDER = ("first", "second")


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def two_scenes(rng: random.Random, split: str) -> Sample:
    while True:
        pair = [draw_scene(rng), draw_scene(rng)]
        shape = rng.choice(SHAPES)
        name = rng.choice(rng.choice(pair).things).name
        shows = [any(thing.name == name for thing in scene.things) for scene in pair]
        by_shape = [scene.count(shape=shape) for scene in pair]
        if by_shape[0] != by_shape[1] and shows[0] != shows[1]:
            break
    totals = [len(scene.things) for scene in pair]
    turns = [
        Turn("compare_scenes", pick(rng, MORE, things=plural(shape)), ORDER[by_shape[1] > by_shape[0]]),
        Turn("compare_scenes", pick(rng, WHICH, name=article(name)), ORDER[shows[1]]),
    ]
    if totals[0] != totals[1]:
        turns.append(Turn("compare_scenes", pick(rng, MORE, things="shapes"), ORDER[totals[1] > totals[0]]))
    k = rng.randrange(2)
    turns.append(Turn("count_pair", pick(rng, HOW_MANY, order=ORDER[k]), str(totals[k])))
    rng.shuffle(turns)
    return Sample(tuple(turns), tuple(paint(rng, scene) for scene in pair))


def two_digits(rng: random.Random, split: str) -> Sample:
    equal = rng.random() < 0.5
    a = rng.randint(0, 9)
    b = a if equal else rng.choice([digit for digit in range(10) if digit != a])
    k = rng.randrange(2)
    turns = [
        Turn("compare_digits", pick(rng, EQUAL), "yes" if equal else "no"),
        Turn("digit", pick(rng, READ, order=ORDER[k]), str((a, b)[k])),
        Turn("compare_digits", pick(rng, SUM), str(a + b)),
    ]
    if not equal:
        turns.append(Turn("compare_digits", pick(rng, LARGER), ORDER[b > a]))
    rng.shuffle(turns)
    return Sample(tuple(turns[:3]), tuple(digit_picture(rng, split, digit) for digit in (a, b)))


def about_it(rng: random.Random, split: str) -> Sample:
    """ "it" in the later questions is the shape of the first one."""
    while True:
        scene = draw_scene(rng)
        options = [t for t in scene.things if scene.count(shape=t.shape) == 1 and place(scene, t)]
        if options:
            break
    thing = rng.choice(options)
    later = [
        Turn("dialogue", "what colour is it?", thing.colour),
        Turn("dialogue", "where is it?", place(scene, thing)),
        Turn("dialogue", "give its box.", thing.box),
    ]
    rng.shuffle(later)
    turns = [Turn("dialogue", f"is there {article(thing.shape)}?", "yes"), *later]
    missing = [shape for shape in SHAPES if not scene.count(shape=shape)]
    if missing and rng.random() < 0.5:  # else the first answer would always be yes
        turns.insert(0, Turn("dialogue", f"is there {article(rng.choice(missing))}?", "no"))
    return Sample(tuple(turns), (paint(rng, scene),))


def one_more(rng: random.Random, split: str) -> Sample:
    """Sums over what was counted, then something that is or is not there."""
    scene: Scene = draw_scene(rng)
    shape = rng.choice([thing.shape for thing in scene.things])
    number, total = scene.count(shape=shape), len(scene.things)
    more = rng.randint(1, 3)
    yes = rng.random() < 0.5
    name = rng.choice(scene.things).name if yes else absent(scene, rng)
    turns = (
        Turn("count", f"how many {plural(shape)} are there?", str(number)),
        Turn("dialogue", f"and if {more} more came?", str(number + more)),
        Turn("dialogue", f"how many shapes are no {shape}?", str(total - number)),
        Turn("exists", f"is there {article(name)}?", "yes" if yes else "no"),
    )
    return Sample(turns, (paint(rng, scene),))


KINDS: tuple[Callable[[random.Random, str], Sample], ...] = (two_scenes, two_digits, about_it, one_more)


def dialogues(rng: random.Random, split: str, index: int) -> Sample:
    return KINDS[index % len(KINDS)](rng, split)
