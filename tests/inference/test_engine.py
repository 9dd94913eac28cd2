"""Continuous batching: whoever else is there, however a prompt is read, the answer is the same."""

import jax
import numpy as np
import pytest

from mm_jax.data.messages import Message, Text
from mm_jax.errors import UserError
from mm_jax.inference.engine import Engine
from mm_jax.inference.features import FeaturePool
from mm_jax.inference.prompt import Medium
from mm_jax.inference.request import Request, settings_of
from mm_jax.inference.sampling import Sampling
from tests.tiny import user

NEW = 10
MESSAGES = [
    [user("what colour is the square in the picture", images=(0,))],
    [user("how many")],
    [user("which word do you hear", clips=(1,))],
    [user("is the colour you hear in one of the two", images=(1, 2), clips=(0,))],
    [user("red or blue"), Message("assistant", (Text("red"),)), user("which word", images=(2,))],
    [user("one two three " * 16)],
]
SETTINGS = [
    Sampling(),
    Sampling(0.9, seed=1),
    Sampling(1.2, top_k=30, top_p=0.9, seed=2),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(1.0, min_p=0.05, presence_penalty=1.0, seed=3, logit_bias={300: 2.0, 7: -5.0}),
    Sampling(0.7, seed=4),
]


def requests(lm, **options):
    return [
        Request(lm.read(lm.prompt(messages)), sampling, NEW, ignore_eos=True, **options)
        for messages, sampling in zip(MESSAGES, SETTINGS, strict=True)
    ]


def vectors(lm):
    """The same prompts, to be turned into vectors."""
    return [Request(request.prompt, max_new_tokens=1, embed=True) for request in requests(lm)]


def finish(engine, answers):
    while not all(answer.finish for answer in answers):
        engine.step()
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def alone(lm):
    """What each request is answered by an engine that has nothing else to do."""
    found = []
    for request in requests(lm):
        engine = lm.engine(1, cache_length=256)
        found += finish(engine, [engine.submit(request)])
    assert len({tuple(tokens) for tokens in found}) == len(found)
    return found


@pytest.fixture(scope="module")
def engine(lm):
    """Few rows, one token at a time, prompts read in short pieces."""
    return lm.engine(3, steps=1, chunk=32, pieces=(1, 2), cache_length=256, features=24)


def test_requests_join_and_leave(lm, engine, alone):
    """More requests than rows, submitted while others are under way, in two orders."""
    for order in ((0, 1, 2, 3, 4, 5), (5, 3, 4, 0, 2, 1)):
        wanted, answers = requests(lm), {}
        for k in order:
            answers[k] = engine.submit(wanted[k])
            engine.step()
            engine.step()
        finish(engine, list(answers.values()))
        assert [answers[k].tokens for k in range(len(alone))] == alone
        assert all(answer.finish == "length" for answer in answers.values())
        assert engine.running == engine.waiting == 0


def test_many_steps_at_a_time(lm, alone):
    wanted = requests(lm)
    answers = {id(answer.request): answer.tokens for answer in lm.engine(4, steps=7).run(wanted)}
    assert [answers[id(request)] for request in wanted] == alone


def test_cancelled_requests_free_their_row_at_once(lm, engine, alone):
    wanted = requests(lm)
    running = [engine.submit(wanted[k]) for k in range(3)]
    for _ in range(6):
        engine.step()
    waiting = engine.submit(wanted[3])
    gone = engine.submit(wanted[4])
    engine.step()
    assert (engine.running, engine.waiting) == (3, 2) and not waiting.tokens
    engine.cancel(gone)
    engine.cancel(running[1])
    assert (engine.running, engine.waiting) == (2, 1)
    said = list(running[1].tokens)
    assert 0 < len(said) < NEW and said == alone[1][: len(said)]
    assert finish(engine, [running[0], running[2], waiting]) == [alone[0], alone[2], alone[3]]
    assert running[1].tokens == said and running[1].finish == gone.finish == "cancelled"
    # also in the middle of reading a long prompt
    engine.reset()
    long = engine.submit(wanted[5])
    engine.step()
    assert not long.tokens and engine.running == 1
    engine.cancel(long)
    assert not engine.busy
    assert finish(engine, [engine.submit(wanted[5])]) == [alone[5]]


def test_the_next_turn_reads_only_what_is_new(lm, alone):
    engine = lm.engine(2, steps=4, cache_length=256)
    first = engine.submit(requests(lm)[0])
    finish(engine, [first])
    again = engine.submit(requests(lm)[0])
    assert finish(engine, [again]) == [alone[0]]
    assert again.reused == again.request.prompt.length - 1
    # another picture has the same tokens, but nothing of it has been read
    other = engine.submit(
        Request(
            lm.read(lm.prompt([user("what colour is the square in the picture", images=(1,))])),
            SETTINGS[0],
            NEW,
        )
    )
    finish(engine, [other])
    assert other.reused == 0
    # three answers to one prompt: it is read once, the others copy
    copies = [engine.submit(settings_of(requests(lm)[5], k)) for k in range(3)]
    tokens = finish(engine, copies)
    assert tokens[0] == alone[5] and len({tuple(t) for t in tokens}) == 3
    length = copies[0].request.prompt.length
    assert copies[0].reused < 4 and [answer.reused for answer in copies[1:]] == [length - 1] * 2


def test_encoders_see_each_picture_once(lm):
    engine = lm.engine(2, cache_length=256)
    ask = [
        [user(text, images=images)] for text in ("how many", "which") for images in ((0,), (1, 0), (0, 0, 2))
    ]
    answers = list(engine.run(Request(lm.read(lm.prompt(messages)), max_new_tokens=2) for messages in ask))
    assert len(answers) == 6 and engine.pool.encoded == 3


def test_the_pool_forgets_the_oldest_and_grows_if_it_must(lm):
    pool = FeaturePool(lm.programs, 8)
    media = [Medium({"pixel_values": np.full((1, 32, 32, 3), k / 8, np.float32)}, 4) for k in range(5)]

    def content(medium, places):
        first = places[medium.digest]
        return np.asarray(pool.array)[first : first + medium.features]

    def encoded(medium):
        single = FeaturePool(lm.programs, 4)
        single.place([[medium]])
        return np.asarray(single.array)

    for group in ([0, 1], [1], [2], [1, 3], [0]):
        (places,) = pool.place([[media[k] for k in group]])
        for k in group:
            np.testing.assert_allclose(content(media[k], places), encoded(media[k]), atol=1e-5)
    assert pool.encoded == 5  # 0 was forgotten, 1 was kept for being needed
    placed = pool.place([[media[0], media[1]], [media[2]]])
    assert len(placed) == 1  # no room for all three at once
    (places,) = pool.place([media])
    assert pool.capacity >= 20
    for medium in media:
        np.testing.assert_allclose(content(medium, places), encoded(medium), atol=1e-5)


class Only:
    """A guide that allows the given tokens, one after the other."""

    def __init__(self, tokens, vocab):
        self.tokens, self.vocab, self.seen = list(tokens), vocab, []

    def mask(self):
        bits = np.zeros(-(-self.vocab // 32) * 32, np.uint8)
        bits[self.tokens[len(self.seen)]] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token):
        self.seen.append(token)
        return len(self.seen) == len(self.tokens)


def test_guides_restrict_only_their_own_answer(lm, engine, alone):
    wanted = requests(lm)
    vocab = lm.programs.vocab_size
    guided = [
        engine.submit(Request(wanted[k].prompt, SETTINGS[k], NEW, guide=Only((k + 40, 50, 60 + k), vocab)))
        for k in (1, 2)
    ]
    free = engine.submit(wanted[0])
    assert finish(engine, [*guided, free]) == [[41, 50, 61], [42, 50, 62], alone[0]]
    assert [answer.finish for answer in guided] == ["stop", "stop"]


def test_a_watcher_ends_an_answer(lm, engine, alone):
    seen = []
    request = Request(
        requests(lm)[0].prompt,
        max_new_tokens=NEW,
        ignore_eos=True,
        watch=lambda t: seen.append(t) or len(seen) == 4,
    )
    answer = engine.submit(request)
    assert finish(engine, [answer]) == [alone[0][:4]] and seen == alone[0][:4]
    assert answer.finish == "stop"


def test_logprobs_are_those_of_the_full_forward_pass(lm, alone):
    engine = lm.engine(2, steps=4, cache_length=256)
    answer = engine.submit(requests(lm, logprobs=True)[2])
    finish(engine, [answer])
    prompt = answer.request.prompt
    batch = lm.batch(MESSAGES[2])
    length, new = prompt.length, len(answer.tokens)
    wide = {
        "tokens": answer.tokens,
        "segment_ids": 1,
        "positions": length + np.arange(new),
        "media_index": -1,
    }
    batch |= {
        name: np.concatenate([batch[name][:, :length], np.broadcast_to(value, (1, new))], axis=1)
        for name, value in wide.items()
    }
    logits = jax.nn.log_softmax(lm.apply(lm.params, batch)[0, length - 1 : -1])
    for row, token, found in zip(np.asarray(logits), answer.tokens, answer.logprobs, strict=True):
        assert found.logprob == pytest.approx(row[token], abs=1e-4)
        best = np.argsort(-row)[:20]
        np.testing.assert_allclose([value for _, value in found.top], row[best], atol=1e-4)


def test_vectors(lm, engine, alone):
    """Those of the full forward pass, read in pieces, beside answers under way, and none the others' business."""
    wanted = requests(lm)
    talking = [engine.submit(wanted[k]) for k in (0, 3)]
    engine.step()
    read = [engine.submit(request) for request in vectors(lm)]
    assert finish(engine, talking) == [alone[0], alone[3]]
    finish(engine, read)
    for messages, answer in zip(MESSAGES, read, strict=True):
        assert answer.finish == "stop" and not answer.tokens and answer.hidden.shape == (32,)
        length = answer.request.prompt.length
        hidden = lm.model.apply({"params": lm.params}, lm.batch(messages), method="hidden")
        np.testing.assert_allclose(answer.hidden, hidden[0, length - 1], atol=2e-4)
    assert not engine.busy
    # what has been read for a vector serves an answer
    engine.reset()
    finish(engine, [engine.submit(vectors(lm)[5])])
    after = engine.submit(wanted[5])
    assert finish(engine, [after]) == [alone[5]] and after.reused == after.request.prompt.length - 1
    engine.reset()


def test_nothing_compiles_after_warm_up(lm):
    """Every compilation of the process is counted, also those of stray operations outside the programs."""
    engine = lm.engine(
        2, steps=3, chunk=64, pieces=(1, 2), lengths=(32, 64), cache_length=128, max_length=128
    )
    media = lm.sample_media()
    assert len(media) == 2
    engine.warm_up(media)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    before = dict(lm.programs.traces)
    wanted = requests(lm, logprobs=True)
    answers = [engine.submit(request) for request in wanted]
    finish(engine, answers)
    again = [engine.submit(settings_of(request, k)) for k, request in enumerate(wanted)]
    engine.step()
    engine.cancel(again[0])
    finish(engine, again)
    guided = Request(wanted[1].prompt, max_new_tokens=3, guide=Only((5, 6, 7), lm.programs.vocab_size))
    finish(engine, [engine.submit(guided)])
    finish(engine, [engine.submit(request) for request in vectors(lm)])
    assert dict(lm.programs.traces) == before
    assert compiled == []


def test_an_interrupted_call_costs_only_what_was_under_way(lm, engine, alone, monkeypatch):
    """A program is given the state and may not come back with it."""
    answer = engine.submit(requests(lm)[0])
    for _ in range(5):
        engine.step()
    advance = Engine._advance

    def interrupted(self, *arguments):
        self._state = None
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(Engine, "_advance", advance)
    engine.step()
    assert answer.finish == "cancelled"
    assert finish(engine, [engine.submit(requests(lm)[0])]) == [alone[0]]


def test_refused_requests(lm, engine):
    prompt = requests(lm)[1].prompt
    with pytest.raises(UserError, match="over the limit of 256"):
        engine.submit(Request(prompt, max_new_tokens=256))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        engine.submit(Request(prompt, max_new_tokens=0))
    with pytest.raises(UserError, match="logit_bias names token 9999"):
        engine.submit(Request(prompt, Sampling(logit_bias={9999: 1.0})))
    assert not engine.busy
