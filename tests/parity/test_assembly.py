"""Models of parts from several checkpoints, which transformers wrote: they hold those weights, train, and answer."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.checkpoint.run import load_params  # noqa: E402
from mm_jax.data.pipeline import BatchConfig  # noqa: E402
from mm_jax.data.sources import SourceConfig  # noqa: E402
from mm_jax.models import MultimodalConfig, ProjectorConfig  # noqa: E402
from mm_jax.train import loop  # noqa: E402
from mm_jax.train.config import InitConfig, OptimizerConfig, RunConfig, Stage, check  # noqa: E402
from mm_jax.train.metrics import read_metrics  # noqa: E402
from mm_jax.train.setup import prepare  # noqa: E402
from mm_jax.train.start import first_params  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity import test_audio_towers as towers  # noqa: E402
from tests.parity import test_deepseek_vl as deepseek  # noqa: E402
from tests.parity import test_qwen_chat as qwen  # noqa: E402
from tests.parity import test_siglip2 as siglip2  # noqa: E402

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VISION = dict(theirs.VISION, num_hidden_layers=2)
SIZE = {"height": 24, "width": 24}


def write_tower(kind: str, directory: Path) -> None:
    """A tower of pictures, "Siglip" or "CLIP"."""
    config = getattr(transformers, f"{kind}VisionConfig")(**VISION, image_size=24, patch_size=8)
    theirs.build(config, directory, f"{kind}VisionModel")
    processor = getattr(transformers, f"{kind}ImageProcessorPil")
    processor(size=SIZE, crop_size=SIZE, do_center_crop=False).save_pretrained(directory)


def write_decoder(kind: str, directory: Path) -> None:
    """A decoder with its tokenizer: "Qwen3" with a chat template and spare entries of the vocabulary, or "Llama"."""
    tokenizer = hosts.byte_level("<|im_start|>", "<|im_end|>")
    more = {}
    if kind == "Qwen3":
        tokenizer.chat_template, more = CHATML, dict(head_dim=16, tie_word_embeddings=True)
    sizes = dict(max_position_embeddings=256, eos_token_id=2, pad_token_id=0)
    sizes["vocab_size"] = len(tokenizer) + (8 if kind == "Qwen3" else 0)
    theirs.build(getattr(transformers, f"{kind}Config")(**theirs.TEXT | sizes, **more), directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A directory for each part, as transformers writes them."""
    root = tmp_path_factory.mktemp("parts")
    write_tower("Siglip", root / "siglip")
    write_tower("CLIP", root / "clip")
    write_decoder("Qwen3", root / "qwen3")
    write_decoder("Llama", root / "llama")
    siglip2.build(root / "naflex")
    transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36).save_pretrained(root / "naflex")
    qwen.build(root / "qwen2_vl")
    deepseek.build(root / "deepseek", hybrid=True)
    square = {"height": 40, "width": 40}
    transformers.DeepseekVLHybridImageProcessorPil(
        size=SIZE, high_res_size=square, min_size=3
    ).save_pretrained(root / "deepseek")
    theirs.build(transformers.SamVisionConfig(**deepseek.HIGH), root / "sam", "SamVisionModel")
    transformers.SamImageProcessorPil(size={"longest_edge": 40}, pad_size=square).save_pretrained(
        root / "sam"
    )
    for case, extractor in (("wav2vec2-conformer", "Wav2Vec2"), ("parakeet", "Parakeet")):
        towers.build(case, root / case)
        options = dict(feature_size=16) if case == "parakeet" else {}
        getattr(transformers, f"{extractor}FeatureExtractor")(**options).save_pretrained(root / case)
    config = transformers.Dinov2Config(
        image_size=35, patch_size=7, num_hidden_layers=2, num_attention_heads=3, hidden_size=24, mlp_ratio=2
    )
    theirs.build(config, root / "dinov2", "Dinov2Model")
    bit = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    bit.save_pretrained(root / "dinov2")
    config = transformers.WhisperConfig(
        d_model=24, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=36, num_mel_bins=10,
        max_source_positions=50, decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=36, vocab_size=20,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    theirs.build(config, root / "whisper", "WhisperModel")
    transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=1).save_pretrained(root / "whisper")
    _write_data(root)
    return root


def _write_data(root: Path) -> None:
    lines = []
    for k in range(6):
        hosts.picture(20 + k, 30).save(root / f"{k}.png")
        time = np.arange(6000 + 500 * k) / 16_000
        soundfile.write(root / f"{k}.wav", 0.3 * np.sin(2 * np.pi * (200 + 300 * k) * time), 16_000)
        for kind, file in (("image", f"{k}.png"), ("audio", f"{k}.wav")):
            content = [{"type": kind, kind: file}, {"type": "text", "text": "what is it?"}]
            answer = {"role": "assistant", "content": f"number {k}, a {kind}"}
            lines.append((kind, {"messages": [{"role": "user", "content": content}, answer]}))
    for kind in ("image", "audio"):
        text = "\n".join(json.dumps(line) for of, line in lines if of == kind)
        (root / f"{kind}.jsonl").write_text(text + "\n")


def config_of(root: Path, kind: str, init: dict, projector: ProjectorConfig, steps: int = 3) -> RunConfig:
    slots = {
        "images" if kind == "image" else "audio": 512 if init.get("vision") in ("qwen2_vl", "naflex") else 3
    }
    batch = BatchConfig(rows=2, length=128, bins=2, **slots)
    stage = Stage(
        steps=steps,
        mixture={kind: 1.0},
        trainable=(".*_projector",),
        batch=batch,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
    )
    return RunConfig(
        name="combination",
        init=InitConfig(**{k: str(root / v) if isinstance(v, str) else v for k, v in init.items()}),
        model=MultimodalConfig(None, None, **{f"{kind}_projector": projector}),
        processor=None,
        sources={kind: SourceConfig("chat", str(root / f"{kind}.jsonl"))},
        stages={
            "align": stage,
            "instruct": replace(stage, trainable=(".*_projector", "decoder"), answer_weight="token"),
        },
        log_every=1,
    )


CASES = {
    "siglip-resampler-qwen3": (
        "image", dict(vision="siglip", decoder="qwen3"),
        ProjectorConfig("resampler", hidden_dim=16, num_queries=4, num_heads=2),
    ),
    "clip-mlp-llama": (
        "image", dict(vision="clip", decoder="llama", vision_layers=(1, -1)),
        ProjectorConfig("mlp", (3, 1), hidden_dim=16),
    ),
    "dinov2-linear-qwen3": (
        "image", dict(vision="dinov2", decoder="qwen3", vision_layers=(-1,), keep_class_token=True),
        ProjectorConfig("linear"),
    ),
    "whisper-mlp-llama": (
        "audio", dict(audio="whisper", decoder="llama"), ProjectorConfig("mlp", (5, 1), hidden_dim=16),
    ),
    "qwen2_vl-mlp-llama": (
        "image", dict(vision="qwen2_vl", decoder="llama"), ProjectorConfig("mlp", (4, 1), hidden_dim=16),
    ),
    "siglip-linear-qwen2_vl": (
        "image", dict(vision="siglip", decoder="qwen2_vl"), ProjectorConfig("linear", (3, 1)),
    ),
    "naflex-mlp-llama": (
        "image", dict(vision="naflex", decoder="llama"), ProjectorConfig("mlp", (4, 1), hidden_dim=16),
    ),
    "naflex-linear-qwen2_vl": (
        "image", dict(vision="naflex", decoder="qwen2_vl"), ProjectorConfig("linear"),
    ),
    "deepseek-branches-qwen3": (
        "image", dict(vision="deepseek", decoder="qwen3"), ProjectorConfig("branches", branch_dims=(32, 24)),
    ),
    "sam-qformer-llama": (
        "image", dict(vision="sam", decoder="llama"),
        ProjectorConfig("qformer", hidden_dim=16, num_queries=4, num_heads=2, num_layers=2, mlp_dim=16),
    ),
    "wav2vec2-mlp-qwen3": (
        "audio", dict(audio="wav2vec2-conformer", decoder="qwen3", audio_seconds=0.30125),
        ProjectorConfig("mlp", (24, 1), hidden_dim=16),
    ),
    "parakeet-resampler-llama": (
        "audio", dict(audio="parakeet", decoder="llama", audio_seconds=0.5),
        ProjectorConfig("resampler", hidden_dim=16, num_queries=4, num_heads=2),
    ),
}  # fmt: skip
# features of a slot, and media tokens of the question below
TOKENS = {
    "siglip-resampler-qwen3": (4, 4),
    "clip-mlp-llama": (3, 3),
    "dinov2-linear-qwen3": (17, 17),
    "whisper-mlp-llama": (10, 4),
    "qwen2_vl-mlp-llama": (0, 2 * 4),  # 20 x 30 pixels become 16 x 32: patches of 4 x 4, squares of 2 x 2
    "siglip-linear-qwen2_vl": (3, 3),
    "naflex-mlp-llama": (0, 3 * 2),  # at most 36 patches: 24 x 16 pixels, so that squares of 2 x 2 are whole
    "naflex-linear-qwen2_vl": (0, 7 * 5),
    "deepseek-branches-qwen3": (9, 9),
    "sam-qformer-llama": (4, 4),
    "wav2vec2-mlp-qwen3": (10, 10 + 3),  # 6000 samples: a window of 240 positions, and one of 58
    "parakeet-resampler-llama": (4, 4),
}
TRAINED = [
    "siglip-resampler-qwen3",
    "whisper-mlp-llama",
    "qwen2_vl-mlp-llama",
    "naflex-mlp-llama",
    "wav2vec2-mlp-qwen3",
]


@pytest.mark.parametrize("case", CASES)
def test_the_first_weights_are_those_of_the_parts(case, parts, tmp_path):
    """Each part is as in its own checkpoint; new tokens are the mean of the others; text gets the decoder's logits."""
    kind, init, projector = CASES[case]
    config = config_of(parts, kind, init, projector)
    check(config)
    setup = prepare(config, tmp_path / "run")
    params = first_params(setup.config, setup.model_config)
    flat = {k: np.asarray(v) for k, v in flatten_dict(params, sep="/").items()}
    tower = next(name for name in ("vision", "audio") if name in init)
    alone = flatten_dict(mm_jax.load(parts / init[tower]).params, sep="/")
    for path, value in flat.items():
        if path.startswith(f"{tower}/"):
            theirs_ = np.asarray(alone.get(path, alone.get(path.removeprefix(f"{tower}/"))))
            assert np.array_equal(value, theirs_[: len(value)] if "/layers/" in path else theirs_), path
    decoder = mm_jax.load(parts / init["decoder"])
    vocab = decoder.config.decoder.vocab_size
    for path, value in flatten_dict({"decoder": decoder.params["decoder"]}, sep="/").items():
        ours = flat[path]
        if path == "decoder/embedding/embedding":
            assert len(ours) == vocab + (init["decoder"] == "llama")
            np.testing.assert_allclose(
                ours[vocab:], np.broadcast_to(value.mean(0), ours[vocab:].shape), atol=1e-6
            )
            ours = ours[:vocab]
        elif path == "decoder/head/kernel":
            ours = ours[:, :vocab]
        assert np.array_equal(ours, value), path
    lm = mm_jax.lm.LanguageModel(setup.model_config, params, setup.processor)
    slots = lm.config.image_tokens if kind == "image" else lm.config.audio_tokens
    assert slots == TOKENS[case][0]
    batch = lm.batch([{"role": "user", "content": "what is in the picture?"}])
    ours = np.asarray(lm.apply(lm.params, batch))[..., :vocab]
    expected = np.asarray(decoder.apply(decoder.params, decoder.batch(input_ids=batch["tokens"])))
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("case", TRAINED)
def test_trains_and_answers(case, parts, tmp_path):
    """Two stages, the loss falls, the tower stays as it was; the run answers."""
    kind, init, projector = CASES[case]
    config = config_of(parts, kind, init, projector, steps=6)
    run = tmp_path / "run"
    assert loop.train(config, run)
    losses = [x["loss"] for x in read_metrics(run) if "loss" in x]
    assert len(losses) == 12 and losses[-1] < losses[0]
    setup = prepare(config, run)
    first = flatten_dict(first_params(setup.config, setup.model_config), sep="/")
    last = flatten_dict(load_params(run), sep="/")
    moved = {path.split("/")[0] for path, x in last.items() if not np.array_equal(x, first[path])}
    assert moved == {f"{kind}_projector", "decoder"}
    lm = mm_jax.load(run)
    file = parts / ("0.png" if kind == "image" else "0.wav")
    question = [
        {
            "role": "user",
            "content": [{"type": kind, kind: str(file)}, {"type": "text", "text": "what is it?"}],
        }
    ]
    batch = lm.batch(question)
    text = lm.processor.tokenizer.decode(batch["tokens"][0][batch["segment_ids"][0] > 0], special=True)
    media = f"<{kind}>" * TOKENS[case][1]
    assert (batch["media_index"] >= 0).sum() == TOKENS[case][1]
    if init["decoder"] == "qwen3":
        assert text == f"<|im_start|>user\n{media}\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    else:
        assert text == f"USER: {media}\nwhat is it? ASSISTANT:"
    assert isinstance(lm.chat(question, max_new_tokens=4), str)
    assert setup.model_config == lm.config


def test_from_another_run(parts, tmp_path):
    """All weights and the tokenizer of a run; a part that it lacks is fresh; one that differs is named."""
    kind, init, projector = CASES["siglip-resampler-qwen3"]
    config = config_of(parts, kind, init, projector, steps=1)
    config = replace(config, stages={"align": config.stages["align"]})
    assert loop.train(config, tmp_path / "one")
    known = mm_jax.load(tmp_path / "one")
    later = replace(config, model=known.config, init=InitConfig(run=str(tmp_path / "one")))
    setup = prepare(later, tmp_path / "two")
    params = first_params(setup.config, setup.model_config)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, known.params))
    assert setup.processor.tokenizer.size == known.processor.tokenizer.size
    other = replace(known.config, image_projector=ProjectorConfig("linear"))
    with pytest.raises(mm_jax.UserError, match="image_projector.* absent in this config|absent in .* and"):
        first_params(later, other)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(decoder="siglip", vision="siglip"), "siglip_vision_model.*no decoder part"),
        (dict(decoder="llama", vision="qwen3"), "qwen3.*no vision part"),
        (dict(decoder="llama", vision="clip", vision_layers=(7,)), r"hidden states \[7\].*2 blocks"),
    ],
)
def test_wrong_parts(change, message, parts, tmp_path):
    config = config_of(parts, "image", change, ProjectorConfig("linear"))
    with pytest.raises(mm_jax.UserError, match=message):
        prepare(config, tmp_path / "run")


def test_readme_combination(tmp_path, monkeypatch):
    """The config of the README, over the parts that its script writes."""
    text = (Path(mm_jax.__file__).parents[1] / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    for path, block in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(block)
    hosts.picture(64, 48).save("my.png")
    exec(compile(Path("tiny_parts.py").read_text(), "tiny_parts.py", "exec"), {"__name__": "__main__"})
    config = mm_jax.train.config.load_config("configs/combination.py")
    assert loop.train(config, tmp_path / "run")
    lm = mm_jax.load(tmp_path / "run")
    question = [{"type": "image", "image": "my.png"}, {"type": "text", "text": "what is it?"}]
    assert isinstance(lm.chat([{"role": "user", "content": question}], max_new_tokens=3), str)
