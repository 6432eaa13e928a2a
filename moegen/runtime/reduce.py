"""The last step of a layer: each token's output is the sum of its top-k slot outputs.

Pure memory traffic. Slots that no GEMM wrote (padding ids, experts of another rank) are not read at all, so their rows
may hold anything, and under expert parallelism the traffic shrinks with them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .kernel_parts import pdl_begin, pdl_option

MAX_TOP_K = 32  # a token's live slots travel as the bits of one int32

# A wide program moves more bytes for its fixed cost; narrow ones spread a small batch over more multiprocessors.
_WIDE, _NARROW = 1024, 256
_WIDE_FROM_PROGRAMS = 512  # about four wide programs for each multiprocessor of a large GPU
_BYTES_PER_WARP = 32 * 16  # one 16-byte access a lane


class ReduceTiles(NamedTuple):
    """The constexpr choices of one (tokens, hidden size, element size): equal tiles run the same compiled kernel."""

    block_h: int  # columns of one program
    num_warps: int


@triton.jit
def is_live(ids, expert_map, num_experts, num_local):
    """Whether these ids belong to an expert whose weights are on this rank."""
    live = (ids >= 0) & (ids < num_experts)
    if expert_map is not None:
        local = tl.load(expert_map + ids, mask=live, other=-1)
        live = (local >= 0) & (local < num_local)
    return live


@triton.jit
def _live_slots(topk_ids, expert_map, token, num_experts, num_local, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr):
    """Bit j is set if slot j of the token was computed on this rank."""
    slot = tl.arange(0, TOP_K_PADDED)
    ids = tl.load(topk_ids + token * TOP_K + slot, mask=slot < TOP_K, other=-1)
    live = is_live(ids, expert_map, num_experts, num_local)
    return tl.sum(live.to(tl.int32) << slot, 0)


@triton.jit(do_not_specialize=["num_experts", "num_local"], do_not_specialize_on_alignment=["topk_ids", "expert_map"])
def top_k_reduce_kernel(
    slot_outputs,
    topk_ids,
    expert_map,
    out,
    hidden_size,
    slot_stride,
    out_stride,
    num_experts,
    num_local,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p: token p // column blocks, BLOCK_H columns; 64-bit offsets, since T·k·H passes 2**31."""
    pdl_begin(PDL)
    column_blocks = tl.cdiv(hidden_size, BLOCK_H)
    token = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < hidden_size
    # All ids are looked at before the first row is loaded: the row loads then depend on nothing and overlap.
    live = _live_slots(topk_ids, expert_map, token, num_experts, num_local, TOP_K, TOP_K_PADDED)
    rows = slot_outputs + token * TOP_K * slot_stride + columns
    total = tl.zeros((BLOCK_H,), tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.load(rows + slot * slot_stride, mask=inside & (((live >> slot) & 1) != 0), other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=inside)


def reduce_launch_key(num_tokens: int, hidden_size: int, itemsize: int) -> ReduceTiles:
    """The constexpr choices for a batch. Equal keys compile nothing new (for one layer, id dtype and kind of map)."""
    wide_programs = num_tokens * -(-hidden_size // _WIDE)
    block_h = _WIDE if wide_programs >= _WIDE_FROM_PROGRAMS else _NARROW
    return ReduceTiles(block_h, max(1, block_h * itemsize // _BYTES_PER_WARP))


def top_k_reduce(
    slot_outputs: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    num_local: int | None = None,
    pdl: bool = False,
) -> None:
    """out[t] = Σ_j slot_outputs[t · top_k + j]: float32 sum in slot order, one cast to out's dtype.

    slot_outputs [T · top_k, H], bf16, fp16 or fp32, rows may be strided
    topk_ids     [T, top_k], int32 or int64, contiguous, top_k 1 … 32
    out          [T, H], rows may be strided; dtype may differ from slot_outputs'
    num_experts  ids are global expert numbers below it: the length of expert_map if there is one
    expert_map   int32 [num_experts], −1 = on another rank
    num_local    experts on this rank: a map beyond them is no expert of this rank (default: no bound)
    pdl          programmatic dependent launch (kernel_parts.pdl_begin)

    A slot whose id is < 0 or >= num_experts or on another rank is never read and adds exactly zero. Raises ValueError
    for shapes and strides that do not fit.
    """
    num_tokens, top_k = topk_ids.shape
    hidden_size = slot_outputs.shape[1]
    _check_shapes(slot_outputs, topk_ids, out, num_experts, expert_map)
    if num_tokens == 0:
        return
    tiles = reduce_launch_key(num_tokens, hidden_size, slot_outputs.element_size())
    programs = num_tokens * -(-hidden_size // tiles.block_h)
    top_k_reduce_kernel[(programs,)](
        slot_outputs, topk_ids, expert_map, out,
        hidden_size, slot_outputs.stride(0), out.stride(0),
        num_experts, num_experts if num_local is None else num_local,
        TOP_K=top_k, TOP_K_PADDED=1 << (top_k - 1).bit_length(), BLOCK_H=tiles.block_h, PDL=pdl,
        num_warps=tiles.num_warps, **pdl_option(pdl),
    )  # fmt: skip


def _check_shapes(
    slot_outputs: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None,
) -> None:
    num_tokens, top_k = topk_ids.shape
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"topk_ids: top_k {top_k} is not allowed; allowed: 1 … {MAX_TOP_K}")
    if not topk_ids.is_contiguous():
        raise ValueError(f"topk_ids: strides {topk_ids.stride()} are not allowed; allowed: contiguous")
    hidden_size = slot_outputs.shape[1]
    for name, tensor, rows in (("slot_outputs", slot_outputs, num_tokens * top_k), ("out", out, num_tokens)):
        if tensor.shape != (rows, hidden_size):
            raise ValueError(f"{name}: shape {list(tensor.shape)} is not allowed; allowed: {[rows, hidden_size]}")
        if tensor.stride(1) != 1:
            raise ValueError(f"{name}: last stride {tensor.stride(1)} is not allowed; allowed: 1")
    if expert_map is not None and (expert_map.shape != (num_experts,) or expert_map.dtype != torch.int32):
        given = f"{expert_map.dtype} {list(expert_map.shape)}"
        raise ValueError(f"expert_map: {given} is not allowed; allowed: torch.int32 [{num_experts}]")
