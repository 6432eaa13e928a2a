"""Options and fixtures that all test folders share."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch of tests/golden."""
    parser.addoption("--update", action="store_true", help="rewrite the golden files from what is rendered now")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModuleType]:
    """`build(num_experts=8, activation="gelu", ...)`: the imported package of a small spec, built once a session."""
    from tests.support import packages  # here and not above: tests/interp patches Triton before anything imports it

    folder: Path = tmp_path_factory.mktemp("packages")

    def make(**fields: Any) -> ModuleType:
        return packages.build(folder, **fields)

    return make
