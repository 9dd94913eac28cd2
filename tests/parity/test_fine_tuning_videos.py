"""Runs on videos: Qwen2-VL's patches and LLaVA-OneVision's pooled frames, beside pictures and text in the same rows."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.packing import BatchConfig, Layout, collate  # noqa: E402
from mm_jax.train import loop  # noqa: E402
from mm_jax.train.encode import Encode  # noqa: E402
from mm_jax.train.metrics import read_metrics  # noqa: E402
from mm_jax.train.setup import prepare  # noqa: E402
from tests.parity import hosts  # noqa: E402
from tests.parity import test_anyres as anyres  # noqa: E402
from tests.parity import test_qwen_chat as qwen  # noqa: E402
from tests.parity.test_fine_tuning import config_of  # noqa: E402

# (builder, slots of a row)
SYSTEMS = {"qwen2_vl": (qwen.build, 1024), "llava_onevision": (lambda d: anyres.build("onevision", d), 16)}
QUESTION = {"type": "text", "text": "what is in the picture?"}


def write_data(root: Path) -> Path:
    """An animation, frames as files, two videos, a video beside a picture, a picture alone, text."""
    frames = [hosts.picture(40, 30, seed=k) for k in range(5)]
    for k, frame in enumerate(frames):
        frame.save(root / f"{k}.png")
    frames[0].save(root / "moving.png", save_all=True, append_images=frames[1:4], duration=250)
    animation = {"type": "video", "video": "moving.png"}
    listed = {"type": "video", "video": ["2.png", "1.png"], "fps": 2}
    picture = {"type": "image", "image": "4.png"}
    contents = [[animation], [listed], [listed, animation], [picture, listed], [picture], []]
    lines = [
        [{"role": "user", "content": [*media, QUESTION]}, {"role": "assistant", "content": f"number {k}"}]
        for k, media in enumerate(contents)
    ]
    path = root / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


@pytest.fixture(scope="module", params=SYSTEMS)
def tuned(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    build, slots = SYSTEMS[request.param]
    build(root / "hf")
    config = config_of(root / "hf", write_data(root), slots)
    assert loop.train(config, root / "run")
    return config, root / "run"


def test_trains(tuned):
    """Both stages, nothing dropped, one program each; the loss falls."""
    lines = [x for x in read_metrics(tuned[1]) if "loss" in x]
    assert len(lines) == 8 and all(x["dropped"] == 0 and x["compilations"] == 1 for x in lines)
    losses = [x["loss"] for x in lines]
    assert losses[3] < losses[0] and losses[7] < losses[4] < losses[0]
    assert isinstance(mm_jax.load(tuned[1]).chat([{"role": "user", "content": "what?"}], 3), str)


def test_packed_equals_unpacked(tuned):
    """Logits of conversations with videos that share rows are those of each alone; only answers are trained on."""
    config, run = tuned
    lm, setup = mm_jax.load(run), prepare(config, run)
    encode, layout = Encode.of(setup.processor, config.stages["align"]), Layout.of(setup.processor)
    examples = [replace(encode(setup.sources["chat"][k]), source="chat") for k in range(6)]
    for k, example in enumerate(examples):
        trained = setup.processor.tokenizer.decode(example.tokens[example.loss_weights > 0], special=True)
        assert trained.startswith(f"number {k}") and (example.num_images > 0) == (k < 5)
    size = BatchConfig(rows=2, length=384, images=config.stages["align"].batch.images)
    order = [[5, 0, 3], [4, 2, 1]]
    packed = collate([[examples[k] for k in row] for row in order], size, layout, {"chat": 0})
    alone = collate([[e] for e in examples], replace(size, rows=6), layout, {"chat": 0})
    apply = jax.jit(lm.apply)
    together, single = np.asarray(apply(lm.params, packed)), np.asarray(apply(lm.params, alone))
    for row, numbers in enumerate(order):
        for segment, k in enumerate(numbers):
            real = packed["segment_ids"][row] == segment + 1
            expected = single[k, : examples[k].length]
            assert 0.1 < expected.std() < 10 and np.abs(together[row][real] - expected).max() < 2e-5
            assert np.array_equal(packed["positions"][row][real], alone["positions"][k, : examples[k].length])
