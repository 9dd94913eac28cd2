import dataclasses
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import tensorflow_datasets as tfds
from PIL import Image as PillowImage

from mm_jax.data.messages import Audio, Conversation, Image, Message, Text
from mm_jax.data.sources import SourceConfig, llava_to_chat, open_source
from mm_jax.errors import UserError

TURNS = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "zwei \u2603"}]


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (width, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def chat_file(folder, lines):
    path = folder / "chat.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_chat_lines(tmp_path):
    picture = [{"role": "user", "content": [{"type": "image", "image": "pictures/a.png"}]}, TURNS[1]]
    path = chat_file(tmp_path, [{"id": "x", "messages": TURNS}, "", {"messages": picture}, "  "])
    source = open_source("mine", SourceConfig("chat", str(path)))
    assert len(source) == 2
    assert source[0] == Conversation(
        (Message("user", (Text("how many?"),)), Message("assistant", (Text("zwei \u2603"),))), "x", "mine"
    )
    assert source[1].id == "chat.jsonl:3"  # a sample without an id is known by its line
    assert source[1].images() == [Image(str(tmp_path / "pictures/a.png"))]
    with pytest.raises(IndexError):
        source[2]


def test_a_bad_line_is_named_when_it_is_read_and_spares_the_others(tmp_path):
    empty = {"id": "e", "messages": []}
    path = chat_file(tmp_path, [{"messages": TURNS}, "", '{"messages": [', "[1]", empty, {"messages": TURNS}])
    source = open_source("mine", SourceConfig("chat", str(path)))
    assert len(source) == 5
    with pytest.raises(UserError, match=r"chat\.jsonl:3: not valid JSON") as caught:
        source[1]
    assert caught.value.reason == "bad_json"
    with pytest.raises(UserError, match=r"chat\.jsonl:4: expected a JSON object, found list"):
        source[2]
    with pytest.raises(UserError, match=r'chat\.jsonl:5: sample "e"') as caught:
        source[3]
    assert caught.value.reason == "empty_conversation"
    assert source[4].messages[1].parts == (Text("zwei \u2603"),)


def test_sources_are_pickled_and_read_by_threads(tmp_path):
    answers = [{"role": "assistant", "content": "é" * (k % 7)} for k in range(300)]
    lines = [{"id": str(k), "messages": [TURNS[0], answer]} for k, answer in enumerate(answers)]
    source = open_source("mine", SourceConfig("chat", str(chat_file(tmp_path, lines))))
    expected = [source[k] for k in range(300)]
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.__getitem__, range(300))) == expected


LLAVA = [
    {"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhät?"}, {"from": "gpt", "value": "A \u2603, [1, 2]}."}]},
    {"id": "2", "image": ["b.png", "sub/c.png"],
     "conversations": [{"from": "human", "value": "<image> or <image>"}, {"from": "gpt", "value": "both"}]},
    {"id": "3", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"id": "4", "image": "a.png",
     "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "?"}]},
]  # fmt: skip


@pytest.mark.parametrize("layout", [{"indent": 2}, {}, {"ensure_ascii": False}])
def test_llava_list(tmp_path, layout):
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(LLAVA, **layout), encoding="utf-8")
    source = pickle.loads(pickle.dumps(open_source("l", SourceConfig("llava", str(path)))))
    assert len(source) == 4
    first = source[0]
    assert (first.id, first.source) == ("1", "l")
    assert first.messages[0] == Message("user", (Image(str(tmp_path / "a.png")), Text("Whät?")))
    assert first.messages[1] == Message("assistant", (Text("A \u2603, [1, 2]}."),))
    assert source[1].images() == [Image(str(tmp_path / "b.png")), Image(str(tmp_path / "sub/c.png"))]
    assert source[2].images() == []
    with pytest.raises(UserError, match="2 <image> placeholders but 1 image"):
        source[3]


def test_llava_speakers():
    assert llava_to_chat({"conversations": [{"from": "human", "value": "<image> Hi"}], "image": "a.png"}) == {
        "id": "", "messages": [{"role": "user", "content": "<image> Hi"}], "images": ["a.png"]}  # fmt: skip
    with pytest.raises(UserError, match='unknown LLaVA speaker "humman"; did you mean "human"'):
        llava_to_chat({"conversations": [{"from": "humman", "value": ""}]})
    with pytest.raises(UserError, match="without the list"):
        llava_to_chat({"id": "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1},\n {"id": 2]', "llava.json:2: not valid JSON"),
        ('[{"id": 1}\n {"id": 2}]', "llava.json:2: not valid JSON .expected ','"),
        ('[{"id": 1},\n]', "llava.json:2: not valid JSON .an item must follow"),
        ('[{"id": 1}', "llava.json:1: not valid JSON"),
        ('{"id": 1}', "llava.json:1: .*must start with"),
        ("", "llava.json:1: .*must start with"),
        ("[ ]", "llava.json holds no samples"),
    ],
)
def test_bad_llava_file(tmp_path, text, message):
    path = tmp_path / "llava.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        open_source("l", SourceConfig("llava", str(path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SourceConfig("chat", "nowhere.jsonl"), 'source "s": no file nowhere.jsonl'),
        (SourceConfig("chatt", "x"), 'unknown kind "chatt"; did you mean "chat"'),
        (SourceConfig("chat", "x", mapping="a:b"), "a mapping is for tfds sources"),
        (SourceConfig("tfds", "./nowhere"), "no dataset_info.json there"),
        (SourceConfig("tfds", "data/my_digits/1.0.0"), "no dataset_info.json there"),
        (SourceConfig("tfds", "no_such_builder_at_all"), "no builder has this name"),
        (SourceConfig("tfds", "mm_jax_quickstart/digitz"), 'no config "digitz"; did you mean "digits"'),
        (SourceConfig("tfds", "mm_jax_quickstart/digits"), "not prepared in .*python -m mm_jax data"),
        (SourceConfig("tfds", "x", mapping="nowhere:f"), 'mapping "nowhere:f" cannot be imported'),
        (SourceConfig("tfds", "x", mapping="json:nothing"), 'mapping "json:nothing" cannot be imported'),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        open_source("s", config, tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        open_source("s", SourceConfig("chat", str(chat_file(tmp_path, ["", " "]))))


class SourcesProbe(tfds.core.GeneratorBasedBuilder):
    """Two pictures in the second record, one clip in the first; a label for the custom mapping."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "conversation": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "audio": tfds.features.Sequence(tfds.features.Text()),
            "picture": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(3):
            parts = [{"type": "image", "image": i} for i in range(k)]
            parts += [{"type": "audio", "audio": 0}] if k == 0 else []
            turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}, TURNS[1]]
            yield (
                k,
                {
                    "id": f"r{k}",
                    "conversation": json.dumps({"messages": turns}) if k < 2 else "not JSON",
                    "images": [png(8 + i) for i in range(k)],
                    "audio": [b"RIFF\xff\x00"] if k == 0 else [],
                    "picture": png(20),
                    "label": k % 2,
                },
            )


def as_conversation(record):
    """A mapping of a user: an image classification record."""
    answer = Message("assistant", (Text(("cat", "dog")[record["label"]]),))
    return Conversation((Message("user", (Image(record["picture"]),)), answer))


def as_json(record):
    return json.loads(record["conversation"]) | {"id": "mapped"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = SourcesProbe(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_tfds_by_directory_and_by_name(prepared):
    by_directory = open_source("t", SourceConfig("tfds", str(prepared.data_path)))
    by_name = open_source("t", SourceConfig("tfds", "sources_probe"), prepared.data_path.parent.parent)
    for source in (by_directory, by_name, pickle.loads(pickle.dumps(by_directory))):
        assert len(source) == 3
        assert (source[0].id, source[0].source) == ("r0", "t")
        assert source[0].audio() == [Audio(b"RIFF\xff\x00")]
        assert source[1].images() == [Image(png(8))]  # encoded bytes, as they were given
        assert source[1].messages[1].parts == (Text("zwei \u2603"),)
        with pytest.raises(UserError, match='record 2: .*"conversation" is not valid JSON') as caught:
            source[2]
        assert caught.value.reason == "bad_json"


def test_tfds_mapping(prepared):
    config = SourceConfig("tfds", str(prepared.data_path), mapping=f"{__name__}:as_conversation")
    source = open_source("m", config)
    assert source[1].messages[0].parts == (Image(png(20)),)
    assert source[1].messages[1].parts == (Text("dog"),)
    assert (source[1].id, source[1].source) == ("train:1", "m")
    mapped = open_source("m", dataclasses.replace(config, mapping=f"{__name__}:as_json"))
    assert mapped[1].id == "mapped" and mapped[1].images() == [Image(png(8))]


def test_tfds_splits(prepared):
    path = str(prepared.data_path)
    assert len(open_source("t", SourceConfig("tfds", path, "train[:2]"))) == 2
    with pytest.raises(UserError, match='no split "trian"; did you mean "train"'):
        open_source("t", SourceConfig("tfds", path, "trian"))
    with pytest.raises(UserError, match="bad split"):
        open_source("t", SourceConfig("tfds", path, "train[x]"))


def test_tfrecord_data_sets_are_refused(prepared, tmp_path):
    """The same directory, described as tfrecord: the format decides before any record is read."""
    for file in prepared.data_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = tmp_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match='stored as tfrecord.*file_format="array_record"'):
        open_source("t", SourceConfig("tfds", str(tmp_path)))
