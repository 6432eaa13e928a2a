"""Config records as the tuner writes them: round trips, atomic writes, merging, and what `moegen check` finds."""

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from moegen import cli
from moegen.device import TARGETS, gpu_facts
from moegen.emit import emit
from moegen.interop.strict import FileError
from moegen.models import load_models, model_spec
from moegen.plan import make_plan
from moegen.runtime.activations import ACTIVATIONS, Activation
from moegen.runtime.configs import RecordError, read_record
from moegen.runtime.tile import FAMILIES, LayerTiles
from moegen.spec import VariantSpec
from moegen.tune import record as record_module
from moegen.tune.fingerprint import current_kernels, package_kernels, spec_of, why_stale
from moegen.tune.record import (
    Record,
    activation_of_slug,
    add_bucket,
    layer_of,
    load_record,
    merge_records,
    record_text,
    write_record,
)
from tests.support.packages import any_activation
from tests.support.packages import spec_of as small_spec
from tests.support.records import FIRST, H200, LAYER, SECOND, TILES, bucket, record

NAME = f"nvidia-h200/{LAYER.slug}.json"


def written(folder: Path, data: Record | dict[str, Any] | str | None = None) -> Path:
    """The file where look-ups find it."""
    path = folder / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    data = record() if data is None else data
    path.write_text(
        record_text(data) if isinstance(data, Record) else data if isinstance(data, str) else json.dumps(data)
    )
    return path


def check(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, str]:
    """Exit code and output of `moegen check`."""
    code = cli.main(["check", *map(str, paths)])
    text, messages = capsys.readouterr()
    assert messages == ""
    return code, text


# -------------------------------------------------------------------------------------------------------- round trips


def test_round_trip(tmp_path: Path) -> None:
    aligned = bucket(tiles=LayerTiles(FIRST, FIRST, low_latency=False))
    other = bucket(tiles=LayerTiles(SECOND, FIRST))
    first = replace(record(16, 64, 4096), buckets={**record().buckets, 1: aligned, 4096: other})
    assert first.name == Path(NAME)
    path = tmp_path / first.name
    write_record(path, first)
    assert load_record(path) == first
    assert path.read_text() == record_text(first)
    assert [entry.name for entry in path.parent.iterdir() if entry.name != ".lock"] == [path.name]


def test_the_dispatcher_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read_record(path, layer_of(LAYER), H200) == {16: TILES, 64: TILES}
    assert json.loads(path.read_text())["triton"] == "3.6.0"


def test_newest_version_is_the_record_s(tmp_path: Path) -> None:
    buckets = {1: bucket(triton="3.6.0"), 2: bucket(triton="3.10.0"), 4: bucket(triton="3.7.1")}
    path = written(tmp_path, Record(H200, LAYER, buckets))
    assert json.loads(path.read_text())["triton"] == "3.10.0"
    assert {tokens: found.triton for tokens, found in load_record(path).buckets.items()} == {
        1: "3.6.0",
        2: "3.10.0",
        4: "3.7.1",
    }


def test_a_bucket_without_a_version_has_the_record_s(tmp_path: Path) -> None:
    data = json.loads(record_text(record(16, triton="", us=None)))
    path = written(tmp_path, {**data, "triton": "3.6.0"})
    assert load_record(path).buckets[16].triton == "3.6.0"


@pytest.mark.parametrize("model", load_models())
def test_every_layer_of_every_model(model: str, tmp_path: Path) -> None:
    """What a record says of a layer is enough to know it again."""
    quant = load_models()[model].quant or ("none",)
    for variant in replace(model_spec(model), quant=quant[:1]).variants():
        one = Record(H200, variant, {1: bucket(tiles=LayerTiles(FIRST, FIRST), kernels="")})
        path = tmp_path / one.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(record_text(one))
        assert load_record(path).variant == variant


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_slug(name: str) -> None:
    assert activation_of_slug(any_activation(name).slug) == any_activation(name)


@pytest.mark.parametrize("limit", [10.0, 2.5, 1e-5, 123456.0, 1e20])
def test_activation_of_slug_with_a_parameter(limit: float) -> None:
    activation = Activation.of("silu", limit=limit)
    assert activation_of_slug(activation.slug) == activation


@pytest.mark.parametrize(
    "slug", ["", "magic", "silu_", "silu_limit", "silu_limit7_limit7", "silu_alpha2", None, 3, "situ"]
)
def test_no_activation(slug: object) -> None:
    with pytest.raises(ValueError, match=r"activation|slug|parameter|missing"):
        activation_of_slug(slug)


# ------------------------------------------------------------------------------------------------------------ writing


def test_buckets_of_two_tuners_come_together(tmp_path: Path) -> None:
    path = tmp_path / NAME
    for tokens in (64, 1, 16):
        add_bucket(path, Record(H200, LAYER), tokens, bucket(tried=tokens))
    add_bucket(path, Record(H200, LAYER), 16, bucket(tried=99))
    assert {tokens: found.tried for tokens, found in load_record(path).buckets.items()} == {1: 1, 16: 99, 64: 64}


def _adds(path: Path, first: int) -> None:
    for tokens in range(first, first + 20):
        add_bucket(path, Record(H200, LAYER), tokens, bucket(tried=tokens))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / NAME
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_adds, args=(path, first)) for first in (1, 101, 201)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(load_record(path).buckets) == 60


def test_a_failed_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    before = path.read_text()

    def broken(_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(record_module.os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        add_bucket(path, Record(H200, LAYER), 1, bucket())
    assert path.read_text() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".lock", path.name]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("{", "JSON"),
        (replace(record(), variant=replace(LAYER, top_k=4)), "layer"),
        (replace(record(), gpu=TARGETS["cuda:100"]), "GPU"),
    ],
)
def test_a_foreign_file_is_not_overwritten(there: Record | str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, there)
    before = path.read_text()
    with pytest.raises((RecordError, FileError), match=message):
        add_bucket(path, Record(H200, LAYER), 1, bucket())
    assert path.read_text() == before


# ------------------------------------------------------------------------------------------------------------ merging

BETTER = bucket(us=40.0)
# What the second record has at 16 tokens beside the first one's plain bucket, and whether it wins.
AGAINST = {
    "the same": (bucket(), False),
    "a larger gain": (BETTER, True),
    "a smaller gain": (bucket(us=55.0), False),
    "less time but a smaller gain": (bucket(us=30.0, default_us=31.0), False),
    "older kernels": (replace(BETTER, kernels="0" * 16), False),
    "a newer Triton": (bucket(us=59.0, triton="3.10.0"), True),
    "an older Triton": (replace(BETTER, triton="3.5.9"), False),
    "imported": (replace(BETTER, us=None, default_us=None, source="E=1.json"), False),
}


@pytest.mark.parametrize("case", AGAINST)
def test_merge(case: str) -> None:
    other, wins = AGAINST[case]
    merged = merge_records(record(16, 64), Record(H200, LAYER, {16: other, 1024: BETTER}))
    assert merged.buckets == {16: other if wins else bucket(), 64: bucket(), 1024: BETTER}


def test_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = written(tmp_path / "a", record(1, 2)), written(tmp_path / "b", record(2, 4, us=40.0))
    before = one.read_text()
    assert cli.main(["merge", str(one), str(other), "-o", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.json: 3 buckets, from {other}: 2, 4\n"
    assert one.read_text() == before
    assert load_record(tmp_path / "out.json").buckets == {1: bucket(), 2: BETTER, 4: BETTER}
    assert cli.main(["merge", str(one), str(other)]) == 0
    assert load_record(one) == load_record(tmp_path / "out.json")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"gpu": TARGETS["cuda:100"]}, ("GPU", "NVIDIA H200", "NVIDIA B200")),
        ({"variant": replace(LAYER, top_k=4)}, ("layer", "_k8_", "_k4_")),
    ],
)
def test_merge_refuses(change: dict[str, Any], shown: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.json"
    other.write_text(record_text(replace(record(), **change)))
    one = written(tmp_path)
    before = one.read_text()
    assert cli.main(["merge", str(one), str(other)]) == 3
    text, message = capsys.readouterr()
    assert text == ""
    assert [word for word in (*shown, str(one), str(other)) if word not in message] == []
    assert one.read_text() == before


# -------------------------------------------------------------------------------------------------------------- check


def test_check_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    assert check(capsys, tmp_path) == (0, "1 records: 0 invalid, 0 stale findings\n")


def test_check_of_the_published_records(capsys: pytest.CaptureFixture[str]) -> None:
    """What CI runs; a stale record works and is told apart."""
    code, text = check(capsys)
    assert code in (0, 5), text


def test_check_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "[]")
    assert cli.main(["check", str(tmp_path), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["records"] == 1
    assert [(found["path"], found["kind"]) for found in document["findings"]] == [(str(path), "invalid")]


def test_check_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = emit(make_plan(model_spec("qwen3-30b-a3b")), tmp_path)
    written(folder / "configs", replace(record(16), buckets={16: bucket(kernels="0" * 16)}))
    code, text = check(capsys, folder)
    assert (code, NAME in text) == (5, True)


def changed(**changes: Any) -> dict[str, Any]:
    return {**json.loads(record_text(record(16))), **changes}


def entry(**changes: Any) -> dict[str, Any]:
    data = changed()
    return {**data, "buckets": {"16": {**data["buckets"]["16"], **changes}}}


def layer(**changes: Any) -> dict[str, Any]:
    data = changed()
    return {**data, "layer": {**data["layer"], **changes}}


TWICE = record_text(record(16)).replace('"us": 50.0', '"us": 50.0, "us": 50.0')
INVALID: dict[str, tuple[dict[str, Any] | str, tuple[str, ...]]] = {
    "not JSON": ("{", ("JSON",)),
    "a list": ("[]", ("not a mapping",)),
    "a key twice": (TWICE, ("'us'", "twice")),
    "NaN": (record_text(record(16)).replace("50.0", "NaN"), ("NaN",)),
    "nested": ('{"schema":' + "[" * 50 + "]" * 50 + "}", ("nested",)),
    "very nested": ("[" * 10**5, ("nested",)),
    "newer schema": (changed(schema=2), ("schema", "2", "allowed: 1")),
    "no GPU": (changed(gpu=None), ("gpu", "None", "name and arch")),
    "GPU of lists": (changed(gpu={"name": [], "arch": {}}), ("gpu", "name and arch")),
    "unknown arch": (changed(gpu={"name": "X", "arch": "42"}), ("gpu.arch", "'42'", "90", "gfx942")),
    "no layer": (changed(layer=[1]), ("layer", "[1]", "num_experts")),
    "extra fact": (layer(colour="red"), ("layer.'colour'", "unknown", "num_experts")),
    "no experts": (layer(num_experts=0), ("layer.num_experts", "0")),
    "dtype of a list": (layer(dtype=["bfloat16"]), ("layer.dtype", "bfloat16")),
    "unknown quant": (layer(quant="magic"), ("layer.quant", "magic")),
    "unknown activation": (layer(activation="magic"), ("layer.activation", "magic")),
    "no buckets": (changed(buckets={}), ("buckets",)),
    "many buckets": (changed(buckets={str(i): {} for i in range(1, 400)}), ("buckets",)),
    "illegal tile": (entry(gemm1={**FIRST.to_dict(), "BLOCK_SIZE_N": 33}), ("buckets.16.gemm1", "BLOCK_SIZE_N=33")),
    "time of text": (entry(us="fast"), ("buckets.16.us", "'fast'", "a number")),
    "negative time": (entry(us=-1), ("buckets.16.us", "-1", "at least 0")),
    "huge count": (entry(tried=1 << 70), ("buckets.16.tried", "71 bits")),
    "true for a count": (entry(tried=True), ("buckets.16.tried", "True")),
    "list for a version": (entry(triton=["3.6.0"]), ("buckets.16.triton", "['3.6.0']")),
    "slower than the default": (entry(us=61.0), ("buckets.16.us", "slower than the default", "61.0", "60.0")),
    "another place": (layer(top_k=4), ("nvidia-h200", "e128_k4_h2048_i768_bf16_silu.json")),
}


@pytest.mark.parametrize("case", INVALID)
def test_check_finds(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, shown = INVALID[case]
    path = written(tmp_path, data)
    code, text = check(capsys, tmp_path)
    assert code == 3
    assert text.startswith(f"invalid: {path}: ")
    assert [word for word in shown if word not in text] == []
    assert text.splitlines()[-1].startswith("1 records: 1 invalid")


def test_one_per_cent_slower_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, entry(us=60.5))
    assert check(capsys, tmp_path)[0] == 0


def test_a_file_of_its_own_may_lie_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "anywhere.json"
    path.write_text(record_text(record()))
    assert check(capsys, path)[0] == 0


def test_check_without_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = check(capsys, tmp_path / "absent.json")
    assert (code, "absent.json: cannot be read" in text) == (3, True)


STALE = {
    "other kernels": ({"kernels": "0" * 16}, "kernels have changed"),
    "no kernels": ({"kernels": ""}, "kernels have changed"),
    "old Triton": ({"triton": "3.2.0"}, "tuned with Triton 3.2.0, supported: 3.6.0, 3.7.1"),
}


@pytest.mark.parametrize("case", STALE)
def test_stale(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, shown = STALE[case]
    path = written(tmp_path, Record(H200, LAYER, {1: bucket(), 2: bucket(**changes), 4: bucket(**changes)}))
    code, text = check(capsys, tmp_path)
    assert code == 5
    assert text.splitlines()[0].startswith(f"stale: {path}: buckets 2, 4: ")
    assert shown in text


def test_invalid_is_worse_than_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a", record(kernels="0" * 16))
    written(tmp_path / "b", "{")
    assert check(capsys, tmp_path / "a", tmp_path / "b")[0] == 3


def test_imported_tiles_do_not_grow_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, record(1, us=None, default_us=None, triton="", kernels="", source="E=128.json"))
    assert check(capsys, tmp_path)[0] == 0


# --------------------------------------------------------------------------------------------------------------- show


def test_show_lists_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without torch, so it checks no more than it shows; a broken record is named."""
    folder = emit(make_plan(model_spec("qwen3-30b-a3b")), tmp_path)
    imported = bucket(us=None, default_us=None, source="E=128.json")
    written(folder / "configs", Record(H200, LAYER, {1: bucket(us=30.0), 16: bucket(us=120.0), 64: imported}))
    other = folder / "configs" / "nvidia-b200" / "x.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"buckets": {"1": {"us": 1 << 2000, "default_us": 0}, "2": [], "4": {"us": "x"}}}))
    (other.parent / "y.json").write_text("{")
    assert cli.main(["show", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("tuned configs:")
    assert [line.strip() for line in lines[start + 1 :]] == [
        "nvidia-b200/x.json: 3 token counts from 1 to 4",
        lines[start + 2].strip(),
        f"{NAME}: 3 token counts from 1 to 64, 1 of them imported, 1.000 × default on average",
    ]
    assert lines[start + 2].strip().startswith("nvidia-b200/y.json: broken: ")


# -------------------------------------------------------------------------------------------------------- fingerprint


def test_a_package_has_the_kernels_of_today(tmp_path: Path) -> None:
    spec = small_spec(quant=("none", "fp8_w8a8:128x128"), hidden_size=256, intermediate_size=128, name="two-schemes")
    folder = emit(make_plan(spec), tmp_path)
    hashes = {variant: package_kernels(folder, variant.slug) for variant in spec.variants()}
    assert hashes == {variant: current_kernels(variant) for variant in spec.variants()}
    assert len(set(hashes.values())) == 2


def test_kernels_are_those_that_run(tmp_path: Path) -> None:
    """Comments, host code and other schemes' kernels do not make a time untrue; another instruction does."""
    spec = small_spec(quant=("none", "int8_w8a8:channel"), name="edited")
    plain, other = spec.variants()
    folder = emit(make_plan(spec), tmp_path)
    before = package_kernels(folder, plain.slug)

    def edit(name: str, change: Callable[[str], str]) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    def more(text: str) -> str:
        return text + "\n\n@triton.jit\ndef more(x):\n    return x\n"

    edit("_kernels_silu.py", lambda text: "# a remark\n\n" + text)
    for name in ("_dispatch.py", "runtime/reduce.py", "runtime/kernel_parts.py"):
        edit(name, lambda text: text + "\nunused = 1\n")
    for name in (*(module for module in plan_modules(spec) if "int8" in module), "runtime/quantise.py"):
        edit(name, more)
    assert package_kernels(folder, plain.slug) == before
    assert package_kernels(folder, other.slug) != current_kernels(other)
    edit("runtime/kernel_parts.py", more)
    assert not set(package_kernels(folder, plain.slug).split(".")) & set(before.split("."))


@pytest.mark.parametrize(
    ("module", "change", "plain", "quantised"),
    [
        ("align_kernels", "", ("portable", "cooperative"), ("portable", "cooperative")),
        ("reduce", "", ("portable", "cooperative"), ("portable", "cooperative")),
        ("quantise", "", (), ("portable", "cooperative")),  # stream quantises by itself
        ("kernel_parts", "", FAMILIES, FAMILIES),
        ("gluon_parts", "", ("cooperative", "stream"), ("cooperative", "stream")),
        ("cooperative_sizes", "more = 1", ("cooperative",), ("cooperative",)),
        ("stream_sizes", "more = 1", ("stream",), ("stream",)),
        ("stream_kernel", "", ("stream",), ("stream",)),
        ("stream_parts", "", ("stream",), ("stream",)),
        ("stream_rows", "", ("stream",), ("stream",)),
        ("stream_scales", "", ("stream",), ("stream",)),
        ("stream", "more = 1", (), ()),
    ],
)
def test_a_family_has_kernels_of_its_own(
    module: str, change: str, plain: tuple[str, ...], quantised: tuple[str, ...], tmp_path: Path
) -> None:
    spec = small_spec(quant=("none", "int8_w8a8:channel"), name="edited")
    folder = emit(make_plan(spec), tmp_path)
    path = folder / "runtime" / f"{module}.py"
    path.write_text(path.read_text() + "\n\n" + (change or "@triton.jit\ndef more(x):\n    return x") + "\n")
    for variant, changed in zip(spec.variants(), (plain, quantised), strict=True):
        pairs = [hashes.split(".") for hashes in (current_kernels(variant), package_kernels(folder, variant.slug))]
        found = [family for family, one, other in zip(FAMILIES, *pairs, strict=True) if one != other]
        assert tuple(found) == changed


def plan_modules(spec: Any) -> list[str]:
    return [f"{module.name}.py" for module in make_plan(spec).modules]


def test_spec_of_a_shard() -> None:
    shard = VariantSpec(num_experts=8, local_experts=2, top_k=2, hidden_size=64, intermediate_size=32, dtype="float16")
    assert spec_of(shard).variants() == (shard,)


def test_this_triton_is_supported() -> None:
    assert why_stale(current_kernels(LAYER), "portable", triton.__version__, LAYER) is None


def test_a_bucket_is_stale_when_its_own_family_has_changed() -> None:
    portable, cooperative, stream = current_kernels(LAYER).split(".")
    other = f"{portable}.0123456789abcdef.{stream}"
    assert why_stale(other, "portable", triton.__version__, LAYER) is None
    assert why_stale(other, "stream", triton.__version__, LAYER) is None
    assert why_stale(other, "cooperative", triton.__version__, LAYER) is not None
    assert why_stale(portable, "cooperative", triton.__version__, LAYER) is not None
    assert cooperative != stream


@pytest.mark.parametrize(("name", "arch"), [("NVIDIA H100 80GB HBM3", "90"), ("AMD Instinct MI300A", "gfx942")])
def test_facts_of_a_gpu_without_a_row(name: str, arch: str) -> None:
    facts = gpu_facts(name, arch)
    assert (facts.name, facts.arch) == (name, arch)
    (same,) = [known for known in TARGETS.values() if known.arch == arch]
    assert facts.shared_memory == same.shared_memory
