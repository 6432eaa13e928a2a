"""Pieces of Triton that every generated grouped GEMM shares: tile order, gate/up rows and tile axes."""

import triton
import triton.language as tl


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
def decode_plain(tile):
    """Stored 8-bit values as float32."""
    return tile.to(tl.float32)


@triton.jit
def unpack_nibbles(tile):
    """[N, K / 2] bytes -> [N, K] nibbles, the low one first."""
    N: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1] * 2
    return tl.reshape(tl.join(tile & 0xF, tile >> 4), (N, K))


@triton.jit
def decode_int4(tile):
    """[N, K / 2] bytes -> [N, K] float32 within 0..15."""
    return unpack_nibbles(tile).to(tl.float32)


@triton.jit
def decode_e2m1(tile):
    """[N, K / 2] bytes -> [N, K] float32 e2m1 values (OCP MX: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives).

    Sign, exponent and mantissa bits are those of a float16 at other places: its bias is 15 instead of 1, hence 2 ** 14.
    """
    nibbles = unpack_nibbles(tile).to(tl.int16)
    bits = ((nibbles & 0x8) << 12) | ((nibbles & 0x7) << 9)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def group_tile(stored, rows, k, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    """Per-group values [N, 1] or [N, BLOCK_SIZE_K] of step k; `stored` is [rows, ceil(DEPTH / GROUP_K)]."""
    GROUPS: tl.constexpr = (DEPTH + GROUP_K - 1) // GROUP_K
    start = stored + rows * GROUPS
    if BLOCK_SIZE_K <= GROUP_K:
        return tl.load(start + k * BLOCK_SIZE_K // GROUP_K)[:, None]
    else:
        N: tl.constexpr = rows.shape[0]
        STEP: tl.constexpr = BLOCK_SIZE_K // GROUP_K
        group = k * STEP + tl.arange(0, STEP)
        tile = tl.load(start[:, None] + group[None, :], mask=(group < GROUPS)[None, :], other=0.0)
        return tl.reshape(tl.broadcast_to(tile[:, :, None], (N, STEP, GROUP_K)), (N, BLOCK_SIZE_K))


@triton.jit
def packed_zeros_tile(
    stored, expert, rows, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):
    """4-bit zero points as float32, shaped like `group_tile`; packed along the rows, low nibble = even row."""
    tile = group_tile(stored, expert * ((ROWS + 1) // 2) + rows // 2, k, DEPTH, GROUP_K, BLOCK_SIZE_K)
    return ((tile >> (4 * (rows % 2))[:, None]) & 0xF).to(tl.float32)


@triton.jit
def zeros_tile(
    stored, expert, rows, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):
    """8-bit zero points as float32, shaped like `group_tile`."""
    return group_tile(stored, expert * ROWS + rows, k, DEPTH, GROUP_K, BLOCK_SIZE_K).to(tl.float32)
