"""Importers: integer weights as checkpoints pack them -> the layout of the kernels (runtime/quant.py). Plain torch.

    AWQ                  4 bit with zero points; packed along the output rows, in an interleaved order
    GPTQ                 4 and 8 bit, with or without zero points; packed along K, zero points less one
    compressed-tensors   "pack-quantized", 4 and 8 bit, symmetric (Kimi-K2-Thinking: 4 bit, groups of 32)

Each takes one linear layer (2-D tensors) or the same layer of all experts stacked ([E, …]) and returns its Scheme and
its Weight [E, rows, K], E = 1 for 2-D tensors. Checkpoints store gate, up and down an expert: `join_rows` puts gate
and up together as w13, `join_experts` the experts; `moegen.quantize.named_tensors` names the result for fused_experts.

N = output rows, K = reduction, g = group along K. Where g is no group of the scheme (a whole row: group_size -1), but
a multiple of one, scales and zero points are repeated.
"""

import math
from collections.abc import Sequence

import torch

from moegen.quantize import pack_nibbles
from moegen.runtime.quant import Scheme
from moegen.runtime.weight import Weight, unpack_nibbles

_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # column j of eight is in nibble _AWQ_NIBBLES[j] of its int32
_MODES = {4: "int4_w4a16", 8: "int8_w8a16"}
_SPLIT = (128, 64, 32)  # groups that a larger one is split into


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> tuple[Scheme, Weight]:
    """AutoAWQ's GEMM format: qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales [K/g, N].

    real = (q - zero) * scale; nibble i of an int32 is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
    """
    qweight, qzeros, scales = _stacked("qweight", qweight), _stacked("qzeros", qzeros), _stacked("scales", scales)
    experts, depth, packed = qweight.shape
    _check("qweight", qweight, (experts, depth, packed), torch.int32)
    _check_scales(scales, (experts, scales.shape[1], packed * 8), depth)
    _check("qzeros", qzeros, (experts, scales.shape[1], packed), torch.int32)
    values = [pack_nibbles(_awq_columns(expert).mT, -1) for expert in qweight]
    zeros = [pack_nibbles(_awq_columns(expert).mT, 0) for expert in qzeros]
    return _grouped(4, depth, torch.stack(values), scales.mT.contiguous(), torch.stack(zeros))


def from_gptq(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    bits: int = 4,
    g_idx: torch.Tensor | None = None,
    symmetric: bool = False,
    zero_offset: int = 1,
) -> tuple[Scheme, Weight]:
    """AutoGPTQ's format: qweight int32 [K * bits/32, N], qzeros int32 [K/g, N * bits/32], scales [K/g, N].

    Packed in order, the lowest bits first. real = (q - zero) * scale with zero = (stored + 1) mod 2 ** bits: a stored
    15 (255) is the zero point 0.

    symmetric    the config's "sym": zero points must all be 8 (128) and are left out; qzeros may then be None
    g_idx        [K], the group of each k; only the trivial k // g is allowed (desc_act false)
    zero_offset  1, or 0 for checkpoint_format "gptq_v2", which stores zero points as they are
    """
    if bits not in _MODES:
        raise ValueError(f"bits: {bits} is not allowed; allowed: 4 or 8")
    if zero_offset not in (0, 1):
        raise ValueError(f"zero_offset: {zero_offset} is not allowed; allowed: 1, or 0 for gptq_v2")
    qweight, scales, per_word = _stacked("qweight", qweight), _stacked("scales", scales), 32 // bits
    experts, packed, rows = qweight.shape
    depth, groups = packed * per_word, scales.shape[1]
    _check("qweight", qweight, (experts, packed, rows), torch.int32)
    _check_scales(scales, (experts, groups, rows), depth)
    if g_idx is not None:
        _check_order(_stacked("g_idx", g_idx, 1), depth, depth // groups)
    if qzeros is None and not symmetric:
        raise ValueError("qzeros: None is not allowed; allowed: a tensor, or symmetric=True")
    zeros = None
    if qzeros is not None:
        qzeros = _stacked("qzeros", qzeros)
        _check("qzeros", qzeros, (experts, groups, math.ceil(rows / per_word)), torch.int32)
        zeros = _gptq_zeros(qzeros, bits, rows, zero_offset)
        if symmetric:
            _check_symmetric(zeros, bits)
            zeros = None
    if zeros is not None:
        zeros = pack_nibbles(zeros.mT, 1) if bits == 4 else zeros.mT.contiguous()
    return _grouped(bits, depth, _as_bytes(qweight.mT), scales.mT.contiguous(), zeros)


def from_compressed_tensors(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, *, bits: int = 4
) -> tuple[Scheme, Weight]:
    """compressed-tensors' format "pack-quantized", symmetric: weight_packed int32 [N, K * bits/32].

    The signed value plus 8 (128) is packed along K in order, the lowest bits first (`pack_to_int32` in
    compressors/pack_quantized of github.com/vllm-project/compressed-tensors), which is the kernels' layout already:
    nothing is copied if g is one of the scheme's. weight_scale [N, K/g]. Asymmetric checkpoints (weight_zero_point)
    are not read.
    """
    if bits not in _MODES:
        raise ValueError(f"bits: {bits} is not allowed; allowed: 4 or 8")
    packed, scale = _stacked("weight_packed", weight_packed), _stacked("weight_scale", weight_scale)
    experts, rows, words = packed.shape
    depth = words * 32 // bits
    _check("weight_packed", packed, (experts, rows, words), torch.int32)
    _check_scales(scale, (experts, rows, scale.shape[2]), depth, name="weight_scale", axis=2)
    return _grouped(bits, depth, _as_bytes(packed), scale.contiguous(), None)


def join_rows(parts: Sequence[Weight]) -> Weight:
    """Weights [E, rows, K] below one another, as gate and up in w13."""
    for index, part in enumerate(parts[:-1]):
        packed = part.zeros is not None and part.zeros.shape[1] != part.values.shape[1]
        if packed and part.values.shape[1] % 2:
            rows = part.values.shape[1]
            raise ValueError(f"parts[{index}]: {rows} rows are not allowed; allowed: an even number, zeros are packed")
    return _join(parts, 1)


def join_experts(parts: Sequence[Weight]) -> Weight:
    """Weights [E, rows, K] of some experts each, in order, as one."""
    return _join(parts, 0)


def _join(parts: Sequence[Weight], dim: int) -> Weight:
    """Concatenate values, scales and zero points."""
    if not parts:
        raise ValueError("parts: an empty sequence is not allowed; allowed: at least one Weight")
    joined: dict[str, torch.Tensor] = {}
    for name in ("values", "scale", "zeros"):
        tensors = [getattr(part, name) for part in parts]
        present = [tensor for tensor in tensors if tensor is not None]
        if present and len(present) != len(tensors):
            raise ValueError(f"parts: {name} in some of them is not allowed; allowed: in all or in none")
        if any(tensor.dim() != 3 for tensor in present):
            dims = ", ".join(str(tensor.dim()) for tensor in present)
            raise ValueError(f"parts: {name} of {dims} dimensions is not allowed; allowed: 3, one an imported weight")
        if present:
            joined[name] = torch.cat(present, dim)
    return Weight.of("values", joined["values"], {f"values_{name}": tensor for name, tensor in joined.items()})


def _awq_columns(packed: torch.Tensor) -> torch.Tensor:
    """int32 [rows, N/8] -> uint8 [rows, N] with the columns in order."""
    shifts = torch.tensor(_AWQ_NIBBLES, dtype=torch.int32, device=packed.device) * 4
    return ((packed[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _gptq_zeros(qzeros: torch.Tensor, bits: int, rows: int, offset: int) -> torch.Tensor:
    """int32 [E, K/g, N * bits/32] -> uint8 zero points [E, K/g, N]."""
    stored = _as_bytes(qzeros)
    if bits == 4:
        return ((unpack_nibbles(stored, rows) + offset) & 15).to(torch.uint8)
    return (stored + offset)[..., :rows]  # uint8 wraps by itself


def _as_bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., 4n], the lowest byte first (all hosts of these GPUs are little-endian)."""
    return words.contiguous().view(torch.uint8)


def _grouped(
    bits: int, depth: int, values: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[Scheme, Weight]:
    """The Scheme of the group that scale [E, N, K/g] has, and the Weight; splits groups that no scheme has."""
    group = depth // scale.shape[2]
    suffix = "z" if zeros is not None else ""
    finest = [group] + [part for part in _SPLIT if group % part == 0]
    for part in finest:
        try:
            scheme = Scheme.parse(f"{_MODES[bits]}:g{part}{suffix}")
        except ValueError:
            continue
        if part != group:
            scale = scale.repeat_interleave(group // part, -1)
            zeros = None if zeros is None else zeros.repeat_interleave(group // part, -1)
        return scheme, Weight(values, scale, zeros)
    raise ValueError(f"scales: groups of {group} are not allowed for {bits} bits; allowed: multiples of 32")


def _stacked(name: str, tensor: torch.Tensor, dims: int = 2) -> torch.Tensor:
    """One expert's tensor of `dims` dimensions as [1, …]; a stacked one as it is."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__} is not allowed; allowed: torch.Tensor")
    if tensor.dim() not in (dims, dims + 1):
        raise ValueError(
            f"{name}: {tensor.dim()} dimensions are not allowed; allowed: {dims}, or {dims + 1} with experts in front"
        )
    return tensor if tensor.dim() == dims + 1 else tensor.unsqueeze(0)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: dtype {tensor.dtype} is not allowed; allowed: {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)} is not allowed; allowed: {list(shape)}")


def _check_scales(
    scales: torch.Tensor, shape: tuple[int, ...], depth: int, *, name: str = "scales", axis: int = 1
) -> None:
    """Scales of the right shape whose number of groups divides K."""
    allowed = (torch.float16, torch.bfloat16, torch.float32)
    if scales.dtype not in allowed:
        raise TypeError(f"{name}: dtype {scales.dtype} is not allowed; allowed: {', '.join(map(str, allowed))}")
    _check(name, scales, shape, scales.dtype)
    groups = scales.shape[axis]
    if not groups or depth % groups:
        raise ValueError(f"{name}: {groups} groups are not allowed; allowed: a divisor of K = {depth}")


def _check_order(g_idx: torch.Tensor, depth: int, group: int) -> None:
    """Refuse rows of K in another order than that of their groups (desc_act with activation reordering)."""
    expected = (torch.arange(depth, device=g_idx.device) // group).expand(g_idx.shape[0], depth)
    if g_idx.shape != expected.shape:
        raise ValueError(f"g_idx: shape {list(g_idx.shape)} is not allowed; allowed: {list(expected.shape)}")
    wrong = (g_idx != expected).nonzero()
    if wrong.numel():
        k = int(wrong[0, 1])
        given, wanted = int(g_idx[int(wrong[0, 0]), k]), int(expected[0, k])
        raise ValueError(
            f"g_idx: {given} at k = {k} is not allowed; allowed: k // g = {wanted}: desc_act (activation order) "
            "is not supported"
        )


def _check_symmetric(zeros: torch.Tensor, bits: int) -> None:
    """Refuse zero points other than the middle, which the symmetric scheme implies."""
    middle = 1 << (bits - 1)
    wrong = zeros[zeros != middle]
    if wrong.numel():
        raise ValueError(f"qzeros: the zero point {int(wrong[0])} is not allowed with symmetric; allowed: {middle}")
