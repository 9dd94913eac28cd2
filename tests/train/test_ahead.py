"""`compile` and `bench`: programs from shapes alone, and their speed on random data."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mm_jax.cli.bench import no_peer, spec_of, table
from mm_jax.cli.main import main
from mm_jax.train import ahead
from mm_jax.train.bench import random_batch
from mm_jax.train.config import load_config

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out if status == 0 else err


def test_a_step_and_its_numbers(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.json"
    status, out = run(["compile", str(config_path), "--stage", "language", "--json", str(target)], capsys)
    assert status == 0 and "verdict" in out and "fits" in out
    (report,) = json.loads(target.read_text())
    config = load_config(config_path)
    # parameters and two moments of the decoder, all in float32, are given back in place
    decoder = ahead.tree_bytes(
        ahead.abstract_params(ahead.complete_heads(config.model, config.processor))["decoder"]
    )
    assert report["aliased"] == pytest.approx(3 * decoder, rel=0.01)
    assert report["arguments"] > report["aliased"]
    assert (
        1 < report["flops"] / report["model_flops"] < 1.6
    )  # [T, T] attention is computed whole, the model's is causal
    assert report["collectives"] == {} and report["chips"] == 1


def test_a_decoding_step(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(["compile", str(config_path), "--decode", "4x64", "--json", "-"], capsys)
    (report,) = json.loads(out)
    cache = 2 * 4 * 64 * 8 * 4  # key and value, one layer with one head of 8
    assert status == 0 and report["aliased"] >= cache and report["fits"]


def test_what_does_not_fit_is_said(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "memory_of", lambda device: 1e5)
    _, out = run(["compile", str(config_path), "--stage", "language"], capsys)
    assert "does not fit; try" in out and "--remat full" in out and "--stages.language.chunk 96" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stage", "lang"], 'no stage "lang"; did you mean "language"?'),
        (["--mesh", "fsdp=3"], "mesh: fsdp 3 needs 3 devices"),
        (["--mesh", "fdsp=3"], 'there is no axis "fdsp"; did you mean "fsdp"?'),
        (["--decode", "8"], '--decode is "8"'),
        (["--stages.language.chunk", "7"], "stages.language.chunk is 7"),
        (
            ["--topology", "v5e:3x5"],
            "libtpu" if importlib.util.find_spec("libtpu") is None else "no topology",
        ),
    ],
)
def test_mistakes_are_one_line(
    config_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, err = run(["compile", str(config_path), *arguments], capsys)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler of TPUs")
def test_llama_fits_sixteen_tpus() -> None:
    """Two layers of Llama-2-7B for a v5e:4x4: splash attention, parameters in 16 pieces, collectives, memory."""
    command = [sys.executable, "-m", "mm_jax", "compile", "configs/llama2_7b.py", "--topology", "v5e:4x4"]
    command += ["--model.decoder.num-layers", "2", "--stages.pretrain.batch.rows", "16", "--json", "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = json.loads(done.stdout)
    assert report["mesh"] == {"fsdp": 16} and report["fits"]
    parameters = 2 * 32_000 * 4096 + 2 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert report["arguments"] == pytest.approx(12 * parameters / 16, rel=0.02)
    assert report["collectives"].keys() >= {"all-gather"}
    assert report["kernels"] or report["flops"] > report["model_flops"]


def test_random_batches_are_full(config_path: Path) -> None:
    batch = random_batch(load_config(ROOT / "configs" / "bench.py"), "all")
    assert batch["tokens"].shape == (4, 256) and batch["tokens"].max() < 16_000
    assert (batch["media_index"][:, :196] == np.arange(196)).all() and (
        batch["media_index"][:, 196:] == -1
    ).all()
    assert batch["loss_weights"].sum() == 4 * 60 and (batch["segment_ids"] == 1).all()
    assert 0.9 < batch["pixel_values"].std() < 1.1


def test_the_peer_is_asked_for_the_same_model(config_path: Path) -> None:
    config = load_config(ROOT / "configs" / "bench.py")
    spec = spec_of(config, "all", 3)
    assert (spec["text"]["hidden_size"], spec["vision"]["hidden_size"], spec["image_tokens"]) == (
        640,
        384,
        196,
    )
    assert spec["optimizer"] == {"lr": 1e-4, "betas": [0.9, 0.98], "weight_decay": 0.02}
    if importlib.util.find_spec("torch"):
        assert no_peer(config, "all") == ""
        assert "is not the training of a whole LLaVA" in no_peer(load_config(config_path), "language")


def test_bench_measures_and_compares(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of a few thousand parameters, with torch beside it where it is installed."""
    sizes = "--model.vision.height 32 --model.vision.width 32 --model.vision.num-layers 1 --model.vision.embed-dim 32 "
    sizes += "--model.vision.num-heads 2 --model.vision.mlp-dim 32 --model.decoder.num-layers 1 "
    sizes += "--model.decoder.embed-dim 32 --model.decoder.num-heads 2 --model.decoder.num-kv-heads 2 "
    sizes += "--model.decoder.head-dim 16 --model.decoder.mlp-dim 32 --model.decoder.vocab-size 64 "
    sizes += "--model.image-projector.hidden-dim 32 --stages.all.batch.rows 2 --stages.all.batch.length 16 "
    sizes += "--processor.image.height 32 --processor.image.width 32 --processor.image.num-tokens 4"
    target = tmp_path / "speed.json"
    path = str(ROOT / "configs" / "bench.py")
    status, out = run(["bench", path, "--steps", "2", "--json", str(target), *sizes.split()], capsys)
    found = json.loads(target.read_text())
    assert status == 0 and "tokens/s" in out
    both = bool(importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"))
    assert [speed["what"] for speed in found["speeds"]] == ["mm_jax", "torch"][: 1 + both]
    for speed in found["speeds"]:
        assert speed["tokens_per_second"] == pytest.approx(32 / speed["step_seconds"])
        assert speed["samples_per_second"] == pytest.approx(2 / speed["step_seconds"])
        assert speed["spread"][0] <= speed["step_seconds"] <= speed["spread"][1] and speed["memory"] > 1e7
    assert ("times_as_fast" in found) == both


def test_a_table_of_speeds() -> None:
    from mm_jax.train.bench import Speed

    text = table([Speed("mm_jax", 0.5, (0.4, 0.6), 2048.0, 8.0, 0.5, 3.0, 2e9)])
    assert text.splitlines()[-1] == (
        "| mm_jax | 0.500 s | 0.400 to 0.600 s | 2048 | 8.00 | 50% | 2.00 GB | 3.0 s |"
    )


def test_the_memory_of_a_process_is_its_own() -> None:
    """A small process that this one starts, with 300 MB more than it needs, has a small peak."""
    ballast = bytearray(b"x") * (300 << 20)
    code = "from mm_jax.resident import peak_resident; print(peak_resident())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and 5e6 < int(done.stdout) < 2e8 < len(ballast)
