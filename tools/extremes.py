"""Time what a layer has to survive: skewed routing, all slots on one expert, very many tokens.

    python tools/extremes.py out/moe_qwen3_30b_a3b out/fp8/moe_deepseek_v3

For each layer, as ratios within one run:

    skew   power-law routing (--alpha) over balanced routing, at each of --tokens
    hot    all slots on one expert over the two dense products of the same size, as torch computes them, and over
           balanced routing; 16-bit layers only, since torch's fp8 product has other scales
    many   µs a token at each of --many tokens over that at the first

A graph of a few calls over two weight copies, replayed in turn with what it is compared with (moegen.bench.timing).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moegen.bench.run import positive
from moegen.bench.timing import CapturedCalls, ratio, release_memory, time_interleaved
from moegen.bench.workload import LayerCall, Weights, draw_log_popularity, draw_routing, draw_weights
from moegen.load import import_package

COPIES, CALLS, HOT = 2, 4, 3  # HOT: the number of the one expert
Function = Callable[..., object]


def main() -> int:
    """Print a line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[4096, 16384])
    parser.add_argument("--many", type=positive, nargs="*", default=[], metavar="TOKENS")
    parser.add_argument("--alpha", type=float, default=1.2)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, alpha {args.alpha}")
    for package in args.packages:
        module = import_package(package)
        for layer in module.LAYERS:
            draw = torch.Generator("cuda").manual_seed(0)
            weights = [draw_weights(layer, draw) for _ in range(COPIES)]
            for tokens in args.tokens:
                compare_routings(layer, module.fused_experts, weights, tokens, args.alpha, draw)
            if args.many:
                compare_counts(layer, module.fused_experts, weights, args.many, draw)
            del weights
            release_memory()
    return 0


def compare_routings(
    layer: Any, function: Function, weights: list[Weights], tokens: int, alpha: float, draw: torch.Generator
) -> None:
    """Balanced, skewed and hot routing side by side, and the dense products."""
    inputs = [inputs_of(layer, tokens, draw) for _ in range(CALLS)]
    forms: dict[str, Any] = {
        name: [routing(layer, tokens, name, alpha, draw) for _ in inputs] for name in ("balanced", "power_law")
    }
    ones = torch.full((tokens, layer.top_k), 1 / layer.top_k, device="cuda")
    forms["hot"] = [(ones, torch.full((tokens, layer.top_k), HOT, dtype=torch.int32, device="cuda")) for _ in inputs]
    graphs = {name: CapturedCalls(calls(function, inputs, weights, drawn)) for name, drawn in forms.items()}
    if layer.quant == "none":
        slots = [x.repeat_interleave(layer.top_k, 0) for x in inputs]
        graphs["dense"] = CapturedCalls([partial(dense, x, weights[n % COPIES]) for n, x in enumerate(slots)])
    times = dict(zip(graphs, time_interleaved(list(graphs.values()), replays=10), strict=True))
    shown = [f"{name} {timing.us_per_call:.1f}" for name, timing in times.items()]
    shown.append(f"skew {ratio(times['power_law'], times['balanced']):.3f}")
    shown.append(f"hot {ratio(times['hot'], times['balanced']):.3f} of balanced")
    if "dense" in times:
        shown.append(f"{ratio(times['hot'], times['dense']):.3f} of dense")
    print(f"{layer.slug} T={tokens}: {', '.join(shown)}", flush=True)
    del graphs
    release_memory()


def compare_counts(
    layer: Any, function: Function, weights: list[Weights], counts: list[int], draw: torch.Generator
) -> None:
    """Balanced routing at each token count."""
    base = 0.0
    for tokens in counts:
        drawn = [routing(layer, tokens, "balanced", 0.0, draw) for _ in range(COPIES)]
        inputs = [inputs_of(layer, tokens, draw) for _ in drawn]
        graph = CapturedCalls(calls(function, inputs, weights, drawn))
        if not all(bool(out.isfinite().all()) for out in graph.outputs if isinstance(out, torch.Tensor)):
            raise SystemExit(f"{layer.slug} T={tokens}: a result is not finite")
        us = time_interleaved([graph], replays=5)[0].us_per_call
        base = base or us / tokens
        print(f"{layer.slug} T={tokens}: {us:.1f} µs, {us / tokens:.4f} a token, {us / tokens / base:.3f}", flush=True)
        del graph
        release_memory()


def inputs_of(layer: Any, tokens: int, draw: torch.Generator) -> torch.Tensor:
    """hidden_states [tokens, H]."""
    return torch.empty(tokens, layer.hidden_size, dtype=layer.dtype, device="cuda").normal_(generator=draw)


def routing(
    layer: Any, tokens: int, kind: str, alpha: float, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights, topk_ids) over the local experts."""
    return draw_routing(tokens, layer.top_k, draw_log_popularity(layer.local_experts, kind, draw, alpha=alpha), draw)


def calls(
    function: Function,
    inputs: list[torch.Tensor],
    weights: list[Weights],
    drawn: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[Callable[[], object]]:
    """Layer calls over the weight copies by turns."""
    made = [LayerCall(x, weights[n % COPIES], *one) for n, (x, one) in enumerate(zip(inputs, drawn, strict=True))]
    return [partial(call.run, function) for call in made]


def dense(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """x [slots, H] through the two products of one expert, without activation: half the rows of the first feed the
    second.
    """
    hidden = x @ weights.w13[HOT].T
    return hidden[:, : weights.w2.shape[2]] @ weights.w2[HOT].T


if __name__ == "__main__":
    sys.exit(main())
