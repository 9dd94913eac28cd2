"""A copy of the repository in which the shipped commands are quick: links to everything, but little of it."""

import os
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The real config with one layer in every part, two steps in every stage and few preference questions.
SHORT_CONFIG = """
from dataclasses import replace
from runpy import run_path


def get_config():
    full = run_path({path!r})["get_config"]()
    model = full.model
    parts = {{name: replace(getattr(model, name), num_layers=1) for name in ("vision", "audio", "decoder")}}
    return replace(
        full,
        model=replace(model, **parts),
        stages={{name: shorten(stage) for name, stage in full.stages.items()}},
        log_every=1,
    )


def shorten(stage):
    return replace(
        stage,
        steps=2,
        batch=replace(stage.batch, rows=2),
        optimizer=replace(stage.optimizer, warmup_steps=1),
        preference=replace(stage.preference, questions=16, pairs=4),
    )
"""

# Stands for the installer: the packages of this environment are there already, by PYTHONPATH.
UV = """#!/bin/sh
echo "$@" >>"$UV_CALLS"
"""


@pytest.fixture
def stub_uv(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(the file that lists the installer's calls, an environment in which nothing is downloaded)."""
    uv, calls = tmp_path / "bin" / "uv", tmp_path / "uv_calls"
    uv.parent.mkdir()
    uv.write_text(UV)
    uv.chmod(0o755)
    calls.touch()
    keep = {k: v for k, v in os.environ.items() if k not in ("MM_JAX_VENV", "PYTHONPATH", "VIRTUAL_ENV")}
    path = os.pathsep.join([str(uv.parent), str(Path(sys.executable).parent), keep["PATH"]])
    packages = sysconfig.get_path("purelib")
    more = {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": packages, "UV_CALLS": str(calls)}
    return calls, {**keep, **more, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy, with a few records of every data set that the quickstart names."""
    from mm_jax.data.quickstart import prepare
    from mm_jax.data.quickstart.builder import MODULES, MmJaxQuickstart

    root = tmp_path / "mm_jax"
    root.mkdir()
    for name in ("mm_jax", "launch", "tests", "setup.py", "pyproject.toml", "README.md"):
        (root / name).symlink_to(ROOT / name)
    (root / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (root / "configs" / path.name).write_text(path.read_text())
    quickstart = ROOT / "configs" / "quickstart.py"
    (root / "configs" / "quickstart.py").write_text(SHORT_CONFIG.format(path=str(quickstart)))
    for config in MmJaxQuickstart.BUILDER_CONFIGS:
        for split, size in (("train", 24), ("validation", 6), ("test", 6)):
            monkeypatch.setattr(config, split, size)
    prepare(MODULES, root / "data", processes=1)
    return root
