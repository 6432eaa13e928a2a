"""Repairs of Triton's interpreter (3.6 and 3.7), so that kernels can be compared with torch on a CPU.

Set TRITON_INTERPRET=1 before triton is imported, then call `apply()` once.

* bf16 values live in uint16 arrays and the stock arithmetic works on those integers: here they are widened to float32,
  computed, and rounded back.
* float32 → bf16 truncates and float32 → fp8 loses the carry of a rounding: here torch converts (to nearest, even).
* numpy ≥ 2.4 refuses to turn a one-element array into an int (Triton 3.6 only): loop bounds that are tl values failed.
* `gdc_wait` and `gdc_launch_dependents` have no interpreted form: here they do nothing.
* Inline assembly has none either: here the two instructions of moegen/runtime/decode.py are computed.

Not repaired: ragged TMA, other inline assembly, bf16 atomics, tl.dot_scaled, Gluon. Programs run one after another, so
races between programs are not seen.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime import interpreter

_TORCH_DTYPE = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_STORED_AS_INTEGER = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
_LARGEST_FP8 = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
_BITS_DTYPE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_applied = False


def apply() -> None:
    """Install every repair in this process; further calls do nothing."""
    global _applied
    if not _applied:
        _repair_casts()
        _repair_dot()
        _repair_elementwise()
        _repair_loop_bounds()
        _ignore_dependent_launch()
        _compute_inline_assembly()
        _applied = True


def _values(bits: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The numbers that an array of the interpreter stands for."""
    owned = np.array(bits, copy=True, order="C")
    raw = torch.from_numpy(owned.reshape(-1).view(np.uint8))
    return raw.view(_TORCH_DTYPE[dtype]).reshape(owned.shape)


def _bits(values: torch.Tensor) -> np.ndarray:
    """The inverse of `_values`: unsigned integers of the same width."""
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(_BITS_DTYPE[values.element_size()]).reshape(tuple(values.shape)).copy()


def _widened(handle: Any) -> Any:
    """Float32 copy of a value that is stored as integers; any other value as it is."""
    dtype = handle.dtype.scalar
    if dtype not in _STORED_AS_INTEGER:
        return handle
    return interpreter.TensorHandle(_values(handle.data, dtype).float().numpy(), tl.float32)


def _rounded_to_bf16(data: np.ndarray) -> Any:
    """The handle of a result that was computed in float32; comparisons stay booleans."""
    if data.dtype == np.bool_:
        return interpreter.TensorHandle(data, tl.int1)
    values = torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16)
    return interpreter.TensorHandle(_bits(values), tl.bfloat16)


def _all_bf16(*handles: Any) -> bool:
    return all(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def _repair_casts() -> None:
    stock = interpreter._convert_float
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> Any:
        if source not in _TORCH_DTYPE or target not in _TORCH_DTYPE or rounding == toward_zero:
            return stock(data, source, target, rounding)
        values = _values(data, source)
        limit = _LARGEST_FP8.get(target)
        if limit is not None:
            values = values.float().clamp(-limit, limit)  # as the hardware saturates; clamp keeps NaN
        return _bits(values.to(_TORCH_DTYPE[target]))

    interpreter._convert_float = convert
    builder = interpreter.InterpreterBuilder
    stock_cast = builder.cast_impl

    def cast_impl(self: Any, value: Any, dst_type: Any) -> Any:
        """Between integers and bf16 or fp8, by way of float32; the stock code would keep the integer as the bits."""
        source, target = value.dtype.scalar, dst_type.scalar
        if source in _STORED_AS_INTEGER and not target.is_floating():
            return stock_cast(self, _widened(value), dst_type)
        if target in _STORED_AS_INTEGER and not source.is_floating():
            exact = value.data.astype(np.float32)
            return interpreter.TensorHandle(convert(exact, tl.float32, target, None), target)
        return stock_cast(self, value, dst_type)

    builder.cast_impl = cast_impl


def _repair_dot() -> None:
    builder = interpreter.InterpreterBuilder
    stock = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        return stock(self, _widened(a), _widened(b), acc, *options)

    builder.create_dot = create_dot


def _repair_elementwise() -> None:
    builder = interpreter.InterpreterBuilder
    stock_unary, stock_binary = builder.unary_op, builder.binary_op
    stock_ternary, stock_fma = builder.ternary_op, builder.create_fma

    def unary(self: Any, value: Any, operation: Any) -> Any:
        if not _all_bf16(value):
            return stock_unary(self, value, operation)
        return _rounded_to_bf16(operation(_widened(value).data))

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if operation in _BITWISE or not _all_bf16(left, right):
            return stock_binary(self, left, right, operation)
        return _rounded_to_bf16(operation(_widened(left).data, _widened(right).data))

    def ternary(self: Any, first: Any, second: Any, third: Any, operation: Any) -> Any:
        if operation is np.where or not _all_bf16(first, second, third):  # where moves bits and needs no repair
            return stock_ternary(self, first, second, third, operation)
        return _rounded_to_bf16(operation(_widened(first).data, _widened(second).data, _widened(third).data))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.dtype.scalar == tl.float32:  # rounded once, as hardware does: the product is exact in float64
            wide = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(wide.astype(np.float32), tl.float32)
        if not _all_bf16(x, y, z):
            return stock_fma(self, x, y, z)
        return _rounded_to_bf16(stock_fma(self, _widened(x), _widened(y), _widened(z)).data)

    builder.unary_op, builder.binary_op = unary, binary
    builder.ternary_op, builder.create_fma = ternary, create_fma


def _repair_loop_bounds() -> None:
    stock = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch


def _ignore_dependent_launch() -> None:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(cuda, name, nothing)


def _permute_bytes(x: np.ndarray, y: np.ndarray, select: np.ndarray) -> np.ndarray:
    """PTX prmt, default mode."""
    source = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(x)
    for place in range(4):
        chosen = select >> np.uint32(4 * place) & np.uint32(0xF)
        byte = (source >> (8 * (chosen & np.uint32(7))).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        sign = (byte >> np.uint32(7)) * np.uint32(0xFF)
        result |= np.where(chosen < 8, byte, sign) << np.uint32(8 * place)
    return result


def _multiply_add_pairs(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """PTX fma.rn.bf16x2, where float32 holds x * y + z exactly (else it is rounded twice)."""

    def values(word: np.ndarray, shift: int) -> np.ndarray:
        bits = (word >> np.uint32(shift) << np.uint32(16)).astype(np.uint32)
        return bits.view(np.float32).astype(np.float64)

    halves = []
    for shift in (0, 16):
        exact = (values(x, shift) * values(y, shift) + values(z, shift)).astype(np.float32)
        halves.append(_bits(torch.from_numpy(exact).to(torch.bfloat16)).astype(np.uint32))
    return halves[0] | halves[1] << np.uint32(16)


_INSTRUCTIONS = {"prmt.b32": _permute_bytes, "fma.rn.bf16x2": _multiply_add_pairs}


class _Results:
    """What `create_inline_asm` returns: an operation with one result."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self._handle


def _compute_inline_assembly() -> None:
    def create_inline_asm(_builder: Any, text: str, _constraints: str, values: Any, *_: Any) -> _Results:
        words = np.broadcast_arrays(*(value.data for value in values))
        words = [np.ascontiguousarray(word.astype(np.int32)).view(np.uint32) for word in words]
        result = _INSTRUCTIONS[text.split()[0]](*words)
        return _Results(interpreter.TensorHandle(result.view(np.int32), tl.int32))

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
