"""The kernels of moegen/runtime compile for every architecture without a GPU."""

import os

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moegen.runtime.quantise import _quantise_groups
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


@pytest.mark.parametrize("beside", [False, True])
def test_a_launch_beside_the_one_before_waits_at_its_end(beside: bool) -> None:
    """Then it triggers first; any other waits before it triggers and before it reads."""
    types = {"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32"}
    fixed: dict[str, object] = dict.fromkeys(("topk_ids", "expert_map", "num_live"))
    fixed |= {"LARGEST": 448.0, "DEPTH": 2048, "GROUP": 128, "GROUP_BLOCK": 128, "GROUPS": 16, "LEAST": 1e-10}
    fixed |= {"UE8M0": False, "FAKE": False, "PDL": True, "BESIDE": beside}
    names = _quantise_groups.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(_quantise_groups, signature, constexprs=fixed)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    wait, trigger = (text.index(f"griddepcontrol.{name}") for name in ("wait", "launch_dependents"))
    if beside:
        assert trigger < text.index("ld.global") < text.rindex("st.global") < wait
    else:
        assert wait < trigger < text.index("ld.global")
