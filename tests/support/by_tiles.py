"""Calls of a layer on a GPU with chosen tile configs, against the oracle, repeated, and in a CUDA graph."""

from types import ModuleType
from typing import Any

import torch

from moegen.runtime.device import device_facts
from moegen.runtime.tile import LayerTiles, why_illegal
from tests.support.packages import TOLERANCE, oracle, relative_error, unnamed

ROUNDED_TWICE = 3e-2  # a sum that float32 and float64 round apart may land one 8-bit step off, see test_quant.py


def run(package: ModuleType, arguments: dict[str, Any], tiles: LayerTiles, on_input: bool = False) -> torch.Tensor:
    """One call of the package's own `run`, past its checks, into NaN."""
    layer, x = package.LAYERS[0], arguments["hidden_states"]
    for op in ("gemm1", "gemm2"):
        assert why_illegal(getattr(tiles, op), layer.gemm(op), device_facts(0)) is None
    out = torch.full_like(x, float("nan"))
    weights = [unnamed(package, name, arguments) for name in ("w13", "w2")]
    routing = (arguments["topk_weights"], arguments["topk_ids"], arguments.get("expert_map"), on_input)
    package.runtime.layer.run(layer, package.runtime.layer.Call(x, *weights, *routing, out), tiles)
    return out


def check(package: ModuleType, arguments: dict[str, Any], tiles: LayerTiles, on_input: bool = False) -> torch.Tensor:
    """Against the oracle; a second run and one in a CUDA graph give the same bits."""
    out = run(package, arguments, tiles, on_input)
    expected = oracle(package.LAYERS[0], arguments, apply_router_weight_on_input=on_input)
    error = relative_error(out, expected)
    layer = package.LAYERS[0]
    assert error < (ROUNDED_TWICE if layer.scheme.kind else TOLERANCE[layer.dtype]), error
    assert torch.equal(out, run(package, arguments, tiles, on_input))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(package, arguments, tiles, on_input)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, captured)
    return out
