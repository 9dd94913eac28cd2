"""`--parity-json FILE`: write what the checks found."""

import json
from pathlib import Path

import pytest

from tests.parity.record import FOUND


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--parity-json", None)
    if path:
        Path(path).write_text(json.dumps(FOUND))
