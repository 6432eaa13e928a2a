"""The latency regression check, on recorded and fabricated timings: timing itself needs a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moegen.bench.check import SLACK, read_recorded, regressions
from moegen.bench.measure import Cell, Result
from moegen.bench.peers import PACKAGE
from moegen.bench.roofline import Ceilings, floor
from moegen.bench.timing import Timing
from tests.support.fake_layer import FakeLayer

GPU = "Some GPU"
HEADER = (
    "layer,tokens,routing,provider,us,us_min,us_max,floor_us,fraction,ratio_to_package,active_experts,gpu,torch,triton"
)
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: str, header: str = HEADER) -> Path:
        path = tmp_path / "recorded.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def row(layer: str, tokens: int, provider: str, fraction: str, routing: str = "balanced", gpu: str = GPU) -> str:
    return f"{layer},{tokens},{routing},{provider},1,1,1,1,{fraction},1,1,{gpu},2.11,3.6"


def cell(tokens: int, fraction: float | None) -> Cell:
    """A cell whose package runs at `fraction` of the floor."""
    layer = FakeLayer()
    bound = floor(layer, tokens, 1.0, Ceilings("bfloat16", 1e12, 1e15))
    timing = None if fraction is None else Timing((bound.us / fraction,))
    result = Result(PACKAGE, "error" if timing is None else "ok", timing)
    return Cell(layer.slug, "bfloat16", tokens, "balanced", (result,), floor=bound)


def test_only_the_packages_own_rows_of_that_routing_count(recorded: Callable[..., Path]) -> None:
    path = recorded(
        row("small", 1, PACKAGE, "0.7"),
        row("small", 1, "vllm", "0.5", gpu="Another"),
        row("small", 4, PACKAGE, ""),
        row("small", 16, PACKAGE, "0.9", routing="power_law"),
    )
    assert read_recorded(path, GPU, "balanced") == {("small", 1): 0.7}
    assert read_recorded(path, GPU, "power_law") == {("small", 16): 0.9}


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ((row("small", 1, PACKAGE, "0.7", gpu="Another"),), HEADER, "recorded on 'Another', this is 'Some GPU'"),
        ((row("small", 1, "vllm", "0.7"),), HEADER, f"no row of {PACKAGE} with balanced routing"),
        (("a,b",), "x,y", "lacks the column 'provider'"),
        ((row("small", 1, PACKAGE, "much"),), HEADER, "could not convert"),
    ],
)
def test_refused(recorded: Callable[..., Path], rows: tuple[str, ...], header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recorded(recorded(*rows, header=header), GPU, "balanced")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.csv"):
        read_recorded(tmp_path / "absent.csv", GPU, "balanced")


@pytest.mark.parametrize(
    ("now", "slower"),
    [(0.80, False), (0.80 * (1 - SLACK) + 1e-6, False), (0.80 * (1 - SLACK) - 1e-3, True), (None, True)],
)
def test_a_cell_may_lose_the_slack_and_no_more(now: float | None, slower: bool) -> None:
    assert bool(regressions([cell(1, now)], {("small", 1): 0.80})) == slower


def test_each_slower_cell_is_named_and_others_are_left_alone() -> None:
    lines = regressions([cell(1, 0.5), cell(4, 0.9), cell(16, 0.1)], {("small", 1): 0.7, ("small", 4): 0.9})
    assert lines == ["small T=1: 50.0% of the floor, recorded 70.0%"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_published_results_can_be_checked_against(path: Path) -> None:
    recorded = read_recorded(path, "NVIDIA H200", "balanced")
    assert len(recorded) >= 7
    assert all(0 < fraction < 1 for fraction in recorded.values())
