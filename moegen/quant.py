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
    e2m1           whether the weights are e2m1, whose decoded values may stay small (kernel_parts.real_e2m1)
    zeros          function that loads the zero points of a tile, or ""
    imports        names that the template takes from runtime/kernel_parts.py
    """

    scheme: Scheme
    template: str
    accumulator: str = "tl.float32"
    dot_arguments: str = ""
    values: str = ""
    e2m1: bool = False
    zeros: str = ""
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
            template = "kernels/grouped_gemm_w8a8_block.py.jinja"
            return KernelQuant(scheme=scheme, template=template, imports=("decode_scale",))
        template = "kernels/grouped_gemm_w8a8.py.jinja"
        if scheme.mode == "int8_w8a8":  # int32 holds every product of a reduction of up to 133 000 steps
            return KernelQuant(
                scheme=scheme, template=template, accumulator="tl.int32", dot_arguments=", out_dtype=tl.int32"
            )
        return KernelQuant(scheme=scheme, template=template, dot_arguments=_FP8_SUMS)
    values, zeros = _weight_values(scheme)
    function = [values.partition("(")[0]] if "(" in values else []
    return KernelQuant(
        scheme=scheme,
        template="kernels/grouped_gemm_weight_only.py.jinja",
        values=values,
        e2m1=values.startswith("real_e2m1"),
        zeros=zeros,
        imports=(*function, "decode_scale", "load_groups", "spread_groups", "E2M1_SMALL", *([zeros] if zeros else [])),
    )


def _weight_values(scheme: Scheme) -> tuple[str, str]:
    """The Triton expression that decodes a weight tile, and the function that loads its zero points, if any."""
    if scheme.mode == "int8_w8a16" and scheme.kind == "channel":
        return "w_tile", ""
    if scheme.mode in ("int4_w4a16", "int8_w8a16"):
        four_bit = scheme.mode == "int4_w4a16"
        function, middle = ("real_int4", "8.0") if four_bit else ("real_uint8", "128.0")
        if not scheme.zero_points:
            return f"{function}(w_tile, scale, {middle})", ""
        return f"{function}(w_tile, scale, zeros)", "load_packed_zeros" if four_bit else "load_zeros"
    return ("real_float8(w_tile, scale)" if scheme.mode == "mxfp8" else "real_e2m1(w_tile, scale, SMALL)"), ""
