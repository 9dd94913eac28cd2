"""Continuous batching of a decoder whose layers remember a text as a whole: what has been read cannot be taken back."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mm_jax.data.messages import Message, Text
from mm_jax.inference.prompt import text_prompt
from mm_jax.inference.request import Request
from mm_jax.inference.sampling import Sampling
from mm_jax.lm import LanguageModel
from mm_jax.models import DeltaConfig
from tests.tiny import random_params, tiny, user

NEW = 8
MESSAGES = [
    [user("what colour is the square in the picture", images=(0,))],
    [user("how many")],
    [user("red or blue"), Message("assistant", (Text("red"),)), user("which word", images=(2,))],
    [user("one two three " * 14)],
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config, _, processor = tiny(audio=False)
    delta = DeltaConfig(2, 2, key_dim=8, value_dim=8)
    decoder = replace(config.decoder, delta=delta, delta_layers=(0,), rotary_dim=4, attention_gate=True)
    config = replace(config, decoder=decoder)
    return LanguageModel(config, random_params(config, 0), processor, max_length=128)


@pytest.fixture(scope="module")
def alone(model):
    """Greedy answers by reading everything anew for each token."""
    found = []
    for messages in MESSAGES:
        batch = model.batch(messages=messages)
        length = int(np.sum(batch["segment_ids"] > 0))
        size = -(-(length + NEW) // 64) * 64
        batch = {
            name: np.pad(np.asarray(x), [(0, 0), (0, size - x.shape[1])], constant_values=-(name == "media_index"))
            if name in ("tokens", "segment_ids", "positions", "media_index")
            else x
            for name, x in batch.items()
        }  # fmt: skip
        run, said = jax.jit(model.apply), []
        for k in range(length, length + NEW):
            said.append(int(np.argmax(run(model.params, batch)[0, k - 1])))
            batch["tokens"][0, k], batch["segment_ids"][0, k], batch["positions"][0, k] = said[-1], 1, k
            batch["media_index"][0, k] = -1
        found.append(said)
    assert len({tuple(tokens) for tokens in found}) == len(found)
    return found


def requests(model):
    return [Request(model.read(model.prompt(m)), Sampling(), NEW, ignore_eos=True) for m in MESSAGES]


def finish(engine, answers):
    while not all(answer.finish for answer in answers):
        engine.step()
    return [answer.tokens for answer in answers]


def test_requests_join_and_leave(model, alone):
    """More requests than rows, prompts in short pieces, rows that have held other texts."""
    engine = model.engine(2, steps=1, chunk=16, pieces=(1, 2), cache_length=64)
    for order in ((0, 1, 2, 3), (3, 2, 0, 1)):
        wanted, answers = requests(model), {}
        for k in order:
            answers[k] = engine.submit(wanted[k])
            engine.step()
        finish(engine, list(answers.values()))
        assert [answers[k].tokens for k in range(len(alone))] == alone


def test_many_steps_at_a_time_and_short_of_room(model, alone):
    """Pieces are padded: the cache has room for that however long prompt and answer may be."""
    engine = model.engine(4, steps=8, max_length=96, chunk=64)
    answers = [engine.submit(request) for request in requests(model)]
    assert finish(engine, answers) == alone


def test_what_is_read_again(model, alone):
    """A conversation goes on from where it was; the same prompt again, or another with its beginning, is read anew."""
    engine = model.engine(2, steps=4, cache_length=128)
    first = engine.submit(requests(model)[3])
    finish(engine, [first])
    again = engine.submit(requests(model)[3])
    assert finish(engine, [again]) == [alone[3]] and again.reused == 0
    ids = [*again.request.prompt.tokens, *again.tokens, 7, 8]
    more = engine.submit(Request(text_prompt(ids), Sampling(), NEW, ignore_eos=True))
    tokens = finish(engine, [more])
    assert more.reused == len(ids) - 3  # all but the newest token of the answer, and what follows
    fresh = model.engine(1, cache_length=128)
    assert tokens == finish(
        fresh, [fresh.submit(Request(text_prompt(ids), Sampling(), NEW, ignore_eos=True))]
    )
    twice = [engine.submit(request) for request in requests(model)[3:] * 2]
    assert finish(engine, twice) == alone[3:] * 2
    # a prompt that another row has read to its end, and not beyond, is copied
    short, long = text_prompt(range(5, 45)), text_prompt(range(5, 60))
    reads = engine.submit(Request(short, Sampling(), 1, ignore_eos=True))
    finish(engine, [reads])
    waits = [engine.submit(Request(long, Sampling(0.8, seed=k), NEW, ignore_eos=True)) for k in range(2)]
    finish(engine, waits)
    assert waits[0].reused == 40


def test_where_it_looked(model):
    """Weights of the layers that have some."""
    prompt, weights = model.attention(MESSAGES[0], [3, 4])
    length = prompt.length + 2
    assert weights["decoder"].shape == (1, model.config.decoder.num_heads, length, length)
    assert np.allclose(weights["decoder"].sum(-1), 1, atol=1e-5)
