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
    values         Triton expression: real weights of a tile less their scale
    imports        names that the template takes from runtime/kernel_parts.py
    """

    scheme: Scheme
    template: str
    accumulator: str = "tl.float32"
    dot_arguments: str = ""
    values: str = ""
    imports: tuple[str, ...] = ()


def kernel_quant(scheme: Scheme) -> KernelQuant:
    """The template row of a scheme."""
    if scheme.mode == "none":
        return KernelQuant(scheme=scheme, template="kernels/grouped_gemm.py.jinja")
    if scheme.mode in ("fp8_w8a8", "int8_w8a8"):
        if scheme.kind == "NxK":
            template = "kernels/grouped_gemm_w8a8_block.py.jinja"
            return KernelQuant(scheme=scheme, template=template, imports=("decode_scale",))
        exact = scheme.mode == "int8_w8a8"  # int32 holds every product of a reduction of up to 133 000 steps
        return KernelQuant(
            scheme=scheme,
            template="kernels/grouped_gemm_w8a8.py.jinja",
            accumulator="tl.int32" if exact else "tl.float32",
            dot_arguments=", out_dtype=tl.int32" if exact else "",
        )
    template = "kernels/grouped_gemm_weight_only.py.jinja"
    decode = {"int4_w4a16": "decode_int4", "int8_w8a16": "decode_plain", "mxfp8": "decode_plain"}
    function = decode.get(scheme.mode, "decode_e2m1")
    values = f"{function}(w_tile)"
    imports: tuple[str, ...] = (function, "decode_scale", "group_tile")
    if scheme.zero_points:
        zeros = "packed_zeros_tile" if scheme.row.values_per_byte == 2 else "zeros_tile"
        values += f" - {zeros}(w_zeros, expert, rows, k, ROWS, DEPTH, GROUP_K, BLOCK_SIZE_K)"
        imports = (*imports, zeros)
    elif scheme.kind == "gK" and scheme.mode in ("int4_w4a16", "int8_w8a16"):
        values += " - 8.0" if scheme.mode == "int4_w4a16" else " - 128.0"
    return KernelQuant(scheme=scheme, template=template, values=values, imports=imports)
