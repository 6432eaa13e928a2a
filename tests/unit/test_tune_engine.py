"""`moegen tune --engine vllm`: what vLLM is told, what it is compiled with ahead, and the file that comes of it."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moegen import cli
from moegen.emit import emit
from moegen.interop import vllm
from moegen.interop.strict import FileError
from moegen.interop.table import read_table
from moegen.plan import make_plan
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.spec import VariantSpec
from moegen.tune import engines
from moegen.tune.fingerprint import spec_of
from moegen.tune.keep import VllmFiles
from moegen.tune.record import layer_of
from tests.support.fake_vllm import write_vllm
from tests.support.records import H200, LAYER

SMALL = VariantSpec(num_experts=8, local_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype="bfloat16")
NAME = "E=8,N=32,device_name=NVIDIA_H200.json"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM for this process and its children."""
    write_vllm(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in engines.ROUNDED_SCALES:
        monkeypatch.setenv(name, "left to vLLM")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return emit(make_plan(spec_of(SMALL)), tmp_path / "out")


def fused_moe() -> Any:
    return importlib.import_module("vllm.model_executor.layers.fused_moe")


@pytest.mark.usefixtures("installed")
def test_from_the_command_to_the_file(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(engines.VllmSource, "worker", "tests.support.fake_vllm:FakeVllmGpu")
    monkeypatch.setattr(engines.VllmSource, "compiler", "tests.support.tune_workers:NoCompiler")
    words = ["tune", str(package), "--engine", "vllm", "--buckets", "1,16", "--effort", "quick", "--jobs", "1"]
    words += ["--out", str(tmp_path / "files"), "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    path = tmp_path / "files" / NAME
    assert found["files"] == [str(path)]
    assert not (package / "configs").exists()
    table = read_table(path)
    assert {tokens: (tile.BLOCK_SIZE_N, tile.num_warps) for tokens, tile in table.items()} == {1: (32, 4), 16: (32, 4)}
    assert json.loads(path.read_text())["triton_version"]
    for bucket in found["buckets"]:
        assert 20 < bucket["tried"] <= 60
        assert set(bucket["failures"]) <= {"wrong"}

    assert cli.main([*words, "--buckets", "1,16,64"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["measured"] == next(b["tried"] for b in again["buckets"] if b["tokens"] == 64)
    assert list(read_table(path)) == [1, 16, 64]
    assert "vllm-0.33.0" in Path(f"{package}.journal").read_text()


@pytest.mark.usefixtures("installed")
def test_what_vllm_is_told() -> None:
    """One config for both GEMMs with the six keys that vLLM knows; scales as its quant config names them."""
    layer = build_layer("fp8_w8a8:128x128")
    kernels = engines.VllmKernels(layer)
    call = fake_call(layer)
    monkey: list[tuple[Any, ...]] = []

    def fused_experts(*arguments: Any, quant_config: Any = None) -> torch.Tensor:
        monkey.append((dict(fused_moe().get_config()), quant_config, arguments))
        return torch.zeros(2, 4)

    fused_moe().fused_experts = fused_experts
    tile = TileConfig(16, 64, 128, 8, SWAP_AB=True, PDL=True, num_warps=8, num_stages=5)
    assert kernels(call, tile).shape == (2, 4)
    config, quant, arguments = monkey[0]
    assert config == {
        "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8, "num_warps": 8, "num_stages": 5,
    }  # fmt: skip
    assert (quant.block_shape, quant.per_act_token_quant, quant.per_out_ch_quant) == ([128, 128], False, False)
    assert (quant.w1_scale, quant.w2_scale) == (call.w13.scale, call.w2.scale)
    assert [a is b for a, b in zip(arguments, fields_of(call), strict=True)] == [True] * 5
    assert fused_moe().get_config() is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("quant", "by_token", "by_channel"),
    [("fp8_w8a8:channel", True, True), ("fp8_w8a8:tensor_token", True, False), ("fp8_w8a8:tensor", False, False)],
)
def test_granularities(quant: str, by_token: bool, by_channel: bool) -> None:
    layer = build_layer(quant)
    engines.VllmKernels(layer)(fake_call(layer), TileConfig(16, 64, 128))
    _, told = fused_moe().seen[-1]
    assert (told.per_act_token_quant, told.per_out_ch_quant, told.block_shape) == (by_token, by_channel, None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("quant", "rounded"), [("none", "0"), ("fp8_w8a8:128x128", "0"), ("fp8_w8a8:128x128ue8m0", "1")]
)
def test_scales_of_activations(quant: str, rounded: str) -> None:
    """vLLM rounds them up to powers of two where DeepGEMM runs, unless told; the check has those of the layer."""
    engines.VllmKernels(build_layer(quant))
    assert [os.environ[name] for name in ("VLLM_USE_DEEP_GEMM", "VLLM_USE_DEEP_GEMM_E8M0")] == [rounded, rounded]


class FakeWeight:
    """Values and scale, as a package's Weight has them."""

    def __init__(self, *shape: int) -> None:
        self.values, self.scale = torch.zeros(shape), torch.ones(1)


class FakeCall:
    """As much of a package's Call as vLLM's functions get."""

    def __init__(self, layer: Any) -> None:
        self.hidden_states = torch.zeros(2, layer.hidden_size)
        self.w13, self.w2 = FakeWeight(*layer.w13_shape), FakeWeight(*layer.w2_shape)
        self.topk_weights, self.topk_ids = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)


def fake_call(layer: Any) -> FakeCall:
    return FakeCall(layer)


def fields_of(call: FakeCall) -> list[torch.Tensor]:
    return [call.hidden_states, call.w13.values, call.w2.values, call.topk_weights, call.topk_ids]


def build_layer(quant: str) -> Any:
    return layer_of(replace(SMALL, quant=quant, hidden_size=256, intermediate_size=128))


COMPILE = """
import sys
from pathlib import Path
from moegen.device import TARGETS
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.compile_pool import jobs_of
from moegen.tune.engines import VllmCompiler, placeholder

folder, slug, width = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tiles = LayerTiles(TileConfig(16, width, 64), placeholder(16))
for job in jobs_of(folder, slug, TARGETS["cuda:90"], 16, tiles):
    done = VllmCompiler()(job)
    print(job.op, [kernel.kernel for kernel in done.kernels], done.failure and done.failure.status)
"""


def compiled(package: Path, width: int, tmp_path: Path) -> list[str]:
    """What a compiler process says; it has a driver of its own from then on, so it is one."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", COMPILE, str(package), SMALL.slug, str(width)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{root}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.usefixtures("installed")
def test_compiled_ahead(package: Path, tmp_path: Path) -> None:
    """Both GEMMs' kernels with gemm1's config; what does not compile is a failure of the config."""
    assert compiled(package, 64, tmp_path) == [
        "others [] None", "gemm1 ['fused_moe_kernel', 'fused_moe_kernel'] None", "gemm2 [] None",
    ]  # fmt: skip
    assert compiled(package, 256, tmp_path)[1] == "gemm1 ['fused_moe_kernel'] compile"


@pytest.mark.usefixtures("installed")
def test_another_launcher_is_no_failure(package: Path, tmp_path: Path) -> None:
    """A vLLM whose function takes other arguments: the process with the GPU compiles then."""
    launcher = tmp_path / "site" / "vllm" / "model_executor" / "layers" / "fused_moe" / "fused_moe.py"
    launcher.write_text("def invoke_fused_moe_triton_kernel(*, everything): ...\n")
    assert compiled(package, 64, tmp_path) == ["others [] None", "gemm1 [] None", "gemm2 [] None"]


# --------------------------------------------------------------------------------------------------------------- space


@pytest.mark.parametrize("quant", ["none", "fp8_w8a8:128x128", "fp8_w8a8:tensor"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 512, 4096, 65536])
def test_space(quant: str, tokens: int) -> None:
    """One tile config for both GEMMs: gemm2's is a placeholder, and the default is among gemm1's."""
    space = engines.vllm_space(replace(LAYER, quant=quant), tokens, H200)
    assert space.default in space
    assert space.default.gemm1 == vllm.default_tile(replace(LAYER, quant=quant), tokens)
    assert set(space.gemm1) == set(space.gemm2)
    for kind, second in space.gemm2.items():
        assert second.tiles == (engines.placeholder(kind.block_m),)
        assert {(tile.family, tile.BLOCK_SIZE_M) for tile in space.gemm1[kind].tiles} == {kind}
        assert not any(tile.SWAP_AB or tile.PDL for tile in space.gemm1[kind].tiles)
    assert 300 < space.size < 1920


def test_steps_that_vllm_cuts_are_not_tried() -> None:
    """It takes the smaller side of a block for BLOCK_SIZE_K: what is above that is the same kernel."""
    space = engines.vllm_space(replace(LAYER, quant="fp8_w8a8:64x128"), 16, H200)
    assert {
        tile.BLOCK_SIZE_K for found in space.gemm1.values() for tile in found.tiles if tile != space.default.gemm1
    } == {64}


@pytest.mark.parametrize(
    ("quant", "tokens", "expected"),
    # vLLM 0.33.0, get_default_config
    [
        ("none", 1, (16, 64, 128, 1, 4, 4)),
        ("none", 64, (32, 64, 128, 1, 4, 3)),
        ("none", 512, (64, 128, 64, 1, 8, 3)),
        ("none", 32768, (128, 128, 64, 16, 8, 3)),
        ("fp8_w8a8:tensor", 1024, (128, 128, 128, 1, 8, 3)),
        ("fp8_w8a8:128x128", 4, (16, 64, 128, 1, 4, 4)),
        ("fp8_w8a8:128x128", 8, (16, 64, 128, 1, 4, 3)),
        ("fp8_w8a8:128x128", 64, (16, 128, 128, 32, 4, 3)),
        ("fp8_w8a8:128x128", 65, (64, 128, 128, 32, 4, 3)),
    ],
)
def test_default_tile(quant: str, tokens: int, expected: tuple[int, ...]) -> None:
    tile = vllm.default_tile(replace(LAYER, quant=quant), tokens)
    sizes = (tile.BLOCK_SIZE_M, tile.BLOCK_SIZE_N, tile.BLOCK_SIZE_K, tile.GROUP_SIZE_M)
    assert (*sizes, tile.num_warps, tile.num_stages) == expected


# ------------------------------------------------------------------------------------------------------------- refusals


def test_vllm_is_missing(package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(["tune", str(package), "--engine", "vllm"]) == 3
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"quant": "int4_w4a16:g128", "intermediate_size": 128, "hidden_size": 128}, {"bias": True}, {"dtype": "float32"}],
    ids=["int4", "bias", "float32"],
)
def test_layers_that_are_not_tuned(changes: dict[str, Any]) -> None:
    with pytest.raises(FileError, match="allowed: none or fp8_w8a8, bfloat16 or float16, silu, without bias"):
        engines.check_variant(replace(SMALL, **changes))


def test_sweeps_are_not_of_its_kernel(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", str(package), "--engine", "vllm", "--replay", str(tmp_path)]) == 2
    assert "--replay" in capsys.readouterr().err


def test_a_broken_file_is_found_first(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{")
    with pytest.raises(FileError, match="JSON"):
        VllmFiles(tmp_path, H200, "3.6.0").earlier(SMALL)


def test_pairs_are_of_one_config() -> None:
    assert vllm.alike(LayerTiles(TileConfig(16, 64, 64), TileConfig(16, 64, 64, PDL=True)))
    assert not vllm.alike(LayerTiles(TileConfig(16, 64, 64), TileConfig(16, 64, 128)))
