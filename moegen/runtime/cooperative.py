"""The family "cooperative" (cooperative_kernel.py): two groups of warps share a tile, a third one loads.

gemm1 gathers the tokens and leaves `hidden` in the order of the aligned assignment, so that gemm2 reads blocks of rows.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .cooperative_sizes import CooperativeSizes
from .descriptors import descriptor, descriptor_base, multiprocessors
from .kernel_parts import pdl_option
from .quantise import Activations, Slots, quantise
from .reduce import top_k_reduce
from .tile import Gemm, LayerTiles, TileConfig
from .weight import Weight, scale_bytes

if TYPE_CHECKING:
    from .layer import Call, Layer

# sorted_token_ids, expert_ids, num_tokens_post_padded of the aligned assignment
SortedSlots = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_SWIZZLE = 128  # bytes, as the tensor cores read tiles
_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
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
        value_bytes=gemm.a_bits // 8,
        integer=layer.scheme.row.activation == "int8",
        grouped=gemm.group_k > 0,
        token_scales=layer.scheme.kind in ("channel", "tensor_token"),
        row_scales=layer.scheme.kind == "channel",
        ue8m0=layer.scheme.ue8m0,
        block_m=tile.BLOCK_SIZE_M,
        block_n=tile.BLOCK_SIZE_N,
        group_m=tile.GROUP_SIZE_M,
        stages=tile.num_stages,
        pdl=tile.PDL,
    )


def quantises_hidden(tile: TileConfig, gemm: Gemm) -> bool:
    """Whether gemm1 quantises what it writes: half a tile of its columns is one group of block scales."""
    return gemm.group_k == tile.BLOCK_SIZE_N // 2


def run_cooperative(layer: "Layer", call: "Call", tiles: LayerTiles, assignment: SortedSlots, experts: int) -> None:
    """`layer.run` after the aligned assignment, for tile configs of this family."""
    x, w13, w2, pdl = call.hidden_states, call.w13, call.w2, tiles.gemm1.PDL
    sorted_ids, slots = assignment[0], call.topk_ids.numel()
    rows, columns = sorted_ids.numel(), layer.intermediate_size
    on_input = call.apply_router_weight_on_input
    a = quantise(x, layer.scheme, w13.values.dtype, w13.input_scale, None, pdl)
    fused = quantises_hidden(tiles.gemm1, layer.gemm("gemm1"))
    if fused:
        scale = x.new_empty((rows, triton.cdiv(columns, layer.scheme.group_k)), dtype=torch.float32)
        hidden = Activations(x.new_empty((rows, columns), dtype=w2.values.dtype), scale)
    else:
        hidden = Activations(x.new_empty((rows, columns)), None)
    _launch(layer, "gemm1", a, w13, hidden, call, assignment, on_input, tiles.gemm1)
    if not fused:
        live = Slots(sorted_ids, None, slots, slots)  # a row holds values iff it has a slot
        hidden = quantise(hidden.values, layer.scheme, w2.values.dtype, w2.input_scale, live, pdl)
    slot_outputs = Activations(x.new_empty((slots, layer.hidden_size)), None)
    _launch(layer, "gemm2", hidden, w2, slot_outputs, call, assignment, not on_input, tiles.gemm2)
    top_k_reduce(
        slot_outputs.values, call.topk_ids, call.out, experts, call.expert_map, layer.local_experts, tiles.gemm2.PDL
    )


@functools.cache
def _kernel(op: str) -> Any:  # noqa: ANN401 - a Gluon function has no Python type
    # Imported where it is used: nothing of Gluon is needed, nor has to exist, on other GPUs.
    from . import cooperative_kernel

    return getattr(cooperative_kernel, f"{op}_cooperative")


def _launch(
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
    x = call.hidden_states
    sizes = cooperative_sizes(layer, op, weighted, tile)
    rows: Any = a.values.contiguous()  # tokens that were not quantised may have gaps between them
    if not sizes.gathers:
        block = [tile.BLOCK_SIZE_M, tile.BLOCK_SIZE_K]
        rows = descriptor(rows, list(rows.shape), list(rows.stride()), block, _SWIZZLE)
    _kernel(op)[(multiprocessors(x),)](
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
        DTYPE=_TRITON_TYPES[layer.dtype],
        S=sizes,
        num_warps=_PARTITION_WARPS,
        **pdl_option(tile.PDL),
    )


def _weights(w: torch.Tensor, sizes: CooperativeSizes, x: torch.Tensor) -> Any:  # noqa: ANN401
    """w [E, ROWS, DEPTH] as [E, sides, ROWS / sides, DEPTH]."""
    by_expert, by_row, _ = w.stride()
    shape = [w.shape[0], sizes.sides, sizes.columns, sizes.depth]
    strides = [by_expert, sizes.columns * by_row, by_row, 1]
    return descriptor(descriptor_base(w, x), shape, strides, sizes.weight_box, _SWIZZLE)
