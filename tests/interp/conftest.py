"""This folder runs kernels in Triton's interpreter, which is chosen when a kernel is *defined*.

Any test that imported a kernel before has fixed that choice for the process. So the folder has an invocation of its
own, `TRITON_INTERPRET=1 python -m pytest tests/interp`, and is skipped in every other one.
"""

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.support import interpreter

    interpreter.apply()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests, and only those, unless the interpreter is on."""
    if INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 from the start: run tests/interp on its own")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(skip)
