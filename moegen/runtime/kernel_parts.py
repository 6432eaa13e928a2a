"""Pieces of Triton that every generated grouped GEMM shares: tile order, gate/up rows and tile axes."""

import triton
import triton.language as tl


def pdl_option(pdl: bool) -> dict[str, bool]:
    """Launch options of a kernel: only backends that know programmatic dependent launch may be given its option."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def pdl_begin(PDL: tl.constexpr):
    """Programmatic dependent launch: wait for the kernel before, then let the kernel behind start.

    Every kernel of a layer begins with this pair, in this order. So when one starts, the kernel before the previous
    one is complete; and none writes, nor reads what another kernel made, before the wait.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def tile_order(pid, num_m, num_n, GROUP_SIZE_M: tl.constexpr):
    """Program id -> (pid_m, pid_n); GROUP_SIZE_M M blocks share a walk through all N blocks, which saves L2 traffic."""
    group = GROUP_SIZE_M * num_n
    first = (pid // group) * GROUP_SIZE_M
    size = tl.minimum(num_m - first, GROUP_SIZE_M)
    return first + (pid % group) % size, (pid % group) // size


@triton.jit
def gate_up_rows(pid_n, I: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, SPAN: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of w13 for one tile: SPAN gate rows, their SPAN up rows, and so on.

    Both halves of a pair thus sit in one tile, so the activation runs in registers after a single dot. Output columns
    behind I wrap around: they are computed and never stored.
    """
    row = tl.arange(0, BLOCK_SIZE_N)
    column = (pid_n * (BLOCK_SIZE_N // 2) + (row // (2 * SPAN)) * SPAN + row % SPAN) % I
    is_up = (row // SPAN) % 2
    if INTERLEAVED:
        return 2 * column + is_up
    else:
        return is_up * I + column


@triton.jit
def split_gate_up(acc, SPAN: tl.constexpr, SWAP_AB: tl.constexpr):
    """The inverse of `gate_up_rows` on an accumulator: [tokens, N] (or [N, tokens]) -> gate, up of N / 2 columns."""
    if SWAP_AB:
        N: tl.constexpr = acc.shape[0]
        M: tl.constexpr = acc.shape[1]
        pairs = tl.permute(tl.reshape(acc, (N // (2 * SPAN), 2, SPAN, M)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        return tl.reshape(gate, (N // 2, M)), tl.reshape(up, (N // 2, M))
    else:
        M: tl.constexpr = acc.shape[0]
        N: tl.constexpr = acc.shape[1]
        pairs = tl.permute(tl.reshape(acc, (M, N // (2 * SPAN), 2, SPAN)), (0, 1, 3, 2))
        gate, up = tl.split(pairs)
        return tl.reshape(gate, (M, N // 2)), tl.reshape(up, (M, N // 2))


@triton.jit
def group_scale(largest, LEAST: tl.constexpr, LARGEST: tl.constexpr, UE8M0: tl.constexpr):
    """Scale of a group of activations whose largest magnitude is `largest`: LARGEST is what the 8-bit type holds."""
    step = tl.div_rn(tl.maximum(largest, LEAST), LARGEST)
    if UE8M0:  # up to the next power of two: add all mantissa bits, then cut them off
        bits = step.to(tl.int32, bitcast=True) + 0x7FFFFF
        step = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    return step


@triton.jit
def divide(values, step):
    """values / step, correctly rounded, for one division a step instead of one a value (Markstein's algorithm)."""
    inverse = tl.div_rn(1.0, step)
    quotient = values * inverse
    return tl.fma(tl.fma(-quotient, step, values), inverse, quotient)


@triton.jit
def to_8_bit(scaled, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """Clamp and round to nearest values that are divided by their scale."""
    scaled = tl.clamp(scaled, -LARGEST, LARGEST)
    if dtype == tl.int8:
        scaled = tl.floor(scaled + 0.5)
    return scaled.to(dtype)


@triton.jit
def along_tokens(values, SWAP_AB: tl.constexpr):
    """A vector over the tile's tokens, ready to broadcast against the accumulator."""
    if SWAP_AB:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def along_rows(values, SWAP_AB: tl.constexpr):
    """A vector over the tile's weight rows or output columns, ready to broadcast against the accumulator."""
    if SWAP_AB:
        return values[:, None]
    else:
        return values[None, :]
