"""The notebooks run from first to last cell, without a screen and on the CPU; what is for Colab alone says so."""

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "launch/notebooks").glob("*.ipynb"))
SKIPPED = "skipped: not on Colab"


def run(name: str, directory: Path) -> str:
    """What the cells of a notebook print, run in `directory`; fails where one of them does."""
    notebook = nbformat.read(ROOT / "launch/notebooks" / f"{name}.ipynb", as_version=4)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "CHECKPOINT": ""}
    # with a kernel of its own in every process that tests
    client = nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository, for what the notebooks write."""
    (tmp_path / "mm_jax").symlink_to(ROOT / "mm_jax")
    return tmp_path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            # what is for Colab alone says so where it is not run
            if isinstance(node, ast.If) and ast.unparse(node.test) == "ON_COLAB":
                assert SKIPPED in ast.unparse(node.orelse[0])
    assert any(SKIPPED in cell.source for cell in cells)


def test_one_module(checkout: Path) -> None:
    said = run("one_module", checkout)
    assert SKIPPED in said and "features (1, 16, 64)" in said and "held-out digits are right" in said


def test_load_and_chat(checkout: Path) -> None:
    pytest.importorskip("transformers")
    said = run("load_and_chat", checkout)
    assert said.count(SKIPPED) == 2 and "llava " in said and "(1, " in said


@pytest.mark.slow
def test_quickstart(workspace: Path) -> None:
    said = run("quickstart", workspace)
    assert SKIPPED in said and "done: runs/notebook" in said
    assert (workspace / "runs/notebook/loss.png").is_file()


def test_all_notebooks_are_run() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"one_module", "load_and_chat", "quickstart"}
