"""Qwen-VL (v1) against arrays of the authors' code."""

import json
import math

import jax
import numpy as np
import pytest

import mm_jax
from mm_jax.data.image import Transform
from mm_jax.data.messages import Box, Text
from tests.parity.hosts import byte_level, picture
from tests.parity.released import FIXTURES, Case

ROOT = FIXTURES / "qwen_vl" / "a"
MARKERS = ("<img>", "</img>", "<imgpad>")


@pytest.fixture(scope="module")
def case():
    return Case("qwen_vl/a")


def changed(directory, drop=(), visual=None, **config):
    """The fixture's checkpoint with other fields in its config.json, and without some tensors."""
    from safetensors.flax import load_file, save_file

    directory.mkdir()
    values = json.loads((ROOT / "config.json").read_text()) | config
    values["visual"] = None if visual is None else values["visual"] | visual
    (directory / "config.json").write_text(json.dumps(values))
    tensors = load_file(ROOT / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if not any(d in k for d in drop)}, directory / "model.safetensors"
    )
    return directory


def test_matches_the_authors_code(case, tmp_path):
    """The tower, the resampler, logits of left-padded rows, greedy answers, and the way back."""
    assert case.lm.family == "qwen"
    batch = case.batch()
    case.check_features(batch)
    case.check(batch)
    case.check_greedy(batch)
    case.check_saving(tmp_path)


def test_gradients(case):
    """The table of positions is none that is trained."""
    case.check_gradients(case.batch(), fixed=("image_projector/positions",))


def test_pictures(case):
    case.same_pixels(case.lm.checkpoint.rule.images(case.images())["pixel_values"], "in/pixel_values")


def test_what_stands_between_the_markers_is_a_picture(case):
    """Without image_bound, and whatever bytes of a path there are."""
    ids = np.array(case["in/input_ids"])
    given = dict(attention_mask=case["in/attention_mask"], pixel_values=case["in/pixel_values"])
    batch = case.batch()
    for start, stop in ((29, 35), (30, 40)):
        ids[0, start:stop] = 7
        found = case.lm.batch(input_ids=ids, **given)
        assert np.array_equal(found["media_index"], batch["media_index"])
        assert np.array_equal(found["pixel_values"], batch["pixel_values"])
    ids[0, 45] = 7
    with pytest.raises(mm_jax.UserError, match="not 16 ids between its markers 256 and 257"):
        case.lm.batch(input_ids=ids, **given)


def reference(tensors: dict[str, np.ndarray], ids: np.ndarray, config: dict) -> np.ndarray:
    """Logits [S, vocab] of one text [S], in float64, as the authors' description has it."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]) * tensors[name]

    length, trained = len(ids), config["seq_length"]
    heads, size = config["num_attention_heads"], config["kv_channels"]
    base = config["rotary_emb_base"]
    if config["use_dynamic_ntk"] and length > trained:
        alpha = max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1)
        base = base * alpha ** (size / (size - 2))
    angles = np.arange(length)[:, None, None] * base ** (-np.arange(0, size, 2) / size)

    def turn(x):
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    growth = np.ones(length)
    if config["use_logn_attn"]:
        growth = np.array([math.log(i, trained) if i > trained else 1 for i in range(1, length + 1)])
    x = tensors["transformer.wte.weight"][ids]
    for k in range(config["num_hidden_layers"]):
        at = f"transformer.h.{k}."
        y = (
            norm(x, f"{at}ln_1.weight") @ tensors[f"{at}attn.c_attn.weight"].T
            + tensors[f"{at}attn.c_attn.bias"]
        )
        q, k_, v = (part.reshape(length, heads, size) for part in np.split(y, 3, axis=-1))
        q, k_ = turn(q) * growth[:, None, None], turn(k_)
        scores = np.einsum("tnh,snh->nts", q, k_) / math.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("nts,snh->tnh", weights, v).reshape(length, -1)
        x = x + y @ tensors[f"{at}attn.c_proj.weight"].T
        y = norm(x, f"{at}ln_2.weight")
        gate = y @ tensors[f"{at}mlp.w2.weight"].T
        y = (y @ tensors[f"{at}mlp.w1.weight"].T) * gate / (1 + np.exp(-gate))
        x = x + y @ tensors[f"{at}mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("ntk, logn", [(True, True), (True, False), (False, True)])
def test_texts_longer_than_the_trained_ones(ntk, logn, tmp_path):
    """Each text of a batch by its own length, packed or not; the decoder alone, as of Qwen-7B."""
    from safetensors.flax import load_file

    options = dict(seq_length=8, use_dynamic_ntk=ntk, use_logn_attn=logn)
    directory = changed(tmp_path / "in", drop=("visual",), **options)
    config = json.loads((directory / "config.json").read_text())
    tensors = {k: np.asarray(v, np.float64) for k, v in load_file(directory / "model.safetensors").items()}
    lm = mm_jax.load(directory, dtype="float32")
    assert lm.config.vision is None and lm.max_length == (8 if ntk else 8192)
    random = np.random.default_rng(0)
    texts = [random.integers(0, 300, length) for length in (6, 17, 33, 16, 8)]
    rows = [texts[:2], texts[2:3], texts[3:]]
    batch = {name: np.zeros((3, 36), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, packed in enumerate(rows):
        at = 0
        for number, ids in enumerate(packed):
            span = slice(at, at := at + len(ids))
            batch["tokens"][row, span], batch["segment_ids"][row, span] = ids, number + 1
            batch["positions"][row, span] = np.arange(len(ids))
    ours = np.asarray(jax.jit(lm.apply)(lm.params, lm.batch(**batch)))
    for row, packed in enumerate(rows):
        for number, ids in enumerate(packed):
            expected = reference(tensors, ids, config)
            found = ours[row, batch["segment_ids"][row] == number + 1]
            assert 0.5 < expected.std() < 20
            assert (
                np.abs(found - expected).max() <= 1e-3
            )  # as the arrays' own tolerance, at logits of this scale
            plain = reference(tensors, ids, config | dict(use_dynamic_ntk=False, use_logn_attn=False))
            assert (len(ids) > 8) == (np.abs(plain - expected).max() > 0.05)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The fixture's checkpoint with a vocabulary that holds a tokenizer's markers."""
    from safetensors.flax import load_file, save_file

    directory = tmp_path_factory.mktemp("chat") / "in"
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<ref>", "</ref>", "<box>", "</box>", *MARKERS)
    start = tokenizer.convert_tokens_to_ids("<img>")
    changed(directory, visual={"image_start_id": start}, vocab_size=len(tokenizer))
    tensors = load_file(directory / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = np.resize(np.asarray(tensors[name]), (len(tokenizer), 128))
    save_file(tensors, directory / "model.safetensors")
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    return mm_jax.load(directory, dtype="float32")


def test_messages(chat):
    """Pictures are numbered through the conversation; each is as many tokens as it has features."""
    user = [{"type": "text", "text": "one"}, {"type": "image", "image": picture(40, 30)}]
    talk = [
        {"role": "user", "content": [*user, {"type": "image", "image": picture(20, 50)}]},
        {"role": "assistant", "content": "two"},
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(9, 9)}, {"type": "text", "text": "why?"}],
        },
    ]
    batch = chat.batch(messages=[talk])
    shown = chat.processor.tokenizer.decode(batch["tokens"][0][batch["segment_ids"][0] > 0], special=True)
    assert shown.replace("<imgpad>" * 16, "...") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nonePicture 1: <img>...</img>\nPicture 2: <img>...</img>\n<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nPicture 3: <img>...</img>\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert np.array_equal(batch["media_index"][batch["media_index"] >= 0], np.arange(48))
    given = chat.batch(
        input_ids=batch["tokens"], attention_mask=batch["segment_ids"],
        **chat.preprocess(images=[picture(40, 30), picture(20, 50), picture(9, 9)]),
    )  # fmt: skip
    assert np.array_equal(given["media_index"], batch["media_index"])
    assert np.array_equal(given["pixel_values"][0], batch["pixel_values"][0, :3])
    ids = chat.generate(batch, 4, ignore_eos=True)
    assert chat.chat(talk, max_new_tokens=4) == chat.processor.tokenizer.decode(ids[0]).strip()


def test_boxes(chat):
    """0..999 of the picture whatever its shape; the markers may be there or not."""
    rule, where = chat.checkpoint.rule, [Transform((200, 100), (0.42, 0.84), (0, 0), (84, 84))]
    box = Box((50.0, 25.0, 200.0, 100.0), 0)
    assert rule.write_box(box, where[0]) == "<box>(250,250),(999,999)</box>"
    for text in ("the <ref>dog</ref><box>(250,250),(500,1000)</box>.", "the dog(250,250),(500,1000)."):
        assert rule.parse(text, where) == [Text("the dog"), Box((50.0, 25.0, 100.0, 100.0), 0), Text(".")]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(no_bias=False), "no_bias"),
        (dict(rotary_pct=0.5), "rotary_pct"),
        (dict(kv_channels=16), "kv_channels"),
        (dict(scale_attn_weights=False), "scale_attn_weights"),
        (dict(use_cache_quantization=True), "use_cache_quantization"),
        (dict(visual=dict(output_dim=64)), "output_dim"),
        (dict(visual=dict(n_queries=15)), "n_queries"),
        (dict(visual=dict(sparse=True)), "sparse"),
    ],
)
def test_fields_that_change_numbers(change, message, tmp_path):
    directory = changed(tmp_path / "in", **{"visual": {}} | change)
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(directory)
