"""The family "tma": weights, and gemm2's activations, are loaded by the tensor memory accelerator of Hopper GPUs.

Programs are persistent, as many as run at a time. gemm1 gathers the tokens by pointers and leaves `hidden` in the order
of the aligned assignment, so that gemm2 reads blocks of rows. That flow is also the one of the family "cooperative".
"""

from typing import TYPE_CHECKING, Protocol

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import device_facts
from .kernel_parts import pdl_option
from .quantise import Activations, Slots, quantise
from .reduce import top_k_reduce
from .tile import Gemm, LayerTiles, TileConfig, flattens, shared_memory
from .weight import Weight, scale_bytes

if TYPE_CHECKING:
    from .layer import Call, Layer

_ALIGNMENT = 16  # bytes, of a descriptor's address and strides
# Of a multiprocessor of compute capability 9.0: bytes of shared memory, what the driver takes of them for a program,
# registers, and how many of those a thread needs beside accumulators and products.
_SHARED, _SHARED_EACH, _REGISTERS, _OTHER_REGISTERS = 233_472, 1024 + 64, 65_536, 40
UNKNOWN_GPU = 2  # programs of a launch without a GPU: in the interpreter, or only compiled
TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# sorted_token_ids, expert_ids, num_tokens_post_padded of the aligned assignment
SortedSlots = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def readable_by_tma(call: "Call") -> bool:
    """Whether the addresses of weights and tokens, and the strides of weights, are as descriptors need them.

    Tokens are read so by the family "stream" alone, which has one of them, hence no stride.
    """
    weights = (call.w13.values, call.w2.values)
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (*weights, call.hidden_states)) and all(
        w.stride(2) == 1 and all(stride * w.element_size() % _ALIGNMENT == 0 for stride in w.stride()[:2])
        for w in weights
    )


def descriptor_base(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a descriptor of `w` shows: `w`, or for the warm-up's weights, which have no memory, some on the GPU of `x`.

    Nothing reads it then.
    """
    return torch.empty(_ALIGNMENT, dtype=w.dtype, device=x.device) if w.is_meta and x.is_cuda else w


def programs_at_once(tile: TileConfig, gemm: Gemm) -> int:
    """Programs that a multiprocessor holds at a time: while one waits or stores, the others multiply."""
    threads, values = 32 * tile.num_warps, tile.BLOCK_SIZE_M * tile.BLOCK_SIZE_N
    # Products that are scaled before they are added have registers of their own.
    held = values + (min(values, tile.BLOCK_SIZE_M * gemm.group_n) if gemm.group_k else 0)
    by_registers = _REGISTERS // (threads * min(255, held // threads + _OTHER_REGISTERS))
    by_shared_memory = _SHARED // (shared_memory(tile, gemm) + _SHARED_EACH)
    return max(1, min(by_registers, by_shared_memory))


def quantises_hidden(tile: TileConfig, gemm: Gemm) -> bool:
    """Whether gemm1 quantises what it writes: half a tile of its columns is one group."""
    return 0 < gemm.group_k == tile.BLOCK_SIZE_N // 2 and not gemm.interleaved


class Launch(Protocol):
    """One GEMM of a family; `a` are tokens in gemm1, sorted rows in gemm2."""

    def __call__(
        self,
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
        """Launch it."""


def run_sorted(
    layer: "Layer", call: "Call", tiles: LayerTiles, assignment: SortedSlots, experts: int, launch: Launch
) -> None:
    """`layer.run` after the aligned assignment, for families whose gemm1 leaves `hidden` in its order."""
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
    launch(layer, "gemm1", a, w13, hidden, call, assignment, on_input, tiles.gemm1)
    if not fused:
        live = Slots(sorted_ids, None, slots, slots)  # a row holds values iff it has a slot
        hidden = quantise(hidden.values, layer.scheme, w2.values.dtype, w2.input_scale, live, pdl)
    slot_outputs = Activations(x.new_empty((slots, layer.hidden_size)), None)
    launch(layer, "gemm2", hidden, w2, slot_outputs, call, assignment, not on_input, tiles.gemm2)
    top_k_reduce(
        slot_outputs.values, call.topk_ids, call.out, experts, call.expert_map, layer.local_experts, tiles.gemm2.PDL
    )


def launch_tma(
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
    gemm = layer.gemm(op)
    programs = programs_at_once(tile, gemm)
    x = call.hidden_states
    multiprocessors = device_facts(x.device.index).num_sms if x.is_cuda else UNKNOWN_GPU
    getattr(layer.kernels, f"{op}_tma")[(programs * multiprocessors,)](
        a.values if op == "gemm1" else _descriptor(a.values, (tile.BLOCK_SIZE_M, tile.BLOCK_SIZE_K)),
        _weights(w.values, gemm, tile, x),
        w.bias,
        out.values,
        out.scale,
        call.topk_weights,
        *assignment,
        call.topk_ids.numel(),
        a.scale,
        scale_bytes(w.scale),
        NUM_EXPERTS=gemm.num_experts,
        TOP_K=gemm.top_k,
        ROWS=gemm.rows,
        DEPTH=gemm.depth,
        MUL_ROUTED_WEIGHT=weighted,
        BLOCK_SIZE_M=tile.BLOCK_SIZE_M,
        BLOCK_SIZE_N=tile.BLOCK_SIZE_N,
        BLOCK_SIZE_K=tile.BLOCK_SIZE_K,
        GROUP_SIZE_M=tile.GROUP_SIZE_M,
        FLATTEN=flattens(gemm),
        DTYPE=TRITON_TYPES[layer.dtype],
        PDL=tile.PDL,
        **pdl_option(tile.PDL),
        maxnreg=min(255, _REGISTERS // (32 * tile.num_warps * programs) // 8 * 8),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _weights(w: torch.Tensor, gemm: Gemm, tile: TileConfig, x: torch.Tensor) -> TensorDescriptor:
    """w [E, ROWS, DEPTH] as [E, SIDES, ROWS / SIDES, DEPTH]; a block holds the rows of one product, on each side."""
    sides = 2 if gemm.gated and not gemm.interleaved else 1
    experts, rows, depth = w.shape
    by_expert, by_row, _ = w.stride()
    shape, strides = [experts, sides, rows // sides, depth], [by_expert, rows // sides * by_row, by_row, 1]
    if gemm.group_k and gemm.group_n < tile.BLOCK_SIZE_N:  # two products a step
        block = [1, 1, tile.BLOCK_SIZE_N // 2, tile.BLOCK_SIZE_K]
    else:
        block = [1, sides, tile.BLOCK_SIZE_N // sides, tile.BLOCK_SIZE_K]
    return TensorDescriptor(descriptor_base(w, x), shape, strides, block)


def _descriptor(values: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(values, list(values.shape), list(values.stride()), list(block))
