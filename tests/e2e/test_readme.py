"""Every command and every program in README.md runs, and every file that it links to is there."""

import os
import re
import shlex
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def lines_of(block: str) -> list[str]:
    """The commands of a bash block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def commands() -> list[str]:
    """All that README.md tells to type."""
    return [line for language, _, text in BLOCKS if language == "bash" for line in lines_of(text)]


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        path, _, anchor = link.partition("#")
        if path and "://" not in link:
            assert (ROOT / path).exists(), link
        elif not path:
            headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_fences_are_of_known_languages() -> None:
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert {language for language, _, _ in BLOCKS} == {"bash", "python", "json", "mermaid"}


def test_every_command_of_the_package_has_an_example() -> None:
    from mm_jax.cli.main import COMMANDS

    shown = {line.split()[3] for line in commands() if line.startswith("python -m mm_jax ")}
    assert shown == set(COMMANDS)


def serve(line: str, workspace: Path, environment: dict[str, str]) -> subprocess.Popen:
    """A server of README.md, once it is ready."""
    server = subprocess.Popen(shlex.split(line), cwd=workspace, env=environment)
    for _ in range(600):
        assert server.poll() is None, line
        try:
            urllib.request.urlopen("http://127.0.0.1:8000/health").close()
            return server
        except OSError:
            time.sleep(1)
    raise AssertionError(f"not ready: {line}")


@pytest.mark.slow
def test_every_block_runs_in_order(workspace: Path, stub_uv: tuple[Path, dict[str, str]]) -> None:
    _, environment = stub_uv
    # launch/test.sh must find the tests, and not run this one again.
    environment["PYTEST_ADDOPTS"] = "--collect-only -q -p no:cacheprovider"

    def run(command: list[str], shown: str) -> None:
        typed = "how many shapes are there?\nand circles?\n"  # what is asked where nothing is given
        done = subprocess.run(
            command, cwd=workspace, env=environment, input=typed, text=True, capture_output=True
        )
        said = f"{shown}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == 0, said
        assert "Traceback" not in done.stderr, said

    for _, about, text in BLOCKS:
        if found := re.search(r"file=(\S+)", about):
            path = workspace / found[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    servers: list[subprocess.Popen] = []
    try:
        for language, about, text in BLOCKS:
            if language == "python" and "file=" not in about:
                run(["python", "-c", text], text)
            elif language == "bash":
                for line in lines_of(text):
                    if line.startswith("python -m mm_jax serve "):  # it goes on while the rest runs
                        servers.append(serve(line, workspace, environment))
                    else:
                        run(shlex.split(line), line)
        for server in servers:
            server.terminate()
            assert server.wait(60) == 0
        assert servers
    finally:
        for server in servers:
            server.kill()
    left = set(os.listdir(workspace / "runs" / "quickstart"))
    expected = (
        "checkpoints scores.md scores.json answers.jsonl loss.png metrics.jsonl tensorboard report.html"
    )
    assert left >= set(expected.split())
