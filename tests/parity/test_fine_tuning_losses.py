"""Checkpoints trained with preference pairs of their own answers, and with names at their media tokens."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.messages import Image  # noqa: E402
from mm_jax.data.packing import BatchConfig, Layout, collate  # noqa: E402
from mm_jax.models import ProjectorConfig  # noqa: E402
from mm_jax.train import loop  # noqa: E402
from mm_jax.train.config import PreferenceConfig, check  # noqa: E402
from mm_jax.train.encode import Encode  # noqa: E402
from mm_jax.train.losses import answer_log_probs  # noqa: E402
from mm_jax.train.metrics import read_metrics  # noqa: E402
from mm_jax.train.setup import check_model, prepare  # noqa: E402
from tests.parity import hosts  # noqa: E402
from tests.parity.test_fine_tuning import begin  # noqa: E402

SHOWN = ["red circle", "blue square", "red digit_7", "fox"]


def write_data(root):
    """Questions about what is there, of two turns each; each picture says what is where. Paths are relative."""
    lines = []
    for k, label in enumerate(SHOWN):
        hosts.picture(24, 24, seed=k).save(root / f"{k}.png")
        regions = [{"label": label, "box": [0, 0, 8, 8]}, {"label": "_place_0 dog", "box": [16, 8, 24, 24]}]
        picture = {"type": "image", "image": f"{k}.png", "regions": regions}
        lines.append([
            {"role": "user", "content": [picture, {"type": "text", "text": "what is in the picture?"}]},
            {"role": "assistant", "content": label.replace("digit_", "")},
            {"role": "user", "content": "is there a circle?"},
            {"role": "assistant", "content": "yes" if k == 0 else "no", "task": "exists"},
        ])  # fmt: skip
    path = root / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "mllama"])
def tuned(request, tmp_path_factory):
    """(name, config, run): a stage with names, where media tokens have places, and one with pairs."""
    root = tmp_path_factory.mktemp(request.param)
    config = begin(request.param, root, write_data(root))
    named = replace(config.stages["align"], steps=6, naming=0.0 if request.param == "mllama" else 0.5)
    prefer = replace(
        config.stages["instruct"],
        steps=6,
        loss="preference",
        batch=BatchConfig(
            rows=1, length=256, images=config.stages["instruct"].batch.images, pairs=2, accumulate=2, bins=2
        ),
        preference=PreferenceConfig(questions=8, pairs=4),
        answer_weight="sqrt",
    )
    config = replace(config, stages={"named": named, "prefer": prefer})
    check(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        relative = {"chat": replace(config.sources["chat"], path="chat.jsonl")}
        config = replace(config, sources=relative)
        assert loop.train(config, root / "run")
        yield request.param, config, root / "run"


def test_pairs_of_its_own_answers(tuned):
    """Before the first step no answer is preferred; then the right one is."""
    name, _, run = tuned
    lines = [x for x in read_metrics(run) if x["stage"] == "prefer" and "loss" in x]
    assert len(lines) == 6 and all(x["compilations"] == 1 and x["dropped"] == 0 for x in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["reward_margin"] > 0
    pairs = [json.loads(x) for x in (run / "preferences/prefer/preferences.jsonl").read_text().splitlines()]
    assert len(pairs) == 4
    for pair in pairs:
        [question, answer] = pair["messages"]
        assert question["content"][-1]["text"] == "is there a circle?" and answer["content"] in ("yes", "no")
        assert pair["rejected"] != answer["content"]


def test_a_pair_is_two_conversations_over_one_picture(tuned):
    """Log-probs of both answers in shared rows, and of the same answers alone; earlier answers do not count."""
    name, config, run = tuned
    lm, setup = mm_jax.load(run), prepare(config, run)
    encode, layout = Encode.of(setup.processor, config.stages["prefer"]), Layout.of(setup.processor)
    conversations = [setup.sources["chat"][k] for k in range(3)]
    other = conversations[0].messages[1].parts
    pairs = [replace(encode(replace(c, rejected=other)), source="chat", preference=k)
             for k, c in enumerate(conversations)]  # fmt: skip
    size = replace(config.stages["prefer"].batch, rows=2, accumulate=1, length=512)
    batch = collate([pairs[:2], pairs[2:]], size, layout, {"chat": 0})
    score = jax.jit(lambda params, batch: answer_log_probs(lm.apply(params, batch), batch))
    found = np.asarray(score(lm.params, batch))[batch["preference"] >= 0]
    apply = jax.jit(lm.apply)
    for k, conversation in enumerate(conversations):
        for column, parts in enumerate((conversation.messages[-1].parts, other)):
            messages = (*conversation.messages[:-1], replace(conversation.messages[-1], parts=parts))
            alone = setup.processor.example(replace(conversation, messages=messages))
            one = collate(
                [[replace(alone, source="chat")]], replace(size, rows=1, pairs=0), layout, {"chat": 0}
            )
            logp = jax.nn.log_softmax(apply(lm.params, one)[0])
            trained = np.flatnonzero(alone.loss_weights > 0)
            last = trained[trained > np.flatnonzero(alone.loss_weights[: trained[-1]] == 0)[-1]]
            assert len(last) < len(trained)
            expected = sum(float(logp[at - 1, alone.tokens[at]]) for at in last)
            assert found[k, column] == pytest.approx(expected, abs=1e-4)
    assert all(len(pair.slots or pair.pixel_values) for pair in pairs)
    assert len({pair.num_images for pair in pairs} | {alone.num_images}) == 1


def test_names(tuned):
    """The loss of names falls; by literal example: which tokens are asked for at which media tokens."""
    name, config, run = tuned
    lines = [x for x in read_metrics(run) if x["stage"] == "named" and "loss" in x]
    if name == "mllama":  # whose features stand beside the text
        assert not any("loss/names" in x for x in lines)
        with pytest.raises(mm_jax.UserError, match="stages.named.naming needs media tokens with a place"):
            named = replace(config.stages["named"], naming=1.0)
            check_model(replace(prepare(config, run).config, stages={"named": named}))
        return
    assert lines[-1]["loss/names"] < lines[0]["loss/names"]
    setup = prepare(config, run)
    tokenizer = setup.processor.tokenizer
    example = Encode.of(setup.processor, config.stages["named"])(setup.sources["chat"][2])
    media = np.flatnonzero(example.image_index >= 0)
    rows, columns = setup.processor.grid((24, 24))
    assert (rows, columns) == (3, 3) and len(media) == rows * columns
    piece = tokenizer.backend.id_to_token
    said = [[piece(token) for token in example.names[at] if token >= 0] for at in media]
    # of "7" and "red", and of "dog": the first token of each inside of a sentence
    first, dog = {"llava": (["<0x37>", "r"], ["▁d"]), "qwen2_vl": (["7", "re"], ["Ġd"])}[name]
    grid = [said[k * columns : (k + 1) * columns] for k in range(rows)]
    assert grid == [[first, [], []], [[], [], dog], [[], [], dog]]
    assert (example.names[example.image_index < 0] == -1).all()
    bare = replace(setup.sources["chat"][2], messages=tuple(
        replace(m, parts=tuple(Image(p.source) if isinstance(p, Image) else p for p in m.parts))
        for m in setup.sources["chat"][2].messages
    ))  # fmt: skip
    assert (Encode.of(setup.processor, config.stages["named"])(bare).names == -1).all()


def test_names_need_places(tuned):
    name, config, run = tuned
    if name != "llava":
        pytest.skip("once is enough")
    config = prepare(config, run).config
    model = replace(config.model, image_projector=ProjectorConfig("resampler"))
    with pytest.raises(mm_jax.UserError, match="stages.named.naming needs media tokens with a place"):
        check_model(replace(config, model=model))
