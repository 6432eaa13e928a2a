"""Dynamic and static quantisation of activations, one launch (two for a dynamic scale of the whole tensor).

Formulas are those of vLLM's quantisers, except that int8 rounds to nearest everywhere (vLLM truncates int8 groups).
Quotients are correctly rounded: those of 16-bit values often lie half-way between two 8-bit ones, where the usual
approximation decides by its own error, and results would depend on the compiler.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .kernel_parts import divide, group_scale, pdl_begin, pdl_option, to_8_bit
from .quant import Scheme
from .reduce import is_live
from .weight import FP8_MAX, INT8_MAX

_PROGRAM_VALUES = 2048  # 16 a thread of four warps: two 16-byte loads of 16-bit values are in flight
_TENSOR_PROGRAMS = 512  # partial maxima of a whole-tensor scale; every program of the second launch reads them all
_FAKE_GROUP = 32  # of mxfp8
_TENSOR_GROUP = 128  # columns that a program takes at a time of a row, where one scale covers the whole tensor


class Activations(NamedTuple):
    """Input of one GEMM: values [rows, K] and their float32 scale: [1], [rows], [rows, ceil(K / group)] or None."""

    values: torch.Tensor
    scale: torch.Tensor | None


class Room(NamedTuple):
    """Memory for Activations; `scale` may have room for more than scales."""

    values: torch.Tensor
    scale: torch.Tensor


class Slots(NamedTuple):
    """Which rows of a [T * k, …] tensor were written: those whose id is valid and, with a map, on this GPU; or, of rows
    that are sorted, the first `num_live` [1].
    """

    topk_ids: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    num_experts: int = 0
    num_local: int = 0
    num_live: torch.Tensor | None = None


def new_room(x: torch.Tensor, scheme: Scheme, dtype: torch.dtype, static_scale: torch.Tensor | None) -> Room | None:
    """Memory for what `quantise` makes of x: values, and as many scales and partial maxima as it writes; or None."""
    kind = scheme.row.activation
    if kind is None:
        return None
    if kind == "mxfp8":  # computed in 16 bit on GPUs without a 4-bit by 8-bit product: only the rounding is kept
        values, group = torch.empty_like(x), _FAKE_GROUP
    else:
        values, group = x.new_empty(x.shape, dtype=torch.int8 if kind == "int8" else dtype), scheme.group_k
    if scheme.kind == "tensor":
        scales = 0 if static_scale is not None else 1 + _TENSOR_PROGRAMS
        return Room(values, x.new_empty(scales, dtype=torch.float32))
    groups = triton.cdiv(x.shape[1], group or x.shape[1])
    return Room(values, x.new_empty((x.shape[0], groups), dtype=torch.float32))


def quantise(
    x: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    static_scale: torch.Tensor | None,
    slots: Slots | None,
    pdl: bool = False,
    room: Room | None = None,
) -> Activations:
    """Quantise x [rows, K] as `scheme` wants its activations; `dtype` is that of the stored weights.

    static_scale  float32, one value, for the kind "tensor"; None = dynamic
    slots         which rows hold values; the others are neither read nor written. None = all
    pdl           programmatic dependent launch (kernel_parts.pdl_begin)
    room          that of `new_room`, if it and x are older than the launch before, which belongs to the same layer: if
                  pdl, this one does not wait for it. torch may fill new memory by a kernel of its own
    """
    kind = scheme.row.activation
    beside = pdl and room is not None  # without pdl the same kernel would be compiled twice
    room = room or new_room(x, scheme, dtype, static_scale)
    if room is None:
        return Activations(x, None)
    values, scale = room
    rows, depth = x.shape
    fake = kind == "mxfp8"
    largest = INT8_MAX if kind == "int8" else FP8_MAX[torch.float8_e4m3fn if fake else dtype]
    routing = slots if slots is not None else Slots()
    if scheme.kind == "tensor":
        return _by_tensor(x, room, static_scale, routing, largest, pdl, beside)
    group, groups = _FAKE_GROUP if fake else scheme.group_k or depth, scale.shape[1]
    group_block = triton.next_power_of_2(group)
    per_program = max(1, _PROGRAM_VALUES // group_block)
    _quantise_groups[(triton.cdiv(rows * groups, per_program),)](
        x, values, scale, *routing, rows, x.stride(0),
        LARGEST=largest, DEPTH=depth, GROUP=group, GROUP_BLOCK=group_block, GROUPS=per_program,
        LEAST=least_maximum(scheme), UE8M0=scheme.ue8m0 or fake, FAKE=fake, PDL=pdl, BESIDE=beside,
        num_warps=max(4, min(8, group_block // 512)), **pdl_option(pdl),
    )  # fmt: skip
    return Activations(values, None if fake else scale)


def _by_tensor(
    x: torch.Tensor,
    room: Room,
    static_scale: torch.Tensor | None,
    routing: Slots,
    largest: float,
    pdl: bool,
    beside: bool,
) -> Activations:
    rows, depth = x.shape
    values, scale, partial = room.values, static_scale, None
    sizes = {"DEPTH": depth, "GROUP": _TENSOR_GROUP, "PDL": pdl, **pdl_option(pdl)}
    if scale is None:
        scale, partial = room.scale.split((1, _TENSOR_PROGRAMS))
        groups = 4 * _PROGRAM_VALUES // _TENSOR_GROUP  # few programs, each with many loads in flight
        _tensor_maximum[(_TENSOR_PROGRAMS,)](
            x, partial, *routing, rows, x.stride(0), GROUPS=groups, BESIDE=beside, **sizes, num_warps=8
        )  # fmt: skip
        beside = False
    groups = _PROGRAM_VALUES // _TENSOR_GROUP
    _quantise_tensor[(triton.cdiv(rows * triton.cdiv(depth, _TENSOR_GROUP), groups),)](
        x, values, scale, partial, *routing, rows, x.stride(0),
        LARGEST=largest, PARTIALS=_TENSOR_PROGRAMS, GROUPS=groups, BESIDE=beside, **sizes, num_warps=4,
    )  # fmt: skip
    return Activations(values, scale.view(1))


def least_maximum(scheme: Scheme) -> float:
    """The smallest maximum that a scale is made from: guards against a division by zero."""
    return 1.0 / 512 if scheme.kind in ("channel", "tensor_token") and scheme.row.activation != "int8" else 1e-10


@triton.jit
def _some_groups(
    index,
    topk_ids,
    expert_map,
    num_experts,
    num_local,
    num_live,
    rows,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Of groups `index` [n], all rows in one sequence: row, columns [n, GROUP_BLOCK], and which of both count."""
    ROW_GROUPS: tl.constexpr = (DEPTH + GROUP - 1) // GROUP
    row = index // ROW_GROUPS
    live = row < rows
    if topk_ids is not None:
        live &= is_live(tl.load(topk_ids + row, mask=live, other=-1), expert_map, num_experts, num_local)
    if num_live is not None:
        live &= row < tl.load(num_live)
    lane = tl.arange(0, GROUP_BLOCK)
    column = (index % ROW_GROUPS * GROUP)[:, None] + lane[None, :]
    inside = live[:, None] & (lane < GROUP)[None, :] & (column < DEPTH)
    return row.to(tl.int64), column, live, inside


@triton.jit
def _begin(PDL: tl.constexpr, BESIDE: tl.constexpr):
    """kernel_parts.pdl_begin, or of a launch beside the one before the half that lets the one behind start.

    What is older than the launch before was complete when that one let this one start.
    """
    if not BESIDE:
        pdl_begin(PDL)
    elif PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _end(PDL: tl.constexpr, BESIDE: tl.constexpr):
    """The launch behind waits for this one alone, and relies on the one before as well."""
    if PDL and BESIDE:
        tl.extra.cuda.gdc_wait()


@triton.jit(
    do_not_specialize=["num_experts", "num_local", "rows"],
    do_not_specialize_on_alignment=["topk_ids", "expert_map", "num_live"],
)
def _quantise_groups(
    x,
    out,
    scale,
    topk_ids,
    expert_map,
    num_experts,
    num_local,
    num_live,
    rows,
    stride,
    LARGEST: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAST: tl.constexpr,
    UE8M0: tl.constexpr,
    FAKE: tl.constexpr,
    PDL: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """Program p: GROUPS groups of the rows' groups in one sequence, so that short rows fill a program too."""
    _begin(PDL, BESIDE)
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row, column, live, inside = _some_groups(
        index, topk_ids, expert_map, num_experts, num_local, num_live, rows, DEPTH, GROUP, GROUP_BLOCK
    )
    values = tl.load(x + (row * stride)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    step = group_scale(tl.max(tl.abs(values), 1), LEAST, LARGEST, UE8M0)
    scaled = divide(values, step[:, None])
    stored = out + (row * DEPTH)[:, None] + column
    if FAKE:
        rounded = tl.clamp(scaled, -LARGEST, LARGEST).to(tl.float8e4nv).to(tl.float32)
        tl.store(stored, (rounded * step[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(scale + index, step, mask=live)
        tl.store(stored, to_8_bit(scaled, LARGEST, out.dtype.element_ty), mask=inside)
    _end(PDL, BESIDE)


@triton.jit(
    do_not_specialize=["num_experts", "num_local", "rows"],
    do_not_specialize_on_alignment=["topk_ids", "expert_map", "num_live"],
)
def _tensor_maximum(
    x,
    partial,
    topk_ids,
    expert_map,
    num_experts,
    num_local,
    num_live,
    rows,
    stride,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """Program p: largest magnitude of every num_programs-th block of GROUPS groups."""
    _begin(PDL, BESIDE)
    largest = tl.zeros((GROUPS, GROUP), tl.float32)
    for first in range(tl.program_id(0) * GROUPS, rows * tl.cdiv(DEPTH, GROUP), tl.num_programs(0) * GROUPS):
        index = first + tl.arange(0, GROUPS)
        row, column, _, inside = _some_groups(
            index, topk_ids, expert_map, num_experts, num_local, num_live, rows, DEPTH, GROUP, GROUP
        )
        values = tl.load(x + (row * stride)[:, None] + column, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    tl.store(partial + tl.program_id(0), tl.max(tl.max(largest, 1), 0))
    _end(PDL, BESIDE)


@triton.jit(
    do_not_specialize=["num_experts", "num_local", "rows"],
    do_not_specialize_on_alignment=["scale", "topk_ids", "expert_map", "num_live"],
)
def _quantise_tensor(
    x,
    out,
    scale,
    partial,
    topk_ids,
    expert_map,
    num_experts,
    num_local,
    num_live,
    rows,
    stride,
    LARGEST: tl.constexpr,
    PARTIALS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """One scale [1] for the whole tensor, read, or made from partial maxima and written; program p: GROUPS groups."""
    _begin(PDL, BESIDE)
    if partial is None:
        step = tl.load(scale)
    else:
        step = tl.maximum(tl.div_rn(tl.max(tl.load(partial + tl.arange(0, PARTIALS)), 0), LARGEST), 1e-10)
        if tl.program_id(0) == 0:
            tl.store(scale, step)
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row, column, _, inside = _some_groups(
        index, topk_ids, expert_map, num_experts, num_local, num_live, rows, DEPTH, GROUP, GROUP
    )
    values = tl.load(x + (row * stride)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    rounded = to_8_bit(divide(values, step), LARGEST, out.dtype.element_ty)
    tl.store(out + (row * DEPTH)[:, None] + column, rounded, mask=inside)
    _end(PDL, BESIDE)
