"""The rule of the low-latency assignment, which was lost once elsewhere because nothing tested it."""

import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moegen.runtime import assignment
from moegen.runtime.assignment import _prepare_expert_assignment, low_latency_applies
from tests.support.packages import make_inputs, unnamed
from tests.support.weights import SMALL_SCHEMES

# (tokens, top_k, experts): tokens * top_k * 4 is one below, at and one above the number of experts
SIZES = {
    "below": ((4, 8, 129), (1, 1, 5), (1, 8, 33), (12, 10, 481), (64, 4, 1025)),
    "at": ((4, 8, 128), (1, 1, 4), (1, 8, 32), (12, 10, 480), (64, 4, 1024)),
    "above": ((4, 8, 127), (1, 1, 3), (1, 8, 31), (12, 10, 479), (64, 4, 1023)),
}
BLOCK_SHAPES: tuple[list[int] | None, ...] = (None, [0, 0], [0, 128], [128, 128], [128, 0])
# Whether a block_shape puts groups along K, written out
GROUPED = {"None": False, "[0, 0]": False, "[0, 128]": True, "[128, 128]": True, "[128, 0]": False}
FLAGS: dict[str, dict[str, bool]] = {
    "none": {},
    "int8_w8a16": {"use_int8_w8a16": True},
    "int4_w4a16": {"use_int4_w4a16": True},
}
TABLE = list(itertools.product((False, True), SIZES, FLAGS, BLOCK_SHAPES, (False, True)))


def expected_low_latency(mapped: bool, size: str, mode: str, block_shape: list[int] | None, on_host: bool) -> bool:
    """The rule in words: no expert map, few slots, weights on the device, no 4- or 8-bit weights in groups along K."""
    if mapped or on_host or size == "above":
        return False
    return not (mode in ("int8_w8a16", "int4_w4a16") and GROUPED[str(block_shape)])


def test_the_table_has_both_answers() -> None:
    answers = [expected_low_latency(*row) for row in TABLE]
    assert len(answers) == 2 * 3 * 3 * 5 * 2
    # 2 sizes × (5 block shapes without groups to heed + 2 × 3 that are not grouped)
    assert sum(answers) == 2 * (5 + 3 + 3)


@pytest.mark.parametrize(("mapped", "size", "mode", "block_shape", "on_host"), TABLE)
def test_rule(mapped: bool, size: str, mode: str, block_shape: list[int] | None, on_host: bool) -> None:
    for tokens, top_k, experts in SIZES[size]:
        expert_map = torch.zeros(experts, dtype=torch.int32) if mapped else None
        applies = low_latency_applies(
            tokens, top_k, experts, expert_map,
            **FLAGS[mode], block_shape=block_shape, weights_host_resident=on_host,
        )  # fmt: skip
        assert applies is expected_low_latency(mapped, size, mode, block_shape, on_host), (tokens, top_k, experts)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("mapped", "size", "mode", "block_shape", "on_host"), TABLE)
def test_prepare(
    mapped: bool, size: str, mode: str, block_shape: list[int] | None, on_host: bool, ids_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    aligned = (object(), object(), object())
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(assignment, "moe_align_block_size", lambda *a, **k: calls.append((a, k)) or aligned)
    tokens, top_k, experts = SIZES[size][0]
    ids = torch.arange(tokens * top_k, dtype=ids_dtype).view(tokens, top_k)
    expert_map = torch.zeros(experts, dtype=torch.int32) if mapped else None
    result = _prepare_expert_assignment(
        ids, {"BLOCK_SIZE_M": 32}, tokens, top_k, experts, expert_map,
        **FLAGS[mode], block_shape=block_shape, weights_host_resident=on_host, ignore_invalid_experts=mapped,
    )  # fmt: skip
    if not expected_low_latency(mapped, size, mode, block_shape, on_host):
        assert result is aligned
        assert calls == [((ids, 32, experts, expert_map), {"ignore_invalid_experts": mapped})]
        return
    assert calls == []
    sorted_token_ids, expert_ids, num_tokens_post_padded = result
    assert sorted_token_ids is None
    assert (expert_ids.data_ptr(), expert_ids.dtype, expert_ids.shape) == (ids.data_ptr(), ids_dtype, (ids.numel(),))
    assert (num_tokens_post_padded.dtype, num_tokens_post_padded.device) == (torch.int32, ids.device)
    assert num_tokens_post_padded.tolist() == [tokens * top_k * 32]


def test_prepare_makes_its_count_on_the_device_of_the_ids() -> None:
    ids = torch.zeros((1, 2), dtype=torch.int32, device="meta")
    _, expert_ids, count = _prepare_expert_assignment(ids, {"BLOCK_SIZE_M": 16}, 1, 2, 8, None)
    assert expert_ids.device == count.device == ids.device


class Recorder:
    """Stands for a kernel: notes the arguments of every launch and does nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.launches.append((grid, args, constants))


def _record_layer(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace everything that `run` launches; `aligned` counts sorts, `gemms` holds both recorders, `beside` says which
    quantisers do not wait.
    """
    layer = package.LAYERS[0]
    module = package.runtime.layer
    record = SimpleNamespace(aligned=[], gemms=(Recorder(), Recorder()), beside=[])

    def quantise(x: torch.Tensor, *arguments: Any) -> Any:
        record.beside.append(len(arguments) == 6 and arguments[5] is not None)
        return module.Activations(x, None)

    def new_room(*arguments: Any) -> Any:
        assert not record.aligned, "torch may fill new memory by a kernel, which nobody would wait for"
        return quantise_module.new_room(*arguments)

    quantise_module = package.runtime.quantise

    monkeypatch.setattr(module, "align_into", lambda *args, **_: record.aligned.append(args))
    monkeypatch.setattr(module, "quantise", quantise)
    monkeypatch.setattr(module, "new_room", new_room)
    monkeypatch.setattr(module, "top_k_reduce", lambda *_args, **_options: None)
    monkeypatch.setattr(layer.kernels, "gemm1", record.gemms[0])
    monkeypatch.setattr(layer.kernels, "gemm2", record.gemms[1])
    return record


def _call(package: ModuleType, arguments: dict[str, Any]) -> Any:
    """A Call without checks: everything that `arguments` lack is off."""
    weights = {name: unnamed(package, name, arguments) for name in ("w13", "w2")}
    names = ("hidden_states", "topk_weights", "topk_ids", "expert_map")
    rest = {name: arguments.get(name) for name in names}
    out = torch.empty_like(arguments["hidden_states"])
    return package.runtime.layer.Call(**weights, **rest, apply_router_weight_on_input=False, out=out)


H200 = ("NVIDIA H200", "cuda", "90", 132, 232_448)
RUNS = [
    # tokens, mapped, low latency: 32 experts with top_k 2, so that 4 tokens are at the limit
    (1, False, True),
    (4, False, True),
    (5, False, False),
    (1, True, False),
    (64, False, False),
]


@pytest.mark.parametrize("quant", ["none", *SMALL_SCHEMES, "int4_w4a16:g128z", "fp8_w8a8:128x128"])
@pytest.mark.parametrize(("tokens", "mapped", "low_latency"), RUNS)
def test_run_takes_the_shortcut(
    quant: str, tokens: int, mapped: bool, low_latency: bool,
    build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`run` itself, not only the rule: in every quant scheme, also with K groups, which vLLM's rule leaves out."""
    package = build(num_experts=32, top_k=2, quant=(quant,))
    layer, runtime = package.LAYERS[0], package.runtime
    assert layer.quant.startswith(quant)  # a bare mode gets its default granularity
    record = _record_layer(package, monkeypatch)
    arguments = make_inputs(layer, tokens, mapped=mapped)
    call = _call(package, arguments)
    assert runtime.layer.is_low_latency(layer, tokens, call.expert_map) is low_latency
    configs, device = package._dispatch._PACKAGE._configs, runtime.device.DeviceFacts(*H200)
    tiles = configs.tiles(layer, tokens, call.expert_map, device, portable=True)
    runtime.layer.run(layer, call, tiles)
    assert len(record.aligned) == (0 if low_latency else 1)
    # x is older than the assignment, but not than the layer, and `hidden` is gemm1's.
    assert record.beside == [not low_latency and layer.scheme.row.activation is not None, False]
    for gemm in record.gemms:
        ((grid, args, constants),) = gemm.launches
        sorted_token_ids, expert_ids = args[5], args[6]
        assert (sorted_token_ids is None) is low_latency
        if low_latency:  # one M block a slot, its expert straight from the router
            assert expert_ids.data_ptr() == call.topk_ids.data_ptr()
            assert grid == (tokens * 2 * -(-constants["ROWS"] // constants["BLOCK_SIZE_N"]),)
