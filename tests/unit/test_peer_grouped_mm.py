"""The peer in tools/ computes the layer."""

from pathlib import Path

import pytest
import torch

from moegen.bench.peers import load_peer
from moegen.runtime.activations import Activation
from moegen.runtime.reference import moe_reference

PEER = Path(__file__).parents[2] / "tools" / "peer_grouped_mm.py"


@pytest.mark.parametrize("tokens", [1, 37])
def test_it_computes_the_layer(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    w13 = (torch.randn(8, 96, 64, generator=generator) / 8).bfloat16()
    w2 = (torch.randn(8, 64, 48, generator=generator) / 7).bfloat16()
    weights, ids = torch.randn(tokens, 8, generator=generator).softmax(-1).topk(3)
    arguments = (x, w13, w2, weights, ids.int())
    expected = moe_reference(*arguments, Activation.of("silu")).double()
    found = load_peer(f"{PEER}:fused_experts=grouped_mm").function(*arguments)
    assert isinstance(found, torch.Tensor)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2
