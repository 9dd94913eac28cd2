"""TPU VMs with a stand-in for gcloud, whose workers are folders of this machine."""

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/llava_1_5_7b.py"
WHERE = ["--name", "pod", "--zone", "z"]
ASK = [*WHERE, "--topology", "v5e:4x4", "--spot", "--bucket", "mine"]

# States of the queued resource come from the file `states`, one a call, the last one again and again; a created one
# begins with the lines of `next-0`, `next-1`, ... Commands run in the folder of their node, worker 0 alone.
GCLOUD = r"""#!/usr/bin/env bash
cd "$CLOUD" || exit
echo "${*//$'\n'/; }" >>calls
case "$1 $2 $3 $4" in
  "compute tpus queued-resources describe")
    [ -e states ] || { echo "ERROR: NOT_FOUND: no $5" >&2; exit 1; }
    head -n 1 states
    [ "$(wc -l <states)" -eq 1 ] || sed -i 1d states
    ;;
  "compute tpus queued-resources create") cp "next-$(cat count 2>/dev/null || echo 0)" states; echo "$(($(cat count 2>/dev/null || echo 0) + 1))" >count ;;
  "compute tpus queued-resources delete") rm states ;;
  "compute tpus tpu-vm scp") mkdir -p "${6%%:*}" && cp "$5" "${6%%:*}/${6##*:}" ;;
  "compute tpus tpu-vm ssh")
    cd "$5" || exit
    for argument; do case $argument in --command=*) HOME=$PWD bash -c "${argument#--command=}" ;; esac; done
    ;;
esac
"""  # noqa: E501

# stands for the environment that uv makes on a worker: ends as the next line of `ends` says
PYTHON = r"""#!/usr/bin/env bash
echo "trains with python $*" >>"$CLOUD/calls"
echo "step 1"
trap 'echo saved; exit 75' TERM
end=$(head -n 1 "$CLOUD/ends")
sed -i 1d "$CLOUD/ends"
if [ "$end" = wait ]; then while :; do sleep 0.05; done; fi
exit "$end"
"""
UV = r"""#!/usr/bin/env bash
if [ "$1" = venv ]; then mkdir -p .venv/bin; cp "$CLOUD/python" .venv/bin/python; fi
"""


class Cloud:
    """starts: states after each creation; ends: exit codes of the trainings, in order ("wait": none until told)."""

    def __init__(self, root: Path):
        self.root = root
        tools = root / "tools"
        tools.mkdir()
        plain = {"setsid": 'exec "$@"', "mountpoint": "exit 0", "gcsfuse": "", "sudo": ""}
        scripts = {"gcloud": GCLOUD, **{k: f"#!/bin/sh\n{v}\n" for k, v in plain.items()}}
        for name, text in scripts.items():
            self._script(tools / name, text)
        self._script(root / "python", PYTHON)
        for node in ("pod", "pod-0", "pod-1"):
            (root / node / ".local/bin").mkdir(parents=True)
            self._script(root / node / ".local/bin/uv", UV)
        (root / "ends").write_text("0\n")
        self.starts(["ACTIVE"])
        path = f"{tools}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "CLOUD": str(root)} | {
            "MM_JAX_POLL": "0.01",
            "MM_JAX_PATIENCE": "3",
        }

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def starts(self, *states: list[str]) -> None:
        for k, lines in enumerate(states):
            (self.root / f"next-{k}").write_text("".join(f"{line}\n" for line in lines))

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "launch/tpu_vm.sh", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, text=True, capture_output=True, timeout=120
        )

    def calls(self, *words: str) -> list[str]:
        """The calls of gcloud, and of train, that contain all words."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_a_run_from_nothing_to_its_end(cloud: Cloud) -> None:
    cloud.starts(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = cloud("train", *ASK, "--", CONFIG, "--name", 'it\'s "a b"')
    assert done.returncode == 0, done.stderr
    assert done.stdout == "step 1\n"
    (create,) = cloud.calls("create")
    for word in ("create pod ", "--zone=z", "--node-id=pod", "--accelerator-type=v5litepod-16", "--spot"):
        assert word in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    (train,) = cloud.calls("trains with")
    assert train == f'trains with python -m mm_jax train {CONFIG} --name it\'s "a b" --unfinished 75'
    assert (cloud.root / "pod/mm_jax/mm_jax/cli/train.py").is_file()
    assert not (cloud.root / "pod/mm_jax/tests").exists()
    assert (cloud.root / "pod/mm_jax/runs").resolve() == cloud.root / "pod/bucket/runs"
    for line in cloud.calls("scp") + [x for x in cloud.calls("ssh") if "tail" not in x and "kill" not in x]:
        assert "--worker=all" in line
    assert done.stderr.splitlines() == ["pod: WAITING_FOR_RESOURCES", "pod: PROVISIONING", "pod: ACTIVE"]


def test_what_is_taken_away_is_asked_for_again(cloud: Cloud) -> None:
    """Once while it runs, once before it is there."""
    active = ["ACTIVE"] * 2
    cloud.starts([*active, "SUSPENDING", "SUSPENDED"], ["PROVISIONING", "FAILED"], ["ACTIVE"])
    (cloud.root / "ends").write_text("75\n0\n")
    done = cloud("train", *ASK, "--", CONFIG)
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("queued-resources create")) == 3 and len(cloud.calls("delete", "--force")) == 2
    assert len(cloud.calls("trains with")) == 2
    assert "pod was taken away; asking again" in done.stderr


def test_its_own_failure_ends_it(cloud: Cloud) -> None:
    (cloud.root / "ends").write_text("2\n")
    done = cloud("train", *ASK, "--", CONFIG)
    assert done.returncode == 2 and len(cloud.calls("trains with")) == 1


def test_stopped_and_followed_again(cloud: Cloud) -> None:
    """A training outlives the connection; the same command finds it, and `stop` lets it save."""
    (cloud.root / "ends").write_text("wait\n")
    command = ["bash", "launch/tpu_vm.sh", "train", *ASK, "--", CONFIG]
    first = subprocess.Popen(
        command, cwd=ROOT, env=cloud.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while "step 1" not in (line := first.stdout.readline()):
            assert line, first.communicate()
        first.kill()  # the connection, not the training
        first.wait()
        second = subprocess.Popen(
            command,
            cwd=ROOT,
            env=cloud.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert "step 1" in second.stdout.readline()
        assert len(cloud.calls("trains with")) == 1 and len(cloud.calls("scp")) == 1
    finally:
        stopped = cloud("stop", *WHERE)
    out, error = second.communicate(timeout=60)
    assert stopped.returncode == 0 and "saved" in out
    assert second.returncode == 75 and "stopped and saved; the same command goes on" in error


def test_slices_start_together(cloud: Cloud) -> None:
    (cloud.root / "ends").write_text("0\n0\n")
    done = cloud("train", *ASK, "--slices", "2", "--", CONFIG)
    assert done.returncode == 0, done.stderr
    assert "--node-count=2 --node-prefix=pod" in cloud.calls("create")[0]
    assert len(cloud.calls("scp", "pod-0:")) == len(cloud.calls("scp", "pod-1:")) == 1
    deadline = time.monotonic() + 20
    while len(cloud.calls("trains with")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(cloud.calls("trains with")) == 2


def test_what_a_dry_run_prints_does_the_same(cloud: Cloud, tmp_path: Path) -> None:
    cloud.environment["TMPDIR"] = str(tmp_path)
    done = cloud("train", *ASK, "--dry-run", "--", CONFIG)
    assert done.returncode == 0 and cloud.calls() == [], done.stderr
    assert not (tmp_path / "mm_jax.tar.gz").exists()
    typed = subprocess.run(
        ["bash", "-c", done.stdout], cwd=ROOT, env=cloud.environment, text=True, capture_output=True
    )
    assert typed.returncode == 0 and typed.stdout == "ACTIVE\nstep 1\n", typed.stderr
    assert cloud.calls("trains with") == [f"trains with python -m mm_jax train {CONFIG} --unfinished 75"]


@pytest.mark.parametrize(
    "topology, kind", [("v4:2x2x4", "v4-32"), ("v5p:2x2x2", "v5p-16"), ("v6e:16x16", "v6e-256")]
)
def test_cores_or_chips(topology: str, kind: str, cloud: Cloud) -> None:
    done = cloud("create", *ASK, "--topology", topology, "--dry-run")
    assert f"--accelerator-type={kind}" in done.stdout.split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a command is needed"),
        (["trian", *ASK], 'unknown command "trian"'),
        (["status", "--zone", "z"], '--name is ""'),
        (["status", "--name", "pod"], "--zone is needed"),
        (["create", *WHERE], "--topology is needed"),
        (["create", *WHERE, "--topology", "v5e:4x4"], "4 x 1 workers need a place"),
        (["train", *ASK], "after -- a config is needed"),
        (["train", *ASK, "--", "none.py"], "there is no config none.py"),
        (["train", *ASK, "--seed", "1"], "unknown option --seed; what comes after -- goes to train"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, cloud: Cloud) -> None:
    done = cloud(*arguments)
    assert done.returncode == 2 and cloud.calls() == []
    assert done.stderr.count("\n") == 1 and message in done.stderr
