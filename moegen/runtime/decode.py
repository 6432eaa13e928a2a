"""Stored weights -> a tile of the activations' type, in registers: the Triton functions of weight-only GEMMs.

Every format has two forms that give the same bits. The portable one computes in float32, value by value. The packed one
(see `is_packed`) holds two bfloat16 values in a 32-bit word from its first instruction to the last; two of these are
CUDA's alone, `permute_bytes` and `multiply_add`. docs/architecture.md explains both.
"""

import triton
import triton.language as tl

# How many times too small decoded weights are, where no scale in bfloat16 can make up for it: the accumulator does.
INTEGERS_LEFT = tl.constexpr(2.0**17)  # packed
FLOATS_LEFT = tl.constexpr(2.0**32)  # packed, and e2m1 in float32


# ------------------------------------------------------------------------------------------------- groups along K


@triton.jit
def load_groups(stored, rows, k, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    """What step k needs of `stored` [rows, ceil(DEPTH / GROUP_K)]: [N, 1], or [N, BLOCK_SIZE_K / GROUP_K]."""
    GROUPS: tl.constexpr = (DEPTH + GROUP_K - 1) // GROUP_K
    start = stored + rows * GROUPS
    if BLOCK_SIZE_K <= GROUP_K:
        return tl.load(start + k * BLOCK_SIZE_K // GROUP_K)[:, None]
    else:
        group = k * (BLOCK_SIZE_K // GROUP_K) + tl.arange(0, BLOCK_SIZE_K // GROUP_K)
        if DEPTH % BLOCK_SIZE_K == 0:
            return tl.load(start[:, None] + group[None, :])
        else:
            return tl.load(start[:, None] + group[None, :], mask=(group < GROUPS)[None, :], other=0.0)


@triton.jit
def load_packed_zeros(
    stored, expert, rows, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):
    """4-bit zero points as int32, shaped like `load_groups`; packed along the rows, low nibble = even row."""
    tile = load_groups(stored, expert * ((ROWS + 1) // 2) + rows // 2, k, DEPTH, GROUP_K, BLOCK_SIZE_K)
    return (tile.to(tl.int32) >> (4 * (rows % 2))[:, None]) & 0xF


@triton.jit
def load_zeros(
    stored, expert, rows, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):
    """8-bit zero points as int32, shaped like `load_groups`."""
    return load_groups(stored, expert * ROWS + rows, k, DEPTH, GROUP_K, BLOCK_SIZE_K).to(tl.int32)


@triton.jit
def spread_groups(values, COLUMNS: tl.constexpr):
    """Group values [N, groups] of `load_groups` for each of COLUMNS equal parts of a step: [N, COLUMNS]."""
    N: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    wide = tl.broadcast_to(values[:, :, None], (N, GROUPS, COLUMNS // GROUPS))
    return tl.reshape(wide, (N, COLUMNS))


@triton.jit
def decode_scale(stored):
    """float32 value of a stored scale: a float type as it is, uint8 as an e8m0 exponent (2 ** (byte - 127))."""
    if stored.dtype == tl.uint8:
        bits = stored.to(tl.int32) << 23
        # Byte 0 would be a float32 zero in these bits; 2 ** -127 is the subnormal below the smallest normal number.
        return tl.where(stored == 0, 0x400000, bits).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


# ------------------------------------------------------------------------------------------------- packed arithmetic


@triton.constexpr_function
def is_packed(a_type, scale_type=None):
    """Whether weights are decoded two at a time: bfloat16 activations on a CUDA GPU.

    Scales that are multiplied as bfloat16 have to be stored so, or as one of the 8-bit types: a float32 scale is not
    rounded.
    """
    target = triton.language.target_info.current_target()
    if triton.knobs.runtime.interpret or target is None or target.backend != "cuda":
        return False
    return a_type == tl.bfloat16 and scale_type in (None, tl.bfloat16, tl.uint8, tl.float8e4nv)


@triton.jit
def permute_bytes(x, y, SELECT: tl.constexpr):
    """PTX prmt on int32: byte i of the result is the one that nibble i of SELECT names.

    0 to 3 are the bytes of x, 4 to 7 those of y; with 8 added, the byte is filled with the sign bit of that one.
    """
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, SELECT], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def multiply_add(x, y, z):
    """x * y + z of int32 words that hold two bfloat16 values each; one rounding, subnormal numbers included."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def words_of(tile):
    """[N, n] bytes -> [N, n / 4] int32; the loads of four neighbouring bytes become one, where a thread has them."""
    N: tl.constexpr = tile.shape[0]
    WORDS: tl.constexpr = tile.shape[1] // 4
    even, odd = tl.split(tl.reshape(tile.to(tl.uint8, bitcast=True).to(tl.int32), (N, WORDS, 2, 2)))
    byte0, byte2 = tl.split(even)
    byte1, byte3 = tl.split(odd)
    return byte0 | (byte1 << 8) | (byte2 << 16) | (byte3 << 24)


@triton.jit
def interleave(low, high):
    """[N, n], [N, n] -> [N, 2n]: low and high by turns."""
    return tl.reshape(tl.join(low, high), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def split_pairs(words):
    """[N, n] int32 words of two bfloat16 values -> [N, 2n] bfloat16; costs nothing, a word is what tl.dot wants."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return interleave(low, high)


@triton.jit
def pairs_of_bytes(words):
    """[N, n] words of four bytes -> [N, 2n] words of two, each zero-extended to 16 bits."""
    return interleave(permute_bytes(words, 0, 0x4140), permute_bytes(words, 0, 0x4342))


@triton.jit
def pairs_of_nibbles(low, high):
    """[N, n] words of four bytes below 128, of the even and of the odd k -> [N, 4n] words of two, zero-extended.

    The zeros are the sign bits of those bytes.
    """
    first = interleave(permute_bytes(low, high, 0x8480), permute_bytes(low, high, 0x8682))
    second = interleave(permute_bytes(low, high, 0x8581), permute_bytes(low, high, 0x8783))
    return interleave(first, second)


# Words of two equal bfloat16 values; negative, since int32 has no other way to set the highest bit.
_LARGER = tl.constexpr(0x79807980)  # 2 ** 116
_MINUS_ZERO = tl.constexpr(0x80008000 - 2**32)
_MINUS_8 = tl.constexpr(0x80088008 - 2**32)  # the lowest bits of a bfloat16 hold an integer below 256 times 2 ** -133
_MINUS_64 = tl.constexpr(0x80408040 - 2**32)
_MINUS_128 = tl.constexpr(0x80808080 - 2**32)
_MINUS_128_LARGER = tl.constexpr(0xBA80BA80 - 2**32)  # -128 * 2 ** (116 - 133)
_E2M1_BITS = tl.constexpr(0x81C081C0 - 2**32)


@triton.jit
def both_halves(values):
    """bfloat16 -> int32 words that hold each value twice."""
    return permute_bytes(values.to(tl.uint16, bitcast=True).to(tl.int32), 0, 0x1010)


@triton.jit
def scaled_integers(pairs, scale, MINUS_MIDDLE: tl.constexpr):
    """[N, n] words of two integers below 256, [N, groups] bfloat16 -> words of (integer - middle) * scale * 2 ** -17.

    The middle is a power of two, so its product with the scale is exact and one rounding is left: that of the result.
    """
    larger = multiply_add(both_halves(scale), _LARGER, _MINUS_ZERO)
    offset = multiply_add(larger, MINUS_MIDDLE, _MINUS_ZERO)
    return multiply_add(pairs, spread_groups(larger, pairs.shape[1]), spread_groups(offset, pairs.shape[1]))


# Integers below 2 ** 23 as the low mantissa bits of 2 ** 23: a logic operation and a subtraction instead of a
# conversion, which runs at a fraction of their rate.
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)


@triton.jit
def real_int4(tile, scale, zeros, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """[N, K / 2] bytes, [N, groups] scales and zeros (None: 8) -> [N, K] (nibble - zero) * scale.

    Packed, it is INTEGERS_LEFT times too small.
    """
    if PACKED:
        words = words_of(tile)
        low = words & 0x0F0F0F0F
        high = (words >> 4) & 0x0F0F0F0F
        if zeros is None:
            return split_pairs(scaled_integers(pairs_of_nibbles(low, high), scale, _MINUS_8))
        else:
            # 64 - zero, in four bytes: the sums stay between 49 and 79.
            shift = spread_groups(0x40404040 - zeros * 0x01010101, words.shape[1])
            return split_pairs(scaled_integers(pairs_of_nibbles(low + shift, high + shift), scale, _MINUS_64))
    else:
        scale = spread_groups(decode_scale(scale), tile.shape[1])
        zero = 8.0 if zeros is None else spread_groups(zeros.to(tl.float32), tile.shape[1])
        bits = tile.to(tl.int32)
        low = ((bits & 0xF) | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + zero)
        # The high nibble stays where it is, 16 times too large: no shift.
        high = ((bits & 0xF0) | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + 16.0 * zero)
        return interleave(low * scale, high * (scale * 0.0625)).to(TYPE)


@triton.jit
def real_uint8(tile, scale, zeros, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """[N, K] bytes, [N, groups] scales and zeros (None: 128) -> (byte - zero) * scale.

    Packed, it is INTEGERS_LEFT times too small.
    """
    if PACKED:
        pairs = pairs_of_bytes(words_of(tile))
        if zeros is None:
            return split_pairs(scaled_integers(pairs, scale, _MINUS_128))
        else:
            # The product of zero and scale would be rounded: byte - zero first, which is exact, then the scale.
            less = spread_groups(both_halves((zeros.to(tl.float32) * -(2.0**-17)).to(tl.bfloat16)), pairs.shape[1])
            scale = spread_groups(both_halves(scale), pairs.shape[1])
            return split_pairs(multiply_add(multiply_add(pairs, _LARGER, less), scale, _MINUS_ZERO))
    else:
        scale = spread_groups(decode_scale(scale), tile.shape[1])
        zero = 128.0 if zeros is None else spread_groups(zeros.to(tl.float32), tile.shape[1])
        return (((tile.to(tl.int32) | _MAGIC_BITS).to(tl.float32, bitcast=True) - (_MAGIC + zero)) * scale).to(TYPE)


@triton.jit
def real_int8(tile, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """[N, K] int8 -> the same numbers, packed INTEGERS_LEFT times too small; the scale is applied after the loop."""
    if PACKED:
        pairs = pairs_of_bytes(words_of(tile) ^ _MINUS_128)  # every sign: from -128..127 to 0..255
        return split_pairs(multiply_add(pairs, _LARGER, _MINUS_128_LARGER))
    else:
        return tile.to(TYPE)


@triton.jit
def larger_e8m0(scale, LARGER: tl.constexpr):
    """e8m0 bytes -> int32 words that hold scale * 2 ** LARGER, from 2 ** -126 to 2 ** 127, twice in bfloat16."""
    return scale.to(tl.int32) * 0x00800080 + LARGER * 0x00800080


@triton.jit
def real_float8(tile, scale, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """[N, K] e4m3, [N, groups] e8m0 -> value * scale; packed FLOATS_LEFT times too small.

    Exponent and mantissa bits of e4m3, moved to the lowest exponent and the highest mantissa bits of a bfloat16, are
    that value times 2 ** -120, subnormal numbers included. A NaN becomes 480.
    """
    if PACKED:
        words = words_of(tile)
        magnitude = words & 0x7F7F7F7F
        sign = (words >> 4) & 0x08080808
        first, second = permute_bytes(magnitude, sign, 0x5140), permute_bytes(magnitude, sign, 0x7362)
        pairs = interleave(first, second) << 4
        return split_pairs(multiply_add(pairs, spread_groups(larger_e8m0(scale, 88), pairs.shape[1]), _MINUS_ZERO))
    else:
        return (tile.to(tl.float32) * spread_groups(decode_scale(scale), tile.shape[1])).to(TYPE)


@triton.jit
def real_e2m1(tile, scale, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """[N, K / 2] bytes, [N, groups] scales -> [N, K] e2m1 value * scale, FLOATS_LEFT times too small unless float16.

    (OCP MX: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.) Exponent and mantissa bits of e2m1, moved to the lowest
    exponent bits and the highest mantissa bit, are that value times 2 ** -126; subnormal numbers included, so 0.5 needs
    no case of its own. One product repairs that and applies the scale: exact for scales from 2 ** -94 to 2 ** 33.
    """
    if PACKED:
        words = words_of(tile)
        pairs = pairs_of_nibbles(words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F)
        pairs = (pairs * 0x1040) & _E2M1_BITS  # bits 0 to 2 moved up by 6, the sign by 12
        if scale.dtype == tl.uint8:
            larger = larger_e8m0(scale, 94)
        else:
            larger = both_halves((scale.to(tl.float32) * 2.0**94).to(tl.bfloat16))
        return split_pairs(multiply_add(pairs, spread_groups(larger, pairs.shape[1]), _MINUS_ZERO))
    else:
        bits = tile.to(tl.int32)
        low = ((bits << 28) & -0x80000000) | ((bits << 22) & 0x01C00000)
        high = ((bits << 24) & -0x80000000) | ((bits << 18) & 0x01C00000)
        factor = spread_groups(decode_scale(scale), tile.shape[1]) * 2.0**94
        low = low.to(tl.float32, bitcast=True) * factor
        high = high.to(tl.float32, bitcast=True) * factor
        if tl.float16 == TYPE:  # has no room for small values
            return interleave(low * FLOATS_LEFT, high * FLOATS_LEFT).to(TYPE)
        else:
            return interleave(low, high).to(TYPE)
