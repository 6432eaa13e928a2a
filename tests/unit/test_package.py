"""What tells compiled kernels of one layer apart, and which forms of the arguments warm-up takes for granted."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

from moegen.device import TARGETS
from moegen.runtime.checks import check_device
from moegen.runtime.quant import Scheme
from tests.support.packages import make_inputs, unnamed
from tests.support.weights import SMALL_SCHEMES

H200 = TARGETS["cuda:90"]


def call_of(package: ModuleType, arguments: dict[str, Any]) -> Any:
    weights = [unnamed(package, name, arguments) for name in ("w13", "w2")]
    x = arguments["hidden_states"]
    return package.runtime.layer.Call(x, *weights, arguments["topk_weights"], arguments["topk_ids"], None, False, x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quant", ["none", *SMALL_SCHEMES])
def test_warmup_takes_the_form_of_a_checkpoint(quant: str, bias: bool, build: Callable[..., ModuleType]) -> None:
    """Its calls select the kernels that a usual call of the same layer runs."""
    package = build(quant=(quant,), bias=bias)
    layer, variant = package.LAYERS[0], package.runtime.package._variant
    ((call, _),) = package._dispatch._PACKAGE.distinct_calls(layer, 1, H200, "meta")
    arguments = make_inputs(layer, 1)
    if quant.endswith("ue8m0"):  # stored in float32 (DeepSeek-V3.1) more often than as bytes
        arguments |= {name: arguments[name].view(torch.float8_e8m0fnu).float() for name in ("w13_scale", "w2_scale")}
    usual = call_of(package, arguments)
    assert variant(call) == variant(usual)
    for warm, given in ((call.w13, usual.w13), (call.w2, usual.w2)):
        for part in ("values", "scale", "zeros", "global_scale", "bias"):
            shapes = [None if getattr(w, part) is None else getattr(w, part).shape for w in (warm, given)]
            assert shapes[0] == shapes[1], part


def test_weights_in_pieces_need_no_other_align_kernel(
    build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """align fetches weights that are in one piece; warm-up, which does not know, has compiled for others as well."""
    package = build()
    layer, runtime = package.LAYERS[0], package.runtime
    launched: list[tuple[int, bool]] = []

    def launch(kernel: Any, *args: Any, grid: Any, **_: Any) -> None:
        if kernel.__name__ == "align_kernel":
            launched.append((grid[0], args[kernel.arg_names.index("weights")] is None))

    monkeypatch.setattr(triton.JITFunction, "run", launch)
    for padded_rows in (0, 16):
        arguments = make_inputs(layer, 64, padded_rows=padded_rows)
        meta = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            for name, value in arguments.items()
        }
        call = call_of(package, meta)
        assert call.w13.values.is_contiguous() == (padded_rows == 0)
        runtime.layer.run(layer, call, package._dispatch._PACKAGE._configs.tiles(layer, 64, None, H200))
    (whole, none), (pieces, also_none) = launched
    assert (none, also_none) == (False, False)
    assert whole > pieces


@pytest.mark.parametrize(
    ("quant", "name", "change"),
    [
        ("int4_w4a16:g32", "w13_scale", lambda part: part.float()),
        ("int8_w8a16:channel", "w2_scale", lambda part: part.float()),
        ("fp8_w8a8:32x32ue8m0", "w2_scale", lambda part: part.view(torch.float8_e8m0fnu).float()),
        ("fp8_w8a8:tensor", "w13_input_scale", lambda _: torch.ones(1)),
        ("int8_w8a8:tensor", "w2_input_scale", lambda _: torch.ones(1)),
        ("fp8_w8a8:channel", "w13", lambda part: part.view(torch.float8_e4m3fnuz)),
        ("none", "w13_bias", lambda part: part.float()),
        ("mxfp8", "w2_bias", lambda part: part.float()),
        ("none", "w13_bias", lambda part: torch.cat((part[0, :1], part.flatten()))[1:].view(part.shape)),
        ("int8_w8a16:channel", "w2_scale", lambda part: torch.cat((part[0, :1], part.flatten()))[1:].view(part.shape)),
        ("int4_w4a16:g32z", "w13_zeros", lambda part: torch.cat((part[0, 0, :1], part.flatten()))[1:].view(part.shape)),
        ("none", "topk_ids", lambda part: part.long()),
        ("none", "hidden_states", lambda part: torch.cat((part, part[:, :1]), 1)[:, : part.shape[1]]),
        ("none", "hidden_states", lambda part: torch.cat((part[0, :1], part.flatten()))[1:].view(part.shape)),
        ("none", "w2", lambda part: torch.cat((part, part[..., :1]), 2)[..., : part.shape[2]]),
    ],
)
def test_forms_that_compile_other_kernels(
    quant: str, name: str, change: Callable[[Any], torch.Tensor], build: Callable[..., ModuleType]
) -> None:
    package = build(quant=(quant,), bias=True)
    variant, arguments = package.runtime.package._variant, make_inputs(package.LAYERS[0], 1)
    other = {**arguments, name: change(arguments.get(name))}
    assert variant(call_of(package, other)) != variant(call_of(package, arguments))


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({}, "; call warmup(3) or run the layer once before capturing a CUDA graph"),
        (
            {"topk_ids": torch.zeros(3, 2, dtype=torch.int64), "w13_input_scale": torch.ones(1)},
            "; warmup(3) compiles for the usual type and alignment of topk_ids, w13_input_scale, so run the layer once "
            "with these before capturing a CUDA graph",
        ),
    ],
)
def test_a_capture_of_cold_kernels_is_told_what_to_do(
    change: dict[str, torch.Tensor], advice: str, build: Callable[..., ModuleType]
) -> None:
    package = build(quant=("fp8_w8a8:tensor",))
    call = call_of(package, make_inputs(package.LAYERS[0], 3) | change)
    told = package.runtime.package._not_compiled(package.LAYERS[0], call, H200)
    assert told.startswith(f"{package.LAYERS[0].slug}: the kernels for 3 tokens are not compiled yet, and compiling ")
    assert told.endswith(advice)


def test_what_depends_on_the_tokens_selects_no_kernel(build: Callable[..., ModuleType]) -> None:
    """Parts of one buffer and slices of the router's output lie at any multiple of 4 bytes."""
    package = build()
    runtime, gemms = package.runtime, package.LAYERS[0].kernels
    kernels = (gemms.gemm1, gemms.gemm2, runtime.align.align_count_kernel, runtime.align.align_kernel)
    kernels += (runtime.quantise._quantise_groups, runtime.quantise._tensor_maximum, runtime.quantise._quantise_tensor)
    kernels += (runtime.reduce.top_k_reduce_kernel,)
    anywhere = {"topk_ids", "topk_weights", "expert_map", "sorted_token_ids", "expert_ids", "num_tokens_post_padded"}
    found = [parameter for kernel in kernels for parameter in kernel.params if parameter.name in anywhere]
    assert {parameter.name for parameter in found} == anywhere
    assert all(parameter.do_not_specialize_on_alignment for parameter in found)


def test_both_types_of_e8m0_scales_run_the_same_kernels(build: Callable[..., ModuleType]) -> None:
    package = build(quant=("mxfp4_w4a16",))
    variant, arguments = package.runtime.package._variant, make_inputs(package.LAYERS[0], 1)
    viewed = {name: arguments[name].view(torch.float8_e8m0fnu) for name in ("w13_scale", "w2_scale")}
    assert variant(call_of(package, {**arguments, **viewed})) == variant(call_of(package, arguments))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quant", ["none", *SMALL_SCHEMES])
def test_schemes_without_kernels_on_a_gpu_are_refused_by_name(quant: str, target: str) -> None:
    scheme, device = Scheme.parse(quant), TARGETS[target]
    holds_e4m3 = scheme.mode in ("fp8_w8a8", "mxfp4_w4a8", "nvfp4_w4a16", "mxfp8")
    if holds_e4m3 and target in ("cuda:80", "cuda:86"):
        with pytest.raises(ValueError, match=rf"compute capability 8\.?[06].*{scheme.mode}.*8\.9"):
            check_device(scheme, device)
    else:
        check_device(scheme, device)
