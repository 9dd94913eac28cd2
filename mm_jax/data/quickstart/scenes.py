"""Questions about scenes: caption, count, colour, shape, position, relation, exists, grounding."""

import random
from collections.abc import Callable

from mm_jax.data.quickstart.paint import COLOURS
from mm_jax.data.quickstart.sample import Sample, Turn, pick
from mm_jax.data.quickstart.shapes import SHAPES, Scene, absent, draw_scene, paint, place
from mm_jax.data.quickstart.surveys import SURVEYS

CAPTION = ("describe the picture.", "what is in the picture?", "write a caption.", "what do you see?")
COUNT_ALL = ("how many shapes are there?", "how many objects do you see?", "count the shapes.")
COUNT_SHAPE = ("how many {shape}s are there?", "count the {shape}s.", "how many {shape}s do you see?")
COUNT_COLOUR = ("how many {colour} shapes are there?", "count the {colour} objects.")
COLOUR = (
    "what colour is the {shape}?",
    "which colour does the {shape} have?",
    "name the colour of the {shape}.",
)
SHAPE = ("what shape is the {colour} object?", "which shape is {colour}?", "what is the {colour} thing?")
POSITION = (
    "where is the {name}?",
    "in which corner is the {name}?",
    "which part of the picture holds the {name}?",
)
EXISTS = (
    "is there a {name}?",
    "do you see a {name}?",
    "does the picture show a {name}?",
    "is a {name} here?",
)
GROUNDING = (
    "where is the {name}? give its box.",
    "give the box of the {name}.",
    "locate the {name}.",
    "draw a box around the {name}.",
)
SIDES = {
    "left": ("what is left of the {name}?", "which shape is to the left of the {name}?"),
    "right": ("what is right of the {name}?", "which shape is to the right of the {name}?"),
    "above": ("what is above the {name}?", "which shape is above the {name}?"),
    "below": ("what is below the {name}?", "which shape is below the {name}?"),
}


def article(name: str) -> str:
    return f"an {name}" if name[0] == "o" else f"a {name}"


def caption(scene: Scene, rng: random.Random, yes: bool) -> Turn | None:
    """Names the things from left to right, at most three so that the sentence stays short."""
    if len(scene.things) > 3:
        return None
    names = [article(thing.name) for thing in scene.ordered()]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return Turn("caption", pick(rng, CAPTION), text)


def count(scene: Scene, rng: random.Random, yes: bool) -> Turn:
    kind = rng.random()
    if kind < 0.35:
        return Turn("count", pick(rng, COUNT_ALL), str(len(scene.things)))
    if kind < 0.75:
        counts = {shape: scene.count(shape=shape) for shape in SHAPES}
        shape = _spread(rng, counts)
        return Turn(
            "count", pick(rng, COUNT_SHAPE, shape=shape).replace("crosss", "crosses"), str(counts[shape])
        )
    counts = {colour: scene.count(colour=colour) for colour in COLOURS}
    colour = _spread(rng, counts)
    return Turn("count", pick(rng, COUNT_COLOUR, colour=colour), str(counts[colour]))


def _spread(rng: random.Random, counts: dict[str, int]) -> str:
    """A name whose count is drawn evenly from the counts that occur, so that 0 and 1 do not swamp them."""
    value = rng.choice(sorted(set(counts.values())))
    return rng.choice([name for name, number in counts.items() if number == value])


def colour(scene: Scene, rng: random.Random, yes: bool) -> Turn | None:
    options = [thing for thing in scene.things if scene.count(shape=thing.shape) == 1]
    if not options:
        return None
    thing = rng.choice(options)
    return Turn("colour", pick(rng, COLOUR, shape=thing.shape), thing.colour)


def shape(scene: Scene, rng: random.Random, yes: bool) -> Turn | None:
    options = [thing for thing in scene.things if scene.count(colour=thing.colour) == 1]
    if not options:
        return None
    thing = rng.choice(options)
    return Turn("shape", pick(rng, SHAPE, colour=thing.colour), thing.shape)


def position(scene: Scene, rng: random.Random, yes: bool) -> Turn | None:
    options = [thing for thing in scene.unique() if place(scene, thing)]
    if not options:
        return None
    thing = rng.choice(options)
    return Turn("position", pick(rng, POSITION, name=thing.name), place(scene, thing))


def relation(scene: Scene, rng: random.Random, yes: bool) -> Turn | None:
    """Asks only where exactly one thing lies on that side, and every other one clearly does not."""
    options = []
    gap = 0.06 * max(scene.width, scene.height)
    for anchor in scene.unique():
        others = [thing for thing in scene.things if thing is not anchor]
        for side in SIDES:
            sign = -1 if side in ("left", "above") else 1
            axis = "x" if side in ("left", "right") else "y"
            offsets = [sign * (getattr(thing, axis) - getattr(anchor, axis)) for thing in others]
            if sum(d > 0 for d in offsets) == 1 and all(abs(d) > gap for d in offsets):
                options.append((anchor, side, others[[d > 0 for d in offsets].index(True)]))
    if not options:
        return None
    anchor, side, answer = rng.choice(options)
    return Turn("relation", pick(rng, SIDES[side], name=anchor.name), answer.name)


def exists(scene: Scene, rng: random.Random, yes: bool) -> Turn:
    name = rng.choice(scene.things).name if yes else absent(scene, rng)
    question = pick(rng, EXISTS, name=name).replace("a orange", "an orange")
    return Turn("exists", question, "yes" if yes else "no")


def grounding(scene: Scene, rng: random.Random, yes: bool) -> Turn | None:
    options = scene.unique()
    if not options:
        return None
    thing = rng.choice(options)
    return Turn("grounding", pick(rng, GROUNDING, name=thing.name), thing.box)


TASKS: dict[str, Callable[[Scene, random.Random, bool], Turn | None]] = {
    "caption": caption,
    "count": count,
    "colour": colour,
    "shape": shape,
    "position": position,
    "relation": relation,
    "exists": exists,
    "grounding": grounding,
}


LONG = ("caption", "relation")
# Of two things one is right by looking anywhere half the time; with five, what a look at the right one is worth drowns
# in the rest. From mostly small scenes the model learns to look sooner, and it answers for large ones just as well.
FEW = (1, 2, 2, 2, 2, 3, 3, 4, 5)


def scenes(rng: random.Random, split: str, index: int) -> Sample:
    """Training: eight questions a picture and a survey. Held out: one question, the tasks in turn, yes and no equally
    often."""
    while True:
        scene = draw_scene(rng, rng.choice(FEW) if split == "train" else None)
        if split == "train":
            # The coins are independent: two yes/no questions tell nothing about each other's answer.
            order = [*TASKS, "colour", "exists", "count", "count"]
            rng.shuffle(order)
            turns = [TASKS[task](scene, rng, rng.random() < 0.5) for task in order]
            turns = [turn for turn in turns if turn is not None]
            # Not twice the same question, nor the same box.
            kept = {turn.question if isinstance(turn.answer, str) else turn.answer: turn for turn in turns}
            # What tells much comes last, or the answers to come could be read there instead of in the picture.
            asked = sorted(list(kept.values())[:8], key=lambda turn: turn.task in LONG)
            survey = rng.choice(SURVEYS)(scene, rng)
            return Sample((*asked, *([survey] if survey else [])), (paint(rng, scene),))
        task = list(TASKS)[index % len(TASKS)]
        turn = TASKS[task](scene, rng, (index // len(TASKS)) % 2 == 0)
        if turn is not None:
            return Sample((turn,), (paint(rng, scene),))
