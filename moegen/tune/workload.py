"""What the tuner times at one token bucket: layer calls of balanced and of skewed routing, by turns, in one graph.

So one time counts both routings; finalists are compared with a graph of each. Everything is drawn from (seed, tokens)
alone, so that a time does not depend on which process measured it, nor on the buckets that it measured before.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from moegen.bench import DEFAULT_ALPHA, ROUTINGS
from moegen.bench.measure import Check, layer_reference
from moegen.bench.workload import (
    NOMINAL_FLOP_PER_US,
    Layer,
    LayerCall,
    Weights,
    active_experts,
    copies_allowed,
    copies_wanted,
    draw_log_popularity,
    draw_routing,
    draw_weights,
    expert_bytes,
    fewest_active,
    layer_flops,
    nominal_us,
)

MIN_REPLAY_US = 700.0  # by nominal rates, about 1 ms: starting a graph costs some µs once, for all candidates alike
MAX_CALLS = 64  # a call is four launches or more, and all of them are captured anew for each candidate
HOT_SHARE = 0.5  # of a call's time, as far as the tensor cores would need that long alone
SEED_STEP = 1_000_003  # keeps the draws of neighbouring seeds and token counts apart


@dataclass(frozen=True, slots=True)
class Bucket:
    """The calls of one token bucket in the order of the graph, and the oracle's rows of the first and the last.

    hot: the calls compute so much that the GPU's power limits its clock, so that what it did before shows in a time.
    routings: how many take turns; call i is of routing i modulo routings.
    """

    tokens: int
    copies: int
    hot: bool
    routings: int
    calls: tuple[LayerCall, ...]
    checks: tuple[Check, Check]


class WeightCopies:
    """The weights of one layer, drawn once and used in all buckets; further copies only keep L2 cold.

    A clone multiplies the same bits from other addresses, which takes the same time as weights drawn anew, and drawing
    and quantising them would take most of the time that a bucket is set up in.
    """

    def __init__(self, layer: Layer, device: torch.device, seed: int) -> None:
        self._copies = [draw_weights(layer, torch.Generator(device).manual_seed(seed))]

    def first(self, count: int) -> list[Weights]:
        """`count` copies; those of an earlier bucket are used again, and given up if there are more."""
        drawn = self._copies[0]
        del self._copies[count:]
        while len(self._copies) < count:
            named = {name: tensor.clone() for name, tensor in drawn.kwargs.items()}
            self._copies.append(Weights(drawn.w13.clone(), drawn.w2.clone(), named))
        return list(self._copies)


def build_bucket(
    layer: Layer, tokens: int, weights: WeightCopies, recorded: torch.Tensor | None, *, device: torch.device, seed: int
) -> Bucket:
    """Draw the calls of one bucket and run the oracle on two of them.

    recorded [N, k] int32 replaces the drawn routings: call i reads `tokens` rows from row i · tokens on, and starts
    over at its end. A shard of an expert-parallel layer is measured with all slots local. Raises ValueError if top_k
    exceeds the local experts, MemoryError if one copy of the weights does not fit beside the activations.
    """
    fewest = _fewest_active(layer, tokens, recorded, torch.Generator(device).manual_seed(seed + 1))
    allowed = copies_allowed(layer, tokens, 1, _memory_for_us(device))
    copies = _even(min(copies_wanted(fewest * expert_bytes(layer)) + 1, MAX_CALLS, allowed))
    count = calls_of(nominal_us(layer, tokens, fewest), copies)
    generator = torch.Generator(device).manual_seed(seed * SEED_STEP + tokens)
    copied = weights.first(copies)
    calls = []
    for index in range(count):
        hidden = torch.empty(tokens, layer.hidden_size, dtype=layer.dtype, device=device).normal_(generator=generator)
        routing = _routing(layer, tokens, index, recorded, generator)
        calls.append(LayerCall(hidden, copied[index % copies], *routing))
    checks = [Check.of(layer, calls[index], layer_reference) for index in (0, -1)]
    hot = layer_flops(layer, tokens) / NOMINAL_FLOP_PER_US > HOT_SHARE * nominal_us(layer, tokens, fewest)
    routings = len(ROUTINGS) if recorded is None else 1
    return Bucket(tokens, copies, hot, routings, tuple(calls), (checks[0], checks[1]))


def calls_of(call_us: float, copies: int) -> int:
    """Calls in the graph: as many of either routing, a multiple of copies, about MIN_REPLAY_US in all."""
    step = math.lcm(copies, len(ROUTINGS))
    return step * math.ceil(min(MIN_REPLAY_US / call_us, MAX_CALLS) / step)


def read_routing(path: Path, layer: Layer) -> torch.Tensor:
    """Recorded topk_ids [N, k] int32 from a .npy file, or from what torch.save made of a tensor.

    -1 is a padding slot; expert-parallel shards have local ids. ValueError names the file, what it holds and what is
    allowed.
    """
    try:
        if path.suffix == ".npy":
            import numpy

            ids = torch.from_numpy(numpy.load(path, allow_pickle=False))
        else:
            ids = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file: the readers raise whatever it makes them raise
        raise ValueError(f"{path}: not a readable .npy or torch file: {error}") from error
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != layer.top_k or not ids.shape[0]:
        shape = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"{path}: {shape} is not allowed; allowed: topk_ids [N, {layer.top_k}], N from 1")
    if ids.is_floating_point() or ids.min() < -1 or ids.max() >= layer.local_experts:
        found = f"{ids.dtype} from {ids.min()} to {ids.max()}"
        raise ValueError(f"{path}: {found} is not allowed; allowed: integers from -1 to {layer.local_experts - 1}")
    return ids.to(torch.int32)


def _routing(
    layer: Layer, tokens: int, index: int, recorded: torch.Tensor | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights [T, k] float32, topk_ids [T, k] int32) of call number `index`."""
    kind = ROUTINGS[index % len(ROUTINGS)] if recorded is None else "balanced"
    popularity = draw_log_popularity(layer.local_experts, kind, generator, alpha=DEFAULT_ALPHA)
    topk_weights, topk_ids = draw_routing(tokens, layer.top_k, popularity, generator)
    if recorded is not None:
        rows = (index * tokens + torch.arange(tokens)) % recorded.shape[0]
        topk_ids = recorded[rows].to(topk_ids.device)
    return topk_weights, topk_ids


def _even(copies: int) -> int:
    """The even number below, or 1: calls of either routing then take turns in step with the copies."""
    return max(1, copies - copies % 2)


def _fewest_active(layer: Layer, tokens: int, recorded: torch.Tensor | None, generator: torch.Generator) -> int:
    """The fewest distinct experts that a call may be expected to read, over the routings."""
    if recorded is not None:
        starts = range(0, min(recorded.shape[0], MAX_CALLS * tokens), tokens)
        return min(active_experts(recorded[start : start + tokens]) for start in starts)

    def active(kind: str) -> int:
        def popularity(draws: torch.Generator) -> torch.Tensor:
            return draw_log_popularity(layer.local_experts, kind, draws, alpha=DEFAULT_ALPHA)

        return fewest_active(layer, tokens, popularity, generator)

    return min(active(kind) for kind in ROUTINGS)


def _memory_for_us(device: torch.device) -> int:
    """Bytes that are free or that this process holds, so that the answer does not depend on earlier buckets."""
    if device.type == "cpu":
        return 2**40
    return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
