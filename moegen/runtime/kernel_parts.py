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


@triton.jit
def decode_scale(stored):
    """float32 value of a stored scale: a float type as it is, uint8 as an e8m0 exponent (2 ** (byte - 127))."""
    if stored.dtype == tl.uint8:
        bits = stored.to(tl.int32) << 23
        # Byte 0 would be a float32 zero in these bits; 2 ** -127 is the subnormal below the smallest normal number.
        return tl.where(stored == 0, 0x400000, bits).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def load_groups(stored, rows, k, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    """What step k needs of `stored` [rows, ceil(DEPTH / GROUP_K)]: [N, 1], or [N, BLOCK_SIZE_K / GROUP_K]."""
    GROUPS: tl.constexpr = (DEPTH + GROUP_K - 1) // GROUP_K
    start = stored + rows * GROUPS
    if BLOCK_SIZE_K <= GROUP_K:
        return tl.load(start + k * BLOCK_SIZE_K // GROUP_K)[:, None]
    else:
        group = k * (BLOCK_SIZE_K // GROUP_K) + tl.arange(0, BLOCK_SIZE_K // GROUP_K)
        return tl.load(start[:, None] + group[None, :], mask=(group < GROUPS)[None, :], other=0.0)


@triton.jit
def spread_groups(values, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, VALUES_PER_BYTE: tl.constexpr):
    """Group values of `load_groups` for every byte of a weight tile: [N, 1] as it is, else [N, bytes]."""
    if BLOCK_SIZE_K <= GROUP_K:
        return values
    else:
        N: tl.constexpr = values.shape[0]
        STEP: tl.constexpr = BLOCK_SIZE_K // GROUP_K
        wide = tl.broadcast_to(values[:, :, None], (N, STEP, GROUP_K // VALUES_PER_BYTE))
        return tl.reshape(wide, (N, BLOCK_SIZE_K // VALUES_PER_BYTE))


@triton.jit
def load_packed_zeros(
    stored, expert, rows, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):
    """4-bit zero points as float32, shaped like `load_groups`; packed along the rows, low nibble = even row."""
    tile = load_groups(stored, expert * ((ROWS + 1) // 2) + rows // 2, k, DEPTH, GROUP_K, BLOCK_SIZE_K)
    return ((tile >> (4 * (rows % 2))[:, None]) & 0xF).to(tl.float32)


@triton.jit
def load_zeros(
    stored, expert, rows, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):
    """8-bit zero points as float32, shaped like `load_groups`."""
    return load_groups(stored, expert * ROWS + rows, k, DEPTH, GROUP_K, BLOCK_SIZE_K).to(tl.float32)


@triton.jit
def interleave(low, high):
    """[N, n], [N, n] -> [N, 2n]: low and high by turns."""
    return tl.reshape(tl.join(low, high), (low.shape[0], 2 * low.shape[1]))


# Integers below 2 ** 23 as the low mantissa bits of 2 ** 23: a logic operation and a subtraction instead of a
# conversion, which runs at a fraction of their rate.
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)


@triton.jit
def real_int4(tile, scale, zero):
    """[N, K / 2] bytes -> [N, K] float32 (nibble - zero) * scale; scale and zero are one value a byte, or a number."""
    bits = tile.to(tl.int32)
    low = ((bits & 0xF) | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + zero)
    # The high nibble stays where it is, 16 times too large: no shift.
    high = ((bits & 0xF0) | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + 16.0 * zero)
    return interleave(low * scale, high * (scale * 0.0625))


@triton.jit
def real_uint8(tile, scale, zero):
    """[N, K] bytes -> float32 (byte - zero) * scale."""
    return ((tile.to(tl.int32) | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + zero)) * scale


@triton.jit
def real_float8(tile, scale):
    """[N, K] float8 -> float32 value * scale."""
    return tile.to(tl.float32) * scale


E2M1_SMALL = tl.constexpr(2.0**-32)  # see real_e2m1


@triton.jit
def real_e2m1(tile, scale, SMALL: tl.constexpr):
    """[N, K / 2] bytes -> [N, K] float32 e2m1 value * scale (OCP MX: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives).

    Exponent and mantissa bits of e2m1 are moved to the lowest exponent bits and the highest mantissa bit of a float32,
    which is then 2 ** 126 too small; subnormals included, so 0.5 needs no case of its own. One product repairs that and
    applies the scale. With SMALL the result stays E2M1_SMALL times too small, for the accumulator to make up for, and
    scales from 2 ** -94 to 2 ** 33 are exact; without, a second product is needed (float16 has no room for small ones).
    """
    bits = tile.to(tl.int32)
    low = ((bits << 28) & -0x80000000) | ((bits << 22) & 0x01C00000)
    high = ((bits << 24) & -0x80000000) | ((bits << 18) & 0x01C00000)
    factor = scale * 2.0**94
    low = low.to(tl.float32, bitcast=True) * factor
    high = high.to(tl.float32, bitcast=True) * factor
    if SMALL:
        return interleave(low, high)
    else:
        return interleave(low * 2.0**32, high * 2.0**32)
