"""Table, JSON and CSV of fabricated results; peers and arguments of the command."""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moegen.bench import DEFAULT_TOKENS, run
from moegen.bench.measure import Cell, Result
from moegen.bench.peers import PACKAGE, PackageError, PeerError, load_package, load_peer, parse_peer, parse_peers
from moegen.bench.report import (
    CSV_COLUMNS,
    Environment,
    Table,
    ceilings_line,
    csv_rows,
    json_document,
    write_csv,
)
from moegen.bench.roofline import Ceilings, Floor
from moegen.bench.timing import Timing
from moegen.bench.workload import Sizes

ENVIRONMENT = Environment("NVIDIA H200", "2.11.0", "3.6.0", "moegen bench out/moe_x")
CEILINGS = Ceilings("bfloat16", 4.47e12, 802e12)
FLOOR = Floor(memory_us=20.0, compute_us=1.0, bytes=89.4e6, flops=10**9)
DECODE = Cell(
    "x",
    "bfloat16",
    1,
    "balanced",
    (
        Result(PACKAGE, "ok", Timing((30.0, 25.0, 40.0)), 3e-3),
        Result("vllm", "ok", Timing((33.0, 30.0, 48.0)), 3e-3),
        Result("other", "wrong", None, float("nan"), "relative error nan, allowed 2e-02"),
    ),
    Sizes(copies=7, copies_wanted=7, calls=112, active_experts=8.0, reuse_bytes=528e6),
    FLOOR,
)
FAILED = Cell(
    "x", "bfloat16", 4, "balanced", tuple(Result(r.provider, "error", message="E: m") for r in DECODE.results)
)

PACKAGE_SOURCE = """
from types import SimpleNamespace
import torch
LAYERS = tuple(SimpleNamespace(slug=slug, dtype=torch.bfloat16, quant="none") for slug in "ab")
def fused_experts(*args): ...
def warmup(max_tokens): ...
"""


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="moegen bench")
    run.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "moe_fake"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE_SOURCE)
    return folder


@pytest.fixture
def peer_file(tmp_path: Path) -> Path:
    folder = tmp_path / "peer_a"
    folder.mkdir()
    (folder / "helper_of_peer_a.py").write_text("VALUE = 3\n")
    path = folder / "peer.py"
    path.write_text("import helper_of_peer_a\ndef layer(x):\n    return x + helper_of_peer_a.VALUE\n")
    return path


def test_table_lines_up_and_remarks_on_failures() -> None:
    table = Table([PACKAGE, "vllm", "other"])
    head = table.head("x", "bfloat16", "balanced").splitlines()
    row = table.row(DECODE).splitlines()
    assert head[0] == "x · bfloat16 · balanced routing"
    assert len(head[1]) == len(row[0])
    assert row[0].split() == ["1", "8.0", "112", "30.0", "20.0", "66.7%", "memory", "33.0", "1.200", "wrong", "-"]
    assert row[1].strip() == "! other: wrong: relative error nan, allowed 2e-02"
    failed = table.row(FAILED).splitlines()
    assert failed[0].split() == ["4", "-", "-", "error", "-", "-", "-", "error", "-", "error", "-"]
    assert len(failed) == 4


def test_table_states_too_few_copies() -> None:
    sizes = Sizes(copies=2, copies_wanted=7, calls=8, active_experts=8.0, reuse_bytes=151e6)
    cell = Cell("x", "bfloat16", 1, "balanced", DECODE.results[:1], sizes, FLOOR)
    assert "2 weight copies instead of 7: only 151 MB" in Table([PACKAGE]).row(cell)


def test_ceilings_line() -> None:
    assert "4.47 TB/s read, 802 TFLOP/s bfloat16" in ceilings_line(CEILINGS)


def test_json_document_holds_samples_and_is_valid_json() -> None:
    document = json_document(ENVIRONMENT, [CEILINGS], [DECODE, FAILED], {"replays": 3, "seed": 0})
    read = json.loads(json.dumps(document, allow_nan=False))
    assert read["environment"]["gpu"] == "NVIDIA H200"
    assert read["environment"]["command"] == "moegen bench out/moe_x"
    assert read["ceilings"][0]["read_bytes_per_s"] == 4.47e12
    cell = read["cells"][0]
    assert cell["sizes"]["copies"] == 7
    assert cell["floor"]["us"] == 20.0
    ours, vllm, other = cell["results"]
    assert ours["samples_us"] == [30.0, 25.0, 40.0]
    assert (ours["us"], ours["us_min"], ours["us_max"], ours["ratio_to_package"]) == (30.0, 25.0, 40.0, 1.0)
    assert vllm["ratio_to_package"] == pytest.approx(1.2)
    assert (other["status"], other["relative_error"], other["us"]) == ("wrong", "nan", None)
    assert read["cells"][1]["floor"] is None


def test_csv_is_tidy(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", csv_rows(ENVIRONMENT, [DECODE, FAILED]))
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 6
    assert (rows[1]["provider"], rows[1]["us"], rows[1]["ratio_to_package"]) == ("vllm", "33.0", "1.2")
    assert (rows[0]["floor_us"], rows[0]["fraction"], rows[0]["active_experts"]) == ("20.0", "0.666667", "8.0")
    assert rows[2]["us"] == rows[3]["us"] == rows[3]["floor_us"] == ""
    assert {row["gpu"] for row in rows} == {"NVIDIA H200"}


def test_load_peer_finds_what_lies_beside_it(peer_file: Path) -> None:
    assert load_peer(f"{peer_file}:layer=theirs").name == "theirs"
    peer = load_peer(f"{peer_file}:layer")
    assert peer.name == "peer.layer"
    assert peer.function(4) == 7


@pytest.mark.parametrize("argument", ["peer.py", "peer.py:", ":f", "peer.py:f g", "peer.py:f="])
def test_malformed_peer_is_named(argument: str) -> None:
    with pytest.raises(PeerError, match=r"FILE\.py:function") as caught:
        parse_peer(argument)
    assert argument in str(caught.value)


def test_peer_errors_say_what_is_missing(peer_file: Path) -> None:
    with pytest.raises(PeerError, match=r"no Python file nowhere\.py"):
        parse_peer("nowhere.py:f")
    with pytest.raises(PeerError, match="no such function; the file has layer"):
        load_peer(f"{peer_file}:absent")
    with pytest.raises(PeerError, match=r"the label 'peer\.layer' is taken"):
        parse_peers([f"{peer_file}:layer"] * 2)
    with pytest.raises(PeerError, match="the label 'moegen' is taken"):
        parse_peers([f"{peer_file}:layer=moegen"])
    peer_file.write_text("import there_is_no_such_module\n")
    with pytest.raises(PeerError, match=r"ModuleNotFoundError: .*there_is_no_such_module"):
        load_peer(f"{peer_file}:layer")


def test_load_package(package: Path, tmp_path: Path) -> None:
    assert [layer.slug for layer in load_package(package).LAYERS] == ["a", "b"]
    with pytest.raises(PackageError, match=r"no __init__\.py"):
        load_package(tmp_path)
    (package / "__init__.py").write_text("LAYERS = ()\n")
    with pytest.raises(PackageError, match="no fused_experts, warmup"):
        load_package(package)
    (package / "__init__.py").write_text("1 / 0\n")
    with pytest.raises(PackageError, match="ZeroDivisionError"):
        load_package(package)


def test_arguments() -> None:
    args = arguments("out/p")
    assert (args.tokens, args.routing, args.replays, args.peer) == (DEFAULT_TOKENS, "balanced", 20, [])
    assert arguments("out/p", "--tokens", "1,4").tokens == (1, 4)


@pytest.mark.parametrize("words", [("--tokens", "1,0"), ("--tokens", "a"), ("--replays", "-1"), ("--routing", "zipf")])
def test_bad_arguments_are_usage_errors(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments("out/p", *words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_exit_codes(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(arguments(str(tmp_path))) == 3
    assert run.main(arguments(str(package), "--peer", "nowhere.py:f")) == 2
    assert run.main(arguments(str(package), "--layer", "c")) == 2
    assert "--layer c: the package has a, b" in capsys.readouterr().err
    assert run.main(arguments(str(package), "--csv", str(tmp_path / "no" / "x.csv"))) == 2
    assert run.main(arguments(str(package))) == 4
    assert "no CUDA or HIP device" in capsys.readouterr().err


@pytest.mark.parametrize(("cells", "code"), [((DECODE,), 0), ((DECODE, FAILED), 1)])
def test_a_whole_run(
    package: Path,
    tmp_path: Path,
    cells: tuple[Cell, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything but the device: cells are fabricated, in the order of --tokens."""
    queue = list(cells)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "NVIDIA H200")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr("moegen.bench.roofline.measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr("moegen.bench.measure.measure_cell", lambda *_, **__: queue.pop(0))
    tokens = ",".join(str(cell.tokens) for cell in cells)
    words = [str(package), "--layer", "a", "--tokens", tokens, "--csv", str(tmp_path / "r.csv")]
    vllm = tmp_path / "vllm.py"
    vllm.write_text("def f(*args): ...\n")
    words += ["--peer", f"{vllm}:f=vllm", "--peer", f"{vllm}:f=other"]
    assert run.main(arguments(*words)) == code
    shown = capsys.readouterr().out
    assert shown.startswith("NVIDIA H200 · torch ")
    assert "4.47 TB/s read" in shown
    assert "1.200" in shown
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 3 * len(cells)

    queue = list(cells)
    assert run.main(arguments(*words, "--json")) == code
    document = json.loads(capsys.readouterr().out)
    assert [cell["tokens"] for cell in document["cells"]] == [cell.tokens for cell in cells]
    assert document["settings"] == {"replays": 20, "seed": 0, "alpha": 1.2}


def test_command_line_repeats_the_run() -> None:
    words = ["out/p", "--tokens", "1,4", "--routing", "power_law", "--replays", "5", "--seed", "7"]
    words += ["--layer", "a", "--peer", "f.py:g"]
    assert run.command_line(arguments(*words)) == " ".join(["moegen", "bench", *words])


def test_arguments_need_no_torch() -> None:
    code = "import argparse, sys, moegen.bench.run as r; r.add_arguments(argparse.ArgumentParser()); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
