"""Importers against packers written here from the formats' definitions, value by value in Python integers."""

from collections.abc import Sequence

import pytest
import torch

from moegen.checkpoints import from_awq, from_compressed_tensors, from_gptq, join_experts, join_rows
from moegen.quantize import quantize
from moegen.runtime.quant import Scheme
from moegen.runtime.weight import Weight, dequantise

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: nibble i of an int32 holds this column of its eight


def pack(rows: Sequence[Sequence[int]], bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Rows of unsigned integers -> int32 words, 32 / bits values a word, the lowest bits first."""
    count = 32 // bits
    order = order or range(count)
    packed = []
    for row in rows:
        padded = [*row, *[0] * (-len(row) % count)]
        words = []
        for start in range(0, len(padded), count):
            word = sum(padded[start + column] << (bits * place) for place, column in enumerate(order))
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def transposed(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


class Linear:
    """Random quantised numbers of one linear layer, real = (q - zero) * scale: q [N][K], zero and scale [N][K/g]."""

    def __init__(self, rows: int, depth: int, group: int, bits: int, *, symmetric: bool = False, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        high = 2**bits

        def draw(columns: int) -> torch.Tensor:
            return torch.randint(0, high, (rows, columns), generator=source)

        self.group, self.bits = group, bits
        self.q, zero = draw(depth), draw(depth // group)
        self.zero = torch.full_like(zero, high // 2) if symmetric else zero
        self.scale = (torch.rand(rows, depth // group, generator=source) + 0.5).half()

    @property
    def real(self) -> torch.Tensor:
        zero, scale = (part.repeat_interleave(self.group, 1) for part in (self.zero, self.scale))
        return (self.q - zero).double() * scale.double()

    def awq(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, zero = (pack(part.T.tolist(), 4, AWQ_ORDER) for part in (self.q, self.zero))
        return q, zero, self.scale.T.contiguous()

    def gptq(self, offset: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qweight = pack(self.q.tolist(), self.bits).T.contiguous()
        stored = (self.zero.T - offset) % 2**self.bits  # 0 - 1 wraps to 15 or 255
        return qweight, self.scale.T.contiguous(), pack(stored.tolist(), self.bits)


def check(found: tuple[Scheme, Weight], name: str, *layers: Linear) -> None:
    scheme, weight = found
    assert scheme.name == name
    experts, (rows, depth) = len(layers), layers[0].real.shape
    assert weight.values.shape == scheme.weight_shape(experts, rows, depth)
    assert weight.values.dtype == torch.uint8
    assert weight.scale is not None
    assert weight.scale.shape == scheme.scale_shape(experts, rows, depth)
    assert (weight.zeros if weight.zeros is None else weight.zeros.shape) == scheme.zeros_shape(experts, rows, depth)
    assert weight.values.is_contiguous()
    assert weight.scale.is_contiguous()
    assert weight.zeros is None or weight.zeros.is_contiguous()
    for expert, layer in enumerate(layers):
        assert dequantise(weight, scheme, expert, depth).equal(layer.real)


def stacked(tensors: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*tensors, strict=True))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group: int) -> None:
    layers = [Linear(24, 256, group, 4, seed=seed) for seed in range(3)]
    check(from_awq(*layers[0].awq()), f"int4_w4a16:g{group}z", layers[0])
    check(from_awq(*stacked([layer.awq() for layer in layers])), f"int4_w4a16:g{group}z", *layers)


def test_awq_order_by_hand() -> None:
    """The word 0x75316420 holds the columns 0 to 7 in order."""
    word = torch.full((32, 1), 0x75316420, dtype=torch.int32)
    _, weight = from_awq(word, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8))
    assert weight.values[0, :, 0].tolist() == [0x11 * column for column in range(8)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_gptq(bits: int, group: int) -> None:
    name = f"{'int4_w4a16' if bits == 4 else 'int8_w8a16'}:g{group}"
    layers = [Linear(16, 256, group, bits, seed=seed) for seed in range(2)]
    layers[0].zero[0, 0] = 0  # stored as 15 or 255
    order = torch.arange(256, dtype=torch.int32) // group
    check(from_gptq(*layers[0].gptq(), bits=bits, g_idx=order), name + "z", layers[0])
    check(from_gptq(*layers[0].gptq(offset=0), bits=bits, zero_offset=0), name + "z", layers[0])
    both = stacked([layer.gptq() for layer in layers])
    check(from_gptq(*both, bits=bits, g_idx=order.expand(2, -1)), name + "z", *layers)
    even = Linear(16, 256, group, bits, symmetric=True)
    check(from_gptq(*even.gptq(), bits=bits, symmetric=True), name, even)
    check(from_gptq(*even.gptq()[:2], bits=bits, symmetric=True), name, even)


def test_groups_that_no_scheme_has_are_split() -> None:
    for group, finer in ((256, 128), (192, 64), (96, 32)):
        layer = Linear(8, 2 * group, group, 4)
        check(from_gptq(*layer.gptq()), f"int4_w4a16:g{finer}z", layer)
        check(from_awq(*layer.awq()), f"int4_w4a16:g{finer}z", layer)
    whole = Linear(8, 384, 384, 8, symmetric=True)  # group_size -1
    check(from_gptq(*whole.gptq(), bits=8, symmetric=True), "int8_w8a16:g128", whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(bits: int) -> None:
    name = "int4_w4a16:g32" if bits == 4 else "int8_w8a16:g32"
    layers = [Linear(6, 96, 32, bits, symmetric=True, seed=seed) for seed in range(3)]
    packed = [(pack(layer.q.tolist(), bits), layer.scale) for layer in layers]
    check(from_compressed_tensors(*packed[0], bits=bits), name, layers[0])
    check(from_compressed_tensors(*stacked(packed), bits=bits), name, *layers)


def test_compressed_tensors_copies_nothing() -> None:
    words, scale = torch.zeros(4, 8, 16, dtype=torch.int32), torch.ones(4, 8, 4, dtype=torch.bfloat16)
    _, weight = from_compressed_tensors(words, scale)
    assert weight.scale is not None
    assert weight.values.data_ptr() == words.data_ptr()
    assert weight.scale.data_ptr() == scale.data_ptr()


def test_gate_up_and_experts_are_joined() -> None:
    gate, up = Linear(8, 128, 64, 4, seed=1), Linear(16, 128, 64, 4, seed=2)
    parts = [from_gptq(*layer.gptq()) for layer in (gate, up)]
    w13 = join_rows([part[1] for part in parts])
    assert dequantise(w13, parts[0][0], 0, 128).equal(torch.cat([gate.real, up.real]))
    both = join_experts([w13, w13])
    assert both.values.shape == (2, 24, 64)
    assert dequantise(both, parts[0][0], 1, 128).equal(torch.cat([gate.real, up.real]))
    assert both.zeros is not None
    assert both.zeros.shape == (2, 12, 2)


def test_join_refusals() -> None:
    values = torch.randn(1, 3, 64)
    odd, even = quantize(values, "int4_w4a16:g32z"), quantize(values, "int4_w4a16:g32")
    with pytest.raises(ValueError, match=r"parts\[0\]: 3 rows are not allowed; allowed: an even number"):
        join_rows([odd, odd])
    with pytest.raises(ValueError, match="zeros in some of them"):
        join_experts([odd, even])
    with pytest.raises(ValueError, match="scale of 1, 1 dimensions"):
        join_rows([quantize(values, "fp8_w8a8:tensor")] * 2)
    with pytest.raises(ValueError, match="empty sequence"):
        join_rows([])
    assert join_rows([even, even]).values.shape == (1, 6, 32)


def test_activation_order_is_refused_by_name() -> None:
    layer = Linear(8, 128, 64, 4)
    order = torch.arange(128) // 64
    order[[3, 100]] = order[[100, 3]]
    with pytest.raises(ValueError, match=r"g_idx: 1 at k = 3 is not allowed; allowed: k // g = 0: desc_act"):
        from_gptq(*layer.gptq(), g_idx=order)
    with pytest.raises(ValueError, match=r"g_idx: shape \[1, 64\] is not allowed; allowed: \[1, 128\]"):
        from_gptq(*layer.gptq(), g_idx=order[:64])


def test_refusals_name_argument_value_and_allowed() -> None:
    layer = Linear(8, 128, 64, 4)
    qweight, scales, qzeros = layer.gptq()
    with pytest.raises(ValueError, match="bits: 3 is not allowed; allowed: 4 or 8"):
        from_gptq(qweight, scales, qzeros, bits=3)
    with pytest.raises(ValueError, match="zero_offset: 2 is not allowed"):
        from_gptq(qweight, scales, qzeros, zero_offset=2)
    with pytest.raises(ValueError, match="qzeros: None is not allowed; allowed: a tensor, or symmetric=True"):
        from_gptq(qweight, scales)
    with pytest.raises(ValueError, match=r"qzeros: the zero point \d+ is not allowed with symmetric; allowed: 8"):
        from_gptq(qweight, scales, qzeros, symmetric=True)
    with pytest.raises(TypeError, match=r"qweight: dtype torch.int64 is not allowed; allowed: torch.int32"):
        from_gptq(qweight.long(), scales, qzeros)
    with pytest.raises(TypeError, match="qweight: list is not allowed"):
        from_gptq([], scales, qzeros)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="qweight: 1 dimensions are not allowed; allowed: 2, or 3"):
        from_gptq(qweight[0], scales, qzeros)
    with pytest.raises(TypeError, match=r"scales: dtype torch.int32"):
        from_gptq(qweight, scales.int(), qzeros)
    with pytest.raises(ValueError, match="scales: 3 groups are not allowed; allowed: a divisor of K = 128"):
        from_gptq(qweight, scales[[0, 0, 1]], qzeros)
    with pytest.raises(ValueError, match=r"scales: shape \[1, 2, 7\] is not allowed; allowed: \[1, 2, 8\]"):
        from_gptq(qweight, scales[:, :7], qzeros)
    q, zeros, scale = layer.awq()
    with pytest.raises(ValueError, match=r"qzeros: shape \[1, 1, 1\] is not allowed; allowed: \[1, 2, 1\]"):
        from_awq(q, zeros[:1], scale)
    with pytest.raises(ValueError, match="bits: 2 is not allowed"):
        from_compressed_tensors(q, scale, bits=2)
    with pytest.raises(ValueError, match="scales: groups of 24 are not allowed for 4 bits"):
        from_compressed_tensors(q[:, :1].expand(-1, 3), scale.new_ones(128, 1))
