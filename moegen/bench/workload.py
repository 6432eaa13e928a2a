"""What is run: weight copies, inputs and routings of one (layer, tokens, routing) cell, and how many of each.

Call i uses weight copy i modulo copies. The number of calls is a multiple of the copies, so that the rule also holds
where one replay ends and the next begins: between two uses of a copy, all the other copies were read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from moegen.bench import DEFAULT_ALPHA, ROUTINGS
from moegen.quantize import CHUNK, experts_at_once, named_tensors, quantize_parts, stored_dtypes
from moegen.runtime.quant import Scheme
from moegen.runtime.weight import Weight

COLD_BYTES = 512 * 10**6  # distinct weights that pass between two uses of a copy: about ten times the L2 of an H200
MAX_CALLS = 1024  # graph nodes; reached only by layers of less than 0.5 MB, whose weights stay in L2 in use as well
MIN_GRAPH_US = 2000.0  # starting a graph costs some µs once: 0.25 % of this
NOMINAL_BYTES_PER_US, NOMINAL_FLOP_PER_US = 4e6, 4e8  # only to choose the number of calls, never reported
SCRATCH_BYTES = 32  # a value, while weights are quantised
PILOT_DRAWS = 4  # routings drawn to learn how many experts a call activates, before the copies are chosen


class Gating(Protocol):
    """The part of an activation that decides the shape of w13."""

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate and up rows."""


class Layer(Protocol):
    """One entry of an emitted package's LAYERS: sizes of the shard that one GPU runs."""

    @property
    def slug(self) -> str: ...  # noqa: D102
    @property
    def num_experts(self) -> int: ...  # noqa: D102
    @property
    def local_experts(self) -> int: ...  # noqa: D102
    @property
    def top_k(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def activation(self) -> Gating: ...  # noqa: D102
    @property
    def bias(self) -> bool: ...  # noqa: D102
    @property
    def quant(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Weights:
    """One copy of the layer's weights: w13 [E, 2I or I, H], w2 [E, H, I] as stored, and the keyword arguments (scales,
    zero points, biases) that go along.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    kwargs: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments of one layer call: hidden_states [T, H], topk_weights [T, k] float32, topk_ids [T, k] int32."""

    hidden_states: torch.Tensor
    weights: Weights
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor

    def run(self, function: Callable[..., object]) -> object:
        """Call function(hidden_states, w13, w2, topk_weights, topk_ids, **kwargs)."""
        w = self.weights
        return function(self.hidden_states, w.w13, w.w2, self.topk_weights, self.topk_ids, **w.kwargs)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many copies and calls a cell has, and why."""

    copies: int
    copies_wanted: int  # more than copies if memory or MAX_CALLS did not allow them
    calls: int
    active_experts: float  # distinct experts a call, mean over the calls
    reuse_bytes: float  # weight bytes read between two uses of a copy, mean

    @property
    def bounded(self) -> bool:
        """Whether there are fewer copies than the cold-L2 rule asks for."""
        return self.copies < self.copies_wanted


@dataclass(frozen=True, slots=True)
class Workload:
    """All tensors of one cell; calls are in the order of the graph."""

    calls: tuple[LayerCall, ...]
    sizes: Sizes

    def bind(self, function: Callable[..., object]) -> list[Callable[[], object]]:
        """One argument-less callable a layer call, for timing.CapturedCalls."""
        return [lambda call=call: call.run(function) for call in self.calls]  # type: ignore[misc]


def w13_rows(layer: Layer) -> int:
    """Rows of w13 per expert: 2I if the activation is gated, else I."""
    return (2 if layer.activation.gated else 1) * layer.intermediate_size


def scheme_of(layer: Layer) -> Scheme:
    """The layer's quant scheme; by name, because a package's own classes are copies of moegen's."""
    return Scheme.parse(layer.quant)


def expert_bytes(layer: Layer) -> int:
    """Bytes of one expert as stored: w13 and w2 with their scales and zero points, and biases where there are any."""
    scheme, rows, itemsize = scheme_of(layer), w13_rows(layer), layer.dtype.itemsize
    total = (rows + layer.hidden_size) * itemsize if layer.bias else 0
    shapes = ((1, rows, layer.hidden_size), (1, layer.hidden_size, layer.intermediate_size))
    if not scheme.kind:
        return total + sum(math.prod(shape) for shape in shapes) * itemsize
    dtype, scale_dtype = stored_dtypes(scheme, layer.dtype)
    for shape in shapes:
        total += math.prod(scheme.weight_shape(*shape)) * dtype.itemsize
        total += math.prod(scheme.scale_shape(*shape) or (0,)) * scale_dtype.itemsize
        total += math.prod(scheme.zeros_shape(*shape) or (0,))
        total += torch.float32.itemsize if scheme.has_global_scale else 0
    return total


def layer_bytes(layer: Layer, tokens: int, active_experts: float) -> float:
    """The fewest bytes of one call: the active experts' weights, hidden_states read once, the output written once."""
    return active_experts * expert_bytes(layer) + 2 * tokens * layer.hidden_size * layer.dtype.itemsize


def layer_flops(layer: Layer, tokens: int) -> int:
    """Multiplications and additions of both GEMMs of one call."""
    return 2 * tokens * layer.top_k * (w13_rows(layer) + layer.intermediate_size) * layer.hidden_size


def copies_wanted(active_bytes: float) -> int:
    """Weight copies so that COLD_BYTES pass between two uses of one, when a call reads active_bytes of weights."""
    return max(2, math.ceil(COLD_BYTES / active_bytes))


def nominal_us(layer: Layer, tokens: int, active_experts: float) -> float:
    """About what one call takes, µs: only to choose the number of calls."""
    memory_us = layer_bytes(layer, tokens, active_experts) / NOMINAL_BYTES_PER_US
    return max(memory_us, layer_flops(layer, tokens) / NOMINAL_FLOP_PER_US)


def calls_wanted(layer: Layer, tokens: int, active_experts: float, copies: int) -> int:
    """Calls in the graph: a multiple of copies, enough to hide its start and to average over routings."""
    one_us = nominal_us(layer, tokens, active_experts)
    least = 8 if one_us < 5000 else 4  # long calls have many tokens: their routings hardly differ in cost
    wanted = max(least, math.ceil(MIN_GRAPH_US / one_us))
    return copies * min(math.ceil(wanted / copies), max(1, MAX_CALLS // copies))


def copies_allowed(layer: Layer, tokens: int, candidates: int, free_bytes: int) -> int:
    """Weight copies that fit beside the activations of all candidates. Raises MemoryError if not even one does."""
    width = w13_rows(layer) + layer.intermediate_size + 2 * layer.hidden_size
    activations = tokens * layer.top_k * width * layer.dtype.itemsize
    io = 2 * tokens * layer.hidden_size * layer.dtype.itemsize * 8 * (1 + candidates)
    # Twice the activations: the eager pass of one candidate runs while the graphs of the others hold theirs.
    reserve = 2 * activations * candidates + io + 2 * 2**30
    if scheme_of(layer).kind:
        reserve += SCRATCH_BYTES * max(CHUNK, w13_rows(layer) * layer.hidden_size)
    allowed = (free_bytes - reserve) // (layer.local_experts * expert_bytes(layer))
    if allowed < 1:
        need = reserve + layer.local_experts * expert_bytes(layer)
        raise MemoryError(f"one weight copy and its activations need {need / 1e9:.1f} GB, free: {free_bytes / 1e9:.1f}")
    return int(allowed)


def draw_log_popularity(
    experts: int, routing: str, generator: torch.Generator, *, alpha: float = DEFAULT_ALPHA
) -> torch.Tensor:
    """Log of the experts' popularity [experts] float32, up to a constant.

    balanced: all equal. power_law: rank^-alpha, with the ranks permuted by `generator`.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing: must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    if routing == "balanced":
        return torch.zeros(experts, device=generator.device)
    ranks = torch.randperm(experts, generator=generator, device=generator.device) + 1
    return -alpha * ranks.float().log()


def draw_routing(
    tokens: int, top_k: int, log_popularity: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights [T, k] float32, softmax over the chosen; topk_ids [T, k] int32, k distinct experts a token).

    Gumbel noise on the log popularity: its top-k draws without replacement in proportion to the popularity. Raises
    ValueError if top_k exceeds the number of experts.
    """
    experts = log_popularity.numel()
    if top_k > experts:
        raise ValueError(f"top_k: {top_k} distinct experts cannot be drawn from {experts} local ones")
    noise = torch.empty(tokens, experts, device=generator.device).exponential_(generator=generator)
    values, ids = (log_popularity - noise.clamp_min_(1e-20).log_()).topk(top_k, dim=-1)
    return values.softmax(-1), ids.to(torch.int32)


def build_workload(
    layer: Layer,
    tokens: int,
    routing: str,
    *,
    device: torch.device,
    seed: int,
    free_bytes: int,
    candidates: int = 1,
    alpha: float = DEFAULT_ALPHA,
) -> Workload:
    """Draw the tensors of one cell; the same seed on the same kind of device gives the same tensors.

    A shard of an expert-parallel layer is measured with all slots local: ids below local_experts, no expert_map.
    free_bytes bounds the weight copies. Raises ValueError if top_k exceeds the local experts, MemoryError if it does
    not fit.
    """

    def popularity(generator: torch.Generator) -> torch.Tensor:
        return draw_log_popularity(layer.local_experts, routing, generator, alpha=alpha)

    fewest = fewest_active(layer, tokens, popularity, torch.Generator(device).manual_seed(seed + 1))
    wanted = copies_wanted(fewest * expert_bytes(layer))
    copies = min(wanted, MAX_CALLS, copies_allowed(layer, tokens, candidates, free_bytes))
    count = calls_wanted(layer, tokens, fewest, copies)

    generator = torch.Generator(device).manual_seed(seed)
    weights = [draw_weights(layer, generator) for _ in range(copies)]
    popularities = [popularity(generator) for _ in range(copies)]
    calls = []
    for index in range(count):
        topk_weights, topk_ids = draw_routing(tokens, layer.top_k, popularities[index % copies], generator)
        hidden = torch.empty(tokens, layer.hidden_size, dtype=layer.dtype, device=device).normal_(generator=generator)
        calls.append(LayerCall(hidden, weights[index % copies], topk_weights, topk_ids))
    active = sum(active_experts(call.topk_ids) for call in calls) / count
    return Workload(tuple(calls), Sizes(copies, wanted, count, active, copies * active * expert_bytes(layer)))


def draw_weights(layer: Layer, generator: torch.Generator) -> Weights:
    """One copy of random weights; the deviation keeps outputs near 1 for inputs of variance 1.

    Quantised weights are normal ones, quantised a few experts at a time: the bits that a GPU multiplies decide its
    power draw and with it its clock. Scales of whole tensors are dynamic.
    """
    experts, hidden, inter, rows = layer.local_experts, layer.hidden_size, layer.intermediate_size, w13_rows(layer)

    def draw(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=layer.dtype, device=generator.device).normal_(0, std, generator=generator)

    def stored(*shape: int) -> Weight:
        scheme, std = scheme_of(layer), shape[2] ** -0.5
        if not scheme.kind:
            return Weight(draw(*shape, std=std))
        fp8 = fp8_dtype(generator.device) if scheme.mode == "fp8_w8a8" else None
        at_once = experts_at_once(shape[1] * shape[2])
        counts = [min(at_once, experts - start) for start in range(0, experts, at_once)]
        parts = (draw(count, *shape[1:], std=std) for count in counts)
        return quantize_parts(parts, experts, scheme, *stored_dtypes(scheme, layer.dtype, fp8))

    w13, w2 = stored(experts, rows, hidden), stored(experts, hidden, inter)
    named = named_tensors("w13", w13) | named_tensors("w2", w2)
    if layer.bias:
        named |= {"w13_bias": draw(experts, rows, std=0.1), "w2_bias": draw(experts, hidden, std=0.1)}
    return Weights(named.pop("w13"), named.pop("w2"), named)


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The e4m3 that the device multiplies: float8_e4m3fnuz on AMD's gfx94x, else float8_e4m3fn."""
    if device.type != "cuda" or torch.version.hip is None:
        return torch.float8_e4m3fn
    old = torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94")
    return torch.float8_e4m3fnuz if old else torch.float8_e4m3fn


def active_experts(topk_ids: torch.Tensor) -> int:
    """The number of distinct experts in topk_ids [T, k]."""
    return int(torch.unique(topk_ids).numel())


def fewest_active(
    layer: Layer, tokens: int, popularity: Callable[[torch.Generator], torch.Tensor], generator: torch.Generator
) -> int:
    """The fewest distinct experts of a few draws: what the number of copies has to assume."""
    draws = [draw_routing(tokens, layer.top_k, popularity(generator), generator)[1] for _ in range(PILOT_DRAWS)]
    return min(active_experts(ids) for ids in draws)
