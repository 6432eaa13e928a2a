"""The measurer's side of a GPU process, without a GPU: every way to fail is a measurement, and the next one is fine."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.client import GpuMeasurer, MeasurerError
from moegen.tune.compile_pool import CompilePool
from moegen.tune.trial import Measurement
from tests.support.misbehaviour import EXIT, HANG, ILLEGAL, KILLED, NOISY, RAISE, SEGFAULT, WRONG
from tests.support.tune_workers import H200

GPU = "tests.support.tune_workers:FakeGpu"
GOOD = LayerTiles(TileConfig(16, 64, 128), TileConfig(16, 128, 64))
WIDE = replace(GOOD, gemm1=replace(GOOD.gemm1, BLOCK_SIZE_N=256))


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    with CompilePool(1, worker="tests.support.tune_workers:NoCompiler", time_limit_s=30.0) as made:
        yield made


def measurer(pool: CompilePool, number: int = 0) -> GpuMeasurer:
    return GpuMeasurer(Path("/package"), "layer", number, pool, worker=GPU, time_limit_s=3.0)


@pytest.fixture
def fresh(pool: CompilePool) -> Iterator[GpuMeasurer]:
    with measurer(pool) as made:
        yield made


@pytest.fixture(scope="module")
def gpu(pool: CompilePool) -> Iterator[GpuMeasurer]:
    """One for many tests, which starts a process only after one was lost: each start takes seconds."""
    with measurer(pool) as made:
        yield made


def bad(kind: int) -> LayerTiles:
    return replace(GOOD, gemm1=replace(GOOD.gemm1, GROUP_SIZE_M=kind))


def process_of(measurement: Measurement) -> str:
    """The fake says which process it is."""
    assert measurement.status == "ok"
    return measurement.message.split()[0]


def test_it_measures_in_one_process(fresh: GpuMeasurer) -> None:
    assert fresh.device == H200
    fresh.prefetch(16, [GOOD, WIDE])
    first, second = fresh.measure(16, GOOD, None), fresh.measure(16, WIDE, 64.0)
    assert (first.us, second.us) == (64.0, 256.0)
    other = fresh.measure(4096, GOOD, None)
    assert process_of(first) == process_of(second) == process_of(other)
    usage = fresh.usage
    assert (dict(usage.statuses), usage.starts, usage.compiled) == ({"ok": 3}, 1, 3)
    assert min(usage.waiting_s, usage.preparing_s, usage.measuring_s) > 0


@pytest.mark.parametrize(
    ("kind", "status", "message", "replaced"),
    [
        (WRONG, "wrong", "relative error 1", False),
        (NOISY, "ok", None, False),
        (HANG, "timeout", "no answer within 3 s", True),
        (EXIT, "crash", "the process ended with exit code 3: no way out", True),
        (SEGFAULT, "crash", "the process was killed by SIGSEGV", True),
        (KILLED, "crash", "the process was killed by SIGKILL", True),
        (RAISE, "crash", "RuntimeError: first line", True),
        (ILLEGAL, "crash", "illegal memory access", True),
    ],
)
def test_a_failure_is_a_measurement(
    gpu: GpuMeasurer, kind: int, status: str, message: str | None, replaced: bool
) -> None:
    before, starts, counted = process_of(gpu.measure(16, GOOD, None)), gpu.usage.starts, gpu.usage.statuses[status]
    found = gpu.measure(16, bad(kind), None)
    assert found.status == status
    if message is not None:
        assert (found.us, found.message) == (None, message)
    after = process_of(gpu.measure(16, GOOD, None))
    assert (before != after) == replaced
    assert gpu.usage.starts == starts + replaced
    assert gpu.usage.statuses[status] > counted


def test_the_anchor_is_the_first_config_that_worked_in_whatever_process(fresh: GpuMeasurer) -> None:
    pairs = [(16, bad(WRONG)), (16, WIDE), (16, GOOD), (16, bad(EXIT)), (16, GOOD), (64, GOOD), (64, WIDE), (16, WIDE)]
    found = [fresh.measure(tokens, pair, None) for tokens, pair in pairs]
    anchors = [one.message.split()[1] for one in found if one.status == "ok"]
    assert anchors == ["None", "256", "256", "None", "64", "256"]


def test_a_bucket_is_set_up_while_its_first_config_compiles(fresh: GpuMeasurer) -> None:
    refused = replace(GOOD, gemm2=replace(GOOD.gemm2, num_stages=8))
    assert fresh.measure(16, refused, None).us is None
    before = fresh.usage.preparing_s
    assert fresh.measure(16, GOOD, None).us == 64.0
    assert fresh.usage.preparing_s == before


def test_what_does_not_compile_never_reaches_the_gpu(fresh: GpuMeasurer) -> None:
    refused = replace(GOOD, gemm2=replace(GOOD.gemm2, num_stages=8))
    found = fresh.measure(16, refused, None)
    assert found == Measurement("resources", message="gemm2: too large")
    assert fresh.usage.measuring_s == 0
    assert [result.status for result in fresh.compare(16, [GOOD, refused, GOOD])] == ["ok", "resources", "ok"]


@pytest.mark.parametrize(("kind", "status"), [(HANG, "timeout"), (EXIT, "crash"), (ILLEGAL, "crash"), (WRONG, "wrong")])
def test_one_bad_finalist_takes_no_other_along(gpu: GpuMeasurer, kind: int, status: str) -> None:
    found = gpu.compare(16, [GOOD, bad(kind), WIDE])
    assert [result.status for result in found] == ["ok", status, "ok"]
    assert (found[0].us, found[2].us) == (64.0, 256.0)


def test_a_bucket_that_cannot_be_set_up_is_nobodys_fault(gpu: GpuMeasurer) -> None:
    with pytest.raises(MeasurerError, match=r"^layer on GPU 0: .*tokens=0.*: MemoryError: one weight copy needs"):
        gpu.measure(0, GOOD, None)
    assert gpu.measure(16, GOOD, None).us == 64.0


def test_a_gpu_that_does_not_start_is_named(pool: CompilePool) -> None:
    with (
        GpuMeasurer(Path("/package"), "cannot start", 3, pool, worker=GPU) as gpu,
        pytest.raises(MeasurerError, match=r"cannot start on GPU 3: .*no CUDA-capable device is detected"),
    ):
        _ = gpu.device
    assert gpu.usage.starts == 2


def test_gpus_share_a_pool_from_threads_of_their_own(pool: CompilePool) -> None:
    found: dict[int, list[float | None]] = {}

    def work(number: int) -> None:
        with measurer(pool, number) as gpu:
            tiles = [GOOD, bad(KILLED + 100 + number), bad(EXIT), WIDE]
            gpu.prefetch(number + 1, tiles)
            found[number] = [gpu.measure(number + 1, pair, None).us for pair in tiles]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [64.0, 64.0, None, 256.0] for number in range(3)}
