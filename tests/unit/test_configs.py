"""Where tile configs come from: records of the user and the package, the heuristic, and what is refused and said."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from moegen.device import TARGETS
from moegen.runtime.activations import Activation
from moegen.runtime.configs import BUCKETS, ENV_CONFIG_DIR, Configs, RecordError, bucket_of, layer_facts, read_record
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.layer import Layer
from moegen.runtime.quant import Scheme
from moegen.runtime.tile import LayerTiles, TileConfig

H200 = TARGETS["cuda:90"]
LAYER = Layer(
    slug="e128_k8_h2048_i768_bf16_silu",
    num_experts=128,
    local_experts=128,
    top_k=8,
    hidden_size=2048,
    intermediate_size=768,
    dtype=torch.bfloat16,
    scheme=Scheme(),
    activation=Activation.of("silu"),
    bias=False,
    kernels=SimpleNamespace(),  # type: ignore[arg-type]
)
# No heuristic answer looks like these.
TILE = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 5, "num_warps": 2, "num_stages": 2}
OTHER = {**TILE, "GROUP_SIZE_M": 7}
STREAM = {"BLOCK_SIZE_M": 1, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 512, "num_stages": 5, "family": "stream"}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "gpu": {"name": "NVIDIA H200", "arch": "90"},
        "layer": layer_facts(LAYER),
        "triton": triton.__version__,
        "buckets": {"16": {"gemm1": TILE, "gemm2": TILE}, "64": {"gemm1": OTHER, "gemm2": OTHER}},
        **changes,
    }


def write(folder: Path, data: object) -> Path:
    path = folder / "nvidia-h200" / f"{LAYER.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def tiles(data: dict[str, Any]) -> LayerTiles:
    return LayerTiles(TileConfig.from_dict(data), TileConfig.from_dict(data))


def heuristic(tokens: int, portable: bool = False) -> LayerTiles:
    low_latency = tokens * 8 * 4 <= 128
    return default_tiles(LAYER.gemm("gemm1"), LAYER.gemm("gemm2"), bucket_of(tokens), H200, low_latency, portable)


@pytest.fixture(autouse=True)
def _no_user_folder(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(ENV_CONFIG_DIR, raising=False)
    caplog.set_level(logging.INFO, logger="moegen")


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    # between 24 and 32 the geometric mean is 27.7; 512 and 1024 meet at 724.1; 65536 is the last one
    [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 4),
        (6, 8),
        (27, 24),
        (28, 32),
        (724, 512),
        (725, 1024),
        (10**6, 65536),
        (1 << 24, 65536),
    ],
)
def test_bucket_of(tokens: int, bucket: int) -> None:
    assert bucket_of(tokens) == bucket


def test_bucket_of_a_tie_is_the_smaller() -> None:
    assert bucket_of(2, (1, 4)) == 1
    assert bucket_of(4, (2, 8)) == 2


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_bucket_is_its_own_nearest(bucket: int) -> None:
    assert bucket_of(bucket) == bucket


@pytest.mark.parametrize(
    ("tokens", "found"),
    # buckets 16 and 64; in use within half an octave of either
    [
        (16, TILE),
        (22, TILE),
        (23, None),
        (45, None),
        (46, OTHER),
        (64, OTHER),
        (12, TILE),
        (90, OTHER),
        (11, None),
        (91, None),
        (1, None),
        (4096, None),
    ],
)
def test_range_of_a_record(tokens: int, found: dict[str, Any] | None, tmp_path: Path) -> None:
    assert math.isclose(16 / math.sqrt(2), 11.3, abs_tol=0.1)
    write(tmp_path, record())
    expected = heuristic(tokens) if found is None else tiles(found)
    assert Configs(tmp_path).tiles(LAYER, tokens, None, H200) == expected


def test_gemms_may_differ_in_all_but_block_m(tmp_path: Path) -> None:
    write(tmp_path, record(buckets={"8": {"gemm1": TILE, "gemm2": {**OTHER, "BLOCK_SIZE_N": 128}}}))
    found = Configs(tmp_path).tiles(LAYER, 8, None, H200)
    assert (found.gemm1.BLOCK_SIZE_N, found.gemm2.BLOCK_SIZE_N) == (64, 128)


def test_user_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    user, package = tmp_path / "user", tmp_path / "package"
    path = write(user, record(buckets={"16": {"gemm1": OTHER, "gemm2": OTHER}}))
    write(package, record())
    monkeypatch.setenv(ENV_CONFIG_DIR, str(user))
    assert Configs(package).tiles(LAYER, 16, None, H200) == tiles(OTHER)
    assert str(path) in caplog.text


def test_broken_user_record_falls_back_to_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path = write(tmp_path / "user", "{")
    own = write(tmp_path / "package", record())
    monkeypatch.setenv(ENV_CONFIG_DIR, str(tmp_path / "user"))
    assert Configs(tmp_path / "package").tiles(LAYER, 16, None, H200) == tiles(TILE)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert str(path) in caplog.records[0].getMessage()
    assert str(own) in caplog.records[1].getMessage()


def change(**tile: Any) -> dict[str, Any]:
    return record(buckets={"16": {"gemm1": TILE, "gemm2": {**TILE, **tile}}})


def layer_with(**fields: Any) -> dict[str, Any]:
    return record(layer={**layer_facts(LAYER), **fields})


def with_value(text: str) -> str:
    """A record whose gemm2.num_warps is `text`, which need not be JSON that Python would write."""
    return json.dumps(change(num_warps="@")).replace('"@"', text)


# file contents, what the message names
REFUSED: dict[str, tuple[object, tuple[str, ...]]] = {
    "empty file": ("", ("JSON",)),
    "broken JSON": ('{"schema": 1,', ("JSON",)),
    "not UTF-8": ("\udcff", ("JSON",)),
    "deeply nested": ("[" * 100_000, ("JSON",)),
    "a list": ("[]", ("schema", "list")),
    "null": ("null", ("schema",)),
    "no schema": ({"gpu": {}}, ("schema", "None", "allowed: 1")),
    "newer schema": (record(schema=2), ("schema", "2", "allowed: 1")),
    "schema of text": (record(schema="1"), ("schema", "'1'", "allowed: 1")),
    "schema true": (record(schema=True), ("schema", "True", "allowed: 1")),
    "other GPU": (record(gpu={"name": "NVIDIA B200", "arch": "100"}), ("gpu", "NVIDIA B200", "NVIDIA H200")),
    "other arch": (record(gpu={"name": "NVIDIA H200", "arch": "80"}), ("gpu", "'80'", "'90'")),
    "no GPU": (record(gpu=None), ("gpu", "None")),
    "other experts": (layer_with(num_experts=64), ("layer", "64")),
    "other dtype": (layer_with(dtype="float16"), ("layer", "float16")),
    "other quant": (layer_with(quant="int8_w8a8:channel"), ("layer", "int8_w8a8:channel")),
    "other activation": (layer_with(activation="gelu"), ("layer", "gelu")),
    "extra fact": (layer_with(colour="red"), ("layer", "red")),
    "no layer": (record(layer=[]), ("layer", "[]")),
    "no buckets": (record(buckets={}), ("buckets", "{}")),
    "buckets of a list": (record(buckets=[1]), ("buckets", "[1]")),
    "bucket 0": (record(buckets={"0": {}}), ("buckets.0", "token count")),
    "negative bucket": (record(buckets={"-1": {}}), ("buckets.-1", "token count")),
    "bucket of text": (record(buckets={"many": {}}), ("buckets.many", "token count")),
    "bucket of Arabic digits": (record(buckets={"٣": {"gemm1": TILE, "gemm2": TILE}}), ("buckets.٣", "token count")),
    "bucket with leading zero": (record(buckets={"016": {"gemm1": TILE, "gemm2": TILE}}), ("buckets.016",)),
    "huge bucket": (record(buckets={str(1 << 25): {}}), ("buckets.33554432", "token count")),
    "absurd bucket": (record(buckets={"1" * 5000: {}}), ("buckets.1111", "token count")),
    "bucket of null": (record(buckets={"16": None}), ("buckets.16.gemm1", "None")),
    "no gemm2": (record(buckets={"16": {"gemm1": TILE}}), ("buckets.16.gemm2", "None")),
    "no BLOCK_SIZE_N": (
        record(buckets={"16": {"gemm1": {"BLOCK_SIZE_M": 16}, "gemm2": TILE}}),
        ("buckets.16.gemm1.BLOCK_SIZE_N", "missing"),
    ),
    "bool for int": (change(num_stages=True), ("buckets.16.gemm2.num_stages", "True", "int")),
    "int for bool": (change(SWAP_AB=1), ("buckets.16.gemm2.SWAP_AB", "1", "bool")),
    "float for int": (change(num_stages=2.0), ("buckets.16.gemm2.num_stages", "2.0", "int")),
    "nested": (change(num_stages={"a": [1]}), ("buckets.16.gemm2.num_stages", "{'a': [1]}")),
    "unknown key": (change(colour=1), ("buckets.16.gemm2.colour", "unknown key", "num_warps")),
    "unknown family": (change(family="magic"), ("buckets.16.gemm2.family", "magic", "portable")),
    "NaN": (with_value("NaN"), ("buckets.16.gemm2.num_warps", "nan")),
    "infinity": (with_value("1e999"), ("buckets.16.gemm2.num_warps", "inf")),
    "huge number": (with_value("1" + "0" * 30), ("buckets.16.gemm2", "num_warps")),
    "absurd number": (with_value("1" * 5000), ("JSON",)),
    "huge power of two": (change(BLOCK_SIZE_K=1 << 4000), ("buckets.16.gemm2", "BLOCK_SIZE_K")),
    "negative": (change(num_warps=-4), ("buckets.16.gemm2", "num_warps=-4")),
    "illegal tile": (change(BLOCK_SIZE_N=33), ("buckets.16.gemm2", "BLOCK_SIZE_N=33 is not a power of two")),
    "too much shared memory": (
        change(BLOCK_SIZE_N=256, BLOCK_SIZE_K=256, num_stages=8, num_warps=8),
        ("buckets.16.gemm2", "shared memory"),
    ),
    "half a stream": (
        record(buckets={"1": {"gemm1": {**STREAM, "num_stages": 4}, "gemm2": STREAM}}),
        ("buckets.1", "family=stream is not allowed", "one tile config for both GEMMs"),
    ),
    "stream of one token for two": (
        record(buckets={"2": {"gemm1": STREAM, "gemm2": STREAM}}),
        ("buckets.2", "family=stream is not allowed", "in the bucket of its BLOCK_SIZE_M"),
    ),
    "stream of four tokens for three": (
        record(buckets={"3": {op: {**STREAM, "BLOCK_SIZE_M": 4} for op in ("gemm1", "gemm2")}}),
        ("buckets.3", "family=stream is not allowed", "in the bucket of its BLOCK_SIZE_M"),
    ),
    "assignment that is no flag": (
        record(buckets={"16": {"gemm1": TILE, "gemm2": TILE, "low_latency": 1}}),
        ("buckets.16.low_latency", "1 is not allowed", "true or false"),
    ),
    "assignment of a stream": (
        record(buckets={"1": {"gemm1": STREAM, "gemm2": STREAM, "low_latency": True}}),
        ("buckets.1.low_latency", "one assignment"),
    ),
    "different BLOCK_SIZE_M": (change(BLOCK_SIZE_M=64), ("buckets.16", "BLOCK_SIZE_M", "32 and 64", "one value")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, shown = REFUSED[case]
    path = write(tmp_path, {}) if case == "not UTF-8" else write(tmp_path, data)
    if case == "not UTF-8":
        path.write_bytes(b'{"schema": "\xff"}')
    with pytest.raises(RecordError) as caught:
        read_record(path, LAYER, H200)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert [text for text in shown if text not in message] == []

    assert Configs(tmp_path).tiles(LAYER, 16, None, H200) == heuristic(16)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert message in warning


@pytest.mark.parametrize("low_latency", [True, False, None])
def test_a_bucket_may_choose_its_assignment(low_latency: bool | None, tmp_path: Path) -> None:
    entry = {"gemm1": TILE, "gemm2": TILE, "low_latency": low_latency}
    write(tmp_path, record(buckets={"16": entry}))
    assert Configs(tmp_path).tiles(LAYER, 16, None, H200) == replace(tiles(TILE), low_latency=low_latency)


@pytest.mark.parametrize(("block_m", "served"), [(1, [1]), (2, [2]), (4, [3, 4, 5])])
def test_stream_serves_few_tokens(block_m: int, served: list[int], tmp_path: Path) -> None:
    tile = {**STREAM, "BLOCK_SIZE_M": block_m}
    write(tmp_path, record(buckets={str(block_m): {"gemm1": tile, "gemm2": tile}}))
    configs = Configs(tmp_path)
    for tokens in range(1, 8):
        expected = tiles(tile) if tokens in served else heuristic(tokens)
        assert configs.tiles(LAYER, tokens, None, H200) == expected


@pytest.mark.parametrize("with_record", [False, True])
def test_a_portable_answer_is_always_there(with_record: bool, tmp_path: Path) -> None:
    if with_record:
        write(tmp_path, record(buckets={"1": {"gemm1": STREAM, "gemm2": STREAM}}))
    found = Configs(tmp_path).tiles(LAYER, 1, None, H200, portable=True)
    assert found == heuristic(1, portable=True)
    assert (found.gemm1.family, found.gemm2.family) == ("portable", "portable")


def test_folder_in_place_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200" / f"{LAYER.slug}.json"
    path.mkdir(parents=True)
    assert Configs(tmp_path).tiles(LAYER, 16, None, H200) == heuristic(16)
    with pytest.raises(RecordError):
        read_record(path, LAYER, H200)


def test_another_triton_warns_and_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, record(triton="3.0.0"))
    assert Configs(tmp_path).tiles(LAYER, 16, None, H200) == tiles(TILE)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text for text in (str(path), "3.0.0", triton.__version__) if text not in warning] == []


@pytest.mark.parametrize("with_record", [False, True])
def test_one_line_a_layer(with_record: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if with_record:
        path = write(tmp_path, record())
    configs = Configs(tmp_path)
    for tokens in (1, 2, 16, 16, 64, 5000):
        configs.tiles(LAYER, tokens, None, H200)
    (line,) = caplog.records
    assert line.levelname == "INFO"
    assert LAYER.slug in line.getMessage()
    assert (str(path) if with_record else "heuristic") in line.getMessage()


def test_an_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = Configs(tmp_path)
    first = configs.tiles(LAYER, 16, None, H200)

    def forbidden(*_: object) -> None:
        pytest.fail("chosen twice")

    monkeypatch.setattr(configs, "_choose", forbidden)
    assert configs.tiles(LAYER, 16, None, H200) is first


def test_every_device_has_records_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, record())
    configs = Configs(tmp_path)
    assert configs.tiles(LAYER, 16, None, H200) == tiles(TILE)
    assert configs.tiles(LAYER, 16, None, TARGETS["cuda:80"]) != tiles(TILE)


def test_records_of_a_package_are_found(build: Callable[..., Any]) -> None:
    """The folder of an emitted package is where its Configs look."""
    package = build(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
    assert package._dispatch._PACKAGE._configs._folder == Path(package.__file__).parent / "configs"
    assert package.LAYERS[0].slug == LAYER.slug
