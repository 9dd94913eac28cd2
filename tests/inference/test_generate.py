"""The generation loop against the full forward pass, on a model of random weights."""

import dataclasses

import jax
import numpy as np
import pytest

from mm_jax.data.messages import Message, Text
from mm_jax.errors import UserError
from mm_jax.inference.batch import collate_prompts
from mm_jax.inference.sampling import Sampling
from mm_jax.lm import LanguageModel
from mm_jax.models import init_cache
from mm_jax.train.setup import init_params
from tests.tiny import tiny, user

PROMPTS = [
    [user("what colour is the square", images=(0,))],
    [user("how many")],
    [user("which word do you hear", clips=(1,))],
    [user("is the colour you hear in one of the two", images=(1, 2), clips=(0, 2))],
    [user("red or blue"), Message("assistant", (Text("red"),)), user("which word", images=(2,), clips=(1,))],
]
NEW = 12


def test_cached_decode_is_the_full_forward_pass(lm):
    """Every generated token is the likeliest one of a full forward pass over all that came before it."""
    ids = lm.generate(lm.batch(PROMPTS), NEW, ignore_eos=True)
    assert ids.shape == (len(PROMPTS), NEW)
    assert len({tuple(row) for row in ids}) == len(PROMPTS)
    examples = [lm.prompt(messages) for messages in PROMPTS]
    whole = [longer(example, row) for example, row in zip(examples, ids, strict=True)]
    logits = np.asarray(jax.jit(lm.apply)(lm.params, collate_prompts(whole, lm.layout)))
    for k, example in enumerate(examples):
        chosen = logits[k, example.length - 1 : example.length - 1 + NEW].argmax(axis=-1)
        assert chosen.tolist() == ids[k].tolist()


def longer(example, ids):
    """A prompt with its answer, no media in it."""
    new = len(ids)
    added = {
        "tokens": ids,
        "loss_weights": np.zeros(new),
        "segments": np.ones(new),
        "image_index": -np.ones(new),
    }
    added |= {"positions": example.length + np.arange(new), "audio_index": -np.ones(new)}
    fields = {name: np.concatenate([getattr(example, name), values]) for name, values in added.items()}
    return dataclasses.replace(example, **{k: v.astype(getattr(example, k).dtype) for k, v in fields.items()})


@pytest.mark.parametrize("messages", PROMPTS[2:])
def test_cached_logits_equal_full_logits(lm, messages):
    """Prefill of a first part, a second part by `extend`, then single tokens: the logits to 1e-5."""
    params = init_params(lm.config, 0)
    example = lm.prompt(messages)
    full = jax.jit(lm.apply)(params, collate_prompts([example], lm.layout))[0, : example.length]
    cache = init_cache(lm.config.decoder, 1, 128)
    extend = jax.jit(lambda p, b, c, s: lm.model.apply({"params": p}, b, c, s, method="extend"))
    cuts = [0, example.length // 2, *range(example.length - 3, example.length + 1)]
    found = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        batch = collate_prompts([example], lm.layout)
        text = ("tokens", "segment_ids", "positions", "media_index")
        batch |= {name: batch[name][:, start:stop] for name in text}
        logits, cache = extend(params, batch, cache, np.array([start], np.int32))
        found.append(logits[0])
    np.testing.assert_allclose(np.concatenate(found), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=20, top_p=0.9, seed=3)])
def test_a_batch_answers_as_single_rows_do(lm, sampling):
    together = lm.generate(lm.batch(PROMPTS), NEW, sampling=sampling, ignore_eos=True)
    for row, messages in zip(together, PROMPTS, strict=True):
        alone = lm.generate(lm.batch(messages), NEW, sampling=sampling, ignore_eos=True)
        assert alone[0].tolist() == row.tolist()
    back = lm.generate(lm.batch(PROMPTS[::-1]), NEW, sampling=sampling, ignore_eos=True)
    np.testing.assert_array_equal(back[::-1], together)


def test_seeds_give_different_answers(lm):
    batch = lm.batch([PROMPTS[0]] * 3)
    ids = lm.generate(batch, NEW, temperature=1.0, seed=[1, 2, 1], ignore_eos=True)
    assert ids[0].tolist() == ids[2].tolist() != ids[1].tolist()


def test_rows_stop_by_themselves(lm):
    """With another token declared the stop id, each row ends there and is padded; ignore_eos goes on."""
    free = lm.generate(lm.batch(PROMPTS), NEW, ignore_eos=True)
    stop = int(free[0, 3])
    config, params, processor = tiny()
    other = LanguageModel(config, params, processor, max_length=256)
    other.programs.stop_ids = (stop,)
    ids = other.generate(other.batch(PROMPTS), NEW)
    longest = 0
    for row, whole in zip(ids, free, strict=True):
        end = whole.tolist().index(stop) + 1 if stop in whole else NEW
        assert row[:end].tolist() == whole[:end].tolist()
        assert (row[end:] == lm.processor.pad_id).all()
        longest = max(longest, end)
    assert ids.shape[1] == longest
    np.testing.assert_array_equal(other.generate(lm.batch(PROMPTS), NEW, ignore_eos=True), free)


def test_one_new_token(lm):
    np.testing.assert_array_equal(
        lm.generate(lm.batch(PROMPTS), 1, ignore_eos=True),
        lm.generate(lm.batch(PROMPTS), NEW, ignore_eos=True)[:, :1],
    )


def test_nothing_compiles_after_warm_up(lm):
    """Every compilation in the process is counted, also those of stray operations outside the programs."""
    compiled = []
    warm = [lm.generate(lm.batch(rows), 4) for rows in (PROMPTS, PROMPTS[:1], PROMPTS[1:2])]
    assert len(warm) == 3
    traces = dict(lm.programs.traces)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    longer = [user("how many circles are there")]
    for count, settings in (
        (5, {}),
        (9, {"temperature": 0.7, "seed": 9}),
        (4, {"top_p": 0.5, "temperature": 2}),
    ):
        lm.generate(lm.batch(PROMPTS), count, **settings)
        lm.generate(lm.batch([longer]), count, ignore_eos=True, **settings)
        lm.generate(lm.batch([[user("what colour is it", images=(4,))]]), count, **settings)
    assert compiled == []
    assert dict(lm.programs.traces) == traces
    jax.jit(lambda x: x + 1)(np.ones(3))
    assert compiled, "the counter does not count"


def test_unused_slots_change_nothing(lm):
    batch = lm.batch([PROMPTS[3], PROMPTS[0], PROMPTS[2]])
    uneven = dict(batch)
    # a third picture slot moves the features of the clips
    uneven["pixel_values"] = np.pad(batch["pixel_values"], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    uneven["image_segment_ids"] = np.pad(batch["image_segment_ids"], ((0, 0), (0, 1)))
    tokens = lm.layout.image_tokens
    index = batch["media_index"]
    uneven["media_index"] = np.where(index >= 2 * tokens, index + tokens, index)
    params, apply = init_params(lm.config, 0), jax.jit(lm.apply)
    expected = np.asarray(apply(params, batch))
    np.testing.assert_allclose(np.asarray(apply(params, uneven)), expected, atol=1e-5)
    # and the same answers: a row brings its own media to the engine, not the slots that it does not use
    np.testing.assert_array_equal(lm.generate(uneven, 6), lm.generate(batch, 6))


def test_too_long_and_too_short(lm):
    with pytest.raises(UserError, match="over the limit of 256"):
        lm.chat([user("red " * 300)])
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        lm.generate(lm.batch(PROMPTS[0]), 0)


def test_arrays_make_a_batch(lm):
    whole = lm.batch(PROMPTS[1])
    assert lm.batch(**whole)["tokens"] is whole["tokens"]
    alone = lm.batch(tokens=whole["tokens"])
    for key in ("segment_ids", "positions", "media_index"):
        np.testing.assert_array_equal(alone[key], whole[key])
    with pytest.raises(UserError, match="tokens"):
        lm.batch(positions=whole["positions"])


def test_apply_is_pure_and_jittable(lm):
    batch = lm.batch([*PROMPTS[:2], [*PROMPTS[0], Message("assistant", (Text("red"),))]])
    logits = jax.jit(lm.apply)(lm.params, batch)
    assert logits.shape == (*batch["tokens"].shape, lm.config.decoder.vocab_size)
    assert logits.dtype == np.float32
    # the answer is part of the third row, whose prompt is the first
    length = int((batch["segment_ids"][0] > 0).sum())
    np.testing.assert_allclose(logits[2, :length], logits[0, :length], atol=1e-4)


def test_preprocess(lm, tmp_path):
    from tests.tiny import clip, picture

    path = tmp_path / "a.png"
    picture(0).save(path)
    arrays = lm.preprocess(images=[str(path), picture(1)], audio=[(clip(0), 16_000)])
    assert arrays["pixel_values"].shape == (2, 32, 32, 3)
    batch = lm.batch([user("x", (0, 1), (0,))])
    np.testing.assert_array_equal(arrays["pixel_values"], batch["pixel_values"][0])
    np.testing.assert_array_equal(
        arrays["audio_frames"], batch["audio_frames"][0][: len(arrays["audio_frames"])]
    )


def test_media_without_an_encoder():
    lm = LanguageModel(*tiny(vision=False, audio=False))
    assert isinstance(lm.chat([user("how many")], 3), str)
    with pytest.raises(UserError, match="no vision encoder"):
        lm.chat([user("how many", images=(0,))])
    with pytest.raises(UserError, match="no audio encoder"):
        lm.preprocess(audio=[(np.zeros(400, np.float32), 16_000)])
