"""Time builds of one package beside each other: what a change of the kernels or of the heuristic is worth.

    moegen build --model qwen3-30b-a3b -o before      # of an older checkout
    moegen build --model qwen3-30b-a3b -o after
    python tools/compare_builds.py before/moe_qwen3_30b_a3b after/moe_qwen3_30b_a3b --tokens 16 64 4096

The method is that of `moegen bench`, all builds in turn in one graph replay after the other; results are compared with
the first build's. The second figure is the time over the first build's, median over the rounds.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from moegen.bench import ROUTINGS
from moegen.bench.measure import Options, measure_cell
from moegen.bench.peers import PACKAGE, Candidate
from moegen.bench.roofline import Ceilings, measure_ceilings, operand_dtype
from moegen.bench.run import positive
from moegen.load import import_package


def main() -> int:
    """The exit code: 0 if every build was timed in every cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "builds", nargs="+", type=Path, metavar="PACKAGE", help="folders of packages of the same layers"
    )
    parser.add_argument("--tokens", nargs="+", type=positive, required=True)
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0])
    parser.add_argument("--replays", type=positive, default=10)
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        # A name of its own each, since modules that a package imports late are found by its name.
        copies = [shutil.copytree(build, Path(folder) / f"build_{n}") for n, build in enumerate(args.builds)]
        modules = [import_package(copy) for copy in copies]
        first, device = modules[0], torch.device("cuda")
        names = [PACKAGE, *(f"build {n}" for n in range(1, len(modules)))]
        candidates = [Candidate(name, module.fused_experts) for name, module in zip(names, modules, strict=True)]
        ceilings: dict[torch.dtype, Ceilings] = {}
        for layer in first.LAYERS:
            operands = operand_dtype(layer, device)
            if operands not in ceilings:
                ceilings[operands] = measure_ceilings(operands, device)
            for tokens in args.tokens:
                cell = measure_cell(
                    layer,
                    tokens,
                    args.routing,
                    candidates,
                    ceilings[operands],
                    device=device,
                    options=Options(replays=args.replays),
                    reference=lambda _, *args, **kwargs: first.fused_experts(*args, **kwargs),
                )
                shown = []
                for build, result in zip(args.builds, cell.results, strict=True):
                    bad += result.timing is None
                    ratio = cell.ratio_to_package(result)
                    time = "" if result.timing is None else f" {result.timing.us_per_call:.2f} µs"
                    shown.append(f"{build}{time} {result.message if ratio is None else f'{ratio:.3f}'}")
                floor = f" floor {cell.floor.us:.1f} µs" if cell.floor else ""
                print(f"{layer.slug} T={tokens}{floor} | {' | '.join(shown)}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
