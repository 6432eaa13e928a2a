"""The interpreter repairs agree with torch: without them every other test of this folder proves nothing."""

import pytest
import torch
import triton
import triton.language as tl
import triton.language.extra.cuda as cuda

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
SATURATES_AT = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@triton.jit
def dot_kernel(a, b, out, k_size, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    cuda.gdc_wait()
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(tl.cdiv(k_size, BLOCK_K)):
        left = tl.load(a + m[:, None] * k_size + (start * BLOCK_K + k)[None, :])
        right = tl.load(b + n[:, None] * k_size + (start * BLOCK_K + k)[None, :])
        acc = tl.dot(left, right.T, acc)
    tl.store(out + m[:, None] * N + n[None, :], acc)
    cuda.gdc_launch_dependents()


@triton.jit
def elementwise_kernel(x, y, results, larger, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    a, b = tl.load(x + lane), tl.load(y + lane)
    tl.store(results + lane, a + b)
    tl.store(results + SIZE + lane, a * b)
    tl.store(results + 2 * SIZE + lane, -a)
    tl.store(results + 3 * SIZE + lane, tl.maximum(tl.minimum(a, b), -b))
    tl.store(results + 4 * SIZE + lane, tl.where(a > b, a, b))
    tl.store(larger + lane, (a > b).to(tl.int32))


@triton.jit
def cast_kernel(x, out, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, tl.load(x + lane).to(out.dtype.element_ty))


@triton.jit
def count_kernel(bound, out):
    total = 0
    for step in range(tl.load(bound)):
        total += step
    tl.store(out, total)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_matches_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 96).to(dtype), torch.randn(32, 96).to(dtype)
    out = torch.full((16, 32), float("nan"))
    dot_kernel[(1,)](a, b, out, 96, 16, 32, 32)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)


def test_bf16_arithmetic_equals_torch() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    results, larger = torch.empty(5, 256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.int32)
    elementwise_kernel[(1,)](x, y, results, larger, 256)
    clamped = torch.maximum(torch.minimum(x, y), -y)
    assert torch.equal(results, torch.stack([x + y, x * y, -x, clamped, torch.maximum(x, y)]))
    assert torch.equal(larger, (x > y).int())


@pytest.mark.parametrize("target", FLOATS[1:], ids=str)
def test_float_casts_round_to_nearest_even(target: torch.dtype) -> None:
    torch.manual_seed(0)
    special = torch.tensor([7.7, 500.0, -1e6, 1e-3, 2.0**-9, -0.0, 0.0, float("nan")])
    values = torch.cat([torch.randn(248) * 3, special])
    limit = SATURATES_AT.get(target, float("inf"))
    if target == torch.float16:
        values = values.clamp(-6e4, 6e4)
    out = torch.empty(256, dtype=target)
    cast_kernel[(1,)](values, out, 256)
    expected = values.clamp(-limit, limit).to(target)
    assert torch.equal(out.float().nan_to_num(-1.0), expected.float().nan_to_num(-1.0))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32], ids=str)
def test_integers_become_floats(target: torch.dtype) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8)
    out = torch.empty(256, dtype=target)
    cast_kernel[(1,)](values, out, 256)
    assert torch.equal(out, values.to(target))


def test_bf16_becomes_integer() -> None:
    values = torch.arange(-64, 64).bfloat16() * 1.5
    out = torch.empty(128, dtype=torch.int32)
    cast_kernel[(1,)](values, out, 128)
    assert torch.equal(out, values.to(torch.int32))


def test_loaded_value_bounds_a_loop() -> None:
    out = torch.empty(1, dtype=torch.int32)
    count_kernel[(1,)](torch.tensor([7], dtype=torch.int32), out)
    assert out.item() == 21
