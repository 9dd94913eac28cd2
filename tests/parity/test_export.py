"""Runs whose models were put together from parts, written by `convert`: as a LLaVA checkpoint, or in our own format."""

from dataclasses import replace

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.cli.main import main  # noqa: E402
from mm_jax.models import ProjectorConfig  # noqa: E402
from mm_jax.train import loop  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity import test_assembly as assembly  # noqa: E402

MLP = ProjectorConfig("mlp", hidden_dim=32, activation="gelu", norm=False)
LLAVAS = {
    "clip-llama": dict(vision="clip", decoder="llama", vision_layers=(-2,)),
    "clip-class-token-llama": dict(
        vision="clip", decoder="llama", vision_layers=(1, -1), keep_class_token=True
    ),
    "siglip-qwen3": dict(vision="siglip", decoder="qwen3", vision_layers=(-1,)),
}
OTHERS = {
    "its own last norm": (dict(vision="siglip", decoder="qwen3"), MLP, "without the last norm"),
    "a resampler": (
        dict(vision="clip", decoder="llama"),
        ProjectorConfig("resampler", hidden_dim=16, num_queries=4, num_heads=2),
        "another image_projector: kind is 'resampler' here and 'mlp' there",
    ),
    "patches": (
        dict(vision="naflex", decoder="llama"),
        ProjectorConfig("mlp", (4, 1), hidden_dim=16),
        "one tower",
    ),
}
parts = assembly.parts


def train(root, init, projector, run):
    config = assembly.config_of(root, "image", init, projector, steps=1)
    assert loop.train(replace(config, stages={"instruct": config.stages["instruct"]}), run)
    return mm_jax.load(run)


def question(root) -> list[dict]:
    picture = {"type": "image", "image": str(root / "0.png")}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "what is it?"}]}]


def logits(lm, messages) -> np.ndarray:
    batch = lm.batch(messages=[messages])
    return np.asarray(jax.jit(lm.apply)(lm.params, batch))[0][batch["segment_ids"][0] > 0]


@pytest.mark.parametrize("case", LLAVAS)
def test_as_llava(case, parts, tmp_path, capsys):
    """transformers loads it, nothing missing, nothing unexpected; its processor writes our tokens; logits are ours."""
    lm = train(parts, LLAVAS[case], MLP, tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    kind = transformers.LlavaForConditionalGeneration
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tower = mm_jax.load(parts / LLAVAS[case]["vision"]).checkpoint.directory
    last = transformers.AutoModel.from_pretrained(tower).state_dict()
    for name in [n for n in last if "post_layernorm" in n]:
        short = name.partition("post_layernorm")[2]
        assert model.state_dict()[f"model.vision_tower.post_layernorm{short}"].equal(last[name])
    talk = [
        *question(parts),
        {"role": "assistant", "content": "a picture"},
        {"role": "user", "content": "and?"},
    ]
    batch = lm.batch(messages=[talk])
    image = transformers.AutoImageProcessor.from_pretrained(tower, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = transformers.LlavaProcessor(
        image, tokenizer, **{
            name: value for name, value in transformers.LlavaProcessor.get_processor_dict(tmp_path / "out")[0].items()
            if name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_token")
        }, chat_template=(tmp_path / "out" / "chat_template.jinja").read_text(),
    )  # fmt: skip
    in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
                for m in talk]  # fmt: skip
    arrays = hosts.their_arrays(processor, [in_parts])
    real = batch["segment_ids"][0] > 0
    assert arrays["input_ids"][0].tolist() == batch["tokens"][0][real].tolist()
    expected, ours = theirs.logits(model.eval(), arrays)[0], logits(lm, talk)
    assert 0.1 < expected.std() < 10 and np.abs(ours - expected).max() <= 1e-4
    again = mm_jax.load(tmp_path / "out")
    assert again.family == "llava" and np.array_equal(logits(again, talk), ours)
    assert again.stop_ids == lm.stop_ids
    assert again.chat(question(parts), max_new_tokens=4) == lm.chat(question(parts), max_new_tokens=4)


@pytest.mark.parametrize("case", OTHERS)
def test_in_our_own_format(case, parts, tmp_path, capsys):
    """One line says why; what is loaded answers the same, in float32 and rounded."""
    init, projector, why = OTHERS[case]
    lm = train(parts, init, projector, tmp_path / "run")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "run"), str(out)]) == 0
    [line] = capsys.readouterr().out.strip().splitlines()
    assert line.startswith(f"{out}, in mm_jax's own format: no family") and why in line
    again = mm_jax.load(out)
    assert again.config == lm.config and again.max_length == lm.max_length
    assert np.array_equal(logits(again, question(parts)), logits(lm, question(parts)))
    assert again.chat(question(parts), max_new_tokens=4) == lm.chat(question(parts), max_new_tokens=4)
    if case != "a resampler":
        return
    half = mm_jax.load(out, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {half.config.dtype} == {"bfloat16"}
    assert main(["inspect", str(out)]) == 0
    assert "image_projector" in capsys.readouterr().out
    for argv, message in (
        (["convert", str(out), str(tmp_path / "again")], "belongs to no Hugging Face family"),
        (["generate", str(out), "--stage", "align", "--prompt", "what?"], "has no stages"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    file = out / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"num_queries": 4', '"num_queries": 5'))
    with pytest.raises(mm_jax.UserError, match="do not fit config.json: image_projector/query"):
        mm_jax.load(out)
    file.write_text(text.replace('"max_length"', '"most"'))
    with pytest.raises(mm_jax.UserError, match="lacks max_length"):
        mm_jax.load(out)
