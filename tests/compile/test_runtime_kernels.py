"""The kernels of moegen/runtime compile for every architecture without a GPU."""

import os

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.aot_cases import AOT_CASES, AotCase

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("cuda", 120, 32),
    GPUTarget("hip", "gfx942", 64),
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def _divisible(case: AotCase) -> dict[tuple[int], list[list[object]]]:
    """What the JIT finds for aligned pointers and multiples of 16, where the kernel lets it specialise on them."""
    divisible: dict[tuple[int], list[list[object]]] = {}
    for index, (kind, parameter) in enumerate(zip(case.signature.values(), case.kernel.params, strict=True)):
        ignored = parameter.do_not_specialize_on_alignment if kind.startswith("*") else parameter.do_not_specialize
        if kind != "constexpr" and not ignored:
            divisible[(index,)] = [["tt.divisibility", 16]]
    return divisible


@pytest.mark.parametrize("case", AOT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_compiles(case: AotCase, target: GPUTarget) -> None:
    source = ASTSource(case.kernel, dict(case.signature), constexprs=dict(case.constexprs), attrs=_divisible(case))
    compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps})
    assert compiled.metadata.shared <= 48 * 1024  # small enough to run beside a GEMM on any GPU
    assert ("hsaco" if target.backend == "hip" else "cubin") in compiled.asm
