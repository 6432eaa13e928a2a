"""The command line: what it builds, prints and refuses, its exit codes, and that it starts without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moegen import aot, cli
from moegen.aot import Compiled
from moegen.load import read_manifest
from moegen.models import load_models, model_spec
from moegen.spec import MoESpec, Parallel, load_spec

DATA = Path(__file__).parent / "data" / "hf"
MODEL = "qwen3-30b-a3b"
SPEC = """\
name: mine
shapes:
- {num_experts: 16, top_k: 2, hidden_size: 256, intermediate_size: 512}
dtypes: [float16, float32]
activation: gelu
bias: true
parallel:
- {tp: 2}
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def built(out: Path) -> MoESpec:
    """The spec of the only package in `out`."""
    (folder,) = out.iterdir()
    return MoESpec.from_dict(read_manifest(folder)["spec"])


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


# -------------------------------------------------------------------------------------------------------------- build


def test_build_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--model", MODEL, "-o", tmp_path / "out") == 0
    assert built(tmp_path / "out") == model_spec(MODEL)
    text, messages = capsys.readouterr()
    assert messages == ""
    assert f"{tmp_path}/out/moe_qwen3_30b_a3b" in text
    assert "w13 [128, 1536, 2048], w2 [128, 2048, 768] bfloat16, top_k 8" in text


def test_default_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("build", "--model", MODEL) == 0
    assert (tmp_path / "out" / "moe_qwen3_30b_a3b" / "manifest.json").is_file()


def test_build_a_spec_file(spec_file: Path, tmp_path: Path) -> None:
    assert run("build", spec_file, "--out", tmp_path / "out") == 0
    assert built(tmp_path / "out") == load_spec(spec_file)


def test_build_again_from_the_spec_in_a_package(spec_file: Path, tmp_path: Path) -> None:
    """What the header of every generated file tells the reader to do."""
    assert run("build", spec_file, "-o", tmp_path / "out") == 0
    first = (tmp_path / "out" / "moe_mine" / "manifest.json").read_bytes()
    assert run("build", tmp_path / "out" / "moe_mine" / "spec.yaml", "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "moe_mine" / "manifest.json").read_bytes() == first


@pytest.mark.parametrize("as_folder", [False, True])
def test_build_a_hugging_face_config(as_folder: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "Qwen3-30B-A3B"
    checkpoint.mkdir()
    shutil.copy(DATA / "qwen3-30b-a3b.json", checkpoint / "config.json")
    assert run("build", checkpoint if as_folder else checkpoint / "config.json", "-o", tmp_path / "out") == 0
    assert built(tmp_path / "out").shapes == model_spec(MODEL).shapes


OVERRIDES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "tp": (["--tp", "1,4"], {"parallel": (Parallel(), Parallel(tp=4))}),
    "ep": (["--ep", "8"], {"parallel": (Parallel(ep=8),)}),
    "both": (
        ["--tp", "1,2", "--ep", "4,8"],
        {"parallel": tuple(Parallel(tp=tp, ep=ep) for tp in (1, 2) for ep in (4, 8))},
    ),
    "dtype": (["--dtype", "float16,float32"], {"dtypes": ("float16", "float32")}),
    "quant": (["--quant", "none"], {"quant": ("none",)}),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides(case: str, tmp_path: Path) -> None:
    options, fields = OVERRIDES[case]
    assert run("build", "--model", MODEL, *options, "-o", tmp_path / "out") == 0
    spec = built(tmp_path / "out")
    assert {name: getattr(spec, name) for name in fields} == fields


def test_overrides_of_a_file(spec_file: Path, tmp_path: Path) -> None:
    assert run("build", spec_file, "--tp", "4", "-o", tmp_path / "a") == 0
    assert built(tmp_path / "a").parallel == (Parallel(tp=4),)
    assert built(tmp_path / "a").dtypes == ("float16", "float32")
    assert run("build", spec_file, "--dtype", "bfloat16", "-o", tmp_path / "b") == 0
    assert built(tmp_path / "b").dtypes == ("bfloat16",)
    assert built(tmp_path / "b").parallel == (Parallel(tp=2),)


def test_build_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--model", MODEL, "-o", tmp_path / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"package": str(tmp_path / "out" / "moe_qwen3_30b_a3b"), "compiled": []}


COMPILED = [
    Compiled("cuda:90", "layer", "gemm1", 1, "BLOCK_SIZE_M=16", 96, 65536, 0, "wgmma.mma_async"),
    Compiled("hip:gfx942", "layer", "gemm2", 64, "BLOCK_SIZE_M=64", error="OutOfResources: too much"),
]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("compiled", [COMPILED, COMPILED[:1]])
def test_build_for_targets(
    compiled: list[Compiled], as_json: bool, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    asked = []
    monkeypatch.setattr(aot, "compile_targets", lambda folder, targets: asked.append((folder, targets)) or compiled)
    options = ["--json"] if as_json else []
    failed = len(compiled) == 2
    assert run("build", "--model", MODEL, "-o", tmp_path, "--target", "cuda:90,hip:gfx942", *options) == 5 * failed
    assert asked == [(tmp_path / "moe_qwen3_30b_a3b", ["cuda:90", "hip:gfx942"])]
    text, messages = capsys.readouterr()
    if as_json:
        assert [item["kernel"] for item in json.loads(text)["compiled"]] == [item.kernel for item in compiled]
    else:
        assert [word for word in ("gemm1", "96", "65536", "wgmma.mma_async") if word not in text] == []
    assert messages == (
        "moegen build: layer gemm2 does not compile for hip:gfx942: OutOfResources: too much\n" if failed else ""
    )


# ------------------------------------------------------------------------------------------------------------- errors

USAGE: list[tuple[list[str], str]] = [
    ([], "required"),
    (["nonsense"], "invalid choice"),
    (["build"], "required"),
    (["build", "spec.yaml", "--model", MODEL], "not allowed with"),
    (["build", "--model", MODEL, "--tp", "0"], "'0' is not allowed; allowed: positive integers"),
    (["build", "--model", MODEL, "--tp", "two"], "'two' is not allowed"),
    (["build", "--model", MODEL, "--ep", "1,,2"], "'1,,2' is not allowed"),
    (["build", "--model", MODEL, "--dtype", "int8"], "'int8' is not allowed; allowed: bfloat16, float16, float32"),
    (["build", "--model", MODEL, "--quant", "fp3"], "'fp3' is not supported; allowed: none, fp8_w8a8, "),
    (["build", "--model", MODEL, "--quant", "int4_w4a16:g48"], "int4_w4a16 has K groups of 32, 64, 128"),
    (["build", "--model", MODEL, "--target", "cuda:1"], "'cuda:1' is not allowed; allowed: cuda:80"),
    (["show"], "required"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_usage_error(arguments: list[str], message: str, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    text, messages = capsys.readouterr()
    assert text == ""
    assert message in messages
    assert list(tmp_path.iterdir()) == []


INVALID: list[tuple[list[str], str]] = [
    (["build", "--model", "qwen3-30b-a4b"], "close matches: qwen3-30b-a3b"),
    (["build", "absent.yaml"], "absent.yaml: no such file"),
    (["build", "absent.json"], "absent.json"),
    (["build", "broken.yaml"], "broken.yaml:2: not valid YAML"),
    (["build", "wrong.yaml"], "wrong.yaml: colour: unknown key"),
    (["build", "binary.yaml"], "binary.yaml: cannot be read"),
    (["build", "."], "config.json"),
    (["build", "broken.json"], "broken.json"),
    (["build", "other.json"], "other.json"),
    (["build", "--model", MODEL, "--tp", "7"], "parallel[0].tp: 7 is not allowed"),
    (["build", "--model", MODEL, "--ep", "3"], "parallel[0].ep: 3 is not allowed"),
    (["build", "--model", MODEL, "--dtype", "float16,float16"], "each item once"),
    (["build", "--model", MODEL, "-o", "wrong.yaml"], "cannot be written"),
    (["show", "absent"], "absent is not a package of moegen"),
    (["show", "."], "is not a package of moegen"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID)
def test_invalid_input(arguments: list[str], message: str, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Exit code 3, one message on stderr, nothing on stdout and nothing in the folder."""
    monkeypatch.chdir(tmp_path)
    files = {
        "broken.yaml": b"name: [\n",
        "wrong.yaml": b"colour: red\n",
        "binary.yaml": b"\xff\xfe\x00",
        "broken.json": b"{",
        "other.json": b'{"model_type": "bert", "hidden_size": 3}',
    }
    for name, data in files.items():
        Path(name).write_bytes(data)
    assert run(*arguments) == 3
    text, messages = capsys.readouterr()
    assert text == ""
    assert messages.startswith(f"moegen {arguments[0]}: ")
    assert message in messages
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


# -------------------------------------------------------------------------------------------------------- list and show


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "E", "top_k", "H", "I", "activation"]
    assert [line.split()[0] for line in lines[1:]] == list(load_models())
    assert next(line for line in lines if line.startswith(f"{MODEL} ")).split() == [
        MODEL, "128", "8", "2048", "768", "silu",
    ]  # fmt: skip
    assert next(line for line in lines if line.startswith("gpt-oss-20b ")).endswith("swigluoai + bias")


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {name: MoESpec.from_dict(spec) for name, spec in document.items()} == {
        name: model_spec(name) for name in load_models()
    }


def test_show(spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("build", spec_file, "-o", tmp_path)
    capsys.readouterr()
    assert run("show", tmp_path / "moe_mine") == 0
    text, messages = capsys.readouterr()
    assert messages == ""
    slug = "e16_k2_h256_i256_fp16_gelu_bias"
    assert [word for word in ("moe_mine", "triton 3.7.1", slug, "_kernels_gelu", "heuristic") if word not in text] == []


def test_show_json(spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("build", spec_file, "-o", tmp_path)
    capsys.readouterr()
    assert run("show", tmp_path / "moe_mine", "--json") == 0
    assert json.loads(capsys.readouterr().out) == read_manifest(tmp_path / "moe_mine")


# ------------------------------------------------------------------------------------------------------------ start-up

START = """
import sys
from moegen.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = [name for name in ("torch", "triton", "numpy", "optuna", "matplotlib") if name in sys.modules]
sys.exit(f"imported: {heavy}" if heavy else code)
"""


HELP = [[name, "--help"] for name in ("build", "bench", "tune", "check", "merge", "export", "import", "plot")]


@pytest.mark.parametrize("arguments", [["--help"], *HELP, ["list"], ["show", "X"]], ids=" ".join)
def test_starts_without_torch(arguments: list[str], spec_file: Path, tmp_path: Path) -> None:
    if "X" in arguments:
        run("build", spec_file, "-o", tmp_path)
        arguments = ["show", str(tmp_path / "moe_mine")]
    command = [sys.executable, "-c", START, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moegen", "build", "--model", "absent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 3
    assert done.stderr.startswith("moegen build: model: 'absent' is unknown")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_early_gets_no_traceback() -> None:
    command = f"{sys.executable} -m moegen list --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert done.stdout.strip() == "{"
    assert done.stderr == ""
