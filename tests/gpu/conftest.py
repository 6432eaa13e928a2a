"""What the tests of whole layers on a GPU share."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.packages import poisoned


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty returns NaN: what a kernel does not write, or reads without right, shows."""
    with poisoned():
        yield
    torch.cuda.empty_cache()
