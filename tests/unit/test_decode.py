"""Where weights are decoded two at a time."""

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from moegen.runtime.decode import is_packed

H200 = GPUTarget("cuda", 90, 32)
PACKED = [(tl.bfloat16, scale) for scale in (None, tl.bfloat16, tl.uint8, tl.float8e4nv)]
NOT_PACKED = [(tl.bfloat16, tl.float32), (tl.float16, tl.float16), (tl.float16, None), (tl.float32, tl.uint8)]


def use(monkeypatch: pytest.MonkeyPatch, target: GPUTarget | None, interpret: bool = False) -> None:
    monkeypatch.setattr(triton.language.target_info, "current_target", lambda: target)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)


def test_packed_are_bfloat16_and_scales_that_are_exact_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, H200)
    assert [bool(is_packed(*types)) for types in PACKED + NOT_PACKED] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("target", [None, GPUTarget("hip", "gfx942", 64)])
def test_packed_needs_cuda(target: GPUTarget | None, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, target)
    assert not is_packed(tl.bfloat16, tl.bfloat16)


def test_the_interpreter_takes_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, H200, interpret=True)
    assert not is_packed(tl.bfloat16, tl.bfloat16)
