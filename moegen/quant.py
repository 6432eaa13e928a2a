"""What the kernel templates need to know of a quant scheme; how it stores weights is in runtime/quant.py."""

from dataclasses import dataclass

from moegen.runtime.quant import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelQuant:
    """The holes of a grouped-GEMM template that depend on the quant scheme.

    scheme         the scheme itself
    template       skeleton that gemm1 and gemm2 extend
    accumulator    Triton type of the accumulator
    dot_arguments  further arguments of tl.dot
    values         Triton expression: real weights of a tile
    zeros          function that loads the zero points of a tile, or "None"
    left_over      Triton expression: what decoded values are still too small by
    imports        names that the template takes from runtime/decode.py
    """

    scheme: Scheme
    template: str
    accumulator: str = "tl.float32"
    dot_arguments: str = ""
    values: str = ""
    zeros: str = "None"
    left_over: str = "1.0"
    imports: tuple[str, ...] = ()


# Hopper's fp8 tensor cores keep about 14 bits of a sum. Every 128 steps it goes to a float32 accumulator where a second
# set of them costs no time, in small tiles; in large ones it would halve the rate.
_FP8_SUMS = ", max_num_imprecise_acc=128 if BLOCK_SIZE_M <= 32 and BLOCK_SIZE_K % 128 == 0 else None"


def kernel_quant(scheme: Scheme) -> KernelQuant:
    """The template row of a scheme."""
    if scheme.mode == "none":
        return KernelQuant(scheme=scheme, template="kernels/grouped_gemm.py.jinja")
    if scheme.mode in ("fp8_w8a8", "int8_w8a8"):
        if scheme.kind == "NxK":
            return KernelQuant(
                scheme=scheme,
                template="kernels/grouped_gemm_w8a8_block.py.jinja",
                imports=("decode_scale",),
            )
        exact = scheme.mode == "int8_w8a8"  # int32 holds every product of a reduction of up to 133 000 steps
        return KernelQuant(
            scheme=scheme,
            template="kernels/grouped_gemm_w8a8.py.jinja",
            accumulator="tl.int32" if exact else "tl.float32",
            dot_arguments=", out_dtype=tl.int32" if exact else _FP8_SUMS,
        )
    values, zeros, left_over = _weight_values(scheme)
    loads = ["load_groups"] if scheme.group_k else ["decode_scale"]
    loads += [zeros] if scheme.zero_points else []
    factor = "FLOATS_LEFT" if "FLOATS" in left_over else "INTEGERS_LEFT"
    return KernelQuant(
        scheme=scheme,
        template="kernels/grouped_gemm_weight_only.py.jinja",
        values=values,
        zeros=zeros,
        left_over=left_over,
        imports=(values.partition("(")[0], factor, "is_packed", *loads),
    )


def _weight_values(scheme: Scheme) -> tuple[str, str, str]:
    """Triton expressions: the decoded weight tile, the function that loads zero points, the factor left over."""
    integers = "INTEGERS_LEFT if PACKED else 1.0"
    if scheme.mode == "int8_w8a16" and scheme.kind == "channel":
        return "real_int8(w_tile, TYPE, PACKED)", "None", integers
    if scheme.mode in ("int4_w4a16", "int8_w8a16"):
        four_bit = scheme.mode == "int4_w4a16"
        load = "load_packed_zeros" if four_bit else "load_zeros"
        values = f"{'real_int4' if four_bit else 'real_uint8'}(w_tile, scale, zeros, TYPE, PACKED)"
        return values, load if scheme.zero_points else "None", integers
    if scheme.mode == "mxfp8":
        return "real_float8(w_tile, scale, TYPE, PACKED)", "None", "FLOATS_LEFT if PACKED else 1.0"
    return "real_e2m1(w_tile, scale, TYPE, PACKED)", "None", "1.0 if TYPE == tl.float16 else FLOATS_LEFT"
