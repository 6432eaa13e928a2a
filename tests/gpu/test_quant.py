"""Every quant scheme on a GPU: the reference's own grids and tolerances, and what they leave out.

The oracle dequantises the same stored bits in float64 and rounds activations as the kernels do. Every test draws fresh
data for three seeds: the second one has padding slots, the third padded weight rows. Memory is poisoned with NaN.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.quantize import quantize_parts, stored_dtypes
from moegen.runtime.quant import Scheme
from moegen.runtime.quantise import quantise
from moegen.runtime.reference import moe_reference
from moegen.runtime.weight import round_activations
from moegen.spec import Parallel
from tests.support import packages
from tests.support.packages import named, portable_tiles, relative_error, spread_map, unnamed
from tests.support.staged import close, quantisations, real, staged_oracle
from tests.support.weights import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DEVICE = "cuda"
SEEDS = (0, 1, 2)
CHUNK = 1024  # tokens that the float64 oracle computes at a time
Build = Callable[..., ModuleType]

# Largest relative error of a GEMM's result in the norm: its own rounding, and that of the activations' type.
RELATIVE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# That of Hopper's fp8 tensor cores, which keep about 14 bits of a sum: 2.2e-3 at K = 4096, more than float16 rounds.
FP8_SUMS = 5e-3


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`make(quant, e, k, h, i, ep=1, …)`: a package of one layer."""
    folder = Path(tmp_path_factory.mktemp("packages"))

    def build(quant: str, e: int, k: int, h: int, i: int, ep: int = 1, **fields: Any) -> ModuleType:
        sizes = {"num_experts": e, "top_k": k, "hidden_size": h, "intermediate_size": i}
        return packages.build(folder, quant=(quant,), parallel=(Parallel(ep=ep),), **sizes, **fields)

    return build


def inputs(layer: Any, tokens: int, seed: int, weight_std: float = 1 / 15, quantised: bool = False) -> dict[str, Any]:
    """Activations of deviation 1 / 10 and real weights of 1 / 15, as in the reference's tests; drawn on the GPU.

    quantised: weights are normal ones, quantised, as the reference draws them. Otherwise bits and scales are random,
    with longer tails: one activation that rounds to the neighbouring fp8 value then moves an output by more.
    """
    g = torch.Generator(DEVICE).manual_seed(zlib.crc32(f"{layer.slug} {tokens} {seed}".encode()))
    draw = {"generator": g, "device": DEVICE}
    values, ids = torch.randn(tokens, layer.num_experts, **draw).softmax(-1).topk(layer.top_k, dim=-1)
    if seed == 1:
        ids[torch.rand(ids.shape, **draw) < 0.2] = -1
    arguments = {
        "hidden_states": (torch.randn(tokens, layer.hidden_size, **draw) / 10).to(layer.dtype),
        "topk_weights": values,
        "topk_ids": ids.int(),
    }
    for name, shape in (("w13", layer.w13_shape), ("w2", layer.w2_shape)):
        padded, gain = 64 * (seed == 2), weight_std * shape[2] ** 0.5
        if quantised:
            parts = (torch.randn(1, *shape[1:], **draw) * weight_std for _ in range(shape[0]))
            weight = quantize_parts(parts, shape[0], layer.scheme, *stored_dtypes(layer.scheme, layer.dtype, None))
            wide = torch.nn.functional.pad(weight.values.view(torch.uint8), (0, padded)).view(weight.values.dtype)
            weight = replace(weight, values=wide[..., : shape[2]])
        else:
            options = {"gain": gain, "padded": padded, "float32_scale": seed == 2}
            weight = random_weight(g, layer.scheme, shape, layer.dtype, **options)
        arguments |= named(name, weight)
        if layer.bias:
            arguments[f"{name}_bias"] = torch.randn(shape[:2], **draw).to(layer.dtype)
    if layer.local_experts < layer.num_experts:
        cpu = torch.Generator().manual_seed(seed)
        arguments["expert_map"] = spread_map(cpu, layer.num_experts, layer.local_experts).to(DEVICE)
    return arguments


def oracle(layer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The layer in float64, some tokens at a time unless one scale covers all of them."""
    scheme, tokens = Scheme.parse(layer.quant), arguments["hidden_states"].shape[0]
    step = tokens if scheme.kind == "tensor" else CHUNK
    by_token = ("hidden_states", "topk_weights", "topk_ids")
    parts = []
    for start in range(0, tokens, step):
        part = {name: arguments[name][start : start + step] for name in by_token}
        parts.append(moe_reference(activation=layer.activation, scheme=scheme, **{**arguments, **part}))
    return torch.cat(parts)


def check(package: ModuleType, arguments: dict[str, Any], atol: float, rtol: float = 0.0, graph: bool = False) -> None:
    """One call against the oracle at the reference's tolerance and in the norm; then in a CUDA graph, bit for bit.

    With quantised activations the whole layer is held to the tolerance in the norm, and each GEMM to it in every value:
    those of the portable family, since the others have tests of their own.
    """
    layer = package.LAYERS[0]
    out = package.fused_experts(**arguments)
    assert out.dtype == layer.dtype
    case = f"{layer.slug}, {arguments['hidden_states'].shape[0]} tokens"
    expected = oracle(layer, arguments)
    if layer.scheme.row.activation is None:
        close(out, expected, atol, rtol, RELATIVE[layer.dtype], case)
    else:
        with portable_tiles(package), quantisations(package) as seen:
            by_stages = package.fused_experts(**arguments)
        for found in (out, by_stages):
            relative = relative_error(found, expected)
            assert relative <= atol, f"{case}: relative error {relative:.4g}, allowed {atol}"
        hidden, wanted, staged = staged_oracle(package, arguments, seen)
        norm = max(RELATIVE[layer.dtype], FP8_SUMS if layer.quant.startswith("fp8") else 0.0)
        close(hidden, wanted, atol, rtol, norm, f"{case}, gemm1")
        close(by_stages, staged, atol, rtol, norm, f"{case}, gemm2")
    if graph:
        static = torch.full_like(out, float("nan"))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            package.fused_experts(**arguments, out=static)
        static.fill_(float("nan"))
        captured.replay()
        torch.cuda.synchronize()
        assert torch.equal(static, out), f"{case}: a CUDA graph gives something else"


# --------------------------------------------------------------------------------------------- the reference's grids

W8A8 = ("fp8_w8a8:tensor", "fp8_w8a8:channel", "fp8_w8a8:128x128", "fp8_w8a8:128x128ue8m0", "int8_w8a8:tensor",
        "int8_w8a8:channel", "int8_w8a8:128x128")  # fmt: skip
WN16_SIZES = ((1, 128, 128), (1, 1024, 1024), (32, 2048, 128), (222, 2048, 1024))  # tokens, I, H
WN16 = [
    (f"{mode}:g{group}{'z' if zeros else ''}", *size, e, k, ep)
    for mode, group, zeros, size, e, k, ep in product(
        ("int4_w4a16", "int8_w8a16"), (64, 128), (False, True), WN16_SIZES, (8, 64, 192), (2, 6), (1, 4)
    )
]


@pytest.mark.parametrize(("quant", "t", "i", "h", "e", "k", "ep"), WN16)
def test_wn16(make: Build, quant: str, t: int, i: int, h: int, e: int, k: int, ep: int) -> None:
    package = make(quant, e, k, h, i, ep)
    for seed in SEEDS:
        check(package, inputs(package.LAYERS[0], t, seed, weight_std=0.1), atol=2e-2, graph=seed == 0)


# tokens, I, H: the published list, and pairs that 128 does not divide
BLOCK_FP8_SIZES = (
    (1, 128, 128), (1, 128, 7168), (1, 1024, 7168), (1, 4608, 128), (1, 4608, 7168),
    (83, 128, 128), (83, 512, 512), (83, 4608, 512), (83, 4608, 7168),
    (128, 512, 512), (128, 1024, 7168), (128, 4608, 7168),
    (2048, 128, 128), (2048, 1024, 7168), (2048, 4608, 512), (2048, 4608, 7168),
    (8192, 128, 128), (8192, 128, 7168), (8192, 1024, 7168), (8192, 4608, 7168),
    (1, 704, 1408), (83, 1856, 2880), (128, 200, 1000), (2048, 511, 720),
)  # fmt: skip
BLOCK_FP8 = [(*size, e, k) for size, e, k in product(BLOCK_FP8_SIZES, (2, 8, 16), (1, 2, 6)) if k <= e]


@pytest.mark.parametrize(("t", "i", "h", "e", "k"), BLOCK_FP8)
def test_block_fp8(make: Build, t: int, i: int, h: int, e: int, k: int) -> None:
    package = make("fp8_w8a8:128x128", e, k, h, i)
    tolerance = 0.035 if t < 8192 else 0.039
    for seed in SEEDS:
        arguments = inputs(package.LAYERS[0], t, seed, quantised=True)
        check(package, arguments, tolerance, tolerance, graph=seed == 0 and t <= 128)


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize(("t", "i", "h"), [(1, 128, 512), (83, 512, 512), (2048, 1024, 1024)])
def test_block_fp8_on_a_shard(make: Build, t: int, i: int, h: int, ep: int) -> None:
    package = make("fp8_w8a8:128x128", 16, 6, h, i, ep)
    for seed in SEEDS:
        check(package, inputs(package.LAYERS[0], t, seed), 0.035, 0.035, graph=True)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("e", [8, 24])
@pytest.mark.parametrize(
    ("t", "i", "h"),
    [(1, 128, 256), (33, 1024, 512), (33, 200, 1000), (128, 512, 4096), (222, 2048, 1024), (2048, 128, 7168)],
)
def test_block_int8(make: Build, t: int, i: int, h: int, e: int, k: int) -> None:
    package = make("int8_w8a8:128x128", e, k, h, i)
    for seed in SEEDS:
        check(package, inputs(package.LAYERS[0], t, seed), 0.065, 0.065, graph=seed == 0)


@pytest.mark.parametrize("quant", ["fp8_w8a8:channel", "int8_w8a8:channel", "fp8_w8a8:tensor_token"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("i", "h"), product((128, 1024), (256, 4096)))
@pytest.mark.parametrize("k", [2, 6])
def test_channel_and_token(make: Build, quant: str, dtype: str, i: int, h: int, k: int) -> None:
    package = make(quant, 8, k, h, i, dtypes=(dtype,))
    layer = package.LAYERS[0]
    for t, seed in product((1, 33), SEEDS):
        arguments = inputs(layer, t, seed)
        check(package, arguments, 0.05, 0.05, graph=seed == 0)
        expected = oracle(layer, arguments)
        mean = (package.fused_experts(**arguments).double() - expected).abs().mean() / expected.abs().mean()
        assert mean.item() < 0.05, f"{layer.slug}, {t} tokens: mean relative error {mean.item():.4g}"


@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "int8_w8a8:tensor"])
@pytest.mark.parametrize(
    ("t", "i", "h", "e", "ep"), [(1, 128, 128, 64, 1), (33, 1024, 2048, 8, 1), (222, 2048, 1000, 64, 4)]
)
def test_tensor(make: Build, quant: str, t: int, i: int, h: int, e: int, ep: int) -> None:
    """Dynamic, static for one GEMM, static for both: the scales of a calibration, which clip a little."""
    package = make(quant, e, 2, h, i, ep)
    layer = package.LAYERS[0]
    largest = 448 if quant.startswith("fp8") else 127
    static = {name: torch.tensor([0.35 / largest], device=DEVICE) for name in ("w13_input_scale", "w2_input_scale")}
    for seed, names in product(SEEDS, ((), ("w13_input_scale",), tuple(static))):
        arguments = inputs(layer, t, seed) | {name: static[name] for name in names}
        check(package, arguments, 0.05, 0.05, graph=seed == 0)


@pytest.mark.parametrize("quant", [*W8A8, "mxfp4_w4a8"])
@pytest.mark.parametrize(("rows", "depth"), [(1, 2048), (8, 768), (513, 1000), (20000, 768)])
def test_quantisers_give_the_reference_bit_for_bit(quant: str, rows: int, depth: int) -> None:
    """Ties between two codes included, which is what the oracle of the grids above rests on."""
    scheme = Scheme.parse(quant)
    stored = torch.int8 if quant.startswith("int8") else torch.float8_e4m3fn
    for seed in SEEDS:
        x = torch.randn(rows, depth, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).bfloat16()
        found = real(scheme, quantise(x, scheme, stored, None, None))
        expected = round_activations(x.double(), scheme, stored, None)
        assert torch.equal(found, expected.bfloat16().double() if quant == "mxfp4_w4a8" else expected)


# ------------------------------------------------------------------------------------------------- beyond the grids

FORMS: dict[str, dict[str, Any]] = {
    "silu": {},
    "relu2": {"activation": "relu2_no_mul"},
    "gpt-oss": {"activation": "swigluoai", "bias": True},
}
GROUPED_SIZES = (  # tokens, I, H, E, k
    (1, 128, 128, 128, 2), (1, 2880, 2880, 32, 4), (32, 2880, 2880, 32, 4), (200, 704, 1408, 64, 6),
    (1000, 1000, 720, 8, 2),
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "i", "h", "e", "k"), GROUPED_SIZES)
@pytest.mark.parametrize("quant", ["mxfp4_w4a16", "mxfp4_w4a8", "nvfp4_w4a16", "mxfp8"])
def test_microscaled(make: Build, quant: str, t: int, i: int, h: int, e: int, k: int, form: str) -> None:
    package = make(quant, e, k, h, i, **FORMS[form])
    for seed in SEEDS:
        check(package, inputs(package.LAYERS[0], t, seed, weight_std=0.05), 2e-2, 2e-2, graph=seed == 0 and t < 200)


OTHER_FORMS = (
    "fp8_w8a8:128x128ue8m0", "fp8_w8a8:64x64", "fp8_w8a8:1x128", "fp8_w8a8:100x32", "int8_w8a8:64x32",
    "int8_w8a16:channel", "int8_w8a16:g32", "int8_w8a16:g256z", "int4_w4a16:g32", "int4_w4a16:g32z",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", OTHER_FORMS)
def test_other_granularities(make: Build, quant: str, form: str) -> None:
    package = make(quant, 32, 4, 1000, 488, **FORMS[form])
    tolerance = 0.035 if quant.startswith("fp8") else 2e-2
    for t, seed in product((1, 70), SEEDS):
        check(package, inputs(package.LAYERS[0], t, seed, weight_std=0.05), tolerance, tolerance, graph=seed == 0)


SCHEMES = ("fp8_w8a8:tensor", "fp8_w8a8:channel", "fp8_w8a8:128x128", "int8_w8a8:channel", "int8_w8a8:128x128",
           "int8_w8a16:channel", "int8_w8a16:g128z", "int4_w4a16:g128", "int4_w4a16:g64z", "mxfp4_w4a16", "mxfp4_w4a8",
           "nvfp4_w4a16", "mxfp8")  # fmt: skip


@pytest.mark.parametrize("quant", SCHEMES)
def test_capture_right_after_warmup(make: Build, quant: str) -> None:
    package = make(quant, 64, 4, 512, 256)
    layer = package.LAYERS[0]
    package.warmup(1100)
    for t in (1, 4, 5, 40, 300, 1100):
        arguments = inputs(layer, t, seed=0)
        out = torch.empty_like(arguments["hidden_states"])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            package.fused_experts(**arguments, out=out)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, package.fused_experts(**arguments)), f"{layer.slug}, {t} tokens"
        check(package, arguments, 0.05, 0.05)


@pytest.mark.parametrize("quant", SCHEMES)
def test_only_padding_gives_zero(make: Build, quant: str) -> None:
    package = make(quant, 64, 4, 512, 256)
    for t in (1, 40):
        arguments = inputs(package.LAYERS[0], t, seed=0)
        arguments["topk_ids"].fill_(-1)
        assert not package.fused_experts(**arguments).any()


@pytest.mark.parametrize("quant", SCHEMES)
def test_low_latency_and_aligned_agree_bit_for_bit(make: Build, quant: str) -> None:
    """With the same tiles: an expert_map to oneself rules the shortcut out and changes nothing else."""
    package = make(quant, 128, 2, 1024, 512)
    layer, runtime = package.LAYERS[0], package.runtime
    everyone = torch.arange(layer.num_experts, dtype=torch.int32, device=DEVICE)
    device = runtime.device.device_facts(torch.cuda.current_device())
    for t in (1, 3, 16):
        arguments = inputs(layer, t, seed=1)
        tiles = package._dispatch._PACKAGE._configs.tiles(layer, t, None, device, portable=True)
        results = []
        for expert_map in (None, everyone):
            weights = [unnamed(package, name, arguments) for name in ("w13", "w2")]
            out = torch.full_like(arguments["hidden_states"], float("nan"))
            x, weight, ids = (arguments[name] for name in ("hidden_states", "topk_weights", "topk_ids"))
            runtime.layer.run(layer, runtime.layer.Call(x, *weights, weight, ids, expert_map, False, out), tiles)
            results.append(out)
        assert torch.equal(*results), f"{layer.slug}, {t} tokens"


@pytest.mark.parametrize("quant", SCHEMES)
def test_runs_repeat_bit_for_bit(make: Build, quant: str) -> None:
    package = make(quant, 64, 4, 512, 256)
    for t in (1, 300):
        arguments = inputs(package.LAYERS[0], t, seed=1)
        first = package.fused_experts(**arguments)
        assert all(torch.equal(first, package.fused_experts(**arguments)) for _ in range(5))


# --------------------------------------------------------------------------------------------- accuracy over a long K


def depth_error(make: Build, depth: int, t: int, positive: bool) -> float:
    """Relative error of gemm1 over `depth` steps: the same 8-bit operands in float64, and a float32 result."""
    package = make("fp8_w8a8:128x128", 8, 2, depth, 128, dtypes=("float32",), activation="silu_no_mul")
    layer, errors = package.LAYERS[0], []
    for seed in (0, 2):
        arguments = inputs(layer, t, seed)
        if positive:  # sums that grow with every step
            arguments["hidden_states"] = arguments["hidden_states"].abs()
            arguments["w13"] = (arguments["w13"].view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)
        with portable_tiles(package), quantisations(package) as seen:
            package.fused_experts(**arguments)
        hidden, wanted, _ = staged_oracle(package, arguments, seen)
        errors.append(relative_error(hidden, wanted))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("t", [1, 64, 1024])
def test_block_fp8_is_as_accurate_over_a_long_reduction(make: Build, t: int, positive: bool) -> None:
    """Every K group is added in float32: at K = 16384 the error is at most 1.5 times that at K = 2048.

    Below 1e-6 it is that of float32 sums themselves, where tiles are too small for the fp8 tensor cores.
    """
    short, long = (depth_error(make, depth, t, positive) for depth in (2048, 16384))
    case = f"{t} tokens: relative error {long:.3g} at K = 16384, {short:.3g} at K = 2048"
    assert long <= max(1.5 * short, 1e-6), case
