"""Both forms of decoding against the oracle, bit for bit: every byte with many scales."""

import pytest
import torch

from tests.support.decoding import CASES, Case, decoded, expected, stored_weight


@pytest.mark.parametrize("packed", [False, True], ids=["portable", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
def test_decoded_values_are_the_rounded_real_ones(case: Case, packed: bool) -> None:
    weight = stored_weight(case)
    assert torch.equal(decoded(case, weight, packed, "cpu"), expected(case, weight))
