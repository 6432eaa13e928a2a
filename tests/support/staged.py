"""Quantised layers checked a GEMM at a time: each from the very bits that it was given."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from moegen.runtime.quant import Scheme
from moegen.runtime.reference import LiveSlots, reference_gemm1, reference_gemm2
from tests.support.packages import relative_error, unnamed

CHUNK = 1024  # tokens that the float64 oracle computes at a time


@contextmanager
def quantisations(package: ModuleType) -> Iterator[list[tuple[torch.Tensor, Any]]]:
    """What the calls inside quantise: (activations, values with their scales), input and intermediate by turns."""
    module, seen = package.runtime.layer, []
    original = module.quantise

    def recording(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((x, original(x, *rest, **options)))
        return seen[-1][1]

    module.quantise = recording
    try:
        yield seen
    finally:
        module.quantise = original


def real(scheme: Scheme, quantised: Any) -> torch.Tensor:
    """The float64 worth of quantised activations."""
    values = quantised.values.double()
    if quantised.scale is None or scheme.kind == "tensor":
        return values if quantised.scale is None else values * quantised.scale.double()
    rows, depth = values.shape
    spread = quantised.scale.double().reshape(rows, -1).repeat_interleave(scheme.group_k or depth, 1)
    return values * spread[:, :depth]


def staged_oracle(
    package: ModuleType, arguments: dict[str, Any], seen: list[tuple[torch.Tensor, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden of the live slots, the same in float64, out in float64), each GEMM from the bits that it was given.

    Hopper's fp8 tensor cores keep about 14 bits of a sum. That is enough for some intermediate values to round to the
    neighbouring fp8 value, 6 to 12 % away, which says nothing about the kernels: so GEMM2 is held to what it read.
    """
    layer = package.LAYERS[0]
    scheme, top_k = Scheme.parse(layer.quant), layer.top_k
    (_, first), (hidden, second) = seen
    w13, w2 = (unnamed(package, name, arguments) for name in ("w13", "w2"))
    found, wanted, out = [], [], []
    for start in range(0, arguments["hidden_states"].shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        weight, ids = arguments["topk_weights"][rows].double(), arguments["topk_ids"][rows]
        slots = LiveSlots.of(weight, ids, arguments.get("expert_map"), w13.values.shape[0])
        here = slots.tokens * top_k + slots.positions
        x, q = (real(scheme, rows_of(part, r)) for part, r in ((first, rows), (second, slots_of(rows, top_k))))
        wanted.append(reference_gemm1(x, w13, slots, layer.activation, scheme, weighted=False))
        found.append(hidden[slots_of(rows, top_k)][here])
        shape = (ids.shape[0], layer.hidden_size)
        out.append(reference_gemm2(q[here], w2, slots, scheme, shape, weighted=True))
    return torch.cat(found), torch.cat(wanted), torch.cat(out)


def slots_of(tokens: slice, top_k: int) -> slice:
    """The slots of some tokens."""
    return slice(tokens.start * top_k, tokens.stop * top_k)


def rows_of(quantised: Any, rows: slice) -> Any:
    """Quantised activations, some rows of them; a scale of the whole tensor stays."""
    whole = quantised.scale is None or quantised.scale.numel() == 1
    return type(quantised)(quantised.values[rows], quantised.scale if whole else quantised.scale[rows])


def close(found: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float, norm: float, case: str) -> None:
    """Every value within atol + rtol * |expected|, and the norm of the error within `norm` of the result's."""
    assert bool(found.isfinite().all()), f"{case}: {int((~found.isfinite()).sum())} values are not finite"
    if not found.numel():
        return
    excess = ((found.double() - expected).abs() - rtol * expected.abs()).max().item()
    assert excess <= atol, f"{case}: absolute error {excess:.4g} beyond rtol {rtol}, allowed {atol}"
    relative = relative_error(found, expected)
    assert relative <= norm, f"{case}: relative error {relative:.4g}, allowed {norm}"
