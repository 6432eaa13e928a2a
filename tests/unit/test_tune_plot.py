"""`moegen plot`: what the lines of its pictures are, and that pictures come of them where matplotlib is."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moegen import cli
from moegen.interop.strict import FileError
from moegen.tune import plot
from moegen.tune.journal import Journal
from moegen.tune.plot import Line, convergence, roofline, speed_up
from moegen.tune.record import Record, write_record
from moegen.tune.session import journal_key, scope_of
from moegen.tune.trial import Measurement
from tests.support.records import H200, LAYER, TILES, bucket, record

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "docs" / "results" / "h200-qwen3-30b-a3b-bf16.csv"
HEAD = "layer,tokens,routing,provider,us,fraction,gpu\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["plot", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_speed_up() -> None:
    """Ascending tokens; a bucket that was not measured has no point."""
    other = bucket(us=None, default_us=None, source="E=1.json")
    first = Record(H200, LAYER, {64: bucket(us=40.0), 1: bucket(), 16: other})
    (line,) = speed_up([first]).lines
    assert line == Line(f"{LAYER.slug}, NVIDIA H200", ((1, 1.2), (64, 1.5)))


def test_convergence() -> None:
    """The best so far over the best at the end; failures count as tried, and what the race dropped is no best."""
    measured = [Measurement("crash"), *(Measurement("ok", us) for us in (80.0, 100.0)), Measurement("slow", 10.0)]
    measured.append(Measurement("ok", 40.0))
    picture = convergence(record(), {16: measured, 64: [Measurement("timeout")]})
    assert picture.lines == (Line("T=16", ((2, 2.0), (3, 2.0), (4, 2.0), (5, 1.0))),)


def test_roofline() -> None:
    rows = plot._bench_rows(BENCH)
    picture = roofline(rows)
    assert {"moegen", "vllm"} <= {line.label.split(", ")[-1] for line in picture.lines}
    for line in picture.lines:
        assert [x for x, _ in line.points] == sorted(x for x, _ in line.points)
        assert all(0 < y <= 1.2 for _, y in line.points)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a,b\n1,2\n", "line 2: no column layer"),
        (HEAD + "l,1,balanced,moegen,5,fast,g\n", "line 2: fraction: 'fast' is not a number"),
        (HEAD + "l,1,balanced,moegen,5,0.5,g\nl,many,balanced,moegen,5,0.5,g\n", "line 3: tokens: 'many'"),
        (HEAD + "l,1,balanced,moegen,5,nan,g\n", "line 2: fraction: 'nan'"),
        (HEAD + "l,1,balanced\n", "line 2: no column"),
        ("\x00\x00", "CSV"),
        (b"\xff\xfe\xff", "CSV"),
    ],
)
def test_files_that_are_no_bench_files(text: str | bytes, shown: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        rows = plot._bench_rows(path)
    except FileError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert shown in message
    else:
        assert rows == []


def test_a_cell_without_a_time_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    path.write_text(HEAD + "l,1,balanced,moegen,,,g\nl,4,balanced,moegen,5,0.5,g\n")
    assert [row["tokens"] for row in plot._bench_rows(path)] == ["4"]


def test_nothing_to_draw(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, message = run(capsys)
    assert (code, text) == (2, "")
    assert "nothing to draw" in message


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / record().name
    write_record(path, record())
    code, text, message = run(capsys, path, "-o", tmp_path / "plots")
    assert (code, text) == (2, "")
    assert "pip install 'moegen[plot]'" in message
    assert not (tmp_path / "plots").exists()


def test_a_broken_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    code, _, message = run(capsys, path)
    assert (code, str(path) in message) == (3, True)


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One convergence a record with a journal, one speed-up, one roofline."""
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: pip install 'moegen[plot]'")
    one = record(16)
    folder, storage = tmp_path / "records", tmp_path / "records.journal"
    write_record(folder / one.name, one)
    tuned = one.buckets[16]
    scope = scope_of(H200, tuned.triton, tuned.torch, tuned.routing, 0)

    class Measurer:
        def prefetch(self, *_: object) -> None: ...

        def measure(self, *_: object) -> Measurement:
            return Measurement("ok", 50.0)

        def compare(self, *_: object) -> list[Measurement]:
            return []

    Journal(storage, scope).measurer(journal_key(LAYER, tuned.kernels), Measurer()).measure(16, TILES, None)
    code, text, messages = run(capsys, folder, "--bench", BENCH, "-o", tmp_path / "plots", "--format", "png")
    assert (code, messages) == (0, "")
    names = [f"convergence-nvidia-h200-{LAYER.slug}.png", "speed-up.png", "roofline.png"]
    assert text.splitlines() == [str(tmp_path / "plots" / name) for name in names]
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_a_record_without_times_draws_an_empty_picture() -> None:
    assert speed_up([replace(record(16, us=None))]).lines == (Line(f"{LAYER.slug}, NVIDIA H200", ()),)
