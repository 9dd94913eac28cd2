"""Turns without media: sums, order, opposites, colours of things, letters of words."""

import random

from mm_jax.data.quickstart.sample import Sample, Turn, pick, split_of
from mm_jax.data.quickstart.speech import NUMBERS
from mm_jax.data.quickstart.words import WORDS

# Learnt by heart, so nothing of it can be held out: training only.
OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("up", "down"), ("left", "right"), ("yes", "no"), ("full", "empty"),
    ("old", "new"), ("wet", "dry"), ("fast", "slow"), ("high", "low"), ("top", "bottom"), ("first", "last"),
    ("more", "less"), ("dark", "light"), ("long", "short"), ("loud", "quiet"), ("above", "below"),
)  # fmt: skip
THINGS = (
    ("grass", "green"), ("blood", "red"), ("the sky", "blue"), ("the sun", "yellow"), ("a carrot", "orange"),
    ("a lemon", "yellow"), ("a leaf", "green"), ("a tomato", "red"), ("a plum", "purple"),
)  # fmt: skip
KINDS = ("sum", "difference", "larger", "next", "first", "letters", "last", "spell")
KNOWN = ("opposite", "thing", "digit", "word")


def fact(rng: random.Random, kind: str) -> tuple[str, str]:
    """(question, answer) of a kind."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    word = rng.choice(WORDS)
    match kind:
        case "sum":
            return f"what is {a} plus {b}?", str(a + b)
        case "difference":
            return f"what is {max(a, b)} minus {min(a, b)}?", str(abs(a - b))
        case "larger":
            a, b = rng.sample(range(100), 2)
            side = rng.choice(("larger", "smaller"))
            return f"which is {side}, {a} or {b}?", str(max(a, b) if side == "larger" else min(a, b))
        case "next":
            a = rng.randint(1, 98)
            return rng.choice(
                ((f"what comes after {a}?", str(a + 1)), (f"what comes before {a}?", str(a - 1)))
            )
        case "first":
            return f"what is the first letter of {word}?", word[0]
        case "last":
            return f"what is the last letter of {word}?", word[-1]
        case "letters":
            return f"how many letters does {word} have?", str(len(word))
        case "spell":
            return f"spell {word}.", " ".join(word)
        case "opposite":
            pair = rng.sample(rng.choice(OPPOSITES), 2)
            return f"what is the opposite of {pair[0]}?", pair[1]
        case "thing":
            thing, colour = rng.choice(THINGS)
            return pick(rng, ("what colour is {x}?", "which colour does {x} have?"), x=thing), colour
        case "digit":
            return f"write {NUMBERS[a]} as a digit.", str(a)
        case _:
            return f"write {a} as a word.", NUMBERS[a]


def question(rng: random.Random, split: str, kind: str) -> Turn:
    """A fact that only this split asks for, as far as the kind can be held out."""
    while True:
        text, answer = fact(rng, kind)
        if kind in KNOWN or split_of(f"text {text}") == split:
            return Turn("text", text, answer)


def text(rng: random.Random, split: str, index: int) -> Sample:
    if split != "train":
        return Sample((question(rng, split, KINDS[index % len(KINDS)]),))
    kinds = rng.sample(KINDS + KNOWN, 5)
    return Sample(tuple(question(rng, split, kind) for kind in kinds))
