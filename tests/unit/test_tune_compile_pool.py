"""The compile pool: a job is done once, a bad compiler fails one job, and what is compiled is what is launched."""

import itertools
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moegen.aot import Compiled
from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.child import Child
from moegen.tune.compile_pool import CompilePool, Job, failure_of, jobs_of
from moegen.tune.trial import NEXT, PERHAPS, SOON
from tests.support.misbehaviour import EXIT, HANG, KILLED, NOISY, RAISE, SEGFAULT
from tests.support.packages import spec_of
from tests.support.tune_workers import H200

FAKE = "tests.support.tune_workers:FakeCompiler"
GOOD = LayerTiles(TileConfig(16, 64, 128), TileConfig(16, 128, 64, PDL=True))


def bad(kind: int) -> LayerTiles:
    return replace(GOOD, gemm1=replace(GOOD.gemm1, GROUP_SIZE_M=kind))


def jobs(tiles: LayerTiles = GOOD, tokens: int = 1) -> list[Job]:
    return jobs_of(Path("/package"), "layer", H200, tokens, tiles)


@pytest.fixture(scope="module")
def fake() -> Iterator[CompilePool]:
    with CompilePool(2, worker=FAKE, time_limit_s=3.0) as pool:
        yield pool


def test_a_candidate_has_jobs_in_common_with_others() -> None:
    others, gemm1, gemm2 = jobs()
    assert [job.op for job in (others, gemm1, gemm2)] == ["others", "gemm1", "gemm2"]
    other = LayerTiles(replace(GOOD.gemm1, BLOCK_SIZE_N=128), replace(GOOD.gemm2, num_warps=8))
    assert jobs(other)[0] == others
    assert jobs(replace(GOOD, gemm1=other.gemm1))[2] == gemm2
    assert jobs(replace(GOOD, gemm2=other.gemm2))[1] == gemm1
    assert jobs(replace(GOOD, gemm1=replace(GOOD.gemm1, PDL=True)))[0] != others


def test_every_kernel_belongs_to_one_job() -> None:
    for kernel in ("gemm1", "gemm2", "align_kernel", "top_k_reduce_kernel", "_quantise_groups"):
        assert sum(job.wants(kernel) for job in jobs()) == 1


def test_a_job_is_done_once(fake: CompilePool) -> None:
    before = fake.compiled
    first = [fake.submit(job) for job in jobs(tokens=7)]
    assert [fake.submit(job) for job in jobs(tokens=7)] == first
    assert [future.result(30).failure for future in first] == [None] * 3
    assert fake.compiled == before + 3
    assert fake.compiler_s >= 1.5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (HANG, r"^gemm1: compiler: no answer within 3 s$"),
        (RAISE, r"^gemm1: compiler: RuntimeError: first line$"),
        (EXIT, r"^gemm1: compiler: the process ended with exit code 3: no way out$"),
        (SEGFAULT, r"^gemm1: compiler: the process was killed by SIGSEGV$"),
        (KILLED, r"^gemm1: compiler: the process was killed by SIGKILL$"),
    ],
)
def test_a_bad_compiler_fails_the_guilty_job_alone(fake: CompilePool, kind: int, message: str) -> None:
    guilty = fake.submit(jobs(bad(kind))[1])
    innocent = [fake.submit(job) for tokens in range(100, 130) for job in jobs(tokens=tokens)]
    failure = guilty.result(30).failure
    assert failure is not None
    assert failure.status == "compile"
    assert re.search(message, failure.message)
    assert all(future.result(30).failure is None for future in innocent)


def test_a_failure_holds_for_all_token_counts(fake: CompilePool) -> None:
    first = fake.submit(jobs(bad(RAISE), 1)[1]).result(30)
    began = time.perf_counter()
    assert [fake.submit(jobs(bad(RAISE), tokens)[1]).result(30) for tokens in (2, 4096)] == [first, first]
    assert time.perf_counter() - began < 0.5


def test_noise_on_stdout_is_no_failure(fake: CompilePool) -> None:
    assert fake.submit(jobs(bad(NOISY))[1]).result(30).failure is None


SLOW = "tests.support.tune_workers:SlowCompiler"


def test_the_lowest_rank_is_compiled_first() -> None:
    with CompilePool(1, worker=SLOW) as pool:
        busy = pool.submit(jobs()[1])
        while not busy.running():
            time.sleep(0.01)
        ranks = (PERHAPS, NEXT, SOON, PERHAPS, NEXT)
        waiting = [pool.submit(jobs(bad(10 + index))[1], rank) for index, rank in enumerate(ranks)]
        assert pool.submit(jobs(bad(13))[1], SOON) is waiting[3]  # what is wanted sooner goes up,
        assert pool.submit(jobs(bad(11))[1], PERHAPS) is waiting[1]  # and never down
        ended = [future.result(30).seconds for future in waiting]
    assert sorted(range(len(ranks)), key=ended.__getitem__) == [2, 3, 1, 4, 0]


def wake(pool: CompilePool) -> None:
    """Until all workers of SLOW have worked at the same time: a process takes longer to start than a job."""
    for first in itertools.count(10, pool.workers):
        futures = [pool.submit(jobs(bad(first + number))[1]) for number in range(pool.workers)]
        found = [future.result(30) for future in futures]
        if max(done.compiled for done in found) / 1e6 < min(done.seconds for done in found):
            return


def test_jobs_of_other_token_counts_wait_for_each_other_alone() -> None:
    """The first one's kernels are in the cache when the second one begins."""
    with CompilePool(3, worker=SLOW) as pool:
        wake(pool)
        alike = [pool.submit(jobs(tokens=tokens)[1]) for tokens in (1, 16, 64)]
        other = pool.submit(jobs()[2]).result(30)
        found = sorted((future.result(30) for future in alike), key=lambda done: done.seconds)
    for one, following in itertools.pairwise(found):
        assert following.compiled / 1e6 >= one.seconds
    assert other.compiled < found[1].compiled


def test_threads_share_it(fake: CompilePool) -> None:
    results: list[Any] = []

    def ask(base: int) -> None:
        results.extend(fake.submit(job).result(30) for tokens in range(base, base + 20) for job in jobs(tokens=tokens))

    threads = [threading.Thread(target=ask, args=(1000 + 10 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 240
    assert all(result.failure is None for result in results)


def test_closing_waits_for_nothing() -> None:
    pool = CompilePool(1, worker=FAKE)
    pool.submit(jobs()[0]).result(30)
    hanging = pool.submit(jobs(bad(HANG))[1])
    waiting = pool.submit(jobs(tokens=2)[0])
    while not hanging.running():
        time.sleep(0.01)
    began = time.perf_counter()
    pool.close()
    assert time.perf_counter() - began < 5
    failure = hanging.result(0).failure
    assert failure is not None
    assert "SIGKILL" in failure.message
    with pytest.raises(CancelledError):
        waiting.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(jobs(tokens=3)[0])


def compiled(**fields: Any) -> Compiled:
    return Compiled("cuda:90", "layer", "gemm1", 1, "", **fields)


def test_failures_have_a_class() -> None:
    assert failure_of([compiled(shared_memory=232_448), compiled()], H200) is None
    found = failure_of([compiled(), compiled(shared_memory=232_449)], H200)
    assert found is not None
    assert (found.status, found.us) == ("resources", None)
    assert "232449 bytes of shared memory, 232448 are there" in found.message
    for error, status in (
        ("CompilationError: at 1:1: bad", "compile"),
        ("RuntimeError: PassManager::run failed", "compile"),
        ("PTXASError: uses too much shared data (0x40000 bytes, 0x38c00 max)", "resources"),
        ("OutOfResources: out of resource: shared memory", "resources"),
    ):
        found = failure_of([compiled(error=error)], H200)
        assert found is not None
        assert (found.status, found.message) == (status, f"gemm1: {error}")


@pytest.mark.parametrize("quant", ["fp8_w8a8:128x128", "int4_w4a16:g128z"])  # with quantisers, and decoded weights
def test_what_is_compiled_ahead_is_what_is_launched(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch on real tensors finds every kernel in the cache that the pool filled from meta tensors."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    fields = {"num_experts": 16, "top_k": 2, "hidden_size": 256, "intermediate_size": 256}
    folder = emit(make_plan(spec_of(quant=(quant,), **fields)), tmp_path)  # type: ignore[arg-type]
    (layer,) = import_package(folder).LAYERS
    launcher = Child("tests.support.tune_workers:StubGpu", folder, layer.slug)
    with CompilePool(1) as pool:
        for tokens in (1, 3, 64):  # low latency, unaligned parts of the assignment, aligned ones
            gemms = layer.gemm("gemm1"), layer.gemm("gemm2")
            tiles = default_tiles(*gemms, tokens, H200, tokens == 1, portable=True)
            jobs_ = reversed(jobs_of(folder, layer.slug, H200, tokens, tiles))  # not in the order of the launches
            results = [pool.submit(job).result(60) for job in jobs_]
            assert [result.failure for result in results] == [None] * 3
            assert {"gemm1", "gemm2"} <= {kernel.kernel for result in results for kernel in result.kernels}
            assert launcher.call((tokens, tiles), 60) == []
        assert pool.compiled > 0
        new = LayerTiles(replace(tiles.gemm1, GROUP_SIZE_M=3), tiles.gemm2)
        assert launcher.call((64, new), 60) == ["gemm1"], "the stub would not notice a kernel that is not there"
    launcher.stop()
