"""Malformed requests, by the hundred (MM_JAX_FUZZ: how many): no 500, no hang, and a valid one is answered after."""

import os

import pytest

from tests.serve import fuzz
from tests.serve.conftest import KEY

COUNT = int(os.environ.get("MM_JAX_FUZZ", "300"))  # of the slow test


def test_broken_requests(server):
    found = fuzz.Fuzz(server.url, KEY)
    fuzz.by_hand(found, 100)
    found.well()
    assert found.seen[400] > 30 and found.seen[200] > 10
    assert "Traceback" not in server.said(), server.said()[-4000:]


@pytest.mark.slow
def test_many_broken_requests(server):
    pytest.importorskip("schemathesis", reason="needs: pip install schemathesis")
    fuzz.main(server.url, COUNT, KEY)
    assert "Traceback" not in server.said() and server.process.poll() is None
    assert server.metric("slots_used ") == 0
