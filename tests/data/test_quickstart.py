"""The quickstart data set: the same every time, no item in two splits, and answers that fit the pictures."""

import io
import itertools
import json
import random
import subprocess
import sys
import wave
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mm_jax.data.quickstart import SIZES, prepare
from mm_jax.data.quickstart.builder import DECODERS, MODULES, MmJaxQuickstart, QuickstartConfig, item
from mm_jax.data.quickstart.digits import partition
from mm_jax.data.quickstart.paint import COLOURS
from mm_jax.data.quickstart.sample import SPLITS, split_of
from mm_jax.data.quickstart.shapes import SHAPES, draw_scene, paint
from mm_jax.data.quickstart.speech import NEW_VOICES, TRAIN_VOICES
from mm_jax.errors import UserError


def messages(record: dict) -> list[dict]:
    return json.loads(record["conversation"])["messages"]


def turns(record: dict) -> list[tuple[str, str, object]]:
    """(task, question, answer) of each turn."""
    result = []
    said = messages(record)
    for user, assistant in zip(said[::2], said[1::2], strict=True):
        question = user["content"] if isinstance(user["content"], str) else user["content"][-1]["text"]
        result.append((assistant["task"], question, assistant["content"]))
    return result


def media(record: dict, kind: str) -> list[dict]:
    content = messages(record)[0]["content"]
    return [part for part in content if isinstance(part, dict) and part["type"] == kind]


def pictures(record: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in record["images"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A prepared data set of a few scenes with sound."""
    config = QuickstartConfig(name="tiny", kind="sound_scenes", train=6, validation=2, test=3)
    builder = MmJaxQuickstart(
        config=config, data_dir=str(tmp_path_factory.mktemp("data")), file_format="array_record"
    )
    builder.download_and_prepare()
    return builder


def test_reads_back_without_tensorflow(tiny):
    source = tfds.builder_from_directory(tiny.data_path).as_data_source(split="train", decoders=DECODERS)
    assert len(source) == 6
    for index in range(6):
        record, made = source[index], item("sound_scenes", "train", index)
        assert record["id"].decode() == made["id"]
        assert record["conversation"].decode() == made["conversation"]
        assert list(record["images"]) == made["images"]
        assert list(record["audio"]) == made["audio"]
    assert "tensorflow" not in sys.modules


def test_every_config_is_registered():
    assert set(MmJaxQuickstart.builder_configs) == set(SIZES)
    assert len(SIZES) == 2 * len(MODULES) == 20
    for name, config in MmJaxQuickstart.builder_configs.items():
        assert (config.train, config.test) == (SIZES[name].train, SIZES[name].test)


def test_prepare_writes_only_what_is_missing(tmp_path):
    (path,) = prepare(["text"], tmp_path, processes=1)
    stamp = (path / "dataset_info.json").stat().st_mtime_ns
    assert prepare(["text"], tmp_path, processes=1) == [path]
    assert (path / "dataset_info.json").stat().st_mtime_ns == stamp
    # What a killed run leaves behind: the directory under its temporary name, some files written.
    path.rename(path.with_name(f"incomplete.XYZ_{path.name}"))
    path.mkdir()  # or, copied by hand, a directory without its last file
    assert prepare(["text"], tmp_path, processes=1) == [path]
    assert len(tfds.builder_from_directory(path).as_data_source(split="test")) == SIZES["text"].test


def test_prepare_names_the_nearest_config(tmp_path):
    with pytest.raises(UserError, match='no config "scene"; did you mean "scenes"'):
        prepare(["scene"], tmp_path)


@pytest.mark.parametrize("kind", MODULES)
def test_an_item_depends_on_kind_split_and_index_alone(kind):
    first = [item(kind, "test", index) for index in (0, 1)]
    item(kind, "train", 5)  # state left behind by other items changes nothing
    assert [item(kind, "test", index) for index in (1, 0)] == first[::-1]


def test_items_are_the_same_in_another_process():
    code = (
        "import hashlib\nfrom mm_jax.data.quickstart.builder import item\n"
        "for kind in ('scenes', 'speech', 'charts', 'ocr'):\n"
        "    record = item(kind, 'train', 7)\n"
        "    print(hashlib.sha256(repr(record).encode()).hexdigest())\n"
    )
    # Hash seeds differ, so that an order that came from a set would show.
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and len(outputs[0].split()) == 4


@pytest.mark.parametrize("kind", MODULES)
def test_form_of_the_records(kind):
    for split in SPLITS:
        for index in range(12):
            record = item(kind, split, index)
            asked = turns(record)
            if split != "train" and kind != "dialogues":
                assert len(asked) == 1
            assert len({question for _, question, _ in asked}) == len(asked)
            for task, question, answer in asked:
                assert task and question == question.lower() and question[-1] in ".?"
                assert "{" not in question
                if isinstance(answer, str):
                    assert answer and answer == answer.lower()
                else:
                    boxes = [part for part in answer if part["type"] == "box"]
                    assert boxes
                    assert len(boxes) == 1 or task == "list_boxes"
            assert len(media(record, "image")) == len(record["images"])
            assert len(media(record, "audio")) == len(record["audio"])


@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind not in ("speech", "text")])
def test_regions_lie_inside_pictures_of_sensible_size(kind):
    for index in range(20):
        record = item(kind, "train", index)
        for picture, part in zip(pictures(record), media(record, "image"), strict=True):
            assert 24 <= min(picture.size) and max(picture.size) <= 176
            assert part["regions"]
            for region in part["regions"]:
                x0, y0, x1, y1 = region["box"]
                assert 0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height, region


def test_label_vocabulary_is_small():
    words = set()
    for kind in MODULES:
        for index in range(60):
            record = item(kind, "train", index)
            for part in media(record, "image") + media(record, "audio"):
                words |= {word for region in part["regions"] for word in region["label"].split()}
    assert {"red", "circle", "digit_7", "bar_a", "spoken_red"} <= words
    assert len(words) < 150


def test_letters_know_their_place_in_the_word():
    record = item("ocr", "train", 3)  # two lines
    marks = [region["label"].split() for region in media(record, "image")[0]["regions"]]
    for task, question, answer in turns(record):
        line = "_line_0" if "top" in question or "upper" in question else "_line_1"
        mine = [words for words in marks if words[2] == line]
        assert task == "ocr" and "".join(words[0][-1] for words in mine) == answer
        assert [words[1] for words in mine] == [f"_place_{k}" for k in range(len(answer))]


def test_digit_scans_are_partitioned():
    parts = {split: [i for digit in digits for i in digit] for split, digits in partition().items()}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    assert sorted(sum(parts.values(), [])) == list(range(1797))


def test_held_out_words_are_never_in_training():
    answers = {
        split: {answer for i in range(300) for _, _, answer in turns(item("ocr", split, i))}
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not answers[a] & answers[b]
    assert split_of("word dog") == "test"  # a change of the rule would move words between releases


@pytest.mark.parametrize("kind", ["numbers", "ocr", "tables", "charts", "scenes", "dialogues"])
def test_no_record_in_two_splits(kind):
    seen = {}
    for split in SPLITS:
        for index in range(80):
            record = item(kind, split, index)
            assert seen.setdefault(tuple(record["images"]), split) == split


def test_held_out_facts_are_never_asked_in_training():
    asked = {s: {q for i in range(200) for _, q, _ in turns(item("text", s, i))} for s in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not asked[a] & asked[b]


def test_new_voices_are_kept_for_testing():
    used = {split: {item("speech", split, i)["id"].split("-", 3)[3] for i in range(60)} for split in SPLITS}
    assert used["train"] <= set(TRAIN_VOICES)
    assert used["test"] & set(NEW_VOICES["test"]) and used["test"] & set(TRAIN_VOICES)
    assert not set(TRAIN_VOICES) & {*NEW_VOICES["test"], *NEW_VOICES["validation"]}


def test_speech_is_wav_with_a_region_for_each_word():
    for index in range(25):
        record = item("speech", "train", index)
        with wave.open(io.BytesIO(record["audio"][0])) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        seconds = len(sound) / 16000
        assert 0.15 < seconds <= 1.5
        regions = media(record, "audio")[0]["regions"]
        spoken = [region["label"].removeprefix("spoken_") for region in regions]
        task = "speech" if len(spoken) == 1 else "speech_pair"
        assert {task: " ".join(spoken)}.items() <= {task: a for task, _, a in turns(record)}.items()
        for region in regions:
            start, end = region["box"]
            assert 0 <= start < end <= seconds + 1e-3
            inside = np.sqrt(np.mean(sound[int(start * 16000) : int(end * 16000)] ** 2))
            assert inside > 0.02


@pytest.mark.parametrize(("kind", "task"), [("scenes", "exists"), ("sound_scenes", "sound_exists")])
def test_yes_and_no_are_balanced(kind, task):
    held_out = Counter(
        answer for index in range(96) for name, _, answer in turns(item(kind, "test", index)) if name == task
    )
    assert held_out["yes"] == held_out["no"] > 0
    train = Counter(a for i in range(300) for name, _, a in turns(item(kind, "train", i)) if name == task)
    assert 0.42 < train["yes"] / (train["yes"] + train["no"]) < 0.58


def test_answers_about_scenes_are_true():
    seen = Counter()
    for index in range(300):
        record = item("scenes", "train", index)
        regions = media(record, "image")[0]["regions"]
        names = [region["label"] for region in regions]
        for task, question, answer in turns(record):
            asked = [n for n in (f"{c} {s}" for c in COLOURS for s in SHAPES) if n in question]
            if task == "exists":
                assert answer == ("yes" if asked[0] in names else "no"), (names, question)
                if answer == "no":
                    colour, shape = asked[0].split()
                    seen["hard"] += any(colour in n for n in names) or any(shape in n for n in names)
                    seen["no"] += 1
            elif task == "grounding":
                assert [tuple(answer[0]["box"])] == [
                    tuple(r["box"]) for r in regions if r["label"] == asked[0]
                ]
            elif task == "count":
                kinds = [w for w in (*COLOURS, *SHAPES) if w in question.replace("shapes", "")]
                assert answer == str(sum(not kinds or kinds[0] in n.split() for n in names)), (
                    names,
                    question,
                )
            elif task == "colour":
                shape = next(s for s in SHAPES if s in question)
                assert [n.split()[0] for n in names if n.endswith(shape)] == [answer]
            elif task == "shape":
                colour = next(c for c in COLOURS if c in question)
                assert [n.split()[1] for n in names if n.startswith(colour)] == [answer]
            elif task == "position":
                x0, y0, x1, y1 = next(r["box"] for r in regions if r["label"] == asked[0])
                width, height = pictures(record)[0].size
                rows, columns = ("top", "bottom"), ("left", "right")
                assert answer == f"{rows[y0 + y1 > height]} {columns[x0 + x1 > width]}"
            elif task == "caption":
                assert Counter(n for n in answer.replace(",", "").split() if n in SHAPES) == Counter(
                    n.split()[1] for n in names
                )
            seen[task] += 1
    assert (
        min(seen[t] for t in ("caption", "count", "colour", "shape", "position", "relation", "grounding"))
        > 20
    )
    assert seen["hard"] > 0.8 * seen["no"]


def test_surveys_say_something_true_of_every_thing():
    seen = Counter()
    for index in range(300):
        record = item("scenes", "train", index)
        regions = media(record, "image")[0]["regions"]
        names = [region["label"] for region in sorted(regions, key=lambda r: r["box"][0] + r["box"][2])]
        tasks = [task for task, _, _ in turns(record)]
        for task, question, answer in turns(record):
            said = answer.split(", ") if isinstance(answer, str) else []
            if task == "list_colours":
                assert Counter(said) == Counter(" ".join(reversed(name.split())) for name in names)
            elif task == "list_boxes":
                found = [part["text"].removeprefix(", ") for part in answer[::2]]
                boxes = {(r["label"], *r["box"]) for r in regions}
                assert {(name, *part["box"]) for name, part in zip(found, answer[1::2], strict=True)} == boxes
            elif task == "list_places":
                assert Counter(" ".join(place.split()[:2]) for place in said) == Counter(names)
                assert {" ".join(place.split()[2:]) for place in said} <= {
                    f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")
                }
            elif task in ("count_shapes", "count_colours"):
                words = Counter(name.split()[task == "count_shapes"] for name in names)
                assert said == [f"{word} {words[word]}" for word in (*SHAPES, *COLOURS) if words[word]]
            elif task == "check":
                assert len(said) == 3
                for name, verdict in (one.rsplit(" ", 1) for one in said):
                    assert name in question
                    assert verdict == ("yes" if name in names else "no")
            else:
                continue
            assert task == tasks[-1]  # what tells much comes last
            seen[task] += 1
    assert len(seen) == 6
    assert min(seen.values()) > 10


def test_answers_about_the_spoken_colour_are_true():
    for index in range(60):
        record = item("sound_scenes", "train", index)
        colour = media(record, "audio")[0]["regions"][0]["label"].removeprefix("spoken_")
        names = [region["label"].split() for region in media(record, "image")[0]["regions"]]
        shapes = [shape for hue, shape in names if hue == colour]
        for task, _, answer in turns(record):
            truth = {"sound_exists": "yes" if shapes else "no", "sound_count": str(len(shapes))}
            assert answer == truth.get(task, shapes[0] if shapes else None)


def test_boxes_enclose_the_coloured_pixels():
    for seed in range(60):
        rng = random.Random(seed)
        scene = draw_scene(rng)
        pixels = np.asarray(paint(rng, scene).image).astype(int)
        coloured = np.abs(pixels - np.array(scene.paper)).sum(-1) > 30
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            rows, columns = slice(round(y0), round(y1)), slice(round(x0), round(x1))
            assert coloured[rows, columns].mean() > 0.25  # a star fills a third of its box
            ys, xs = np.nonzero(coloured[rows, columns])
            assert xs.min() <= 1 and ys.min() <= 1
            assert xs.max() >= round(x1) - round(x0) - 2 and ys.max() >= round(y1) - round(y0) - 2
        for x0, y0, x1, y1 in (thing.box for thing in scene.things):
            coloured[max(0, int(y0) - 1) : int(y1) + 2, max(0, int(x0) - 1) : int(x1) + 2] = False
        assert not coloured.any()


def test_bars_are_as_high_as_the_answers_say():
    for index in range(20):
        record = item("charts", "train", index)
        marks = [(r["label"].split(), r["box"]) for r in media(record, "image")[0]["regions"]]
        bars = {words[0][4:]: box for words, box in marks if words[0].startswith("bar_")}
        told = {words[0][4:]: words[1][6:] for words, _ in marks if words[0].startswith("bar_")}
        height = {letter: box[3] - box[1] for letter, box in bars.items()}
        values = [(q, a) for task, q, a in turns(record) if task == "chart_value"]
        for question, answer in values:
            letter = next(word for word in question.strip("?.").split()[::-1] if word in bars)
            assert told[letter] == answer
            unit = height[letter] / int(answer)
            assert all(abs(h / unit - round(h / unit)) < 0.15 for h in height.values())
        for task, _, answer in turns(record):
            if task == "chart_highest":
                assert answer == max(height, key=height.get)
            if task == "chart_lowest":
                assert answer == min(height, key=height.get)


def test_table_answers_stand_in_the_named_cell():
    for index in range(30):
        record = item("tables", "train", index)
        marks = [(r["label"].split(), r["box"]) for r in media(record, "image")[0]["regions"]]
        glyphs = [(words[0][6:], box) for words, box in marks]
        centre = {letter: ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for letter, b in glyphs if letter.isalpha()}
        for _, question, answer in turns(record):
            words = question.replace(",", " ").strip("?.").split()
            row, column = words[words.index("row") + 1], words[words.index("column") + 1]
            x, y = centre[column][0], centre[row][1]
            cell = [
                letter
                for letter, b in glyphs
                if letter.isdigit() and abs((b[0] + b[2]) / 2 - x) < 14 and abs((b[1] + b[3]) / 2 - y) < 8
            ]
            assert "".join(cell) == answer
            named = [words for words, _ in marks if {f"row_{row}", f"column_{column}"} <= set(words)]
            assert [words[0][6:] for words in named] == list(answer)
            assert [words[-1] for words in named] == [f"_place_{k}" for k in range(len(answer))]
