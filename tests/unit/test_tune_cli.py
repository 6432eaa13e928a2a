"""`moegen tune` from end to end, on recorded sweeps and on a made-up GPU: results, resume, limits, exit codes."""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from moegen import cli
from moegen.emit import emit
from moegen.interop import vllm
from moegen.interop.table import entry, read_table
from moegen.plan import make_plan
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune import progress, report, run, session, sources, workers
from moegen.tune.client import GpuMeasurer
from moegen.tune.fingerprint import spec_of
from moegen.tune.progress import Progress, State
from moegen.tune.record import load_record, record_text
from moegen.tune.replay import Replay
from moegen.tune.space import Kind
from moegen.tune.trial import NEXT, PERHAPS, SOON, Measurement
from tests.support.records import LAYER, record
from tests.support.sweeps import write_sweeps

TOKENS = (1, 16, 64)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.unit.test_tune_cli"])  # or each start would take the seconds of its imports
NAME = record().name
VLLM_NAME = "E=128,N=768,device_name=NVIDIA_H200.json"


@pytest.fixture(scope="session")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "sweeps"
    write_sweeps(folder, LAYER, TOKENS)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return emit(make_plan(spec_of(LAYER)), tmp_path / "out")


@pytest.fixture
def tune(sweeps: Path, package: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`tune(option, ...)`: exit code, output and messages of a quick run on the sweeps."""

    def call(*options: object) -> tuple[int, str, str]:
        words = ["tune", package, "--replay", sweeps, "--effort", "quick", *options]
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def expected(sweeps: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The record of a run that nothing disturbed."""
    package = emit(make_plan(spec_of(LAYER)), tmp_path_factory.mktemp("undisturbed"))
    assert cli.main(["tune", str(package), "--replay", str(sweeps), "--effort", "quick", "-q"]) == 0
    return (package / "configs" / NAME).read_text()


def _tune(words: list[str]) -> None:
    os._exit(cli.main(words))


def document(result: tuple[int, str, str], code: int = 0) -> dict[str, Any]:
    assert result[0] == code, result
    found: dict[str, Any] = json.loads(result[1])
    return found


# --------------------------------------------------------------------------------------------------------- end to end


def test_what_buckets_begin_with_is_announced_before_anything_is_measured(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it compiles where compilers have time, and no bucket waits for its first batches."""
    seen: list[tuple[int, int]] = []

    def prefetch(_: Replay, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:
        assert candidates
        seen.append((rank, tokens))

    monkeypatch.setattr(Replay, "prefetch", prefetch)
    assert tune()[0] == 0
    early = [(rank, tokens) for rank in (NEXT, PERHAPS) for tokens in TOKENS]
    assert seen[: len(early)] == early
    assert {rank for rank, _ in seen[len(early) :]} == {SOON}


def test_what_is_done_is_not_announced(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    assert tune("--buckets", "1,64")[0] == 0
    monkeypatch.setattr(Replay, "prefetch", lambda _, tokens, *__: seen.append(tokens))
    assert tune()[0] == 0
    assert set(seen) == {16}


def test_end_to_end(tune: Any, package: Path, expected: str, tmp_path: Path, capsys: Any) -> None:
    """Tune, check, show, export, import; and again, at once."""
    code, text, messages = tune()
    assert code == 0
    path = package / "configs" / NAME
    assert path.read_text() == expected
    assert f"result: {path}" in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows[: len(TOKENS)]] == ["1", "16", "64"]
    assert all(float(row[3]) == pytest.approx(float(row[1]) / float(row[2]), rel=0.01) for row in rows[: len(TOKENS)])
    head = [
        "E 128, top_k 8, H 2048, I 768, bfloat16, none, silu",
        "NVIDIA H200",
        "T=16 ",
        "60 measurements",
        "a new run",
    ]
    assert [words for words in head if words not in messages] == []

    assert cli.main(["check", str(package)]) == 0
    assert cli.main(["show", str(package)]) == 0
    assert f"{NAME}: 3 token counts from 1 to 64" in capsys.readouterr().out

    again = document(tune("--json"))
    assert (again["measured"], again["files"]) == (0, [str(path)])
    assert path.read_text() == expected

    assert cli.main(["export", str(package), "--format", "vllm", "-o", str(tmp_path / "vllm")]) == 0
    other = emit(make_plan(spec_of(LAYER)), tmp_path / "other")
    assert cli.main(["import", str(tmp_path / "vllm" / VLLM_NAME), str(other)]) == 0
    assert list(load_record(other / "configs" / NAME).buckets) == list(TOKENS)
    assert cli.main(["check", str(other)]) == 0


def test_the_result_beats_the_default(expected: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(expected)
    for bucket in load_record(path).buckets.values():
        assert bucket.gain is not None
        assert bucket.gain > 1.5
        assert bucket.tried is not None
        assert 20 < bucket.tried <= 60
        assert (bucket.effort, bucket.routing, bucket.triton) == ("quick", "replay of sweeps", "3.6.0")


def test_json(tune: Any, package: Path) -> None:
    found = document(tune("--json"))
    assert (found["package"], found["gpu"], found["effort"], found["seed"]) == (str(package), "NVIDIA H200", "quick", 0)
    assert [(bucket["layer"], bucket["tokens"], bucket["complete"]) for bucket in found["buckets"]] == [
        (LAYER.slug, tokens, True) for tokens in TOKENS
    ]
    assert found["measured"] == sum(bucket["tried"] for bucket in found["buckets"])
    assert found["per_minute"] == pytest.approx(60 * found["measured"] / found["wall_s"], rel=0.02)


def test_a_model_is_built_first(sweeps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And built again by the next command, which keeps the record."""
    monkeypatch.chdir(tmp_path)
    words = ["tune", "--model", "qwen3-30b-a3b", "--replay", str(sweeps), "--effort", "quick", "-q", "--buckets", "16"]
    assert cli.main(words) == 0
    path = tmp_path / "out" / "moe_qwen3_30b_a3b" / "configs" / NAME
    first = path.read_text()
    assert cli.main([*words[:-1], "64"]) == 0
    assert list(load_record(path).buckets) == [16, 64]
    assert first.split('"16"')[1].split("\n    }")[0] in path.read_text()


def test_options_of_a_spec_do_not_fit_a_package(tune: Any) -> None:
    code, _, message = tune("--tp", "2")
    assert (code, "is built already" in message) == (3, True)


def test_out(tune: Any, expected: str, tmp_path: Path) -> None:
    found = document(tune("--json", "--out", tmp_path / "published"))
    path = tmp_path / "published" / NAME
    assert path.read_text() == expected
    assert str(path) in found["files"]


def test_quiet(tune: Any) -> None:
    code, text, messages = tune("-q")
    assert (code, messages) == (0, "")
    assert "default µs" in text


# ------------------------------------------------------------------------------------------------- resume and forget


class Stop:
    """Replay.measure that does something at the given measurement."""

    def __init__(self, at: int, act: Callable[[], Any]) -> None:
        self.at, self.act, self.count, self.measure = at, act, 0, Replay.measure

    def __get__(self, replay: Replay, _: type[Replay]) -> Callable[..., Measurement]:
        def measure(*arguments: Any) -> Measurement:
            self.count += 1
            if self.count == self.at:
                self.act()
            return self.measure(replay, *arguments)

        return measure


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 30, 100])
def test_ctrl_c(at: int, tune: Any, package: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is kept, and the same command goes on and ends as if nothing had happened."""
    whole = 0
    with monkeypatch.context() as patch:
        stop = Stop(at, interrupt)
        patch.setattr(Replay, "measure", stop)
        code, text, message = tune()
        assert (code, text) == (130, "")
        assert f"{package}.journal" in message
        assert "the same command goes on" in message
    counter = Stop(-1, interrupt)
    monkeypatch.setattr(Replay, "measure", counter)
    found = document(tune("--json"))
    whole = sum(bucket["tried"] for bucket in found["buckets"])
    assert counter.count == found["measured"] == whole - (at - 1)
    assert (package / "configs" / NAME).read_text() == expected


def test_what_another_command_left_is_not_done(tune: Any, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption, a command for one bucket does that one, and the first command all that is left."""
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "measure", Stop(10, interrupt))
        assert tune()[0] == 130
    assert [bucket["tokens"] for bucket in document(tune("--json", "--buckets", "64"))["buckets"]] == [64]
    assert list(load_record(package / "configs" / NAME).buckets) == [64]
    assert len(document(tune("--json"))["buckets"]) == 3
    assert list(load_record(package / "configs" / NAME).buckets) == list(TOKENS)


def test_two_at_once(sweeps: Path, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They share the buckets, and the record has all of them."""
    words = ["tune", str(package), "--replay", str(sweeps), "--effort", "standard", "-q", "--json"]
    processes = [CONTEXT.Process(target=_tune, args=(words,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert list(load_record(package / "configs" / NAME).buckets) == list(TOKENS)
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 0


def test_it_says_that_it_goes_on(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "measure", Stop(70, interrupt))
        tune()
    assert "1 of 3 buckets done, 69 measurements known: going on" in tune()[2]


def test_fresh(tune: Any, package: Path, expected: str) -> None:
    first = document(tune("--json"))
    (package / "configs" / NAME).unlink()
    again = document(tune("--json", "--fresh"))
    assert again["measured"] == first["measured"] > 0
    assert (package / "configs" / NAME).read_text() == expected


def test_fresh_after_an_interruption(tune: Any, package: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that the queue has as done is done anew as well."""
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "measure", Stop(100, interrupt))
        assert tune()[0] == 130
    (package / "configs" / NAME).unlink()
    assert document(tune("--json", "--fresh"))["measured"] > 150
    assert (package / "configs" / NAME).read_text() == expected


def test_a_lost_record_comes_back_from_the_journal(tune: Any, package: Path, expected: str) -> None:
    tune()
    (package / "configs" / NAME).unlink()
    assert document(tune("--json"))["measured"] == 0
    assert (package / "configs" / NAME).read_text() == expected


@pytest.mark.parametrize("option", [("--seed", 1), ("--effort", "standard")])
def test_another_search_is_another_run(option: tuple[str, object], tune: Any) -> None:
    """A different seed measures anew; a higher effort goes on from what is known."""
    first = document(tune("--json"))["measured"]
    found = document(tune("--json", *option))
    tried = sum(bucket["tried"] for bucket in found["buckets"])
    assert found["measured"] > 0
    if option[0] == "--seed":
        assert found["measured"] == tried
    else:
        assert found["measured"] < tried
        assert tried > first


def test_other_kernels_are_measured_anew(tune: Any, package: Path) -> None:
    """A time of kernels that have changed since is no time of these."""
    first = document(tune("--json"))["measured"]
    parts = package / "runtime" / "kernel_parts.py"
    parts.write_text(parts.read_text() + "\n\n@triton.jit\ndef more(x):\n    return x\n")
    assert document(tune("--json"))["measured"] == pytest.approx(first, rel=0.1)


def test_kill_9(sweeps: Path, package: Path, expected: str) -> None:
    """The whole command, killed at random moments: every restart gets on, and the record is the same at last."""
    moments = random.Random(5)  # noqa: S311 - no secret
    words = ["tune", str(package), "--replay", str(sweeps), "--effort", "quick", "-q", "--json"]
    codes: list[int | None] = []
    while 0 not in codes and len(codes) < 100:
        process = CONTEXT.Process(target=_tune, args=(words,))
        process.start()
        process.join(moments.uniform(0.05, 0.5) * 1.05 ** len(codes))  # longer and longer, for slow machines
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert (package / "configs" / NAME).read_text() == expected
    assert load_record(package / "configs" / NAME)


# --------------------------------------------------------------------------------------------------- limits and starts


def test_time_limit(tune: Any, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bucket gets its share; what was cut short says so, is used, and is finished by the next run."""
    clock = [0.0]

    def tick() -> None:
        clock[0] += 1.0

    class Ticking(Stop):
        def __get__(self, replay: Replay, kind: type[Replay]) -> Callable[..., Measurement]:
            tick()
            return super().__get__(replay, kind)

    with monkeypatch.context() as patch:
        patch.setattr(session.time, "monotonic", lambda: clock[0])
        patch.setattr(Replay, "measure", Ticking(-1, tick))
        found = document(tune("--json", "--time-limit", 75))
    assert [bucket["complete"] for bucket in found["buckets"]] == [False, False, False]
    assert all(15 <= bucket["tried"] <= 45 for bucket in found["buckets"]), found
    assert list(load_record(package / "configs" / NAME).buckets) == list(TOKENS)

    cut = load_record(package / "configs" / NAME).buckets
    code, text, _ = tune()
    assert (code, "cut short" in text) == (0, False)
    whole = load_record(package / "configs" / NAME).buckets
    assert all((whole[t].us or 0) <= (cut[t].us or 0) and (whole[t].tried or 0) > (cut[t].tried or 0) for t in TOKENS)


def test_no_time_at_all(tune: Any, package: Path) -> None:
    code, text, _ = tune("--time-limit", "0.000001")
    assert (code, text.count("not done yet")) == (0, 3)
    assert not (package / "configs" / NAME).exists()


def test_warm_files_are_measured_first(
    tune: Any, sweeps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the GPU in the name; and the winner of the bucket before is among the first ones of the next."""
    source = sources.ReplaySource(sweeps)
    tile = next(
        tile for tile in reversed(source.space(LAYER, 64).gemm1[Kind("portable", 16)].tiles) if not tile.SWAP_AB
    )
    path = tmp_path / VLLM_NAME.replace("H200", "H20-3e")
    path.write_text(json.dumps({"8": entry(tile)}))
    seen: dict[int, list[LayerTiles]] = {}
    measure = Replay.measure

    def spying(replay: Replay, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        seen.setdefault(tokens, []).append(tiles)
        return measure(replay, tokens, tiles, best_us)

    monkeypatch.setattr(Replay, "measure", spying)
    found = document(tune("--json", "--warm", path))
    pair = LayerTiles(replace(tile, PDL=True), replace(tile, PDL=True))
    warm = {tokens: session.snapped(source.space(LAYER, tokens), pair) for tokens in TOKENS}
    assert warm[64] is not None
    assert all(pair in seen[tokens][:5] for tokens, pair in warm.items() if pair is not None)
    winners = {tokens: bucket.tiles for tokens, bucket in load_record(Path(found["files"][0])).buckets.items()}
    near = session.snapped(source.space(LAYER, 64), winners[16])
    assert near is None or near in seen[64][:5]


def test_fields_that_do_not_vary_are_no_reason_to_ignore_a_start(sweeps: Path) -> None:
    """GROUP_SIZE_M counts only where experts have many slots; a foreign file has some value everywhere."""
    space = sources.ReplaySource(sweeps).space(LAYER, 16)
    first, second = space.gemm1[Kind("portable", 16)].tiles[7], space.gemm2[Kind("portable", 16)].tiles[3]
    foreign = LayerTiles(replace(first, GROUP_SIZE_M=33), replace(second, GROUP_SIZE_M=65))
    assert foreign not in space
    assert session.snapped(space, foreign) == LayerTiles(first, second)
    assert session.snapped(space, LayerTiles(replace(first, num_stages=7), second)) is None
    assert session.snapped(space, LayerTiles(*(replace(first, BLOCK_SIZE_M=512),) * 2)) is None


def test_the_record_is_a_start_as_well(tune: Any, package: Path) -> None:
    """A better config that was found earlier cannot get lost by tuning again with less effort."""
    tune("--effort", "standard")
    before = load_record(package / "configs" / NAME)
    tune("--effort", "quick", "--seed", 3)
    after = load_record(package / "configs" / NAME)
    assert all((after.buckets[t].gain or 0) >= (before.buckets[t].gain or 0) * 0.999 for t in TOKENS)


def test_one_bucket_and_one_layer(tune: Any) -> None:
    found = document(tune("--json", "--buckets", "2-16", "--layer", LAYER.slug))
    assert [bucket["tokens"] for bucket in found["buckets"]] == [16]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", (16,)),
        ("1-64", (1, 2, 4, 8, 16, 24, 32, 48, 64)),
        ("64,1,5", (1, 5, 64)),
        ("40-100,96", (48, 64, 96)),
        ("4096-70000", (4096, 8192, 16384, 32768, 65536)),
    ],
)
def test_buckets(text: str, expected: tuple[int, ...]) -> None:
    assert run.buckets(text) == expected


USAGE = [
    ("--buckets", ""),
    ("--buckets", "0"),
    ("--buckets", "-4"),
    ("--buckets", "5-7"),
    ("--buckets", "64-1"),
    ("--buckets", "1,x"),
    ("--buckets", "99999999"),
    ("--time-limit", "0"),
    ("--time-limit", "nan"),
    ("--time-limit", "inf"),
    ("--gpus", "0,0"),
    ("--gpus", "-1"),
    ("--gpus", "one"),
    ("--effort", "heroic"),
    ("--jobs", "0"),
    ("--seed", "x"),
]


@pytest.mark.parametrize("option", USAGE, ids=" ".join)
def test_usage(option: tuple[str, str], package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", str(package), f"{option[0]}={option[1]}"])
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- what can fail


def test_no_gpu(package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["tune", str(package)]) == 4
    text, message = capsys.readouterr()
    assert (text, "no CUDA or HIP device" in message, "--replay" in message) == ("", True, True)
    assert not Path(f"{package}.journal").exists()


def test_no_such_gpu(package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(["tune", str(package), "--gpus", "1,5"]) == 4
    assert "--gpus 5: this machine has the GPUs 0 to 1" in capsys.readouterr().err


def test_nothing_runs(tune: Any, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "true", lambda *_: Measurement("timeout", message="no answer within 30 s"))
    code, text, messages = tune()
    assert code == 6
    assert "timeout" in text
    assert messages.count("no pair of tile configs could be timed") == len(TOKENS)
    assert not (package / "configs" / NAME).exists()


def test_a_failed_bucket_does_not_stop_the_others(tune: Any, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Replay.true

    def failing(replay: Replay, tokens: int, tiles: LayerTiles) -> Measurement:
        return Measurement("crash", message="killed by SIGSEGV") if tokens == 16 else true(replay, tokens, tiles)

    monkeypatch.setattr(Replay, "true", failing)
    found = document(tune("--json"))
    assert [bucket["reason"] == "" for bucket in found["buckets"]] == [True, False, True]
    assert list(load_record(package / "configs" / NAME).buckets) == [1, 64]


def test_wrong_results_are_named(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes something else is a fault of the compiler or of a kernel, which a count does not find."""
    true = Replay.true

    def failing(replay: Replay, tokens: int, tiles: LayerTiles) -> Measurement:
        bad = tokens == 16 and tiles.gemm1.num_stages == 5
        return Measurement("wrong", message="relative error 1") if bad else true(replay, tokens, tiles)

    monkeypatch.setattr(Replay, "true", failing)
    found = document(tune("--json"))
    counts = {bucket["tokens"]: len(bucket["wrong"]) for bucket in found["buckets"]}
    assert counts == {1: 0, 16: found["buckets"][1]["failures"]["wrong"], 64: 0}
    assert {one["tiles"][0]["num_stages"] for one in found["buckets"][1]["wrong"]} == {5}
    text = tune()[1]  # what the journal knows
    assert text.count("T=16 wrong, not used: relative error 1: [{'BLOCK_SIZE_M'") == counts[16] > 0


def test_a_broken_record_is_found_before_the_work(tune: Any, package: Path) -> None:
    path = package / "configs" / NAME
    path.parent.mkdir(parents=True)
    path.write_text("{")
    code, text, message = tune()
    assert (code, text) == (3, "")
    assert str(path) in message
    assert path.read_text() == "{"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--layer", "absent"), LAYER.slug),
        (("--buckets", "4096"), "no sweep"),
        (("--warm", "absent.json"), "absent.json"),
        (("--routing", "absent.npy"), "absent.npy"),
        (("--storage", "nonsense://host/db"), "--storage nonsense://host/db"),
        (("--storage", "nonsense://me:secret@host/db"), "--storage nonsense://me:***@host/db"),
        (("--storage", "/"), "--storage /"),
    ],
)
def test_invalid_input(options: tuple[str, str], shown: str, tune: Any) -> None:
    code, text, message = tune(*options)
    assert (code, text) == (3, "")
    assert shown in message


@pytest.mark.skipif(find_spec("psycopg") is not None, reason="the driver of PostgreSQL is installed")
def test_a_database_without_its_driver(tune: Any) -> None:
    code, text, message = tune("--storage", "postgresql://host/db")
    assert (code, text) == (3, "")
    assert message.endswith("pip install 'moegen[postgresql]' brings it.\n")


@pytest.mark.parametrize("content", [None, "not a sweep", "two GPUs"])
def test_a_folder_without_sweeps(content: str | None, package: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    if content == "not a sweep":
        (folder / "x.csv.gz").write_text("plain")
    elif content is not None:
        write_sweeps(folder, LAYER, (1,))
        (folder / "other").mkdir()
        write_sweeps(folder / "other", LAYER, (2,), triton="3.7.1")
        (file,) = (folder / "other").iterdir()
        file.rename(folder / file.name)
    assert cli.main(["tune", str(package), "--replay", str(folder)]) == 3
    assert str(folder) in capsys.readouterr().err


def test_not_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- a GPU, made up


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU whose process answers without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sources.GpuSource, "worker", "tests.support.tune_workers:FakeGpu")
    monkeypatch.setattr(sources.GpuSource, "compiler", "tests.support.tune_workers:NoCompiler")


@pytest.mark.usefixtures("fake_gpu")
def test_on_a_gpu(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fake takes BLOCK_SIZE_N µs of gemm1, and configs of 8 stages do not fit."""
    words = ["tune", str(package), "--buckets", "16,64", "--effort", "quick", "--jobs", "1", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["processes_lost"] == 0
    assert found["measured"] > 40
    assert 0 < found["waiting_for_compiler"] < 1
    assert (found["compilers"], found["compiled"]) == (1, 0)
    assert found["compiler_s"] == 0
    assert found["per_minute"] > 0
    buckets = load_record(package / "configs" / NAME).buckets
    assert {tokens: bucket.tiles.gemm1.BLOCK_SIZE_N for tokens, bucket in buckets.items()} == {16: 32, 64: 32}
    assert {(bucket.routing, bucket.torch) for bucket in buckets.values()} == {
        ("balanced+power_law", torch.__version__.split("+")[0])
    }
    assert Counter(f for b in found["buckets"] for f in b["failures"]) <= Counter(resources=2)
    assert cli.main([*words, "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 0


@pytest.mark.usefixtures("fake_gpu")
def test_two_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process with the GPU for each layer, and not one for each bucket."""
    made: list[str] = []

    def counting(package: Path, slug: str, *rest: Any, **options: Any) -> GpuMeasurer:
        made.append(slug)
        return GpuMeasurer(package, slug, *rest, **options)

    monkeypatch.setattr(sources, "GpuMeasurer", counting)
    spec = replace(spec_of(LAYER), name="two", dtypes=("bfloat16", "float16"))
    folder = emit(make_plan(spec), tmp_path)
    assert cli.main(["tune", str(folder), "--buckets", "1-4", "--effort", "quick", "--jobs", "1", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(bucket["layer"], bucket["tokens"]) for bucket in found["buckets"]] == [
        (variant.slug, tokens) for variant in spec.variants() for tokens in (1, 2, 4)
    ]
    assert made == [variant.slug for variant in spec.variants()]
    assert len(found["files"]) == 2


@pytest.mark.usefixtures("fake_gpu")
def test_routing_file(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times under another routing are other times."""
    import numpy

    words = ["tune", str(package), "--buckets", "16", "--effort", "quick", "--jobs", "1", "--json", "-q"]
    assert cli.main(words) == 0
    first = json.loads(capsys.readouterr().out)["measured"]
    path = tmp_path / "ids.npy"
    numpy.save(path, numpy.zeros((100, 8), dtype=numpy.int32))
    assert cli.main([*words, "--routing", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] >= first - 2
    assert load_record(package / "configs" / NAME).buckets[16].routing.startswith("ids.npy ")
    numpy.save(path, numpy.full((100, 8), 128, dtype=numpy.int32))
    assert cli.main([*words, "--routing", str(path)]) == 3
    assert "-1 to 127" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_gpu")
def test_a_gpu_that_cannot_start(package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is too old for the layer, say: no bucket is begun."""

    def cannot(package: Path, _: str, *rest: Any, **options: Any) -> GpuMeasurer:
        return GpuMeasurer(package, "cannot start", *rest, **options)

    monkeypatch.setattr(sources, "GpuMeasurer", cannot)
    assert cli.main(["tune", str(package), "--jobs", "1"]) == 4
    assert "no CUDA-capable device is detected" in capsys.readouterr().err
    assert not (package / "configs").exists()


# -------------------------------------------------------------------------------------------------------- several GPUs


def test_workers_are_whole_commands(package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU each of them says so, and the whole has their exit code."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(["tune", str(package), "--gpus", "all", "--buckets", "1", "-q"]) == 4
    messages = capsys.readouterr().err
    assert [
        f"GPU {gpu}: moegen tune: no CUDA" for gpu in (0, 1) if f"GPU {gpu}: moegen tune: no CUDA" not in messages
    ] == []


def bucket(tokens: int, us: float | None, *, complete: bool = True, reason: str = "") -> dict[str, Any]:
    times = {} if us is None else {"us": us, "default_us": 60.0, "spread": 0.01, "tried": 50, "failures": {}}
    return {"layer": "layer", "tokens": tokens, **times, "complete": complete, "reason": reason}


def made(*buckets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "gpu": "NVIDIA H200",
        "wall_s": 10.0,
        "measured": 100,
        "per_minute": 600.0,
        "waiting_for_compiler": 0.1,
    }
    facts |= {"preparing_s": 4.0, "measuring_s": 5.0, "compiled_late": 0, "processes_lost": 0}
    facts |= {"compilers": 5, "compiled": 90, "compiler_s": 20.0}
    return {**facts, "files": ["a"], "buckets": list(buckets), **changes}


LATER = bucket(16, None, complete=False, reason="not done yet")


def test_documents_of_workers_are_merged() -> None:
    one = made(bucket(1, 50.0), LATER, bucket(64, 40.0, complete=False))
    other = made(bucket(64, 30.0), bucket(16, 20.0), wall_s=20.0, measured=200, waiting_for_compiler=0.3)
    found = report.merged([one, other])
    assert [(b["tokens"], b.get("us")) for b in found["buckets"]] == [(1, 50.0), (16, 20.0), (64, 30.0)]
    assert (found["wall_s"], found["measured"], found["per_minute"]) == (20.0, 300, 900.0)
    assert (found["waiting_for_compiler"], found["files"]) == (0.2, ["a"])
    assert (found["preparing_s"], found["measuring_s"]) == (8.0, 10.0)
    assert (found["compilers"], found["compiled"], found["compiler_s"]) == (10, 180, 40.0)


def test_spread() -> None:
    """Output is collected, messages are passed on; a worker that fails does not spoil the others."""
    script = (
        "import json, sys; gpu = int(sys.argv[2])\n"
        "print(f'line of {gpu}', file=sys.stderr)\n"
        "sys.exit(7) if gpu == 1 else print(json.dumps({**DOCUMENT, 'measured': gpu, 'files': sys.argv[3:]}))"
    )
    script = script.replace("DOCUMENT", repr(made(bucket(1, 50.0))))
    found = workers.spread([sys.executable, "-c", script], [0, 1, 2], 3)
    assert (found["measured"], found["files"]) == (2, ["--jobs", "3"])
    with pytest.raises(workers.WorkersFailedError) as failed:
        workers.spread([sys.executable, "-c", script], [1], 1)
    assert failed.value.code == 7


# ------------------------------------------------------------------------------------------------------------ progress

TILES = LayerTiles(TileConfig(16, 64, 128), TileConfig(16, 64, 128))
OTHER = LayerTiles(TileConfig(16, 32, 128), TileConfig(16, 64, 128))


class Scripted:
    """A measurer with answers made up before."""

    def __init__(self, *answers: Measurement) -> None:
        self.answers = list(answers)

    def prefetch(self, *_: object) -> None:
        pass

    def measure(self, *_: object) -> Measurement:
        return self.answers.pop(0)

    def compare(self, *_: object) -> list[Measurement]:
        return self.answers


def test_lines_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """One line every 30 s: bucket, measured of budget, best, × default, failures by class, ETA."""
    now = [0.0]
    answers = [Measurement("ok", 60.0), Measurement("timeout"), Measurement("slow", 90.0), Measurement("ok", 50.0)]
    with Progress(2, clock=lambda: now[0]) as shown:
        state = State("layer", 16, 8, TILES)
        watched = shown.watch(Scripted(*answers), state)
        for tiles in (TILES, OTHER, OTHER, OTHER):
            now[0] += 10.0
            watched.measure(16, tiles, None)
        assert capsys.readouterr().err == (
            "layer T=16 3/8, best 60.0 µs, 1.000 × default, failed: 1 timeout, ETA 02:10\n"
        )
        now[0] += 40.0
        shown.update()
        assert "T=16 4/8, best 50.0 µs, 1.200 × default, failed: 1 timeout, ETA 04:00" in capsys.readouterr().err
        shown.finished()
        assert shown.eta() == "01:20"


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(1) as shown:
        watched = shown.watch(Scripted(Measurement("ok", 60.0)), State("layer", 16, 1, TILES))
        watched.measure(16, TILES, None)
        shown.say("a line of its own")
        shown.finished()
    text = capsys.readouterr().err
    assert "T=16 1/1, best 60.0 µs, 1.000 × default" in text
    assert "a line of its own\n" in text
    assert "100 %" in text


def test_quiet_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=True, clock=lambda: 1e9) as shown:
        shown.watch(Scripted(Measurement("ok", 60.0)), State("layer", 16, 1, TILES)).measure(16, TILES, None)
        shown.say("nothing")
    assert capsys.readouterr().err == ""


def test_summary() -> None:
    text = report.summary(
        made(bucket(1, 50.0), LATER, {**bucket(64, 40.0), "default_us": None, "failures": {"crash": 2}})
    )
    lines = text.splitlines()
    assert lines[0] == "layer on NVIDIA H200"
    assert [line.split() for line in lines[1:5]] == [
        ["tokens", "default", "µs", "tuned", "µs", "×", "tried"],
        ["1", "60.0", "50.0", "1.200", "50"],
        ["16", "-", "-", "-", "-", "not", "done", "yet"],
        ["64", "-", "40.0", "-", "50", "failed:", "2", "crash"],
    ]
    assert "10 s, 100 measurements, 600 a minute; waited 10.0% for the compiler" in text
    assert "workloads were set up in 4 s, measuring took 5 s\n" in text
    assert "90 kernels in 20 s of compiling; 5 compilers were busy 40%\n" in text
    assert "compil" not in report.summary(made(bucket(1, 50.0), compilers=0)).splitlines()[-2]


# --------------------------------------------------------------------------------------------------- export's journal


def is_portable(pair: LayerTiles) -> bool:
    return pair.gemm1.family == "portable"


def test_export_takes_the_best_common_config(tune: Any, package: Path, tmp_path: Path, capsys: Any) -> None:
    """vLLM has one config for both GEMMs: the fastest pair of equals that was measured."""
    tune()
    path = package / "configs" / NAME
    first = load_record(path)
    known = {
        t: [(pair, found) for pair, found in session.measured(f"{package}.journal", first, t) if is_portable(pair)]
        for t in TOKENS
    }
    some = {t: known[t][0][0].gemm1 for t in TOKENS}
    unlike = {t: LayerTiles(tile, TileConfig(tile.BLOCK_SIZE_M, 32, 16)) for t, tile in some.items()}
    changed = {t: replace(b, tiles=unlike[t]) for t, b in first.buckets.items()}
    path.write_text(record_text(replace(first, buckets=changed)))
    out = tmp_path / "out"
    assert cli.main(["export", str(package), "--format", "vllm", "-o", str(out)]) == 0
    message = capsys.readouterr().err
    table = read_table(out / VLLM_NAME)
    for tokens in TOKENS:
        alike = {p.gemm1: m.us for p, m in known[tokens] if m.us and vllm.alike(p)}
        assert (str(tokens) in message) == (not alike)
        best = min(alike, key=lambda tile: alike[tile]) if alike else changed[tokens].tiles.gemm1
        assert table[tokens].BLOCK_SIZE_N == best.BLOCK_SIZE_N
