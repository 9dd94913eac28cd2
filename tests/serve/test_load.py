"""64 clients at once, some of which go away: no error, everybody is served, memory stays where it is."""

import os

import pytest

from tests.cli.conftest import make_run
from tests.serve import load
from tests.serve.conftest import Server

SECONDS = float(os.environ.get("MM_JAX_LOAD_SECONDS", "30"))
RUN = os.environ.get("MM_JAX_LOAD_RUN", "")  # a run of the quickstart; without one a tiny model


@pytest.mark.slow
def test_many_clients(tmp_path):
    run = RUN or make_run(tmp_path / "tiny")
    server = Server(run, "--slots", "16", "--queue", "64", "--max-length", "512").wait()
    try:
        options = ["--clients", "64", "--seconds", str(SECONDS), "--pid", str(server.process.pid)]
        before = load.memory(server.process.pid)
        tally = load.main([server.url, *options])
        assert not tally.errors and tally.left > 0
        assert min(tally.answers) > 0 and max(tally.answers) <= 3 * min(tally.answers) + 3
        after = load.memory(server.process.pid)
        assert after < 1.3 * before + 200, f"{before:.0f} MiB before, {after:.0f} MiB after"
        assert server.chat(model=None)[0] == 200 and server.stop() == 0
        assert "Traceback" not in server.said()
    finally:
        server.process.kill()
