"""moe_reference against formulas written out once more in plain Python, and the CPU path of emitted packages."""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.activations import ACTIVATIONS, Activation
from moegen.runtime.reference import local_ids, moe_reference
from moegen.spec import Parallel
from tests.support.packages import (
    TOLERANCE,
    any_activation,
    make_inputs,
    oracle,
    poisoned,
    relative_error,
    spec_of,
)

Row = list[float]
E, K, H, I = 4, 2, 5, 3  # noqa: E741


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def clip(x: float, limit: float) -> float:
    return max(-limit, min(limit, x))


def gelu_erf(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swiglu_oai(g: float, u: float, alpha: float, beta: float, limit: float) -> float:
    g, u = min(g, limit), clip(u, limit)
    return (u + beta) * g * sigmoid(alpha * g)


def situ(g: float, u: float, beta: float, limit: float | None) -> float:
    u = u if limit is None else limit * math.tanh(u / limit)
    return beta * math.tanh(g / beta) * sigmoid(g) * u


# name, parameters, formula of (gate, up) or of x
FORMULAS: list[tuple[str, dict[str, float], Callable[..., float]]] = [
    ("silu", {}, lambda g, u: g * sigmoid(g) * u),
    ("silu", {"limit": 1.5}, lambda g, u: min(g, 1.5) * sigmoid(min(g, 1.5)) * clip(u, 1.5)),
    ("gelu", {}, lambda g, u: gelu_erf(g) * u),
    ("gelu_tanh", {}, lambda g, u: gelu_tanh(g) * u),
    ("swigluoai", {}, lambda g, u: swiglu_oai(g, u, 1.702, 1.0, 7.0)),
    ("swigluoai", {"limit": 1.5, "alpha": 2.0, "beta": 0.5}, lambda g, u: swiglu_oai(g, u, 2.0, 0.5, 1.5)),
    ("swigluoai_uninterleave", {"limit": 1.5}, lambda g, u: swiglu_oai(g, u, 1.0, 0.0, 1.5)),
    (
        "swigluoai_uninterleave",
        {"limit": 2.0, "alpha": 1.702, "beta": 1.0},
        lambda g, u: swiglu_oai(g, u, 1.702, 1.0, 2.0),
    ),
    ("swiglustep", {}, lambda g, u: min(g * sigmoid(g), 7.0) * clip(u, 7.0)),
    ("swiglustep", {"limit": 1.2}, lambda g, u: min(g * sigmoid(g), 1.2) * clip(u, 1.2)),
    ("situ", {"beta": 4.0}, lambda g, u: situ(g, u, 4.0, None)),
    ("situ", {"beta": 1.5, "limit": 2.0}, lambda g, u: situ(g, u, 1.5, 2.0)),
    ("silu_no_mul", {}, lambda x: x * sigmoid(x)),
    ("gelu_no_mul", {}, gelu_erf),
    ("gelu_tanh_no_mul", {}, gelu_tanh),
    ("relu2_no_mul", {}, lambda x: max(x, 0.0) ** 2),
]
INTERLEAVED = ("swigluoai",)


def matvec(rows: list[Row], x: Row, bias: Row | None) -> Row:
    found = [sum(w * v for w, v in zip(row, x, strict=True)) for row in rows]
    return found if bias is None else [value + b for value, b in zip(found, bias, strict=True)]


def activate(rows: Row, name: str, formula: Callable[..., float]) -> Row:
    if name.endswith("_no_mul"):
        return [formula(x) for x in rows]
    half = len(rows) // 2
    gates, ups = (rows[0::2], rows[1::2]) if name in INTERLEAVED else (rows[:half], rows[half:])
    return [formula(g, u) for g, u in zip(gates, ups, strict=True)]


def naive(a: dict[str, Any], name: str, formula: Callable[..., float], on_input: bool) -> list[Row]:
    """The layer by loops over tokens, slots and values, in Python floats."""
    lists = {key: value.tolist() for key, value in a.items() if value is not None}
    limit = len(lists.get("expert_map", lists["w13"]))
    out = []
    for x, weights, ids in zip(lists["hidden_states"], lists["topk_weights"], lists["topk_ids"], strict=True):
        total = [0.0] * len(x)
        for weight, expert in zip(weights, ids, strict=True):
            if not 0 <= expert < limit:
                continue
            local = lists["expert_map"][expert] if "expert_map" in lists else expert
            if local < 0:
                continue
            b13, b2 = (lists[key][local] if key in lists else None for key in ("w13_bias", "w2_bias"))
            row = [v * weight for v in x] if on_input else x
            slot = matvec(lists["w2"][local], activate(matvec(lists["w13"][local], row, b13), name, formula), b2)
            total = [t + (s if on_input else s * weight) for t, s in zip(total, slot, strict=True)]
        out.append(total)
    return out


def tiny(activation: Activation, bias: bool, seed: int = 0, tokens: int = 6, top_k: int = K) -> dict[str, Any]:
    """Float64 arguments, large enough to reach every clamp."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * I if activation.gated else I
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "hidden_states": randn(tokens, H),
        "w13": 2 * randn(E, rows, H),
        "w2": randn(E, H, I),
        "topk_weights": torch.rand(tokens, top_k, generator=g, dtype=torch.float64) + 0.1,
        "topk_ids": torch.stack([torch.randperm(E, generator=g)[:top_k] for _ in range(tokens)]),
        "w13_bias": randn(E, rows) if bias else None,
        "w2_bias": randn(E, H) if bias else None,
        "expert_map": None,
    }


def assert_matches(a: dict[str, Any], activation: Activation, formula: Callable[..., float], on_input: bool) -> None:
    result = moe_reference(activation=activation, **a, apply_router_weight_on_input=on_input)
    expected = torch.tensor(naive(a, activation.name, formula, on_input), dtype=torch.float64)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_every_activation_has_a_formula() -> None:
    assert {name for name, _, _ in FORMULAS} == set(ACTIVATIONS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "parameters", "formula"), FORMULAS)
def test_formula(name: str, parameters: dict[str, float], formula: Callable[..., float], bias: bool) -> None:
    activation = Activation.of(name, **parameters)
    assert_matches(tiny(activation, bias), activation, formula, on_input=False)


SILU = FORMULAS[0][2]


@pytest.mark.parametrize("bias", [False, True])
def test_weight_on_input(bias: bool) -> None:
    activation = Activation.of("silu")
    assert_matches(tiny(activation, bias, top_k=1), activation, SILU, on_input=True)


@pytest.mark.parametrize("ids", [[-1, 2], [0, -1], [-1, -1], [4, 1], [1, 1000], [-7, 3]])
def test_ids_that_no_expert_has(ids: list[int]) -> None:
    activation = Activation.of("silu")
    arguments = tiny(activation, bias=True)
    arguments["topk_ids"][2] = torch.tensor(ids)
    assert_matches(arguments, activation, SILU, on_input=False)


@pytest.mark.parametrize("expert_map", [[-1, 3, -1, 0, 1, -1, 2, -1], [-1] * 8, [0, 1, 2, 3, -1, -1, -1, -1]])
def test_expert_map(expert_map: list[int]) -> None:
    activation = Activation.of("silu")
    arguments = tiny(activation, bias=True)
    arguments["expert_map"] = torch.tensor(expert_map, dtype=torch.int32)
    arguments["topk_ids"] = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [-1, 3], [8, 1]])
    assert_matches(arguments, activation, SILU, on_input=False)


def test_one_expert_twice_in_a_token() -> None:
    activation = Activation.of("silu")
    arguments = tiny(activation, bias=False)
    arguments["topk_ids"][:] = 1
    assert_matches(arguments, activation, SILU, on_input=False)


def test_local_ids() -> None:
    ids = torch.tensor([[0, -1], [3, 4]], dtype=torch.int32)
    assert local_ids(ids, None, 4).tolist() == [[0, -1], [3, -1]]
    expert_map = torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32)
    assert local_ids(ids, expert_map, 3).tolist() == [[-1, -1], [1, 2]]


# ------------------------------------------------------------------------------------------- emitted packages on a CPU

DTYPES = ("bfloat16", "float16", "float32")
ODD = {"num_experts": 7, "top_k": 3, "hidden_size": 37, "intermediate_size": 11}


def assert_right(layer: Any, result: torch.Tensor, arguments: dict[str, Any], **options: Any) -> None:
    assert result.dtype == layer.dtype
    assert result.is_contiguous()
    assert relative_error(result, oracle(layer, arguments, **options)) < TOLERANCE[layer.dtype]


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_package(tokens: int, dtype: str, build: Callable[..., ModuleType]) -> None:
    package = build(dtypes=(dtype,), **ODD)
    layer = package.LAYERS[0]
    arguments = make_inputs(layer, tokens)
    with poisoned():
        result = package.fused_experts(**arguments)
    assert result.shape == (tokens, 37)
    assert_right(layer, result, arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_package_of_every_activation(name: str, bias: bool, build: Callable[..., ModuleType]) -> None:
    package = build(activation=name, bias=bias, **ODD)
    layer = package.LAYERS[0]
    assert repr(layer.activation) == repr(any_activation(name))
    arguments = make_inputs(layer, 9)
    assert_right(layer, package.fused_experts(**arguments), arguments)


VARIANTS: dict[str, dict[str, Any]] = {
    "int64 ids": {"ids_dtype": torch.int64},
    "padded weights": {"padded_rows": 24},
    "padding slots": {"padding": 0.4},
    "only padding": {"padding": 1.0},
    "one hot expert": {"hot_expert": 3},
    "empty experts": {"empty_experts": (0, 2, 7)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_package_variants(variant: str, build: Callable[..., ModuleType]) -> None:
    package = build()
    layer = package.LAYERS[0]
    arguments = make_inputs(layer, 17, seed=1, **VARIANTS[variant])
    before = {name: value.clone() for name, value in arguments.items()}
    with poisoned():
        result = package.fused_experts(**arguments)
    assert_right(layer, result, arguments)
    assert [name for name in arguments if not torch.equal(arguments[name], before[name])] == []
    if variant == "only padding":
        assert bool((result == 0).all())


@pytest.mark.parametrize("mapped", [False, True])
def test_package_of_a_shard(mapped: bool, build: Callable[..., ModuleType]) -> None:
    package = build(parallel=(Parallel(ep=2),))
    layer = package.LAYERS[0]
    assert (layer.num_experts, layer.local_experts) == (8, 4)
    arguments = make_inputs(layer, 17, mapped=mapped, padding=0.1)
    with poisoned():
        result = package.fused_experts(**arguments)
    assert_right(layer, result, arguments)


def test_remote_slots_contribute_exactly_zero(build: Callable[..., ModuleType]) -> None:
    package = build(parallel=(Parallel(ep=2),))
    arguments = make_inputs(package.LAYERS[0], 5, mapped=True)
    arguments["expert_map"].fill_(-1)
    with poisoned():
        assert bool((package.fused_experts(**arguments) == 0).all())


def test_weight_on_input_of_a_package(build: Callable[..., ModuleType]) -> None:
    package = build(top_k=1, bias=True)
    layer = package.LAYERS[0]
    arguments = make_inputs(layer, 17)
    arguments["topk_weights"] = arguments["topk_weights"] * 0.3
    result = package.fused_experts(**arguments, apply_router_weight_on_input=True)
    assert_right(layer, result, arguments, apply_router_weight_on_input=True)
    assert relative_error(result, oracle(layer, arguments)) > 0.1


@pytest.mark.parametrize("tokens", [0, 5])
def test_out_is_written_and_returned(tokens: int, build: Callable[..., ModuleType]) -> None:
    package = build()
    arguments = make_inputs(package.LAYERS[0], tokens)
    wide = torch.full((tokens, 100), 7.0, dtype=torch.bfloat16)
    out = wide[:, :64]
    assert package.fused_experts(**arguments, out=out) is out
    assert torch.equal(out, package.fused_experts(**arguments))
    assert bool((wide[:, 64:] == 7.0).all())


def test_layer_of_every_shape_and_dtype(build: Callable[..., ModuleType]) -> None:
    """Several layers in one package: the arguments alone select the right one."""
    package = build(sizes=({}, {"top_k": 1}, {"intermediate_size": 48}), dtypes=("bfloat16", "float32"))
    assert len(package.LAYERS) == 6
    for layer in package.LAYERS:
        arguments = make_inputs(layer, 4)
        assert_right(layer, package.fused_experts(**arguments), arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mapped", [False, True])
def test_compiled_equals_eager(backend: str, mapped: bool, build: Callable[..., ModuleType]) -> None:
    package = build(parallel=(Parallel(ep=2),), bias=True)
    torch.compiler.reset()
    compiled = torch.compile(package.fused_experts, fullgraph=True, backend=backend)
    for tokens in (1, 6, 9):
        arguments = make_inputs(package.LAYERS[0], tokens, mapped=mapped)
        expected = package.fused_experts(**arguments)
        assert torch.equal(compiled(**arguments), expected)
        out = torch.full_like(expected, 7.0)
        assert torch.equal(compiled(**arguments, out=out), expected)
        assert torch.equal(out, expected)


def flat(a: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the registered op, in the order of its schema."""
    parts = ("", "_scale", "_zeros", "_global_scale", "_input_scale", "_bias")
    weights = [a.get(f"{name}{part}") for name in ("w13", "w2") for part in parts]
    return (a["hidden_states"], *weights, a["topk_weights"], a["topk_ids"], a.get("expert_map"), -1, False)


@pytest.mark.parametrize("quant", ["none", "int4_w4a16:g32z", "int8_w8a8:channel"])  # opcheck itself cannot compare fp8
def test_opcheck(quant: str, build: Callable[..., ModuleType]) -> None:
    package = build(bias=True, parallel=(Parallel(ep=2),), quant=(quant,))
    a = make_inputs(package.LAYERS[0], 6, mapped=True)
    torch.library.opcheck(package._dispatch._OP.default, flat(a))


def test_op_survives_the_copy_that_registered_it(tmp_path: Path) -> None:
    """An identical package in another folder takes over the name in sys.modules; the first one is collected."""
    plan = make_plan(spec_of(name="copies"))
    first = import_package(emit(plan, tmp_path / "first"))
    arguments = make_inputs(first.LAYERS[0], 3)
    expected = first.fused_experts(**arguments)
    second = import_package(emit(plan, tmp_path / "second"))
    assert second is not first
    del first
    gc.collect()
    compiled = torch.compile(second.fused_experts, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**arguments), expected)
