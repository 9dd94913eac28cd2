"""`--parity-json FILE`: run the tests that make a check alone, and write what they found, after each file of tests, so
that a run may be stopped."""

import inspect
import json
from pathlib import Path

import pytest

from tests.parity.record import FOUND
from tests.parity.table import CHECKS

WRITTEN: dict[str, dict | None] = {}  # by file of tests; None where one has failed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--parity-json", None):
        return
    kept = [item for item in items if CHECKS.search(inspect.getsource(item.function))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    if outcome.get_result().failed:
        WRITTEN[item.path.name] = None


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    path, name = item.config.getoption("--parity-json", None), item.path.name
    if not path or (nextitem is not None and nextitem.path == item.path):
        return
    if name not in WRITTEN:
        WRITTEN[name] = json.loads(json.dumps(FOUND))
    FOUND.clear()
    Path(path).write_text(json.dumps(WRITTEN))
