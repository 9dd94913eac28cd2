"""`inspect` and `convert` on a directory that transformers has written."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.cli.main import main  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.test_anyres import SIDE, build  # noqa: E402


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("next")
    build("next", found)
    return found


def fails(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_inspect(directory, capsys):
    assert main(["inspect", str(directory), "--image", "60x31"]) == 0
    out = capsys.readouterr().out
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    unused = out.split("not computed with")[1].split("\n")[0]
    computed = int(out.split("parameters")[1].split()[0].replace(",", ""))
    left = int(unused.split(",", 1)[1].split()[0].replace(",", ""))
    assert computed + left == sum(p.numel() for p in model.parameters())
    # 60 x 31 goes into 48 x 24 ... of 72 x 24 and the like 48 x 48 keeps the most: 2 x 2 tiles and the whole
    tokens = len(mm_jax.load(directory).prompt(hosts.messages([hosts.picture(60, 31)])).image_index)
    found = int(out.split("60 x 31 pixels: ")[1].split()[0])
    assert SIDE**2 < found < tokens and "5 views" in out
    assert "llava_next (text, image)" in out and "float32" in out and "decoder" in out


def test_inspect_refuses(directory, tmp_path, capsys):
    assert "width x height" in fails(capsys, "inspect", directory, "--image", "60")
    assert "--image" in fails(capsys, "inspect", directory, "--imag=60x60")
    assert "is not a run directory" in fails(capsys, "inspect", tmp_path)


def test_convert(directory, tmp_path, capsys):
    """Names of the hub in, those of transformers out, in another dtype and in several files."""
    out = tmp_path / "out"
    assert main(["convert", str(directory), str(out), "--dtype", "bfloat16", "--shard-gb", "0.0001"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model, info = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        out, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    before = transformers.LlavaNextForConditionalGeneration.from_pretrained(directory).state_dict()
    for name, value in model.state_dict().items():
        if "post_layernorm" not in name and "vision_tower.encoder.layers.2" not in name:  # kept as they are
            assert value.equal(before[name].bfloat16()), name
    one, two = (mm_jax.load(d).processor.prompt(hosts.messages("how many?")) for d in (directory, out))
    assert np.array_equal(one.tokens, two.tokens)
    assert "is not empty" in fails(capsys, "convert", directory, out)
    assert "is no Hugging Face checkpoint" in fails(capsys, "convert", tmp_path, tmp_path / "x")
    assert 'did you mean "bfloat16"' in fails(
        capsys, "convert", directory, tmp_path / "y", "--dtype", "bfloat"
    )


def test_pickled_weights_are_refused(tmp_path, capsys):
    config = transformers.LlamaConfig(**theirs.TEXT)
    config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "save_pretrained(...) writes safetensors" in fails(capsys, "inspect", tmp_path)
