"""A scene and a spoken colour: questions that need both the picture and the sound."""

import random

from mm_jax.data.quickstart.paint import COLOURS
from mm_jax.data.quickstart.sample import Sample, Turn, pick
from mm_jax.data.quickstart.shapes import draw_scene, paint
from mm_jax.data.quickstart.speech import choose_voice, say_words

EXISTS = (
    "is the spoken colour in the picture?",
    "does the picture show the colour you hear?",
    "is anything in the picture of the spoken colour?",
)
COUNT = ("how many shapes of the spoken colour are there?", "how many shapes have the colour you hear?")
SHAPE = ("what shape has the spoken colour?", "which shape has the colour you hear?")
TASKS = ("sound_exists", "sound_count", "sound_shape")


def sound_scenes(rng: random.Random, split: str, index: int) -> Sample:
    """The colour is in the picture in half of the records, whatever the picture."""
    task = TASKS[index % 3] if split != "train" else None
    number = index // 3 if task else index
    present = task == "sound_shape" or number % 2 == 0
    while True:
        scene = draw_scene(rng, rng.randint(1, 4))
        inside = sorted({thing.colour for thing in scene.things})
        outside = [colour for colour in COLOURS if colour not in inside]
        if not outside:
            continue
        colour = rng.choice(inside if present else outside)
        turns = {
            "sound_exists": Turn("sound_exists", pick(rng, EXISTS), "yes" if present else "no"),
            "sound_count": Turn("sound_count", pick(rng, COUNT), str(scene.count(colour=colour))),
        }
        if scene.count(colour=colour) == 1:
            shape = next(thing.shape for thing in scene.things if thing.colour == colour)
            turns["sound_shape"] = Turn("sound_shape", pick(rng, SHAPE), shape)
        if task is None or task in turns:
            break
    asked = list(turns.values()) if task is None else [turns[task]]
    rng.shuffle(asked)
    voice = choose_voice(rng, split)
    clip = say_words(rng, [colour], voice)
    return Sample(tuple(asked), (paint(rng, scene),), (clip,), note=voice.name)
