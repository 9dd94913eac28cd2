"""`--slow`: also run the tests that take longer than a minute. Every file starts without compiled programs."""

import gc
import sys
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--parity-json", metavar="FILE", help="write what the parity checks found, see tests.parity.table"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="longer than a minute; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def released_programs() -> Iterator[None]:
    """XLA maps every kernel it compiles into memory, and a process may have 65,530 mappings on Linux.

    A worker that keeps the programs of all files goes beyond that, and is then killed in the middle of a test.
    """
    yield
    if jax := sys.modules.get("jax"):
        gc.collect()
        jax.clear_caches()
        gc.collect()
