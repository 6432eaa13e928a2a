"""The family "cooperative" (cooperative_kernel.py): two groups of warps share a tile of a GEMM with block scales."""

import functools
from typing import TYPE_CHECKING, Any

import torch

from .cooperative_sizes import CooperativeSizes
from .device import device_facts
from .kernel_parts import pdl_option
from .quantise import Activations
from .stream import gluon_descriptor
from .tile import TileConfig
from .tma import TRITON_TYPES, UNKNOWN_GPU, SortedSlots, descriptor_base
from .weight import Weight, scale_bytes

if TYPE_CHECKING:
    from .layer import Call, Layer

_SWIZZLE = 128  # bytes, as the tensor cores read tiles
_PARTITION_WARPS = 4  # of each consumer, half of a tile config's num_warps, and of a producer that gathers


def cooperative_sizes(layer: "Layer", op: str, weighted: bool, tile: TileConfig) -> CooperativeSizes:
    """What the kernel of one GEMM of a layer is compiled for."""
    gemm = layer.gemm(op)
    return CooperativeSizes(
        num_experts=gemm.num_experts,
        top_k=gemm.top_k,
        rows=gemm.rows,
        depth=gemm.depth,
        gathers=op == "gemm1",
        gated=gemm.gated,
        weighted=weighted,
        ue8m0=layer.scheme.ue8m0,
        block_m=tile.BLOCK_SIZE_M,
        block_n=tile.BLOCK_SIZE_N,
        group_m=tile.GROUP_SIZE_M,
        stages=tile.num_stages,
        pdl=tile.PDL,
    )


@functools.cache
def _kernel(op: str) -> Any:  # noqa: ANN401 - a Gluon function has no Python type
    # Imported where it is used: nothing of Gluon is needed, nor has to exist, on other GPUs.
    from . import cooperative_kernel

    return getattr(cooperative_kernel, f"{op}_cooperative")


def launch_cooperative(
    layer: "Layer",
    op: str,
    a: Activations,
    w: Weight,
    out: Activations,
    call: "Call",
    assignment: SortedSlots,
    weighted: bool,
    tile: TileConfig,
) -> None:
    """One GEMM of `run_sorted`, for tile configs of this family."""
    x = call.hidden_states
    sizes = cooperative_sizes(layer, op, weighted, tile)
    rows: Any = a.values
    if not sizes.gathers:
        block = [tile.BLOCK_SIZE_M, tile.BLOCK_SIZE_K]
        rows = gluon_descriptor(rows, list(rows.shape), list(rows.stride()), block, _SWIZZLE)
    _kernel(op)[(device_facts(x.device.index).num_sms if x.is_cuda else UNKNOWN_GPU,)](
        rows,
        _weights(w.values, sizes, x),
        w.bias,
        out.values,
        out.scale,
        call.topk_weights,
        *assignment,
        call.topk_ids.numel(),
        a.scale,
        scale_bytes(w.scale),
        ACTIVATION=layer.kernels.activation,
        DTYPE=TRITON_TYPES[layer.dtype],
        S=sizes,
        num_warps=_PARTITION_WARPS,
        **pdl_option(tile.PDL),
    )


def _weights(w: torch.Tensor, sizes: CooperativeSizes, x: torch.Tensor) -> Any:  # noqa: ANN401
    """w [E, ROWS, DEPTH] as [E, sides, ROWS / sides, DEPTH]."""
    by_expert, by_row, _ = w.stride()
    shape = [w.shape[0], sizes.sides, sizes.columns, sizes.depth]
    strides = [by_expert, sizes.columns * by_row, by_row, 1]
    return gluon_descriptor(descriptor_base(w, x), shape, strides, sizes.weight_box, _SWIZZLE)
