"""Which part of the package may know which: the arrows of the design, read off the import statements."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mm_jax

ROOT = Path(mm_jax.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# part -> the parts that it may import when it is imported; FOUNDATION is below everything
BELOW = {
    "errors": set(),
    "serialize": {"errors"},
    "resident": set(),
    "models": set(),
    "data": set(),
    "parallel": set(),
    "bench_torch": set(),
    "families": {"models", "data"},
    "checkpoint": {"models", "data", "families", "parallel"},
    "inference": {"models", "data", "families", "parallel"},
    "train": {"models", "data", "families", "parallel", "checkpoint", "inference"},
    "tower": {"models", "data", "checkpoint"},
    "lm": {"models", "data", "parallel", "families", "checkpoint", "inference", "tower"},
    "agents": {"data", "inference"},
    "serve": {"data", "inference", "agents", "lm"},
    "evaluate": {"models", "data", "inference", "lm"},
    "cli": {"data", "inference", "checkpoint", "parallel", "train", "lm", "serve", "evaluate"},
}
FOUNDATION = {"errors", "serialize", "resident"}
# Imports inside functions that go against the arrows, each for one purpose; the list may only get shorter.
DEFERRED = {
    ("lm", "train"),  # `load` opens a run directory
    ("train", "lm"),  # preference pairs are the model's own answers
}


@cache
def parts() -> set[str]:
    """Directories and files right below the package, hidden ones and __init__ left out."""
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    return {name for name in found if not name.startswith("__")}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, deferred: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, is it inside a function) of every import that is ever executed."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            # `from mm_jax import models` names a module as well
            yield node.module, deferred
            yield from ((f"{node.module}.{alias.name}", deferred) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), deferred)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, deferred or inside)


@cache
def imported(path: Path) -> frozenset[tuple[str, bool]]:
    return frozenset(imports(ast.parse(path.read_text())))


@cache
def arrows() -> dict[tuple[str, str], set[bool]]:
    """(part, part it imports) -> whether at import time (False), inside a function (True) or both."""
    found: dict[tuple[str, str], set[bool]] = {}
    for path in MODULES:
        for name, deferred in imported(path):
            words = name.split(".")
            if words[0] == "mm_jax" and len(words) > 1 and words[1] in parts() - {part_of(path)}:
                found.setdefault((part_of(path), words[1]), set()).add(deferred)
    return {arrow: kinds for arrow, kinds in found.items() if not arrow[0].startswith("__")}


def test_the_reader_of_imports_by_literal_example():
    source = """
import numpy as np
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
else:
    import einops
def f():
    from mm_jax import lm
try:
    import jax.numpy
except ImportError:
    pass
"""
    found = dict(imports(ast.parse(source)))
    assert found == {
        "numpy": False,
        "typing": False,
        "typing.TYPE_CHECKING": False,
        "einops": False,
        "mm_jax": True,
        "mm_jax.lm": True,
        "jax.numpy": False,
    }


def test_every_part_has_its_place():
    assert parts() <= set(BELOW), "give the new part a line in BELOW: what may it import?"


def test_arrows_go_one_way():
    wrong = [
        f"{part} -> {other}"
        for (part, other), kinds in arrows().items()
        if other not in BELOW[part] | FOUNDATION and (False in kinds or (part, other) not in DEFERRED)
    ]
    assert not wrong


def test_the_allowed_arrows_have_no_circle():
    order: list[str] = []
    while len(order) < len(BELOW):
        free = [part for part in BELOW if part not in order and BELOW[part] <= set(order)]
        assert free, f"a circle among {set(BELOW) - set(order)}"
        order += free
    for part, other in DEFERRED:
        assert (part, other) in arrows(), f"{part} -> {other} is gone: take it off the list"


def test_models_know_jax_flax_einops_and_numpy():
    allowed = {"jax", "flax", "einops", "numpy", *sys.stdlib_module_names}
    for path in (ROOT / "models").rglob("*.py"):
        for name, _ in imported(path):
            assert name.split(".")[0] in allowed or name.startswith("mm_jax.models"), f"{path.name}: {name}"


@pytest.mark.parametrize(
    "part, others",
    [
        ("data", {"models", "train", "inference", "parallel", "checkpoint", "lm"}),
        ("parallel", {"models", "data", "train", "inference", "checkpoint", "lm"}),
        ("models", {"data", "train", "inference", "parallel", "checkpoint", "lm", "errors", "serialize"}),
    ],
)
def test_never_at_any_level(part, others):
    found = {other for (one, other) in arrows() if one == part}
    assert not found & others


def test_data_needs_no_jax():
    for path in (ROOT / "data").rglob("*.py"):
        assert not {name for name, _ in imported(path) if name.split(".")[0] in ("jax", "flax")}, path.name


def test_no_other_framework_anywhere():
    """But for the peer of `bench`, which is a program of its own and is imported by nobody."""
    for path in MODULES:
        assert not {name for name, _ in imported(path) if name.startswith("mm_jax.bench_torch")}, path
        if path.name == "bench_torch.py":
            continue
        roots = {name.split(".")[0] for name, _ in imported(path)}
        assert not roots & {"torch", "transformers", "tensorflow", "keras"}, path


def test_importing_the_package_is_light():
    heavy = ["jax", "flax", "tensorflow_datasets", "grain", "numpy", "PIL", "orbax", "matplotlib"]
    code = f"import sys, mm_jax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
