"""The family "cooperative" (cooperative_kernel.py): two groups of warps share a tile or alternate, a third one loads.

gemm1 gathers the tokens and leaves `hidden` in the order of the aligned assignment, less its padding, so that gemm2
reads blocks of rows. A block's last rows may be the next expert's: what is made of those is not stored.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .align_kernels import NUM_TICKETS
from .cooperative_sizes import CooperativeSizes, joins, quantises_hidden
from .descriptors import descriptor, descriptor_base, multiprocessors
from .kernel_parts import pdl_option
from .quantise import Activations, Room, Slots, quantise
from .reduce import top_k_reduce
from .tile import LayerTiles, TileConfig
from .weight import scale_bytes

if TYPE_CHECKING:
    from .layer import Call, Layer

# Outputs of align_into: sorted_token_ids, expert_ids, num_tokens_post_padded, first_rows.
SortedSlots = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_SWIZZLE = 128  # bytes, as the tensor cores read tiles
_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PARTITION_WARPS = 4  # of each consumer, half of a tile config's num_warps, and of a producer that gathers


def cooperative_sizes(layer: "Layer", op: str, weighted: bool, tile: TileConfig, joined: bool) -> CooperativeSizes:
    """What the kernel of one GEMM of a layer, or both GEMMs, are compiled for."""
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
        joined=joined,
        ue8m0=layer.scheme.ue8m0,
        block_m=tile.BLOCK_SIZE_M,
        block_n=tile.BLOCK_SIZE_N,
        group_m=tile.GROUP_SIZE_M,
        stages=tile.num_stages,
        pdl=tile.PDL,
    )


def run_cooperative(
    layer: "Layer",
    call: "Call",
    tiles: LayerTiles,
    assignment: SortedSlots,
    counters: torch.Tensor,
    experts: int,
    room: Room | None,
) -> None:
    """`layer.run` after the aligned assignment, for tile configs of this family; counters: those of align_into, room:
    that of quantise.
    """
    x, w13, w2, pdl = call.hidden_states, call.w13, call.w2, tiles.gemm1.PDL
    slots, columns = call.topk_ids.numel(), layer.intermediate_size
    gemm1 = layer.gemm("gemm1")
    joined, quantised = joins(tiles, gemm1), quantises_hidden(tiles.gemm1, gemm1)
    sizes = [
        cooperative_sizes(layer, op, call.apply_router_weight_on_input == (op == "gemm1"), tile, joined)
        for op, tile in (("gemm1", tiles.gemm1), ("gemm2", tiles.gemm2))
    ]
    a = quantise(x, layer.scheme, w13.values.dtype, w13.input_scale, None, pdl, room)
    a = Activations(a.values.contiguous(), a.scale)  # tokens that were not quantised may have gaps between them
    scale = None
    if quantised:
        scale = x.new_empty((slots, triton.cdiv(columns, layer.scheme.group_k)), dtype=torch.float32)
    hidden = Activations(x.new_empty((slots, columns), dtype=w2.values.dtype if quantised else x.dtype), scale)
    slot_outputs = x.new_empty((slots, layer.hidden_size))
    weights = [_weights(w.values, one, x) for w, one in zip((w13, w2), sizes, strict=True)]
    scales = [scale_bytes(w.scale) for w in (w13, w2)]
    routing = (call.topk_weights, *assignment)
    first, second, done = counters[:1], counters[1:2], counters[NUM_TICKETS.value :]

    def launch(kernel: str, *arguments: object, **options: object) -> None:
        _kernel(kernel)[(multiprocessors(x),)](
            *arguments,
            ACTIVATION=layer.kernels.activation,
            DTYPE=_TRITON_TYPES[layer.dtype],
            num_warps=_PARTITION_WARPS,
            **options,
            **pdl_option(pdl),
        )

    if joined:
        launch(
            "layer_cooperative", a.values, weights[0], w13.bias, *hidden, _sorted_rows(hidden, tiles.gemm2), weights[1],
            w2.bias, slot_outputs, *routing, first, done, slots, a.scale, *scales, S=sizes[0], S2=sizes[1],
        )  # fmt: skip
    else:
        launch(
            "gemm1_cooperative", a.values, weights[0], w13.bias, *hidden, *routing, first, slots, a.scale, scales[0],
            S=sizes[0],
        )  # fmt: skip
        if not quantised:
            written = Slots(num_live=assignment[3][-1:])
            hidden = quantise(hidden.values, layer.scheme, w2.values.dtype, w2.input_scale, written, pdl)
        launch(
            "gemm2_cooperative", _sorted_rows(hidden, tiles.gemm2), weights[1], w2.bias, slot_outputs, None, *routing,
            second, slots, hidden.scale, scales[1], S=sizes[1],
        )  # fmt: skip
    top_k_reduce(slot_outputs, call.topk_ids, call.out, experts, call.expert_map, layer.local_experts, tiles.gemm2.PDL)


def _sorted_rows(hidden: Activations, tile: TileConfig) -> Any:  # noqa: ANN401
    """`hidden` [rows, I] in blocks of a tile's step."""
    rows = hidden.values
    block = [tile.BLOCK_SIZE_M, tile.BLOCK_SIZE_K]
    return descriptor(rows, list(rows.shape), list(rows.stride()), block, _SWIZZLE)


@functools.cache
def _kernel(name: str) -> Any:  # noqa: ANN401 - a Gluon function has no Python type
    # Imported where it is used: nothing of Gluon is needed, nor has to exist, on other GPUs.
    from . import cooperative_kernel

    return getattr(cooperative_kernel, name)


def _weights(w: torch.Tensor, sizes: CooperativeSizes, x: torch.Tensor) -> Any:  # noqa: ANN401
    """w [E, ROWS, DEPTH] as [E, sides, ROWS / sides, DEPTH]."""
    by_expert, by_row, _ = w.stride()
    shape = [w.shape[0], sizes.sides, sizes.columns, sizes.depth]
    strides = [by_expert, sizes.columns * by_row, by_row, 1]
    return descriptor(descriptor_base(w, x), shape, strides, sizes.weight_box, _SWIZZLE)
