"""Run every family of kernels on small layers, for compute-sanitizer, under which large ones take hours:

    python tools/small_layers.py                                          # first: compiles
    compute-sanitizer --tool memcheck python tools/small_layers.py        # then racecheck, synccheck

Prints a line a layer, and fails where a result is far from the reference.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moegen.bench.measure import layer_reference, relative_error
from moegen.bench.workload import LayerCall, draw_log_popularity, draw_routing, draw_weights
from moegen.emit import emit
from moegen.load import import_package, with_tiles
from moegen.plan import make_plan
from moegen.runtime.device import device_facts
from moegen.runtime.tile import LayerTiles
from moegen.spec import MoESpec, Shape
from moegen.tune.space import family_starts

QUANTS = ("none", "fp8_w8a8:128x128", "fp8_w8a8:channel", "int4_w4a16:g128", "mxfp4_w4a16")
SHAPE = Shape(num_experts=8, top_k=2, hidden_size=512, intermediate_size=256)
TOKENS = (1, 2, 70)  # of 8 experts and top_k 2: one is low-latency
TOLERANCE = 5e-2


def main() -> int:
    """The exit code: 0 if all results are right."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        spec = MoESpec(name="small", shapes=(SHAPE,), quant=QUANTS)
        module = import_package(emit(make_plan(spec), Path(folder)))
        for layer in module.LAYERS:
            for tokens in TOKENS:
                for label, error in errors(module, layer, tokens).items():
                    bad += not error < TOLERANCE
                    print(f"{layer.slug} T={tokens} {label}: relative error {error:.4f}", flush=True)
    return int(bad > 0)


def errors(module: Any, layer: Any, tokens: int) -> dict[str, float]:
    """What is run -> how far its result is from the reference."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    weights, ids = draw_routing(
        tokens, layer.top_k, draw_log_popularity(layer.local_experts, "balanced", generator), generator
    )
    hidden = torch.empty(tokens, layer.hidden_size, dtype=layer.dtype, device="cuda").normal_(generator=generator)
    call = LayerCall(hidden, draw_weights(layer, generator), weights, ids)
    expected: Any = call.run(lambda *args, **kwargs: layer_reference(layer, *args, **kwargs))
    functions = {"heuristic": module.fused_experts}
    functions |= {label: with_tiles(module, pair) for label, pair in pairs(layer, tokens).items()}
    found: dict[str, Any] = {label: call.run(function) for label, function in functions.items()}
    return {label: relative_error(out, expected) for label, out in found.items()}


def pairs(layer: Any, tokens: int) -> dict[str, LayerTiles]:
    """The pairs of the families that the heuristic does not take for so few tokens."""
    if tokens == 1:
        return {}
    gemms, device = (layer.gemm("gemm1"), layer.gemm("gemm2")), device_facts(torch.cuda.current_device())
    starts = family_starts("cooperative", *gemms, tokens, device)
    return {f"cooperative {kind.block_m}": pair for kind, pair in starts.items()}


if __name__ == "__main__":
    sys.exit(main())
