"""Checkpoints that transformers wrote are trained with their own processors, and written as such checkpoints again."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.checkpoint.run import load_params  # noqa: E402
from mm_jax.cli.main import main  # noqa: E402
from mm_jax.data.messages import conversation_from_json  # noqa: E402
from mm_jax.data.packing import BatchConfig, Layout, collate  # noqa: E402
from mm_jax.data.pipeline import TrainData  # noqa: E402
from mm_jax.data.sources import SourceConfig, open_source  # noqa: E402
from mm_jax.models import MultimodalConfig  # noqa: E402
from mm_jax.train import loop  # noqa: E402
from mm_jax.train.config import CheckpointConfig, InitConfig, OptimizerConfig, RunConfig, Stage, check  # noqa: E402
from mm_jax.train.encode import Encode  # noqa: E402
from mm_jax.train.metrics import read_metrics  # noqa: E402
from mm_jax.train.setup import prepare  # noqa: E402
from mm_jax.train.start import first_params  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity import test_anyres as anyres  # noqa: E402
from tests.parity import test_family_chat as family_chat  # noqa: E402
from tests.parity import test_internvl_chat as internvl  # noqa: E402
from tests.parity import test_llava_chat as llava  # noqa: E402
from tests.parity import test_mllama as mllama  # noqa: E402
from tests.parity import test_qwen_chat as qwen  # noqa: E402


def build_instructblip(directory) -> None:
    """Its Q-Former reads the questions too."""
    config, processor = family_chat.instructblip(directory)
    kind = "InstructBlipForConditionalGeneration"
    theirs.build(config, directory, kind, scales=family_chat.SCALES | {"embed_tokens": 0.4})
    processor.save_pretrained(directory)


# (builder, class, slots of a row, the token that ends an answer in the template)
SYSTEMS = {
    "llava": (lambda d: llava.build("crop", d), "LlavaForConditionalGeneration", 6, ""),
    "llava_next": (lambda d: anyres.build("next", d), "LlavaNextForConditionalGeneration", 16, ""),
    "internvl": (internvl.build, "InternVLForConditionalGeneration", 16, "<|im_end|>"),
    "qwen2_vl": (qwen.build, "Qwen2VLForConditionalGeneration", 512, "<|im_end|>"),
    "mllama": (mllama.build_chat, "MllamaForConditionalGeneration", 6, "<|im_end|>"),
    "instructblip": (build_instructblip, "InstructBlipForConditionalGeneration", 7, "</s>"),
}
SIZES = [(60, 31), (17, 40), (33, 33), (24, 90)]
ANSWER = "a red circle"


def write_data(root: Path) -> Path:
    """Conversations of several turns and sizes, with no picture, one and two."""
    lines = []
    for k, size in enumerate(SIZES):
        hosts.picture(*size, seed=k).save(root / f"{k}.png")
        pictures = [{"type": "image", "image": f"{n}.png"} for n in ((k,) if k % 2 else (k, (k + 1) % 4))]
        question = {
            "role": "user",
            "content": [*pictures, {"type": "text", "text": "what is in the picture?"}],
        }
        more = [
            {"role": "user", "content": "how many?"},
            {"role": "assistant", "content": f"there are {k} digits"},
        ]
        lines.append([question, {"role": "assistant", "content": ANSWER}, *more[: 2 * (k % 2)]])
    lines.append([{"role": "user", "content": "what is 1 and 2?"}, {"role": "assistant", "content": "3"}])
    path = root / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


def config_of(directory: Path, data: Path, slots: int, **init) -> RunConfig:
    align = Stage(
        steps=4,
        mixture={"chat": 1.0},
        trainable=(".*projector",),
        answer_weight="token",
        batch=BatchConfig(rows=2, length=256, images=slots, bins=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
    )
    return RunConfig(
        name="tuned",
        init=InitConfig(checkpoint=str(directory), **init),
        model=MultimodalConfig(None, None),
        processor=None,
        sources={"chat": SourceConfig("chat", str(data))},
        stages={
            "align": align,
            "instruct": replace(
                align,
                trainable=(".*projector", "decoder"),
                optimizer=replace(align.optimizer, learning_rate=2e-3),
                batch=replace(align.batch, rows=1, accumulate=2),
            ),
        },
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=2),
    )


def begin(name: str, root: Path, data: Path) -> RunConfig:
    """Both stages of one of `SYSTEMS` on some conversations, from the checkpoint that is written to root / "hf"."""
    build, _, slots, stop = SYSTEMS[name]
    build(root / "hf")
    if stop:
        ids = transformers.AutoTokenizer.from_pretrained(root / "hf").convert_tokens_to_ids([stop])
        (root / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return config_of(root / "hf", data, slots)


@pytest.fixture(scope="module", params=SYSTEMS)
def tuned(request, tmp_path_factory):
    """(name, the checkpoint, the config, a run that nobody interrupted)"""
    root = tmp_path_factory.mktemp(request.param)
    config = begin(request.param, root, write_data(root))
    check(config)
    assert loop.train(config, root / "run")
    return request.param, root / "hf", config, root / "run"


def flat(params) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}


def test_a_stage_moves_what_it_names(tuned):
    """From the checkpoint's weights on, bit for bit; the loss falls; one program a stage."""
    _, directory, _, run = tuned
    before = flat(mm_jax.load(directory).params)
    for stage, moved in (("align", {"image_projector"}), ("instruct", {"image_projector", "decoder"})):
        after = flat(load_params(run, stage))
        assert after.keys() == before.keys()
        changed = {path for path in after if not np.array_equal(before[path], after[path])}
        assert {path.split("/")[0] for path in changed} == moved
        before = after
    lines = [x for x in read_metrics(run) if "loss" in x]
    assert [(x["stage"], x["step"]) for x in lines] == [
        (s, k) for s in ("align", "instruct") for k in range(1, 5)
    ]
    assert all(x["compilations"] == 1 and x["dropped"] == 0 for x in lines)
    losses = [x["loss"] for x in lines]
    assert losses[3] < losses[0] and losses[7] < losses[4] < losses[0]


def test_only_answers_are_trained_on(tuned):
    """By the text of the trained tokens, from the family's template: each answer and what ends it."""
    name, _, config, run = tuned
    setup = prepare(config, run)
    encode = Encode.of(setup.processor, config.stages["align"])
    stop = SYSTEMS[name][3]
    for k, answers in ((0, [ANSWER]), (1, [ANSWER, "there are 1 digits"]), (4, ["3"])):
        example = encode(setup.sources["chat"][k])
        trained = example.tokens[example.loss_weights > 0]
        text = setup.processor.tokenizer.decode(trained, special=True)
        between = "" if name == "instructblip" else stop  # its earlier answers stand in the question
        expected = between.join(answers) + stop
        assert "".join(text.split()) == "".join(expected.split())  # blanks are the tokenizers' own
        assert not example.loss_weights[example.image_index != -1].any()


def test_packed_equals_unpacked(tuned):
    """Logits and losses of conversations that share a row are those of each alone."""
    name, directory, config, run = tuned
    lm, setup = mm_jax.load(directory), prepare(config, run)
    encode, layout = Encode.of(setup.processor, config.stages["align"]), Layout.of(setup.processor)
    examples = [replace(encode(setup.sources["chat"][k]), source="chat") for k in range(5)]
    slots = SYSTEMS[name][2]
    size = BatchConfig(rows=2, length=448, images=slots)
    packed = collate(
        [[examples[4], examples[0], examples[1]], [examples[2], examples[3]]], size, layout, {"chat": 0}
    )
    alone = collate([[e] for e in examples], replace(size, rows=5), layout, {"chat": 0})
    apply = jax.jit(lm.apply)
    together, single = np.asarray(apply(lm.params, packed)), np.asarray(apply(lm.params, alone))
    for row, segment, k in ((0, 1, 4), (0, 2, 0), (0, 3, 1), (1, 1, 2), (1, 2, 3)):
        real = packed["segment_ids"][row] == segment
        assert real.sum() == examples[k].length
        expected = single[k, : examples[k].length]
        assert 0.1 < expected.std() < 10 and np.abs(together[row][real] - expected).max() < 2e-5
        assert np.array_equal(packed["positions"][row][real], alone["positions"][k, : examples[k].length])
    assert packed["loss_weights"].sum() == alone["loss_weights"].sum()


def test_batches_keep_their_shapes(tuned):
    """Whatever pictures a batch holds."""
    _, _, config, run = tuned
    setup, stage = prepare(config, run), config.stages["align"]
    encode = Encode.of(setup.processor, stage)
    sources = {"chat": open_source("chat", config.sources["chat"])}
    with TrainData(sources, stage.mixture, stage.batch, encode, Layout.of(setup.processor)) as data:
        batches = [next(data) for _ in range(6)]
    assert len({tuple((k, v.shape, v.dtype) for k, v in batch.items()) for batch, _ in batches}) == 1
    assert len({info.images for _, info in batches}) > 1


def test_resumed_equals_uninterrupted(tuned, tmp_path, monkeypatch):
    """Killed in the middle of a stage, and the checkpoint that it began with is gone."""
    name, directory, config, run = tuned
    one_step, seen = loop._StageRun._one_step, []

    class Killed(BaseException):
        pass

    def step(self, done):
        seen.append((self.name, done))
        if seen.count(("instruct", 3)) == 1 and (self.name, done) == ("instruct", 3):
            raise Killed
        one_step(self, done)

    monkeypatch.setattr(loop._StageRun, "_one_step", step)
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run")
    (directory / "model.safetensors").rename(directory / "moved")
    try:
        assert loop.train(config, tmp_path / "run")
    finally:
        (directory / "moved").rename(directory / "model.safetensors")
    assert seen[-3:] == [("instruct", 3), ("instruct", 3), ("instruct", 4)]
    one, two = flat(load_params(run)), flat(load_params(tmp_path / "run"))
    assert all(np.array_equal(one[path], two[path]) for path in one)


def test_saved_run_is_a_checkpoint(tuned, tmp_path, capsys):
    """transformers loads it, nothing missing and nothing unexpected, and gives our logits; all else is as it was."""
    name, directory, config, run = tuned
    kind = getattr(transformers, SYSTEMS[name][1])
    lm = mm_jax.load(run)
    assert lm.family == name
    mm_jax.save(lm, tmp_path / "saved", format="hf")
    assert main(["convert", str(run), str(tmp_path / "converted")]) == 0
    assert main(["convert", str(run), str(tmp_path / "half"), "--dtype", "bfloat16", "--stage", "align"]) == 0
    loaded, info = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    converted = kind.from_pretrained(tmp_path / "converted").state_dict()
    before = kind.from_pretrained(directory).state_dict()
    assert loaded.state_dict().keys() == before.keys()
    for key, value in loaded.state_dict().items():
        assert value.equal(converted[key]), key
    changed = {key for key, value in loaded.state_dict().items() if not value.equal(before[key])}
    assert changed and not any("layernorm" in key and "vision" in key for key in changed)
    ours, again = mm_jax.load(tmp_path / "saved"), mm_jax.load(tmp_path / "half")
    assert again.checkpoint.dtype == "bfloat16"
    question = [json.loads(line) for line in (directory.parent / "chat.jsonl").read_text().splitlines()][0]
    question = conversation_from_json(question, root=directory.parent).messages[:1]
    batch, apply = lm.batch([question]), jax.jit(lm.apply)
    logits = np.asarray(apply(lm.params, batch))
    assert np.array_equal(batch["tokens"], ours.batch([question])["tokens"])
    assert np.array_equal(logits, np.asarray(apply(ours.params, ours.batch([question]))))
    if name == "llava":
        assert lm.chat(question, max_new_tokens=4) == ours.chat(question, max_new_tokens=4)
    pixels = [np.asarray(hosts.picture(*SIZES[k], seed=k)) for k in (0, 1)]
    arrays = lm.preprocess(images=pixels)
    real = batch["segment_ids"][0] > 0
    arrays["input_ids"] = batch["tokens"][:, real].astype(np.int64)
    arrays = {k: v for k, v in arrays.items() if k != "num_patches"}
    arrays["attention_mask"] = np.ones_like(arrays["input_ids"])
    token = loaded.config.image_token_id
    if name == "qwen2_vl":
        arrays["mm_token_type_ids"] = (arrays["input_ids"] == token).astype(np.int64)
    elif name == "mllama":
        tiles = arrays["aspect_ratio_mask"].sum(-1).tolist()
        arrays["cross_attention_mask"] = mllama.cross_mask(arrays["input_ids"], token, tiles, 4)
    elif name == "instructblip":
        arrays["input_ids"] = np.where(batch["media_index"][:, real] >= 0, token, arrays["input_ids"])
        told = batch["instructions"][0, :2].astype(np.int64)
        arrays |= {"qformer_input_ids": np.maximum(told, 0), "qformer_attention_mask": (told >= 0) * 1}
    expected = theirs.logits(loaded.eval(), arrays)[0]
    assert np.abs(logits[0][real] - expected).max() < 1e-4


def test_first_weights_of_several_directories(tmp_path):
    """Parts named beside the checkpoint take the place of its own, and what is to be fresh is."""
    llava.build("crop", tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    text = config.text_config
    text.vocab_size -= 3
    decoder = theirs.build(text, tmp_path / "decoder", scales={"embed": 3.0})
    data = write_data(tmp_path)
    run = config_of(
        tmp_path / "hf",
        data,
        6,
        decoder=str(tmp_path / "decoder"),
        fresh=("image_projector/out", "image_projector/hid"),
    )
    setup = prepare(run, tmp_path / "run")
    with pytest.raises(mm_jax.UserError, match='init.fresh: "image_projector/hid" matches no parameter'):
        first_params(setup.config, setup.model_config)
    setup = replace(
        setup, config=replace(setup.config, init=replace(run.init, fresh=("image_projector/out",)))
    )
    params, known = (
        flat(first_params(setup.config, setup.model_config)),
        flat(mm_jax.load(tmp_path / "hf").params),
    )
    theirs_ = decoder.state_dict()["model.embed_tokens.weight"].numpy()
    table = params["decoder/embedding/embedding"]
    assert np.array_equal(table[:-3], theirs_) and np.allclose(table[-3:], theirs_.mean(0), atol=1e-6)
    same = {path for path in params if np.array_equal(params[path], known[path])}
    assert {path.split("/")[0] for path in same} == {"vision", "image_projector"}
    assert {path for path in params if path.startswith("image_projector")} - same == {
        "image_projector/out/kernel", "image_projector/out/bias",
    }  # fmt: skip
    other = transformers.LlamaConfig(**theirs.TEXT | dict(intermediate_size=44))
    theirs.build(other, tmp_path / "other")
    wrong = replace(setup.config, init=replace(setup.config.init, decoder=str(tmp_path / "other")))
    with pytest.raises(
        mm_jax.UserError, match=r"decoder/layers/mlp/\w+/kernel is .*44.* there and .*40.* in this model"
    ):
        first_params(wrong, setup.model_config)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(run="somewhere"), "init.run is another run with all its parts"),
        (dict(vision_layers=(-1,)), "init.checkpoint says what its tower gives out"),
        (dict(checkpoint="", fresh=("decoder",)), "init.fresh is for parameters of init.checkpoint"),
        (dict(checkpoint="", template="x"), "template need init.decoder"),
    ],
)
def test_contradictions(change, message, tmp_path):
    config = config_of(tmp_path, tmp_path, 1)
    with pytest.raises(mm_jax.UserError, match=message):
        check(replace(config, init=replace(config.init, **change)))
