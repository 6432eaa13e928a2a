"""Tuned files of vLLM and SGLang: names, schemas, what a broken one does, and the way there and back."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moegen import cli
from moegen.device import TARGETS
from moegen.emit import emit
from moegen.interop import sglang, vllm
from moegen.interop.files import gpu_of, import_tiles, known_gpu, matching, nearest
from moegen.interop.strict import MAX_BYTES, FileError, read_json
from moegen.interop.table import FIELDS, IGNORED, offered, read_table
from moegen.plan import make_plan
from moegen.runtime.configs import RecordError
from moegen.runtime.tile import LayerTiles, TileConfig, why_illegal
from moegen.spec import MoESpec, VariantSpec
from moegen.tune.fingerprint import spec_of
from moegen.tune.record import Record, layer_of, load_record, record_text, write_record
from tests.support.records import H200, LAYER, TILES, bucket, record

VLLM_NAME = "E=128,N=768,device_name=NVIDIA_H200.json"
ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
UP = TileConfig(16, 128, 64, 1, SWAP_AB=False, PDL=True, num_warps=4, num_stages=3)


def variant(quant: str = "none", **changes: Any) -> VariantSpec:
    return replace(LAYER, quant=quant, **changes)


def tuned_file(folder: Path, data: object, name: str = VLLM_NAME) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def imported(path: Path, layer: VariantSpec = LAYER) -> dict[int, LayerTiles]:
    return import_tiles(path, layer, layer_of(layer), H200).tiles


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and messages of a command."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


# -------------------------------------------------------------------------------------------------------------- names

EP = variant("fp8_w8a8:128x128", num_experts=256, local_experts=32, intermediate_size=2048)
# layer, the driver's name of the GPU, vLLM's file, SGLang's file; None: there is none
NAMES: list[tuple[VariantSpec, str, str | None, str | None]] = [
    (LAYER, "NVIDIA H200", "E=128,N=768,device_name=NVIDIA_H200", "E=128,N=768,device_name=NVIDIA_H200"),
    (
        variant(dtype="float16"),
        "NVIDIA H200 NVL",
        "E=128,N=768,device_name=NVIDIA_H200",
        "E=128,N=768,device_name=NVIDIA_H200_NVL",
    ),
    (
        variant(dtype="float32"),
        "NVIDIA A100-SXM4-80GB",
        "E=128,N=768,device_name=NVIDIA_A100-SXM4-80GB,dtype=float32",
        "E=128,N=768,device_name=NVIDIA_A100-SXM4-80GB,dtype=float32",
    ),
    (
        variant("fp8_w8a8:tensor"),
        "NVIDIA H100 80GB HBM3",
        "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8",
        "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8",
    ),
    (
        variant("fp8_w8a8:channel"),
        "NVIDIA H200",
        "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8",
        "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,per_channel_quant=True",
    ),
    (variant("fp8_w8a8:tensor_token"), "NVIDIA H200", "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8", None),
    (
        EP,
        "NVIDIA H200",
        "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128]",
        "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128]",
    ),
    (
        variant("int8_w8a8:channel"),
        "NVIDIA H200",
        None,
        "E=128,N=768,device_name=NVIDIA_H200,dtype=int8_w8a8,per_channel_quant=True",
    ),
    (
        variant("int8_w8a8:128x128"),
        "NVIDIA H200",
        None,
        "E=128,N=768,device_name=NVIDIA_H200,dtype=int8_w8a8,block_shape=[128, 128]",
    ),
    (
        variant("int8_w8a16:channel"),
        "NVIDIA H200",
        "E=128,N=768,device_name=NVIDIA_H200,dtype=int8_w8a16",
        "E=128,N=768,device_name=NVIDIA_H200,dtype=int8_w8a16",
    ),
    (
        variant("int4_w4a16:g128z"),
        "AMD Instinct MI300X",
        "E=128,N=768,device_name=AMD_Instinct_MI300X,dtype=int4_w4a16",
        "E=128,N=384,device_name=AMD_Instinct_MI300X,dtype=int4_w4a16",
    ),
    (variant("mxfp4_w4a16:g32"), "NVIDIA H200", None, None),
]


@pytest.mark.parametrize("case", NAMES, ids=lambda case: f"{case[0].dtype} {case[0].quant}")
def test_file_names(case: tuple[VariantSpec, str, str | None, str | None]) -> None:
    layer, gpu, *expected = case
    for engine, name in zip((vllm, sglang), expected, strict=True):
        if name is None:
            with pytest.raises(FileError, match=layer.slug):
                engine.file_name(layer, gpu)
        else:
            assert engine.file_name(layer, engine.device_name(gpu)) == f"{name}.json"


@pytest.mark.parametrize("case", NAMES, ids=lambda case: f"{case[0].dtype} {case[0].quant}")
def test_a_name_finds_its_layer(case: tuple[VariantSpec, str, str | None, str | None]) -> None:
    layer, _, *names = case
    others = [variant(intermediate_size=1024), variant("int8_w8a16:channel", num_experts=64, local_experts=64), layer]
    for name in (name for name in names if name is not None):
        assert matching(Path(f"{name}.json"), others) == layer
        assert matching(Path(f"{name}_down.json"), others) == layer


def test_a_gpu_s_names() -> None:
    assert vllm.device_name("AMD  Instinct/MI300X") == "AMD_Instinct_MI300X"
    assert gpu_of(Path("E=1,N=2,device_name=NVIDIA_H20-3e,dtype=fp8_w8a8.json")) == "NVIDIA_H20-3e"
    assert gpu_of(Path("E=1,N=2,device_name=NVIDIA_H200_down.json")) == "NVIDIA_H200"
    assert known_gpu("NVIDIA_H200") == H200
    assert known_gpu("NVIDIA_H20-3e") is None
    mine = replace(H200, name="NVIDIA H20-3e")
    assert known_gpu("NVIDIA_H20-3e", [mine]) == mine


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tuned.json", ("device_name",)),
        ("E=8,N=768,device_name=NVIDIA_H200.json", ("no layer looks for this name", VLLM_NAME)),
        (VLLM_NAME.replace(".json", ",dtype=fp8_w8a8.json"), ("no layer looks for this name",)),
    ],
)
def test_a_name_without_a_layer(name: str, shown: tuple[str, ...]) -> None:
    with pytest.raises(FileError) as caught:
        matching(Path(name), [LAYER])
    assert [text for text in (name, *shown) if text not in str(caught.value)] == []


def test_a_name_of_several_layers() -> None:
    with pytest.raises(FileError, match="--layer"):
        matching(Path(VLLM_NAME), [LAYER, variant(top_k=4)])


# ------------------------------------------------------------------------------------------------------------- import


def test_import_vllm(tmp_path: Path) -> None:
    data = {"triton_version": "3.6.0", "64": {**ENTRY, "num_warps": 8}, "1": {**ENTRY, "waves_per_eu": 2, "SPLIT_K": 1}}
    assert imported(tuned_file(tmp_path, data)) == {
        1: LayerTiles(UP, UP),
        64: LayerTiles(replace(UP, num_warps=8), replace(UP, num_warps=8)),
    }


def test_import_sglang(tmp_path: Path) -> None:
    """Both files, by either name; the down GEMM takes the nearest entry and the up GEMM's BLOCK_SIZE_M."""
    up = {"1": {key: ENTRY[key] for key in FIELDS[:4]}, "64": {**ENTRY, "BLOCK_SIZE_M": 64}}
    down = {"60": {**ENTRY, "BLOCK_SIZE_N": 64, "USE_TMA": True}}
    path = tuned_file(tmp_path, up)
    beside = tuned_file(tmp_path, down, VLLM_NAME.replace(".json", "_down.json"))
    narrow = replace(UP, BLOCK_SIZE_N=64)
    expected = {
        1: LayerTiles(UP, narrow),
        64: LayerTiles(replace(UP, BLOCK_SIZE_M=64), replace(narrow, BLOCK_SIZE_M=64)),
    }
    assert imported(path) == expected
    assert imported(beside) == expected


def test_as_the_engines_launch_it(tmp_path: Path) -> None:
    """BLOCK_SIZE_K is cut down to the quant group; fp8 operands swap where the token side is short."""
    data = {"1": {**ENTRY, "BLOCK_SIZE_K": 256}, "64": {**ENTRY, "BLOCK_SIZE_M": 64}}
    name = VLLM_NAME.replace(".json", ",dtype=fp8_w8a8,block_shape=[128,128].json")
    found = imported(tuned_file(tmp_path, data, name), variant("fp8_w8a8:128x128"))
    assert found[1].gemm1 == replace(UP, BLOCK_SIZE_K=128, SWAP_AB=True)
    assert found[64].gemm1 == replace(UP, BLOCK_SIZE_M=64)


def test_illegal_here_is_left_out(tmp_path: Path) -> None:
    """vLLM ships hand-made entries that moegen's kernels have no tile for."""
    data = {"1": {**ENTRY, "BLOCK_SIZE_M": 4}, "2": ENTRY, "4": {**ENTRY, "BLOCK_SIZE_N": 256, "num_stages": 8}}
    path = tuned_file(tmp_path, data)
    found = import_tiles(path, LAYER, layer_of(LAYER), H200)
    assert list(found.tiles) == [2]
    assert [line.split(": ")[1] for line in found.skipped] == ["1", "4"]
    assert "BLOCK_SIZE_M=4 is outside" in found.skipped[0]


def test_nothing_legal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"1: gemm1: BLOCK_SIZE_M=4.*no token count"):
        imported(tuned_file(tmp_path, {"1": {**ENTRY, "BLOCK_SIZE_M": 4}}))


@pytest.mark.parametrize(("quant", "exported"), [("none", 16), ("fp8_w8a8:128x128", 8)])
def test_eight_tokens(quant: str, exported: int, tmp_path: Path) -> None:
    """Both projects launch them with swapped operands only, which they have for fp8 alone."""
    layer = variant(quant)
    name = vllm.file_name(layer, "NVIDIA_H200")
    found = imported(tuned_file(tmp_path, {"1": {**ENTRY, "BLOCK_SIZE_M": 8}}, name), layer)[1]
    assert found.gemm1 == replace(UP, BLOCK_SIZE_M=8, SWAP_AB=True)
    assert exported == offered(found, layer, H200).gemm1.BLOCK_SIZE_M
    narrow = LayerTiles(found.gemm1, replace(found.gemm2, BLOCK_SIZE_N=32))
    assert {tile.BLOCK_SIZE_M for tile in (offered(narrow, layer, H200).gemm1, offered(narrow, layer, H200).gemm2)} == {
        16
    }
    assert offered(found, layer, TARGETS["cuda:100"]).gemm1.BLOCK_SIZE_M == 16


def test_nearest_is_the_engines_rule() -> None:
    table = {1: UP, 8: replace(UP, num_warps=8), 64: replace(UP, num_warps=2)}
    assert [nearest(table, tokens).num_warps for tokens in (1, 4, 5, 36, 37, 10**6)] == [4, 4, 8, 8, 2, 2]


def with_entry(**changes: Any) -> dict[str, Any]:
    return {"1": ENTRY, "16": {**ENTRY, **changes}}


def with_text(text: str) -> str:
    """A file whose 16.num_warps is `text`, which need not be JSON that Python would write."""
    return json.dumps(with_entry(num_warps="@")).replace('"@"', text)


BROKEN: dict[str, tuple[object, tuple[str, ...]]] = {
    "empty": ("", ("JSON",)),
    "cut off": (json.dumps(with_entry())[:-9], ("JSON",)),
    "HTML": ("<html>404</html>", ("JSON",)),
    "a list": ([ENTRY], ("not a mapping",)),
    "null": ("null", ("not a mapping",)),
    "no buckets": ({"triton_version": "3.6.0"}, ("0 keys",)),
    "too many buckets": ({str(t): ENTRY for t in range(1, 300)}, ("299 keys",)),
    "deeply nested": ("[" * 10**5, ("nested",)),
    "nested": ('{"1":' + "[" * 20 + "]" * 20 + "}", ("nested",)),
    "nested mapping": (with_entry(num_warps={"a": {"b": 1}}), ("16.'num_warps'", "{'a': {'b': 1}}")),
    "bucket twice": ('{"1": {}, "1": {}}', ("'1'", "twice")),
    "key twice": (json.dumps(with_entry()).replace("}}", ', "num_warps": 8}}'), ("'num_warps'", "twice")),
    "bucket 0": ({"0": ENTRY}, ("'0'", "token count")),
    "negative bucket": ({"-1": ENTRY}, ("'-1'", "token count")),
    "bucket of text": ({"many": ENTRY}, ("'many'", "token count")),
    "bucket with a blank": ({" 16": ENTRY}, ("' 16'", "token count")),
    "bucket of Arabic digits": ({"٣": ENTRY}, ("'٣'", "token count")),
    "huge bucket": ({"9" * 5000: ENTRY}, ("'999", "token count")),
    "entry of a list": ({"16": list(ENTRY.values())}, ("16:", "not a mapping")),
    "unknown key": (with_entry(BLOCK_SIZE=1), ("16.'BLOCK_SIZE'", "unknown key", "num_warps")),
    "missing key": ({"16": {"BLOCK_SIZE_M": 16}}, ("16.BLOCK_SIZE_N", "missing")),
    "text": (with_entry(num_warps="4"), ("16.'num_warps'", "'4'", "an integer")),
    "float": (with_entry(num_warps=4.0), ("16.'num_warps'", "4.0", "an integer")),
    "boolean": (with_entry(num_stages=True), ("16.'num_stages'", "True")),
    "null value": (with_entry(BLOCK_SIZE_K=None), ("16.'BLOCK_SIZE_K'", "None")),
    "zero": (with_entry(GROUP_SIZE_M=0), ("16.'GROUP_SIZE_M'", "0")),
    "negative": (with_entry(num_stages=-3), ("16.'num_stages'", "-3")),
    "no power of two": (with_entry(BLOCK_SIZE_N=96), ("16.'BLOCK_SIZE_N'", "96", "power of two")),
    "huge number": (with_entry(BLOCK_SIZE_N=1 << 4000), ("16.'BLOCK_SIZE_N'", "4001 bits")),
    "absurd number": (with_text("1" * 5000), ("JSON",)),
    "NaN": (with_text("NaN"), ("NaN",)),
    "infinity": (with_text("-Infinity"), ("Infinity",)),
    "float too large": (with_text("1e999"), ("1e999",)),
    "long text": (with_entry(num_warps="x" * 10**6), ("16.'num_warps'", "'xxx")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    data, shown = BROKEN[case]
    path = tuned_file(tmp_path, data)
    with pytest.raises(FileError) as caught:
        imported(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert [text for text in shown if text not in message] == []
    assert len(message) < len(str(path)) + 400


def test_broken_down_file(tmp_path: Path) -> None:
    path = tuned_file(tmp_path, with_entry())
    beside = tuned_file(tmp_path, "{", VLLM_NAME.replace(".json", "_down.json"))
    with pytest.raises(FileError, match=r"_down\.json: not a readable JSON file"):
        imported(path)
    beside.unlink()
    assert imported(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(FileError, match="cannot be read"):
            read_table(path)
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(FileError, match="not a readable JSON file"):
        read_table(path)


def test_a_billion_buckets(tmp_path: Path) -> None:
    """Refused by its size before anything is parsed."""
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(40 * 10**9)
    with pytest.raises(FileError, match=f"longer than {MAX_BYTES} bytes"):
        read_json(path)


# -------------------------------------------------------------------------------------------- broken files at random

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 16, 64, 2**16, 2**31, 2**63, 2**64, 10**30, 1 << 5000, 1.5, 1e308, -0.0,
    "", "16", "NaN", "\x00", "𝟙", [], [16], {}, {"a": 1}, ENTRY, [[[[[]]]]],
]  # fmt: skip
KEYS = [
    "",
    "0",
    "-1",
    "1",
    "1e9",
    "16",
    "00016",
    "16777217",
    "9" * 40,
    "triton_version",
    "buckets",
    "gpu",
    "schema",
    "us",
    *FIELDS,
]


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def mutated(rng: random.Random, data: Any) -> Any:
    """The value with one place replaced, removed, renamed or filled with something else."""
    data = json.loads(json.dumps(data))
    place = rng.choice(places(data)[1:])
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    key, action = place[-1], rng.randrange(4)
    if action == 0:
        inside[key] = rng.choice(VALUES)
    elif action == 1:
        del inside[key]
    elif action == 2 and isinstance(inside, dict):
        inside[rng.choice(KEYS)] = inside.pop(key)
    else:
        inside[key] = {rng.choice(KEYS): rng.choice(VALUES), rng.choice(KEYS): inside[key]}
    return data


def damaged(rng: random.Random, text: str) -> bytes:
    """The text with a few bytes replaced, removed, doubled or cut off."""
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        action = rng.randrange(4)
        if action == 0:
            raw[at] = rng.randrange(256)
        elif action == 1:
            del raw[at : at + rng.randint(1, 8)]
        elif action == 2:
            raw[at:at] = raw[at : at + rng.randint(1, 30)]
        else:
            raw = raw[: at + 1]
    return bytes(raw)


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What was read, or the message of the error that a broken file is allowed to be."""
    try:
        return read(path)
    except (FileError, RecordError) as error:
        return str(error)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_never_crash(seed: int, tmp_path: Path) -> None:
    """Whatever is in it: legal tile configs, or an error that begins with the file's name."""
    rng = random.Random(seed)  # noqa: S311
    table = {"triton_version": "3.6.0", **{str(2**i): ENTRY for i in range(6)}}
    path, refused = tmp_path / VLLM_NAME, 0
    for turn in range(250):
        data = mutated(rng, mutated(rng, table) if turn % 3 == 0 else table)
        path.write_bytes(json.dumps(data).encode() if turn % 2 else damaged(rng, json.dumps(table, indent=1)))
        found = outcome(imported, path)
        if isinstance(found, str):
            assert found.startswith(f"{path}: ")
            refused += 1
            continue
        for pair in found.values():
            assert why_illegal(pair.gemm1, layer_of(LAYER).gemm("gemm1"), H200) is None
            assert why_illegal(pair.gemm2, layer_of(LAYER).gemm("gemm2"), H200) is None
    assert 20 < refused < 250


@pytest.mark.parametrize("seed", range(8))
def test_mutated_records_never_crash(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)  # noqa: S311
    text = record_text(record(1, 16, 64))
    path, refused = tmp_path / "record.json", 0
    for turn in range(250):
        path.write_bytes(json.dumps(mutated(rng, json.loads(text))).encode() if turn % 2 else damaged(rng, text))
        found = outcome(load_record, path)
        if isinstance(found, str):
            assert found.startswith(f"{path}: ")
            refused += 1
            continue
        assert all(found.buckets)
        path.write_text(record_text(found))
        assert load_record(path) == found
    assert 50 < refused <= 250


# ------------------------------------------------------------------------------------------------------------- export


def test_export_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in" / record().name
    write_record(path, record(64, 1))
    code, text, messages = run(capsys, "export", path, "--format", "vllm", "-o", tmp_path / "out")
    out = tmp_path / "out" / VLLM_NAME
    assert (code, text) == (0, f"{out}\n")
    assert "token counts 1, 64: gemm1's tile config" in messages
    expected = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 5, "num_warps": 2}
    assert json.loads(out.read_text()) == {
        "triton_version": "3.6.0",
        "1": {**expected, "num_stages": 2},
        "64": {**expected, "num_stages": 2},
    }
    assert list(json.loads(out.read_text())["1"]) == list(FIELDS)


def test_export_sglang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files for each Triton version, whose values are those of the two GEMMs and nothing else."""
    write_record(tmp_path / "in" / record().name, Record(H200, LAYER, {1: bucket(), 64: bucket(triton="3.7.1")}))
    code, text, messages = run(capsys, "export", tmp_path / "in", "--format", "sglang", "-o", tmp_path / "out")
    assert (code, messages) == (0, "")
    stem = VLLM_NAME.removesuffix(".json")
    names = [f"triton_{v}/{stem}{end}.json" for v in ("3_6_0", "3_7_1") for end in ("", "_down")]
    assert text.splitlines() == [f"{tmp_path}/out/{name}" for name in names]
    up, down, newer, _ = [json.loads((tmp_path / "out" / name).read_text()) for name in names]
    assert (list(up), list(down), list(newer)) == (["1"], ["1"], ["64"])
    assert up["1"] == {key: getattr(TILES.gemm1, key) for key in FIELDS}
    assert down["1"] == {key: getattr(TILES.gemm2, key) for key in FIELDS}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_family_of_moegens_own_is_replaced(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody else has its kernels: without a journal, the heuristic's tile config of the portable family."""
    tile = TileConfig(1, 16, 512, PDL=True, num_stages=6, family="stream")
    write_record(tmp_path / "in" / record().name, record(1, tiles=LayerTiles(tile, tile)))
    assert run(capsys, "export", tmp_path / "in", "--format", engine, "-o", tmp_path / "out")[0] == 0
    for file in (tmp_path / "out").rglob("*.json"):
        exported = json.loads(file.read_text())["1"]
        assert (exported["BLOCK_SIZE_M"], exported["BLOCK_SIZE_K"]) == (16, 128)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_there_and_back(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export, import into a fresh package, and the dispatcher has the six fields that all three know."""
    write_record(tmp_path / "in" / record().name, record(1, 64, tiles=LayerTiles(TILES.gemm1, TILES.gemm1)))
    _, text, _ = run(capsys, "export", tmp_path / "in", "--format", engine, "-o", tmp_path / "out")
    folder = emit(make_plan(spec_of(LAYER)), tmp_path)
    code, _, messages = run(capsys, "import", text.splitlines()[0], folder)
    assert (code, messages) == (0, "")
    found = load_record(folder / "configs" / record().name)
    tile = replace(TILES.gemm1, PDL=True)
    name = Path(text.splitlines()[0]).name
    assert {tokens: (entry.tiles, entry.source) for tokens, entry in found.buckets.items()} == {
        1: (LayerTiles(tile, tile), name),
        64: (LayerTiles(tile, tile), name),
    }
    assert run(capsys, "check", folder)[0] == 0


def test_several_layers_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Record(H200, variant(top_k=4), {1: bucket(tiles=LayerTiles(UP, UP))})
    for one in (record(1), other):
        write_record(tmp_path / one.name, one)
    code, text, message = run(capsys, "export", tmp_path, "--format", "vllm", "-o", tmp_path / "out")
    assert (code, text) == (3, "")
    assert VLLM_NAME in message
    assert "--layer" in message
    assert not (tmp_path / "out").exists()
    slug = other.variant.slug
    assert run(capsys, "export", tmp_path, "--format", "vllm", "-o", tmp_path / "out", "--layer", slug)[0] == 0
    assert read_table(tmp_path / "out" / VLLM_NAME)[1] == replace(UP, PDL=False)


@pytest.mark.parametrize(
    ("layer", "tiles", "engine", "shown"),
    [
        (variant("int8_w8a8:channel"), {}, "vllm", "int8_w8a8: it reads the file of bfloat16"),
        (variant("mxfp4_w4a16:g32"), {}, "sglang", "mxfp4_w4a16:g32"),
        (LAYER, {"triton": ""}, "sglang", "no Triton version"),
        (LAYER, {"source": "E=1.json"}, "vllm", "every bucket was imported"),
    ],
)
def test_nothing_to_export(
    layer: VariantSpec, tiles: dict[str, Any], engine: str, shown: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "one.json"
    tile = TileConfig(16, 64, 128)
    path.write_text(record_text(Record(H200, layer, {1: bucket(tiles=LayerTiles(tile, tile), **tiles)})))
    code, text, message = run(capsys, "export", path, "--format", engine, "-o", tmp_path / "out")
    assert (code, text) == (3, "")
    assert shown in message


# ----------------------------------------------------------------------------------------------------- import command


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return emit(make_plan(MoESpec.from_dict({**spec_of(LAYER).to_dict(), "dtypes": ["bfloat16", "float32"]})), tmp_path)


def test_measured_buckets_stay(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = package / "configs" / record().name
    old = bucket(us=None, default_us=None, source="older.json")
    write_record(path, Record(H200, LAYER, {1: bucket(), 64: old, 4096: old}))
    code, text, _ = run(capsys, "import", tuned_file(tmp_path, {"1": ENTRY, "16": ENTRY, "64": ENTRY}), package)
    assert (code, text) == (0, f"{path}: 2 of 3 token counts in use as a fallback\n")
    sources = {tokens: found.source for tokens, found in load_record(path).buckets.items()}
    assert sources == {1: "", 16: VLLM_NAME, 64: VLLM_NAME, 4096: "older.json"}
    assert load_record(path).buckets[1] == bucket()


def test_import_names_what_it_leaves_out(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tuned_file(tmp_path, {"1": ENTRY, "16": {**ENTRY, "BLOCK_SIZE_M": 4}})
    code, _, messages = run(capsys, "import", path, package)
    assert code == 0
    assert f"left out: {path}: 16: gemm1: BLOCK_SIZE_M=4" in messages


def test_import_for_another_gpu(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tuned_file(tmp_path, {"1": ENTRY}, VLLM_NAME.replace("H200", "H100_80GB_HBM3"))
    code, _, message = run(capsys, "import", path, package)
    assert (code, "NVIDIA_H100_80GB_HBM3" in message, "--target" in message) == (3, True, True)
    assert run(capsys, "import", path, package, "--target", "cuda:91")[0] == 3
    assert run(capsys, "import", path, package, "--target", "cuda:90")[0] == 0
    (written,) = (package / "configs").glob("*/*.json")
    assert written.parent.name == "nvidia-h100-80gb-hbm3"
    assert load_record(written).gpu == replace(TARGETS["cuda:90"], name="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("data", ["{", {"1": {**ENTRY, "num_warps": 3}}])
def test_a_failed_import_changes_nothing(data: object, package: Path, tmp_path: Path, capsys: Any) -> None:
    path = package / "configs" / record().name
    write_record(path, record())
    before = path.read_text()
    code, text, message = run(capsys, "import", tuned_file(tmp_path, data), package)
    assert (code, text) == (3, "")
    assert VLLM_NAME in message
    assert path.read_text() == before


def test_import_names_an_unknown_layer(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = run(capsys, "import", tuned_file(tmp_path, {"1": ENTRY}), package, "--layer", "absent")
    assert (code, LAYER.slug in message) == (3, True)


def test_every_ignored_key_is_accepted(tmp_path: Path) -> None:
    assert imported(tuned_file(tmp_path, {"1": {**ENTRY, **dict.fromkeys(IGNORED, 1)}})) == {1: LayerTiles(UP, UP)}
