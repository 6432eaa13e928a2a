"""Packages of small layers, random arguments for them, and what it takes to compare results."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.activations import ACTIVATIONS, REQUIRED, Activation
from moegen.runtime.quant import Scheme
from moegen.runtime.reference import moe_reference
from moegen.runtime.weight import Weight
from moegen.spec import MoESpec, Parallel, Shape
from tests.support.weights import random_weight

DEFAULT_SIZES = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32}
# Largest relative error (of the norm of the whole output) of a right result: rounding of the activation and the output.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

_built: dict[MoESpec, ModuleType] = {}


def spec_of(
    *,
    sizes: Sequence[dict[str, int]] = ({},),
    dtypes: tuple[str, ...] = ("bfloat16",),
    quant: tuple[str, ...] = ("none",),
    activation: str | Activation = "silu",
    bias: bool = False,
    parallel: tuple[Parallel, ...] = (Parallel(),),
    name: str | None = None,
    **size: int,
) -> MoESpec:
    """A spec of small layers: `size` (num_experts=…) or several `sizes` override DEFAULT_SIZES."""
    if isinstance(activation, str):
        activation = any_activation(activation)
    shapes = tuple(Shape(**{**DEFAULT_SIZES, **size, **one}) for one in sizes)
    key = repr((shapes, dtypes, quant, activation, bias, parallel))
    return MoESpec(
        name=name or f"t-{hashlib.sha256(key.encode()).hexdigest()[:10]}",
        shapes=shapes,
        dtypes=dtypes,
        quant=quant,
        activation=activation,
        bias=bias,
        parallel=parallel,
    )


def any_activation(name: str) -> Activation:
    """The activation of that name with its defaults; parameters that have none get 2.5, which inputs reach."""
    required = {key: 2.5 for key, value in ACTIVATIONS[name].parameters if value is REQUIRED}
    return Activation.of(name, **required)


def build(folder: Path, **fields: Any) -> ModuleType:
    """The imported package of `spec_of(**fields)`: emitted below `folder`, once a spec and session."""
    spec = spec_of(**fields)
    if spec not in _built:
        _built[spec] = import_package(emit(make_plan(spec), folder))
    return _built[spec]


def make_inputs(
    layer: Any,
    tokens: int,
    seed: int = 0,
    device: str = "cpu",
    *,
    padding: float = 0.0,
    hot_expert: int | None = None,
    empty_experts: Sequence[int] = (),
    mapped: bool = False,
    padded_rows: int = 0,
    ids_dtype: torch.dtype = torch.int32,
    **weight_options: Any,
) -> dict[str, Any]:
    """Random arguments of `fused_experts` for one layer, drawn on the CPU so that every device gets the same ones.

    padding        share of slots that get id -1
    hot_expert     every token's first slot goes to this expert
    empty_experts  experts that no token chooses
    mapped         with an expert_map whose local experts are spread over the global ones
    padded_rows    so many stored values lie between the rows of the weights
    The rest goes to `random_weight`, which scales weights by the length of the reduction, so that activations and
    outputs are of order 1.
    """
    g = torch.Generator().manual_seed(seed)
    ids_in = layer.num_experts if mapped else layer.local_experts
    weights, ids = _routing(g, tokens, ids_in, layer.top_k, hot_expert, empty_experts)
    ids[torch.rand(ids.shape, generator=g) < padding] = -1
    arguments = {
        "hidden_states": (torch.randn(tokens, layer.hidden_size, generator=g) / 3).to(layer.dtype),
        "topk_weights": weights,
        "topk_ids": ids.to(ids_dtype),
    }
    for name, shape in (("w13", layer.w13_shape), ("w2", layer.w2_shape)):
        weight = random_weight(g, layer.scheme, shape, layer.dtype, padded=padded_rows, **weight_options)
        arguments |= named(name, weight)
    if layer.bias:
        arguments["w13_bias"] = torch.randn(layer.w13_shape[:2], generator=g).to(layer.dtype)
        arguments["w2_bias"] = torch.randn(layer.w2_shape[:2], generator=g).to(layer.dtype)
    if mapped:
        arguments["expert_map"] = spread_map(g, layer.num_experts, layer.local_experts)
    return {name: to_device(value, device) for name, value in arguments.items()}


def _routing(
    g: torch.Generator, tokens: int, num_experts: int, top_k: int, hot: int | None, empty: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(tokens, num_experts, generator=g)
    logits[:, list(empty)] = -100.0
    if hot is not None:
        logits[:, hot] = 10.0
    values, ids = logits.topk(top_k, dim=-1)
    return values.softmax(-1), ids


def named(name: str, weight: Weight) -> dict[str, torch.Tensor]:
    """A weight and its parts under the argument names of `fused_experts`: w13, w13_scale, …"""
    parts = {name: weight.values}
    for part in ("scale", "zeros", "global_scale", "input_scale", "bias"):
        value = getattr(weight, part)
        if value is not None:
            parts[f"{name}_{part}"] = value
    return parts


def unnamed(package: ModuleType, name: str, arguments: dict[str, Any]) -> Any:
    """The inverse of `named`: a Weight for the package's own layer.run."""
    return package.runtime.weight.Weight.of(name, arguments[name], arguments)


def spread_map(g: torch.Generator, num_experts: int, local_experts: int) -> torch.Tensor:
    """An expert_map with the local experts at random places, in random order."""
    chosen = torch.randperm(num_experts, generator=g)[:local_experts]
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
    expert_map[chosen] = torch.arange(local_experts, dtype=torch.int32)
    return expert_map


def to_device(value: torch.Tensor, device: str) -> torch.Tensor:
    """Move a tensor and keep its strides, also those of a slice."""
    if device == "cpu":
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def oracle(layer: Any, arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    """The layer in float64."""
    scheme = Scheme.parse(layer.quant)
    return moe_reference(activation=layer.activation, scheme=scheme, **arguments, **options)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`; infinite if anything is not finite."""
    if not bool(torch.isfinite(result).all()):
        return float("inf")
    norm = expected.double().norm().item()
    difference = (result.double() - expected.double()).norm().item()
    return difference if norm == 0 else difference / norm


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty, new_empty and empty_like return NaN (integers: their largest value)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling


@contextmanager
def portable_tiles(package: ModuleType) -> Iterator[None]:
    """Calls inside run the portable family, whatever is faster."""
    configs = package._dispatch._PACKAGE._configs
    configs.tiles = functools.partial(configs.tiles, portable=True)
    try:
        yield
    finally:
        del configs.tiles


def by_portable(package: ModuleType, arguments: dict[str, Any]) -> torch.Tensor:
    """What the portable family gives."""
    with portable_tiles(package):
        return package.fused_experts(**arguments)  # type: ignore[no-any-return]
