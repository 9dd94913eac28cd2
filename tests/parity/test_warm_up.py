"""Servers of families whose pictures come in all sizes: nothing compiles after the warm-up."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.messages import Image, Message, Text, Video  # noqa: E402
from mm_jax.data.native_pixels import fitting_size, largest_area  # noqa: E402
from mm_jax.data.patches import PatchLayout  # noqa: E402
from mm_jax.inference.batch import span_bucket  # noqa: E402
from mm_jax.inference.prompt import _mixed  # noqa: E402
from mm_jax.inference.request import Request  # noqa: E402
from tests.parity import hosts, test_anyres, test_qwen_chat  # noqa: E402

SIZES = [
    (60, 31),
    (17, 90),
    (24, 24),
    (8, 8),
    (300, 9),
    (3, 200),
    (200, 200),
    (41, 39),
    (640, 480),
    (300, 199),
]
LONGEST = 128


def questions(video: bool) -> list[list]:
    """Pictures of all sizes alone, several at once, and videos."""
    pictures = [Image(hosts.picture(*size)) for size in SIZES]
    frames = [np.asarray(hosts.picture(36, 28, seed=k)) for k in range(7)]
    videos = [Video(frames, 4.0), Video(frames[:2], 4.0), Video([frame[:, :9] for frame in frames[:5]], 1.0)]
    return [
        [Text("no picture")],
        *([picture, Text("what is in it")] for picture in pictures),
        [pictures[0], Text("or"), pictures[1], pictures[0]],
        pictures[2:5],
        *([each] for each in videos * video),
        *([pictures[0], each, pictures[3]] for each in videos[1:2] * video),
    ]


def compilations() -> list[str]:
    """Grows with every program that the process compiles."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    return compiled


def check(lm, video: bool = True) -> set[tuple]:
    """The kinds of media that were asked about."""
    sizes = {"pieces": (1, 3), "lengths": (32, 64), "max_length": LONGEST, "cache_length": LONGEST}
    engine = lm.engine(3, steps=1, chunk=64, **sizes)
    engine.warm_up(lm.sample_media(LONGEST))
    prompts = [lm.read(lm.prompt([Message("user", tuple(parts))])) for parts in questions(video)]
    kinds = {medium.kind for prompt in prompts for medium in prompt.media}
    compiled, before = compilations(), dict(lm.programs.traces)
    for order in (1, -1):  # other neighbours, and other media that are known already
        answers = list(engine.run(Request(prompt, max_new_tokens=3) for prompt in prompts[::order]))
        answers += engine.run(Request(prompt, max_new_tokens=1, embed=True) for prompt in prompts[::order])
        assert len(answers) == 2 * len(prompts) and all(answer.finish for answer in answers)
        engine.pool.warm_up(())  # forgets them
    assert dict(lm.programs.traces) == before and compiled == []
    return kinds


def test_qwen2_vl(tmp_path):
    test_qwen_chat.build(tmp_path)
    lm = mm_jax.load(tmp_path)
    assert len(check(lm)) == 3
    prompt = lm.read(lm.prompt([Message("user", tuple(Image(hosts.picture(*size)) for size in SIZES[:3]))]))
    assert [len(m.arrays["patches"]) for m in prompt.media] == [
        span_bucket(int((m.arrays["patch_segment_ids"] > 0).sum()), lm.layout) for m in prompt.media
    ]


@pytest.mark.parametrize("window", [0, 4, 8])
def test_no_picture_is_larger_than_the_largest(window):
    """Sides are rounded, and windows at the edges are filled in part."""
    layout, random = PatchLayout(2, window), np.random.default_rng(0)
    for bounds in ((64, 64), (200, 4000), (56 * 56, 100_000)):
        most = layout.most_slots(largest_area(bounds, 8) // 4**2)
        found = []
        for _ in range(3000):
            short, ratio = int(random.integers(1, 300)), float(random.uniform(1, 200))
            sides = [short, int(short * ratio)][:: random.choice([1, -1])]
            rows, columns = fitting_size(*sides, 8, *bounds)
            found.append(layout.num_slots((1, rows // 4, columns // 4)))
        assert max(found) <= most


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_tiles(kind, tmp_path):
    test_anyres.build(kind, tmp_path)
    assert len(check(mm_jax.load(tmp_path), kind == "onevision")) == (1 if kind == "next" else 2)


def test_mixed_tiles():
    """Tiles that a token is mixed of are encoded together, and no others."""
    each, none = 9, np.zeros((1, 4), np.float32)
    index = np.array([0, 8, -2, 9, 25, 36, -1])
    distances = np.zeros((7, 4), np.int32)
    weights = np.repeat(none + [1, 0, 0, 0], 7, axis=0)
    distances[1] = [0, 1, 0, 40]  # of no weight
    distances[3], weights[3] = [0, 8, 0, 9], 0.25  # from the second tile into the third
    distances[4], weights[4] = [0, 1, 1, 2], 0.25  # and from there into the fourth
    assert list(_mixed(index, (distances, weights), each, 6)) == [(0, 1), (1, 4), (4, 5), (5, 6)]
