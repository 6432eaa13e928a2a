"""The kernels compile for every target with both supported Tritons, without a GPU.

Every form does for cuda:90 with the installed Triton. Elsewhere the few do that a back end may treat in its own way: a
form takes a second, and what the others add is arithmetic that all back ends have in common.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from moegen.aot import compile_targets
from moegen.cli import EXIT_TARGET, main
from moegen.device import TARGETS
from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from tests.compile.sweep import (
    COOPERATIVE_CASES,
    COOPERATIVE_KERNELS,
    FEW,
    LOW_LATENCY,
    SCHEMES,
    TILED,
    cases,
)
from tests.support.packages import spec_of

ROOT = Path(__file__).parents[2]
OLDER = "3.6.0"
OLDER_FOLDER = ROOT / f".triton-{OLDER}"
WANTED = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
GEMMS = ("gemm1", "gemm2")
STREAM = "stream_layer"
# Two products and their sums fill the registers of wide tiles: a few addresses go to memory, some of them in the loop.
MOST_SPILLS = {
    "cooperative": 16,
    "cooperative, 64 rows": 24,
    "cooperative, channel": 32,
    "cooperative, int8, un-gated": 16,
    "cooperative, int8 channel": 32,
}
# Triton has no conversion from or to e4m3 on compute capability 8.0, and these schemes store or compute with it.
NO_FP8 = {
    "cuda:80": tuple(q for q in (*SCHEMES, "fp8_w8a8:128x128") if q.startswith(("fp8", "mxfp8", "nvfp4", "mxfp4_w4a8")))
}
NO_FP8_REASON = "type fp8e4nv not supported in this architecture"
MOST_REGISTERS = {"cuda": 255, "hip": 512}
TINY = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 64}

Record = dict[str, Any]


def names_of(target: str, older: bool) -> tuple[str, ...]:
    """The cases of sweep.py that are compiled."""
    if target == "cuda:90":
        return FEW if older else tuple(cases(target))
    return FEW[:3] if older else FEW


def folder_of(older: bool) -> Path | None:
    """Where the older Triton is, if it is wanted; a test without it is skipped."""
    if older and not OLDER_FOLDER.is_dir():
        pytest.skip(f"Triton {OLDER} is not there: pip install --no-deps --target {OLDER_FOLDER.name} triton=={OLDER}")
    return OLDER_FOLDER if older else None


def sweep(module: str, triton_folder: Path | None, *arguments: object) -> list[Record]:
    """Run a module of tests/compile with the installed Triton or the one in `triton_folder`."""
    path = [str(ROOT), *([str(triton_folder)] if triton_folder else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", f"tests.compile.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout))


def constants(record: Record) -> dict[str, str]:
    return dict(pair.split("=") for pair in record["constants"].split())


def complaints(record: Record) -> list[str]:
    """Everything that is wrong with one compiled kernel."""
    target, dtype = record["target"], next(d for d in ("bf16", "fp16", "fp32") if f"_{d}_" in record["layer"])
    backend, limit = target.split(":")[0], TARGETS[target].shared_memory
    if record["case"] in NO_FP8.get(target, ()):
        known = record["error"] is None or NO_FP8_REASON in record["error"]
        return [] if known else [f"does not compile for another reason: {record['error']}"]
    if record["error"] is not None:
        return [f"does not compile: {record['error']}"]
    found = []
    if not 0 <= record["shared_memory"] <= limit:
        found.append(f"{record['shared_memory']} bytes of shared memory, {limit} are there")
    if not 0 < record["registers"] <= MOST_REGISTERS[backend]:
        found.append(f"{record['registers']} registers")
    spills = MOST_SPILLS.get(record["case"], 0)
    if target == "cuda:90" and dtype == "bf16" and record["spills"] > spills:
        found.append(f"spills {record['spills']} bytes")
    if record["kernel"] in COOPERATIVE_KERNELS:
        if not str(record["tensor_cores"]).startswith("wgmma"):
            found.append(f"{record['tensor_cores']} in place of wgmma")
        expected = record.get("figure", record["shared_memory"])  # of the family "cooperative"
        if record["shared_memory"] != expected:
            found.append(f"{record['shared_memory']} bytes of shared memory, {expected} are expected")
    if record["kernel"] in GEMMS and dtype != "fp32":
        found += _tensor_core_complaints(record)
    return found


def _tensor_core_complaints(record: Record) -> list[str]:
    instruction = record["tensor_cores"]
    if instruction is None:
        return ["no tensor-core instruction"]
    if record["target"] == "cuda:90":
        sizes = constants(record)
        # the M side of wgmma has 64 rows; with SWAP_AB it is filled by weight rows
        side = sizes["BLOCK_SIZE_N"] if sizes.get("SWAP_AB") == "True" else sizes["BLOCK_SIZE_M"]
        # Two warps on purpose: weights decoded in registers go to mma.sync without a way through shared memory.
        # And 8 tokens are mma.sync's other side: Triton's wgmma has 16 at least.
        wide = int(side) >= 64 and int(sizes["BLOCK_SIZE_M"]) >= 16 and int(sizes["num_warps"]) >= 4
        if wide and not instruction.startswith("wgmma"):
            return [f"{instruction} in place of wgmma"]
    return []


@pytest.mark.parametrize("older", [False, True], ids=["installed", OLDER])
@pytest.mark.parametrize("target", WANTED)
def test_forms_compile(target: str, older: bool, tmp_path: Path) -> None:
    names = names_of(target, older)
    records = sweep("sweep", folder_of(older), tmp_path, target, *names)
    assert {record["triton"] for record in records} == {OLDER if older else triton.__version__}
    shown = ("case", "layer", "kernel", "tokens", "constants")
    wrong = [(*(record[key] for key in shown), text) for record in records for text in complaints(record)]
    assert wrong == []
    assert_complete(records, target, names)


def assert_complete(records: list[Record], target: str, names: tuple[str, ...]) -> None:
    """Nothing was left out: every case has both GEMMs and the reduce, aligned ones the sort as well."""
    for case in names:
        _, tokens = cases(target)[case]
        own = [record for record in records if record["case"] == case]
        kernels = {record["kernel"] for record in own}
        if case in NO_FP8.get(target, ()):  # the first kernel that does not compile is named, the rest is not tried
            assert any(record["error"] is not None for record in own), case
            continue
        assert {*GEMMS, "top_k_reduce_kernel"} <= kernels, case
        assert tokens == LOW_LATENCY or any(kernel.startswith("align") for kernel in kernels), case
    own = [record for record in records if record["case"] in COOPERATIVE_CASES]
    compiled = {
        case: {record["kernel"] for record in own if record["case"] == case} for case in {r["case"] for r in own}
    }
    assert set(compiled) == (set(COOPERATIVE_CASES) if target == "cuda:90" else set())
    assert all(kernels in (set(COOPERATIVE_KERNELS[:2]), {COOPERATIVE_KERNELS[2]}) for kernels in compiled.values())
    blocks = {constants(r)["BLOCK_SIZE_M"] for r in records if r["case"] == "tiles" and r["kernel"] in GEMMS}
    assert "tiles" not in names or {"16", "32", "64", "128"} <= blocks


def test_every_scheme_and_tile_of_the_h200_is_compiled() -> None:
    for target in WANTED:
        assert set(FEW) <= set(cases(target))
    assert {*SCHEMES, "tiles", *(f"{quant}, tiles" for quant in TILED)} <= set(names_of("cuda:90", False))


def test_fp8_weights_are_those_of_the_target(tmp_path: Path) -> None:
    """AMD's gfx942 has the fnuz form of e4m3 and no other."""
    package = import_package(emit(make_plan(spec_of(**TINY, quant=("fp8_w8a8",))), tmp_path))._dispatch._PACKAGE
    for target, stored in (("cuda:90", torch.float8_e4m3fn), ("hip:gfx942", torch.float8_e4m3fnuz),
                           ("hip:gfx950", torch.float8_e4m3fn)):  # fmt: skip
        for call, _ in package.distinct_calls(package.layers[0], 1, TARGETS[target], "meta"):
            assert (call.w13.values.dtype, call.w2.values.dtype) == (stored, stored)


def test_scheme_that_a_target_lacks_is_reported_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spec.yaml"
    spec = spec_of(**TINY, quant=("fp8_w8a8",), name="lacking")
    path.write_text(json.dumps(spec.to_dict()))
    assert main(["build", str(path), "-o", str(tmp_path), "--target", "cuda:80"]) == EXIT_TARGET
    (line,) = capsys.readouterr().err.splitlines()
    slug = "e8_k2_h64_i64_bf16_fp8_w8a8_128x128_silu"
    assert line.startswith(f"moegen build: {slug} _quantise_groups does not compile for cuda:80: ")
    assert NO_FP8_REASON in line


def test_targets_of_the_issue_are_known() -> None:
    assert set(WANTED) <= set(TARGETS)


def test_unknown_target_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target: 'cuda:1' is not allowed; allowed: cuda:80, "):
        compile_targets(tmp_path / "absent", ["cuda:90", "cuda:1"])


def test_records_come_in_the_order_of_the_targets(tmp_path: Path) -> None:
    folder = emit(make_plan(spec_of(**TINY)), tmp_path)
    compiled = compile_targets(folder, ["hip:gfx942", "cuda:90"], max_tokens=1)
    assert [(item.target, item.kernel) for item in compiled] == [
        *(("hip:gfx942", kernel) for kernel in (*GEMMS, "top_k_reduce_kernel")),
        ("cuda:90", STREAM),
    ]
    assert {(item.error, item.tokens, item.layer) for item in compiled} == {(None, 1, "e8_k2_h64_i64_bf16_silu")}


def test_kernel_that_does_not_compile_is_a_record(tmp_path: Path) -> None:
    folder = emit(make_plan(spec_of(**TINY, name="broken")), tmp_path)
    path = folder / "_kernels_silu.py"
    source = path.read_text()
    assert source.count("    result = acc\n") == 1
    path.write_text(source.replace("    result = acc\n", '    tl.static_assert(False, "broken on purpose")\n'))
    compiled = compile_targets(folder, ["cuda:80"], max_tokens=1)
    assert [item.kernel for item in compiled if item.error is None] == ["gemm1"]
    (failed,) = [item for item in compiled if item.error is not None]
    assert (failed.target, failed.tokens, failed.layer) == ("cuda:80", 1, "e8_k2_h64_i64_bf16_silu")
    assert failed.kernel == "gemm2"
    assert "BLOCK_SIZE_M=16" in failed.constants
    assert failed.error is not None
    assert failed.error.startswith("CompileTimeAssertionFailure: at ")
    assert failed.error.endswith("broken on purpose")
