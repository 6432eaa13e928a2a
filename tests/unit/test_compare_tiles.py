"""tools/compare_tiles.py, as far as it needs no GPU: what it would time, and that it compiles."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moegen.bench.measure import Cell, Result
from moegen.bench.timing import Timing
from moegen.device import TARGETS
from moegen.load import with_tiles
from tests.support.tools import load_tool

H200 = TARGETS["cuda:90"]
SIZES = {"num_experts": 16, "top_k": 4, "hidden_size": 1024, "intermediate_size": 640}


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("compare_tiles")


@pytest.mark.parametrize(
    ("fields", "tokens", "target", "labels"),
    [
        ({}, 1, "cuda:90", ["moegen", "portable", *(f"cooperative {rows}" for rows in (16, 32, 64, 128))]),
        ({}, 2048, "cuda:90", ["moegen", "portable", *(f"cooperative {rows}" for rows in (16, 32, 64))]),
        (
            {"quant": ("fp8_w8a8:128x128",)},
            2048,
            "cuda:90",
            ["moegen", "portable", *(f"cooperative {rows}" for rows in (16, 32, 64))],
        ),
        ({"quant": ("int4_w4a16:g128",)}, 2048, "cuda:90", ["moegen"]),
        ({"dtypes": ("float32",)}, 2048, "cuda:90", ["moegen"]),
        ({}, 2048, "cuda:100", ["moegen"]),
    ],
)
def test_what_is_timed(
    tool: Any, build: Callable[..., ModuleType], fields: dict[str, Any], tokens: int, target: str, labels: list[str]
) -> None:
    package = build(**SIZES, **fields)
    assert list(tool.pairs_of(package.LAYERS[0], tokens, TARGETS[target])) == labels


def test_chosen_tiles_hold_for_their_calls_alone(
    tool: Any, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = build(**SIZES)
    public, pairs = package._dispatch._PACKAGE, tool.pairs_of(package.LAYERS[0], 2048, H200)
    ran: list[Any] = []
    monkeypatch.setattr(package.runtime.package, "run", lambda _layer, call, tiles: ran.append((call, tiles)))
    monkeypatch.setattr(package, "fused_experts", lambda call: public._run(package.LAYERS[0], call))
    first, second = (with_tiles(package, pair) for pair in list(pairs.values())[:2])
    for function, call in ((first, "a"), (second, "b"), (first, "c")):
        function(call)
    assert ran == [("a", pairs["moegen"]), ("b", pairs["portable"]), ("c", pairs["moegen"])]
    assert "_run" not in vars(public)


def test_all_of_it_compiles(tool: Any, build: Callable[..., ModuleType]) -> None:
    folder = Path(str(build(**SIZES).__file__)).parent
    (request,) = tool.requests_of(f"{folder}=2048", H200)
    with tool.CompilePool(2) as pool:
        done = [future.result() for future in tool.compile_ahead(pool, request, H200)]
    assert [one.failure for one in done if one.failure] == []
    assert {"gemm1", "layer_cooperative"} <= {kernel.kernel for one in done for kernel in one.kernels}


def test_a_line_a_cell(tool: Any) -> None:
    cell = Cell("layer", "bfloat16", 64, "balanced", (
        Result("moegen", "ok", Timing((10.0,))),
        Result("cooperative 64", "ok", Timing((8.0,))),
        Result("portable", "wrong", message="relative error 1"),
    ))  # fmt: skip
    assert (
        tool.shown(cell)
        == "layer T=64 | portable wrong: relative error 1 | cooperative 64 8.0 x0.800 | moegen 10.0 x1.000"
    )
