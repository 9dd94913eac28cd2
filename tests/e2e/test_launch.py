"""The launch scripts: the environment that they make and mend, and how they stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = 'source "{root}/launch/env.sh"; setup_environment "$1"; echo "$python"'

# Stands for the package: says what it is called with; `train` waits for Ctrl-C like the real one.
PACKAGE = """
import signal, sys, time
command, run = sys.argv[1], "RUN"
if command == "train" and "--wait" in sys.argv:
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    print("training", file=sys.stderr, flush=True)
    while not stopped:
        time.sleep(0.01)
    print("stopped and saved; go on with: python -m mm_jax " + " ".join(sys.argv[1:]))
elif "--fail" in sys.argv:
    print("mm_jax train: no such thing", file=sys.stderr)
    sys.exit(2)
else:
    print("called with " + " ".join(sys.argv[1:]))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the real scripts around a package that does nothing."""
    root = tmp_path / "clone"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "quickstart.py").touch()
    (root / "launch").symlink_to(ROOT / "launch")
    (root / "setup.py").write_text("one")
    (root / "mm_jax").mkdir()
    (root / "mm_jax" / "__main__.py").write_text(PACKAGE)
    return root


class Shell:
    """Runs the scripts of a clone with a stand-in for the installer."""

    def __init__(self, root: Path, calls: Path, environment: dict[str, str]):
        self.root, self._calls, self.environment = root, calls, environment

    def __call__(
        self, script: str, *arguments: str, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.root / "launch" / script), *arguments]
        return subprocess.run(
            command, cwd=cwd or self.root, env=self.environment, text=True, capture_output=True
        )

    def setup(self, extras: str = "test") -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", SETUP.format(root=self.root), "setup", extras]
        return subprocess.run(command, env=self.environment, text=True, capture_output=True)

    def installed(self) -> list[str]:
        """What the installer was asked for since the last time."""
        asked = [line.split("[")[-1].rstrip("]") for line in self._calls.read_text().splitlines()]
        self._calls.write_text("")
        return asked


@pytest.fixture
def shell(clone: Path, stub_uv: tuple[Path, dict[str, str]]) -> Shell:
    return Shell(clone, *stub_uv)


def test_packages_are_installed_once_and_again_when_they_change(shell: Shell) -> None:
    first = shell.setup()
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(shell.root / ".venv/bin/python")
    assert first.stderr.count("\n") == 1 and first.stderr.startswith("installing mm_jax[test] into ")
    assert shell.setup().stderr == ""
    assert shell.installed() == ["test"]
    assert shell.setup("quickstart").returncode == 0
    assert shell.installed() == ["quickstart"]
    (shell.root / "setup.py").write_text("two")
    shell.setup()
    assert shell.installed() == ["test"]


def test_what_a_killed_installation_left_is_made_anew(shell: Shell) -> None:
    venv, lock = shell.root / ".venv", shell.root / ".venv.lock"
    shell.setup()
    (venv / "half").touch()
    lock.mkdir()
    (lock / "pid").write_text("999999999")
    assert shell.setup().returncode == 0
    assert not lock.exists() and not (venv / "half").exists()
    (venv / "bin" / "python").unlink()
    assert shell.setup().returncode == 0
    assert (venv / "bin" / "python").exists()
    lock.mkdir()
    (lock / "pid").write_text(str(os.getpid()))
    assert f"process {os.getpid()} is installing into {venv}" in shell.setup().stderr


def test_a_failed_installation_is_not_taken_for_done(shell: Shell) -> None:
    uv = Path(shell.environment["PATH"].split(os.pathsep)[0]) / "uv"
    works = uv.read_text()
    uv.write_text("#!/bin/sh\nexit 1\n")
    assert shell.setup().returncode == 1
    uv.write_text(works)
    assert shell.setup().returncode == 0
    assert shell.installed() == ["test"]


def test_python_is_chosen_and_checked(shell: Shell, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\nexec python3 -c "import sys; sys.exit(1)"\n')
    old.chmod(0o755)
    shell.environment["PYTHON"] = str(old)
    refused = shell.setup()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"PYTHON={old} is not a Python 3.11 or newer" in refused.stderr
    del shell.environment["PYTHON"]
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "ls"):
        found = subprocess.run(
            ["bash", "-c", f"type -P {name}"], capture_output=True, text=True
        ).stdout.strip()
        (tools / name).symlink_to(found)
    shell.environment["PATH"] = str(tools)
    refused = shell.setup()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "no Python 3.11 or newer found" in refused.stderr


def test_a_directory_of_something_else_is_left_alone(shell: Shell, tmp_path: Path) -> None:
    shell.environment["MM_JAX_VENV"] = str(tmp_path / "thesis")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    refused = shell.setup()
    assert refused.returncode == 2 and "is neither empty nor a virtual environment" in refused.stderr
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "mine"
    (tmp_path / "thesis" / "thesis.txt").unlink()
    assert shell.setup().stdout.strip() == str(tmp_path / "thesis/bin/python")


def test_quickstart_from_anywhere(shell: Shell, tmp_path: Path) -> None:
    (here := tmp_path / "here").mkdir()
    done = shell("quickstart.sh", "--seed", "1", "--name", "a b", cwd=here)
    assert done.returncode == 0, done.stderr
    run = shell.root / "runs/quickstart"
    lines = done.stdout.splitlines()
    assert lines[0] == f"called with train configs/quickstart.py --run {run} --seed 1 --name a b"
    assert lines[1] == f"called with evaluate {run} --split test"
    assert f"{run}/report.html" in done.stdout and f"{run}/loss.png" in done.stdout
    assert lines[-1] == f"talk with it: {shell.root}/.venv/bin/python -m mm_jax chat {run} --image my.png"
    (here / "mine.py").touch()
    shown = shell("quickstart.sh", "--config=mine.py", "--dry-run", cwd=here).stdout.splitlines()
    assert shown[0] == f"python -m mm_jax train {here}/mine.py --run {shell.root}/runs/mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--run"], "quickstart.sh: --run needs a value"),
        (["--config", "none.py"], "quickstart.sh: there is no config none.py"),
        (["--fail"], "mm_jax train: no such thing"),
    ],
)
def test_mistakes_end_it(shell: Shell, arguments: list[str], message: str) -> None:
    done = shell("quickstart.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == message
    assert "called with" not in done.stdout


def test_ctrl_c_stops_before_the_scores_and_says_how_to_go_on(shell: Shell) -> None:
    command = ["bash", "launch/quickstart.sh", "--run", "runs/x", "--name", "a b", "--wait"]
    process = subprocess.Popen(
        command, cwd=shell.root, env=shell.environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while "training" not in (line := process.stderr.readline()):
        assert line, process.communicate()
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the script and to what it runs
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    again = "bash launch/quickstart.sh --config configs/quickstart.py --run runs/x --name a\\ b --wait"
    assert out == f"stopped and saved; go on with: {again}\n"


def test_arguments_reach_pytest(shell: Shell) -> None:
    shown = shell("test.sh", "--dry-run", "--slow", "tests/data", "-k", "boxes").stdout.split()
    assert shown[:4] == ["python", "-m", "pytest", "-n"] and shown[4].isdigit()
    assert shown[5:] == ["--slow", "tests/data", "-k", "boxes"]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_has_an_example(shell: Shell, script: str) -> None:
    done = shell(script, "--help")
    assert done.returncode == 0 and f"example: bash launch/{script}" in done.stdout
    assert shell.installed() == []


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_huge_pages_are_asked_for_unless_something_else_is(shell: Shell) -> None:
    show = f'source "{shell.root}/launch/env.sh"; echo "$GLIBC_TUNABLES"'
    for given, expected in (("", "glibc.malloc.hugetlb=1"), ("x=1", "x=1")):
        environment = {**shell.environment, "GLIBC_TUNABLES": given}
        done = subprocess.run(["bash", "-c", show], env=environment, text=True, capture_output=True)
        assert done.stdout.strip() == expected
