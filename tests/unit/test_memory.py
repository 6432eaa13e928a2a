"""What a call allocates beside its inputs and its output, counted on meta tensors: docs/performance.md, Memory."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from moegen.aot import meta_call
from moegen.device import TARGETS
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.layer import Layer, is_low_latency

H200 = TARGETS["cuda:90"]
SLACK = 64 * 10**6
SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b, tp 4": (128, 8, 4096, 384),
    "qwen3-next-80b-a3b": (512, 10, 2048, 512),
    "deepseek-v3, tp 8": (256, 8, 7168, 256),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "gpt-oss-120b": (128, 4, 2880, 2880),
}
SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that is made, none of them taken to be freed: an upper bound."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "empty" in func.__name__:
            self.bytes += out.nbytes
        return out


def allocated(package: ModuleType, tokens: int, monkeypatch: pytest.MonkeyPatch) -> int:
    layer: Layer = package.LAYERS[0]
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    tiles = default_tiles(*map(layer.gemm, ("gemm1", "gemm2")), tokens, H200, is_low_latency(layer, tokens, None))
    call = meta_call(package._dispatch._PACKAGE, layer, tokens, H200)
    with Allocations() as counted:
        package.runtime.layer.run(layer, call, tiles)
    return counted.bytes


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 4096, 131072])
@pytest.mark.parametrize("shape", SHAPES)
def test_16_bit_layers(
    shape: str, tokens: int, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, top_k, hidden, inter = SHAPES[shape]
    package = build(**dict(zip(SIZES, SHAPES[shape], strict=True)))
    found = allocated(package, tokens, monkeypatch)
    least = inter if tokens <= 2 else hidden + inter  # at most "stream" adds up what it makes of a token's slots
    assert tokens * top_k * least * 2 <= found <= tokens * top_k * (hidden + inter) * 2 + SLACK


@pytest.mark.parametrize("tokens", [2, 4096, 131072])
def test_block_scales(tokens: int, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than with 16 bits, and the quantised tokens; `hidden` has rows for each expert's padding."""
    package = build(**dict(zip(SIZES, SHAPES["qwen3-30b-a3b"], strict=True)), quant=("fp8_w8a8:128x128",))
    assert allocated(package, tokens, monkeypatch) <= tokens * (8 * (2048 + 768) * 2 + 2048) + SLACK
