"""Both forms of decoding on a GPU against the oracle, bit for bit."""

import pytest
import torch

from tests.support.decoding import CASES, Case, decoded, expected, stored_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["portable", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
def test_decoded_values_are_the_rounded_real_ones(case: Case, packed: bool) -> None:
    weight = stored_weight(case)
    assert torch.equal(decoded(case, weight, packed, "cuda"), expected(case, weight))
