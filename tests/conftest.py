"""`--slow`: also run the tests that take longer than a minute."""

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
