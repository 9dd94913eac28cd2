import collections
import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from standins import DENSE, LAYOUT, Encode, Numbers

from mm_jax.data.pipeline import BatchConfig, TrainData, merge
from mm_jax.data.stream import share_out
from mm_jax.errors import UserError

BATCH = BatchConfig(rows=3, length=64, images=6, audio=4, bins=5)
SOURCES = {"a": Numbers("a", 40), "b": Numbers("b", 17), "pairs": Numbers("pairs", 30, pairs=True)}
BATCH_OF_4 = dataclasses.replace(BATCH, rows=4)
MIXTURE = {"b": 1.0, "a": 2.0}
MEDIA = Encode(images=1, audio=1)


def train_data(mixture=MIXTURE, batch=BATCH, encode=MEDIA, layout=LAYOUT, sources=SOURCES, **options):
    return TrainData(sources, mixture, batch, encode, layout, **options)


def take(data, count):
    return [next(data) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for (arrays, info), (others, other_info) in zip(first, second, strict=True):
        assert arrays.keys() == others.keys()
        for key, array in arrays.items():
            assert array.dtype == others[key].dtype
            np.testing.assert_array_equal(array, others[key], err_msg=key)
        assert info == other_info


def seen(batches):
    """(source number, sample number) of every example; stand-ins carry the latter as first token."""
    found = []
    for arrays, _ in batches:
        first = (arrays["positions"] == 0) & (arrays["segment_ids"] > 0)
        found += zip(arrays["sources"][first].tolist(), arrays["tokens"][first].tolist(), strict=True)
    return found


VARIANTS = {
    "media": {},
    "accumulate": {"batch": dataclasses.replace(BATCH, accumulate=2)},
    "dense": {"encode": Encode(images=2, audio=1, targets=True), "layout": DENSE},
    "pairs": {
        "mixture": {"pairs": 1},
        "batch": dataclasses.replace(BATCH, pairs=2),
        "encode": Encode(images=1),
    },
    "drops": {"encode": dataclasses.replace(MEDIA, bad=frozenset(f"a-{i}" for i in range(0, 40, 3)))},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_equals_uninterrupted_bit_for_bit(variant):
    with train_data(**VARIANTS[variant]) as data:
        whole = take(data, 12)
    with train_data(**VARIANTS[variant]) as data:
        take(data, 5)
        state = json.loads(json.dumps(data.state()))
        assert sum(map(len, state["streams"][0]["rows"])) > 0, "rows are open when the state is taken"
    with train_data(**VARIANTS[variant]) as data:
        data.restore(state)
        assert_same(take(data, 7), whole[5:])


def test_the_state_of_a_batch_does_not_depend_on_what_is_prepared_ahead():
    with train_data() as data:
        take(data, 3)
        state = data.state()
        data.close()
        rest = take(data, 2)  # goes on behind the last batch handed out
        data.restore(state)
        assert_same(take(data, 2), rest)


def test_workers_change_nothing_and_a_state_moves_between_them():
    with train_data() as data:
        whole = take(data, 8)
    for workers, other in ((1, 2), (2, 0)):
        with train_data(workers=workers) as data:
            assert_same(take(data, 4), whole[:4])
            state = data.state()
        with train_data(workers=other) as data:
            data.restore(state)
            assert_same(take(data, 4), whole[4:])


def test_every_sample_once_an_epoch():
    """Batches and open rows together hold exactly the samples of the stream so far: none lost, none twice."""
    with train_data({"a": 1.0}) as data:
        batches = take(data, 8)
        state = data.state()
        waiting = waiting_in(data)
    samples = [number for _, number in seen(batches)] + [int(sample.example.tokens[0]) for sample in waiting]
    assert len(samples) == state["streams"][0]["next_index"]
    epochs, rest = divmod(len(samples), 40)
    counts = collections.Counter(samples)
    assert epochs >= 2 and set(counts) == set(range(40))
    assert sorted(counts.values()) == [epochs] * (40 - rest) + [epochs + 1] * rest


def waiting_in(data):
    """The samples in the open rows."""
    return [
        sample
        for stream, state in zip(data.streams(), data._states, strict=True)
        for row in stream.open_rows(state["rows"]).rows
        for sample in row
    ]


def test_mixture_weights_are_shares_of_the_samples():
    with train_data({"a": 3.0, "b": 1.0, "pairs": 0.0}) as data:
        numbers = collections.Counter(source for source, _ in seen(take(data, 40)))
        assert data.names == ("a", "b", "pairs")
    assert set(numbers) == {0, 1}
    assert numbers[0] / sum(numbers.values()) == pytest.approx(0.75, abs=0.03)


def test_seed_decides_the_order():
    def first(seed):
        with train_data(seed=seed) as data:
            return take(data, 2)

    assert_same(first(1), first(1))
    assert seen(first(1)) != seen(first(2))


def test_processes_share_the_samples_and_each_has_the_whole_mixture():
    positions = {}
    for index in range(2):
        with train_data({"a": 1.0, "b": 1.0}, BATCH_OF_4, process=(index, 2)) as data:
            positions[index] = [(s.source, s.epoch, int(s.example.tokens[0])) for s in
                                (data.streams()[0]._regular[k] for k in range(40))]  # fmt: skip
    for index in range(2):
        assert collections.Counter(source for source, _, _ in positions[index]) == {"a": 20, "b": 20}
    both = positions[0] + positions[1]
    first_epoch = [number for source, epoch, number in both if (source, epoch) == ("a", 0)]
    assert sorted(first_epoch) == list(range(40))


def processes(count, state=None, batches=0, batch=BATCH_OF_4):
    """(batches of each process, their merged state) of `count` processes that go on from `state`."""
    found, states = [], []
    for index in range(count):
        with train_data(batch=batch, process=(index, count)) as data:
            if state is not None:
                data.restore(state)
            found.append(take(data, batches))
            states.append(json.loads(json.dumps(data.state())))
    return found, merge(states)


def whole(parts):
    """Batches of several processes as one: their rows behind one another, as the devices see them."""
    return [
        {key: np.concatenate([arrays[key] for arrays, _ in step]) for key in step[0][0]}
        for step in zip(*parts, strict=True)
    ]


def test_processes_that_divide_the_streams_see_the_same_batches():
    batch = dataclasses.replace(BATCH_OF_4, streams=4)
    expected = None
    for counts in ((1, 1), (4, 2), (2, 4), (4, 1)):
        state, found = None, []
        for count in counts:
            parts, state = processes(count, state, 4, batch)
            found += whole(parts)
        expected = expected or found
        for ours, theirs in zip(found, expected, strict=True):
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{counts}: {key}")


def test_accumulated_rows_of_streams_are_those_of_one_process():
    batch = dataclasses.replace(BATCH_OF_4, streams=2, accumulate=3)
    (one,), _ = processes(1, None, 2, batch)
    two, _ = processes(2, None, 2, batch)
    for k in range(2):
        both = np.concatenate([two[0][k][0]["tokens"], two[1][k][0]["tokens"]], axis=1)
        np.testing.assert_array_equal(one[k][0]["tokens"], both)


@pytest.mark.parametrize("counts", [(4, 2), (4, 3), (1, 2), (4, 1), (2, 3, 4, 1)])
def test_another_number_of_processes_loses_and_repeats_nothing(counts):
    """Every sample so often as its source has been gone through, whatever number of processes read it."""
    batch = dataclasses.replace(BATCH, rows=12)
    state, samples = None, collections.Counter()
    for count in counts:
        parts, state = processes(count, state, 3, batch)
        samples.update(("ab"[number], k) for part in parts for number, k in seen(part))
    # what waits in open rows and in streams that are behind stands in front of a stream that would go on alone
    order = train_data()._order
    origin, (alone,) = share_out(order, state["origin"], state["streams"], 1)
    for key in alone["head"]:
        samples[order.record(tuple(key))[::2]] += 1
    places = [(name, place) for name, end in origin.items() for place in range(end)]
    assert samples == collections.Counter(order.record(key)[::2] for key in places)
    assert len(places) > 3 * 57  # several epochs


def test_two_processes_go_on_with_the_streams_of_four():
    _, state = processes(4, None, 3)
    assert state == merge([{**state, "first": k, "streams": state["streams"][k:][:2]} for k in (2, 0, 0)])
    _, after = processes(2, state, 1)
    assert len(after["streams"]) == 4 and after["origin"] == {"a": 0, "b": 0}


def test_a_source_smaller_than_the_number_of_processes_is_a_clear_mistake():
    sources = {"few": Numbers("few", 3)}
    with pytest.raises(
        UserError, match='^source "few" holds 3 samples, fewer than the 4 processes or streams'
    ):
        train_data({"few": 1.0}, BATCH_OF_4, sources=sources, process=(0, 4))


def test_streams_must_divide_the_rows():
    with pytest.raises(UserError, match="batch.rows 3, read in 2 streams by 2 processes"):
        train_data(process=(0, 2))


def test_info_says_what_the_batch_holds():
    with train_data() as data:
        for arrays, info in take(data, 6):
            used = arrays["segment_ids"] > 0
            assert info.tokens == used.sum() and info.padding == pytest.approx(1 - used.mean())
            assert info.examples == ((arrays["positions"] == 0) & used).sum()
            assert info.images == (arrays["image_segment_ids"] > 0).sum()
            assert info.audio == (arrays["audio_segment_ids"] > 0).sum()
            for number, name in enumerate(data.names):
                trained = (arrays["loss_weights"] > 0) & (arrays["sources"] == number)
                assert info.trainable[name] == trained.sum()
        assert info.epochs["b"] >= 1 and info.drops == {}


def test_preference_pairs_are_numbered_by_their_place_in_the_source():
    sources = {"p": Numbers("p", 5, pairs=True), "q": Numbers("q", 7, pairs=True)}
    batch = BatchConfig(rows=2, length=80, pairs=2, bins=2)
    with train_data({"p": 1, "q": 1}, batch, Encode(median=5), sources=sources) as data:
        for arrays, _ in take(data, 6):
            chosen = (arrays["positions"] == 0) & (arrays["segment_ids"] % 2 == 1)
            for row in range(2):
                numbers = arrays["tokens"][row][chosen[row]] + 5 * arrays["sources"][row][chosen[row]]
                assert numbers.tolist() == [k for k in arrays["preference"][row] if k >= 0]


def test_bad_samples_are_counted_by_source_and_reason():
    bad = Encode(images=2, longest=200, median=40, bad=frozenset({"a-3", "a-4", "b-0"}))
    mixture = {"a": 1.0, "b": 1.0}
    with train_data(mixture, dataclasses.replace(BATCH, images=1), bad) as data:
        batches = take(data, 30)
        state = data.state()
        drops = data.drops
        assert data.drop_messages["a", "unreadable_image"].startswith('sample "a-')
    info = batches[-1][1]
    assert info.drops == drops == state["streams"][0]["drops"]
    assert set(drops["a"]) == {"unreadable_image", "too_long", "too_many_images"}
    used = sum(info.examples for _, info in batches) + sum(map(len, state["streams"][0]["rows"]))
    assert (
        used + sum(sum(reasons.values()) for reasons in drops.values()) == state["streams"][0]["next_index"]
    )
    assert not {(0, 3), (0, 4), (1, 0)} & set(seen(batches))


def test_strict_stops_at_the_first_bad_sample():
    encode = dataclasses.replace(MEDIA, bad=frozenset({"a-3"}))
    with train_data({"a": 1.0}, encode=encode, strict=True) as data:
        with pytest.raises(UserError, match='sample "a-3" of source "a": a-3 is bad'):
            take(data, 30)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_one_good_sample_stops_the_run(workers):
    bad = dataclasses.replace(MEDIA, bad=frozenset(f"b-{i}" for i in range(17)))
    with train_data(encode=bad, workers=workers) as data:
        with pytest.raises(UserError, match='source "b": none of 64 samples in a row .* unreadable_image'):
            take(data, 1000)


def broken(conversation):
    raise KeyError("no such field")


def test_any_exception_of_a_sample_is_a_counted_drop():
    with train_data({"b": 1.0}, encode=broken) as data:
        with pytest.raises(UserError, match="mostly error_KeyError"):
            next(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": {"aa": 1.0}}, 'unknown source "aa"; did you mean "a"'),
        ({"mixture": {"a": -1.0}}, 'weight of source "a" is -1.0'),
        ({"mixture": {"a": float("nan")}}, 'weight of source "a" is nan'),
        ({"mixture": {"a": 0.0}}, "no source has a weight above 0"),
        ({"mixture": {}}, "no source has a weight above 0"),
        ({"mixture": {"e": 1.0}, "sources": {"e": Numbers("e", 0)}}, 'source "e" .* holds no samples'),
        ({"workers": -1}, "workers is -1"),
        ({"process": (2, 2)}, "process index 2 is not one of 2"),
    ],
)
def test_mistakes_have_one_clear_line(options, message):
    with pytest.raises(UserError, match=message):
        train_data(**options)


def test_a_state_of_another_run_is_refused():
    with train_data() as data:
        next(data)
        state = data.state()
    for options, key in (
        ({"seed": 1}, "seed"),
        ({"mixture": {"a": 1.0, "b": 1.0}}, "mixture"),
        ({"batch": dataclasses.replace(BATCH, length=80)}, "budget"),
        ({"sources": {**SOURCES, "a": Numbers("a", 41)}}, "samples"),
    ):
        with train_data(**options) as data, pytest.raises(UserError, match=f"saved data state has {key}"):
            data.restore(state)


@pytest.mark.parametrize("ending", ["data.close()", "", "raise SystemExit(0)"])
def test_nothing_is_left_on_stderr(ending):
    """With two worker processes, whether the data is closed or the program just ends."""
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_pipeline import take, train_data
        if __name__ == "__main__":
            data = train_data(workers=2)
            take(data, 3)
            {ending}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
