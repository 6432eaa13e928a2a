"""What is timed at a bucket: drawn from seed and tokens alone, both routings, weights that are drawn once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moegen.bench.timing import CapturedCalls, Timing
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune import gpu, workload
from moegen.tune.gpu import Anchor, GpuWorker, compared, raced, status_of, without_drift
from moegen.tune.trial import Measurement
from moegen.tune.workload import Bucket, WeightCopies, build_bucket, calls_of, read_routing
from tests.support.fake_layer import FakeLayer

CPU = torch.device("cpu")
LAYER = FakeLayer(num_experts=64, local_experts=64, top_k=2)


def build(tokens: int, weights: WeightCopies | None = None, recorded: torch.Tensor | None = None) -> Bucket:
    weights = weights or WeightCopies(LAYER, CPU, 0)
    return build_bucket(LAYER, tokens, weights, recorded, device=CPU, seed=0)


def test_a_bucket_does_not_depend_on_those_before_it() -> None:
    weights = WeightCopies(LAYER, CPU, 0)
    build(1, weights)
    again, fresh = build(16, weights), build(16)
    assert len(again.calls) == len(fresh.calls)
    for one, other in zip(again.calls, fresh.calls, strict=True):
        assert torch.equal(one.hidden_states, other.hidden_states)
        assert torch.equal(one.topk_ids, other.topk_ids)
        assert torch.equal(one.topk_weights, other.topk_weights)
        assert torch.equal(one.weights.w13, other.weights.w13)
    for one_check, other_check in zip(again.checks, fresh.checks, strict=True):
        assert torch.equal(one_check.expected, other_check.expected)


def test_copies_have_the_same_bits_at_other_addresses() -> None:
    weights = WeightCopies(FakeLayer(quant="fp8_w8a8:channel"), CPU, 0)
    many = weights.first(4)
    assert (
        len({copy.w13.data_ptr() for copy in many}) == len({copy.kwargs["w2_scale"].data_ptr() for copy in many}) == 4
    )
    assert all(torch.equal(copy.w2.view(torch.uint8), many[0].w2.view(torch.uint8)) for copy in many)
    assert weights.first(2) == many[:2]
    assert len(weights.first(3)) == 3


def test_routings_take_turns() -> None:
    """A power law makes some experts much more popular than the mean; a balanced draw does not."""
    bucket = build(512)
    assert bucket.routings == 2
    most = [int(call.topk_ids.long().flatten().bincount().max()) for call in bucket.calls]
    assert len(most) % 2 == 0
    assert max(most[0::2]) < 50 < 100 < min(most[1::2])


@pytest.mark.parametrize(("call_us", "copies"), [(30.0, 8), (30.0, 1), (1.0, 64), (0.01, 2), (500.0, 2), (1e5, 2)])
def test_calls_fill_a_replay(call_us: float, copies: int) -> None:
    calls = calls_of(call_us, copies)
    assert calls % copies == calls % 2 == 0
    assert calls <= workload.MAX_CALLS
    assert calls * call_us >= workload.MIN_REPLAY_US or calls == workload.MAX_CALLS
    assert (calls - max(copies, 2)) * call_us < workload.MIN_REPLAY_US


def test_recorded_routing_is_replayed_in_order() -> None:
    recorded = torch.arange(20, dtype=torch.int32).view(10, 2)
    bucket = build(4, recorded=recorded)
    assert bucket.routings == 1
    assert torch.equal(bucket.calls[0].topk_ids, recorded[:4])
    assert torch.equal(bucket.calls[1].topk_ids, recorded[4:8])
    assert torch.equal(bucket.calls[2].topk_ids, torch.cat((recorded[8:], recorded[:2])))


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_read_routing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ids{suffix}"
    ids = np.array([[0, 63], [-1, 5]])
    np.save(path, ids) if suffix == ".npy" else torch.save(torch.from_numpy(ids), path)
    found = read_routing(path, LAYER)
    assert found.dtype == torch.int32
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int32), r"\[4, 3\] is not allowed; allowed: topk_ids \[N, 2\]"),
        (torch.zeros(0, 2, dtype=torch.int32), r"\[0, 2\] is not allowed"),
        (torch.zeros(4, 2), r"torch.float32 from 0.0 to 0.0 is not allowed; allowed: integers from -1 to 63"),
        (torch.full((4, 2), 64), r"from 64 to 64 is not allowed"),
        (torch.full((4, 2), -2), r"from -2 to -2 is not allowed"),
        ({"topk_ids": torch.zeros(4, 2)}, "dict is not allowed"),
        (Path("code"), "not a readable .npy or torch file"),
    ],
)
def test_read_routing_names_what_is_wrong(tmp_path: Path, saved: object, message: str) -> None:
    path = tmp_path / "ids.pt"
    torch.save(saved, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_routing(path, LAYER)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"nowhere\.npy: not a readable"):
        read_routing(tmp_path / "nowhere.npy", LAYER)


class Clock:
    """In place of time_rounds: each graph is its own time in µs, a round later all are slower by `drift`."""

    def __init__(self, drift: float = 1.0, noise: float = 0.0) -> None:
        self.rounds, self.drift, self.noise = 0, drift, noise

    def __call__(self, graphs: list[float], replays: int) -> list[Timing]:
        rounds = range(self.rounds, self.rounds + replays)
        self.rounds += replays
        return [
            Timing(tuple(us * self.drift**turn * (1 + self.noise * ((turn + index) % 2)) for turn in rounds))
            for index, us in enumerate(graphs)
        ]


def graphs(*us: float) -> list[CapturedCalls]:
    return list(us)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("us", "best", "status", "replays"), [(14.9, 10.0, "ok", 7), (15.1, 10.0, "slow", 3), (15.1, None, "ok", 7)]
)
def test_the_race(us: float, best: float | None, status: str, replays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(gpu, "time_rounds", clock)
    found = raced(graphs(us)[0], best, None)
    assert (found.status, found.us, clock.rounds) == (status, us, replays)


def test_an_anchor_takes_the_clock_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU slows down by 5 % a replay since the anchor took 100 µs; the config takes 1.2 times as long."""
    clock = Clock(drift=1.05)
    monkeypatch.setattr(gpu, "time_rounds", clock)
    clock([1.0], 20)
    found = raced(graphs(120.0)[0], 100.0, Anchor(graphs(100.0)[0], 100.0))
    assert found.status == "ok"
    assert found.us == pytest.approx(120.0)
    assert found.spread < 1e-9
    assert raced(graphs(160.0)[0], 100.0, Anchor(graphs(100.0)[0], 100.0)).status == "slow"
    drifted = raced(graphs(120.0)[0], None, None).us
    assert drifted is not None
    assert drifted > 240


def test_buckets_with_many_tokens_are_hot() -> None:
    assert not build(1).hot
    assert build(8192).hot


def test_finalists_are_compared_without_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(drift=1.05)
    monkeypatch.setattr(gpu, "time_rounds", clock)
    monkeypatch.setattr(gpu, "time_interleaved", lambda graphs, replays: clock(graphs, replays))
    slower, faster = compared([graphs(20.0), graphs(10.0)])
    assert slower.us is not None
    assert faster.us is not None
    assert slower.us / faster.us == pytest.approx(2)
    assert max(slower.spread, faster.spread) < 1e-9
    assert slower.apart == faster.apart == ()
    assert clock.rounds == gpu.FINAL_ROUNDS


def test_routings_are_compared_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config's time is the mean over its routings."""
    monkeypatch.setattr(gpu, "time_interleaved", lambda graphs, replays: Clock()(graphs, replays))
    found = compared([graphs(20.0, 40.0), graphs(21.0, 37.0)])
    assert [one.us for one in found] == [30.0, 29.0]
    assert [one.apart for one in found] == [(20.0, 40.0), (21.0, 37.0)]
    assert found[1].loses(found[0])
    assert not found[0].loses(found[0])
    assert not Measurement("ok", 50.0).loses(found[0])


@pytest.mark.parametrize("routings", [1, 2])
def test_a_graph_for_each_routing(routings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a config that has passed both checks, with every call in it."""
    order: list[int] = []
    checked: list[int] = []

    class Graph:
        def __init__(self, calls: list[Any], memory: object) -> None:
            assert memory is None
            self.outputs = [call() for call in calls]
            self.indices = [int(output) for output in self.outputs]

        def poison_outputs(self) -> None: ...

        replay = poison_outputs

    class Worker(GpuWorker):
        def __init__(self) -> None:
            self._calls = [SimpleNamespace(out=torch.zeros(()), index=index) for index in range(4)]
            self._memory = None

        def _run(self, call: Any, _: LayerTiles) -> torch.Tensor:
            order.append(call.index)
            out: torch.Tensor = call.out.fill_(call.index)
            return out

    class Checked(SimpleNamespace):
        def verify(self, output: torch.Tensor) -> None:
            checked.append(int(output))

    monkeypatch.setattr(gpu, "CapturedCalls", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    checks: Any = (Checked(), Checked())
    tile = TileConfig(16, 64, 64)
    bucket = Bucket(16, 2, False, routings, (), checks)
    found: Any = Worker()._captured_apart(bucket, LayerTiles(tile, tile))
    assert checked == [0, 0, 3]
    assert order[:5] == [0, 0, 1, 2, 3]
    assert [graph.indices for graph in found] == ([[0, 1, 2, 3]] if routings == 1 else [[0, 2], [1, 3]])


def test_noisy_finalists_are_replayed_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(noise=0.1)
    monkeypatch.setattr(gpu, "time_rounds", clock)
    monkeypatch.setattr(gpu, "time_interleaved", lambda graphs, replays: clock(graphs, replays))
    monkeypatch.setattr(gpu, "FINAL_LIMIT_S", 0.01)
    assert [found.status for found in compared([graphs(20.0), graphs(10.0)])] == ["ok", "ok"]
    assert clock.rounds > gpu.FINAL_ROUNDS


def test_without_drift_keeps_the_usual_time() -> None:
    first, second = without_drift([Timing((1.0, 2.0, 3.0)), Timing((3.0, 6.0, 9.0))])
    assert first.samples == pytest.approx((2.0, 2.0, 2.0))
    assert second.samples == pytest.approx((6.0, 6.0, 6.0))


def test_failures_have_a_class() -> None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from moegen.bench.measure import WrongResultError

    for error, status in (
        (WrongResultError("relative error 1"), "wrong"),
        (OutOfResources(300_000, 232_448, "shared memory"), "resources"),
        (OutOfResources(2048, 1024, "threads"), "resources"),
        (torch.OutOfMemoryError("CUDA out of memory."), "resources"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "resources"),
        (PTXASError("syntax error"), "compile"),
        (CompilationError(None, None, "bad"), "compile"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash"),
        (KeyError("x"), "crash"),
    ):
        assert status_of(error) == status, error
