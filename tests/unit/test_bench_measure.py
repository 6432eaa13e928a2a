"""The gate before the clock, with the graphs replaced by plain calls: what needs a device is in tests/gpu."""

from collections.abc import Callable, Sequence

import pytest
import torch

from moegen.bench import measure
from moegen.bench.measure import (
    Cell,
    Check,
    Options,
    Reference,
    WrongResultError,
    layer_reference,
    measure_cell,
    relative_error,
    tolerance,
)
from moegen.bench.peers import PACKAGE, Candidate
from moegen.bench.roofline import Ceilings
from moegen.bench.timing import Timing, ratio, rotated
from moegen.bench.workload import Layer, LayerCall, draw_log_popularity, draw_routing, draw_weights
from tests.support.fake_layer import FakeLayer

CPU = torch.device("cpu")
CEILINGS = Ceilings("bfloat16", 4e12, 8e14)


LAYER = FakeLayer(bias=True)


def right(x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    return layer_reference(LAYER, x, *args, **kwargs).to(x.dtype)


def wrong(x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    return right(x, *args, **kwargs) * 1.1


def failing(*_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of something\nand a long explanation")


def one_call(tokens: int, quant: str = "none") -> LayerCall:
    source = torch.Generator().manual_seed(0)
    weights, ids = draw_routing(tokens, 2, draw_log_popularity(8, "balanced", source), source)
    hidden = torch.randn(tokens, 64, generator=source).to(torch.bfloat16)
    return LayerCall(hidden, draw_weights(FakeLayer(bias=True, quant=quant), source), weights, ids)


class EagerCalls:
    """CapturedCalls without a device: every replay runs the calls again."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.size, self._calls = len(calls), calls
        self.outputs = [call() for call in calls]

    def replay(self) -> None:
        self.outputs = [call() for call in self._calls]

    def poison_outputs(self) -> None:
        pass


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in measure that needs a device, replaced; the n-th graph of a round takes n µs."""
    monkeypatch.setattr(measure, "CapturedCalls", EagerCalls)
    monkeypatch.setattr(measure, "release_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**12, 10**12))
    monkeypatch.setattr("moegen.bench.workload.MAX_CALLS", 4)

    def timed(captured: Sequence[object], *, replays: int) -> list[Timing]:
        return [Timing((float(index + 1),) * replays) for index in range(len(captured))]

    monkeypatch.setattr(measure, "time_interleaved", timed)


def run_cell(*candidates: Candidate, layer: FakeLayer = LAYER, reference: Reference | None = layer_reference) -> Cell:
    options = Options(replays=3)
    return measure_cell(layer, 5, "balanced", candidates, CEILINGS, device=CPU, options=options, reference=reference)


@pytest.mark.usefixtures("no_device")
def test_wrong_and_failing_candidates_are_rows_and_are_not_timed() -> None:
    cell = run_cell(
        Candidate(PACKAGE, right), Candidate("bad", wrong), Candidate("broken", failing), Candidate("good", right)
    )
    assert [result.status for result in cell.results] == ["ok", "wrong", "error", "ok"]
    assert cell.result("bad").timing is None
    assert cell.result("bad").relative_error == pytest.approx(0.1, rel=0.1)
    assert cell.result("broken").message == "RuntimeError: out of something"
    assert cell.result(PACKAGE).relative_error == pytest.approx(2e-3, abs=2e-3)
    assert cell.ratio_to_package(cell.result("good")) == 2.0
    assert cell.ratio_to_package(cell.result("bad")) is None
    assert cell.floor is not None
    assert cell.fraction(cell.result("good")) == pytest.approx(cell.floor.us / 2)


@pytest.mark.usefixtures("no_device")
def test_without_a_reference_nothing_is_compared() -> None:
    cell = run_cell(Candidate(PACKAGE, wrong), reference=None)
    assert cell.result(PACKAGE).status == "ok"
    assert cell.result(PACKAGE).relative_error is None


@pytest.mark.usefixtures("no_device")
def test_an_output_that_only_the_replay_spoils_is_wrong() -> None:
    count = 0

    def later_wrong(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        out = right(*args, **kwargs)
        return out * float("nan") if count > 1 else out

    cell = run_cell(Candidate(PACKAGE, later_wrong))
    assert cell.result(PACKAGE).status == "wrong"
    assert cell.result(PACKAGE).timing is None


@pytest.mark.usefixtures("no_device")
def test_a_layer_without_a_workload_is_a_row() -> None:
    cell = run_cell(Candidate(PACKAGE, right), layer=FakeLayer(bias=True, top_k=9))
    assert cell.result(PACKAGE).status == "error"
    assert "top_k: 9" in cell.result(PACKAGE).message
    assert cell.floor is None


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "fp8_w8a8:32x32", "int8_w8a8", "int4_w4a16:g32z", "nvfp4_w4a16"])
def test_quantised_layers_are_compared_in_their_own_scheme(quant: str) -> None:
    layer = FakeLayer(bias=True, quant=quant)
    seen: list[set[str]] = []

    def same(x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        seen.append(set(kwargs))
        return layer_reference(layer, x, *args, **kwargs).to(x.dtype)

    def one_step_off(x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        scales = {key: value.float() * 1.06 for key, value in kwargs.items() if key == "w2_scale"}
        return layer_reference(layer, x, *args, **kwargs | scales).to(x.dtype)

    cell = run_cell(Candidate(PACKAGE, same), Candidate("off", one_step_off), layer=layer)
    assert [result.status for result in cell.results] == ["ok", "wrong"], cell.results
    assert {"w13_scale", "w2_scale", "w13_bias", "w2_bias"} <= seen[0]
    assert cell.dtype == "bfloat16"


def test_tolerances() -> None:
    assert tolerance(FakeLayer(dtype=torch.float16)) == 5e-3
    assert tolerance(FakeLayer(dtype=torch.float16, quant="int4_w4a16")) == 5e-3
    assert tolerance(FakeLayer(dtype=torch.float16, quant="fp8_w8a8")) == 4e-2


@pytest.mark.parametrize(("quant", "tokens"), [("fp8_w8a8:tensor", 300), ("fp8_w8a8:tensor_token", 64)])
def test_a_scale_of_the_whole_tensor_needs_all_tokens(quant: str, tokens: int) -> None:
    """One huge value in a token that is not sampled coarsens all the others."""
    layer, call = FakeLayer(bias=True, quant=quant), one_call(300, quant)
    call.hidden_states[1] *= 1000
    counts: list[int] = []

    def reference(layer: Layer, x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        counts.append(x.shape[0])
        return layer_reference(layer, x, *args, **kwargs)

    check = Check.of(layer, call, reference)
    assert counts == [tokens]
    assert check.expected.shape == (64, 64)
    out = call.run(lambda *args, **kwargs: layer_reference(layer, *args, **kwargs))
    assert check.verify(out) < 1e-6


@pytest.mark.usefixtures("no_device")
def test_a_device_error_while_timing_hits_all_that_were_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> list[Timing]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(measure, "time_interleaved", lost)
    cell = run_cell(Candidate(PACKAGE, right), Candidate("bad", wrong))
    assert [result.status for result in cell.results] == ["error", "wrong"]
    assert "illegal memory access" in cell.result(PACKAGE).message


@pytest.mark.parametrize("tokens", [1, 3, 64, 1000])
def test_check_samples_first_and_last_token(tokens: int) -> None:
    call = one_call(tokens)
    check = Check.of(LAYER, call, layer_reference)
    assert check.rows.numel() == min(tokens, 64)
    assert (int(check.rows[0]), int(check.rows[-1])) == (0, tokens - 1)
    assert len(set(check.rows.tolist())) == check.rows.numel()
    out = call.run(right)
    assert isinstance(out, torch.Tensor)
    assert check.verify(out) < 1e-2
    out[-1] = float("nan")
    with pytest.raises(WrongResultError, match="nan"):
        check.verify(out)


def test_check_refuses_other_shapes_and_types() -> None:
    check = Check.of(LAYER, one_call(3), layer_reference)
    with pytest.raises(WrongResultError, match=r"\[3, 64\], got \[3, 2, 64\]"):
        check.verify(torch.ones(3, 2, 64))
    with pytest.raises(WrongResultError, match="got NoneType"):
        check.verify(None)


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) != 0


def test_timing_statistics() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 10.0))
    assert (timing.us_per_call, timing.us_min, timing.us_max) == (3.0, 1.0, 10.0)
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Timing((1.0,)).spread == 0.0
    with pytest.raises(ValueError, match="samples"):
        Timing(())


def test_ratio_is_the_median_of_the_rounds() -> None:
    # The clock halves after the second round: the ratios of the rounds do not notice.
    assert ratio(Timing((2.0, 2.0, 4.0, 4.0)), Timing((1.0, 1.0, 2.0, 2.0))) == 2.0
    with pytest.raises(ValueError, match="zip"):
        ratio(Timing((1.0,)), Timing((1.0, 2.0)))


def test_each_round_starts_with_another_graph() -> None:
    assert [rotated(3, turn) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
