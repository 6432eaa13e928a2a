"""The command `moegen bench`: arguments, order of the cells, exit codes. Imports torch only when it runs."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from moegen.bench import DEFAULT_REPLAYS, DEFAULT_TOKENS, ROUTINGS
from moegen.bench.check import SLACK, Recorded, read_recorded, regressions
from moegen.bench.peers import PACKAGE, Candidate, PackageError, PeerError, load_package, load_peer, parse_peers
from moegen.bench.report import Environment, Table, ceilings_line, csv_rows, json_document, write_csv

if TYPE_CHECKING:
    import torch

    from moegen.bench.measure import Cell, Options
    from moegen.bench.roofline import Ceilings
    from moegen.bench.workload import Layer

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_PACKAGE, EXIT_DEVICE = 0, 1, 2, 3, 4

DESCRIPTION = f"""\
Times an emitted package and its peers on this GPU: one CUDA graph of n layer calls over different weight copies and
routings, so that at least 512 MB of weights pass between reuses (cold L2); median of the replays, µs per layer.
Routing itself is outside; assignment, both GEMMs, activation and reduce are inside. Beside it the floor of the layer
under the read bandwidth and the cuBLAS rate measured in the same run. A ratio above 1 means that the package is faster.

exit codes: {EXIT_OK} done, {EXIT_FAILED} the package failed, was wrong or (--check) got slower in some cell,
{EXIT_USAGE} usage, {EXIT_PACKAGE} invalid package, {EXIT_DEVICE} no device"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen bench`; imports no torch."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="folder of an emitted package")
    parser.add_argument(
        "--tokens",
        type=token_list,
        default=DEFAULT_TOKENS,
        metavar="T,T,…",
        help=f"token counts (default {','.join(map(str, DEFAULT_TOKENS))})",
    )
    parser.add_argument("--layer", metavar="SLUG", help="one layer of the package (default: all)")
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0], help="how tokens choose experts")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="FILE.py:function[=label]",
        help="a callable with the arguments of fused_experts to time beside the package; may be repeated",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help=f"time the cells of an earlier --csv; fail if one lost over {SLACK:.0%}% of its fraction of the floor",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document with all samples, not the table")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write one row per cell and provider")
    parser.add_argument("--replays", type=positive, default=DEFAULT_REPLAYS, help="graph replays (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and routings (default %(default)s)")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def token_list(text: str) -> tuple[int, ...]:
    """`1,4,16` -> (1, 4, 16), for argparse."""
    return tuple(positive(part) for part in text.split(","))


def main(args: argparse.Namespace) -> int:
    """Run the benchmark and return the exit code; messages about arguments, package and device go to stderr."""
    try:
        peers = parse_peers(args.peer)
        package = load_package(args.package)
        layers = select_layers(package, args.layer)
        if args.csv is not None and not args.csv.resolve().parent.is_dir():
            raise ValueError(f"--csv {args.csv}: its folder does not exist")
        import torch

        if not torch.cuda.is_available():
            return _fail("no CUDA or HIP device: the benchmark needs one", EXIT_DEVICE)
        recorded = _recorded(args, layers)
        candidates = [Candidate(PACKAGE, package.fused_experts), *map(load_peer, peers)]
    except PackageError as error:
        return _fail(str(error), EXIT_PACKAGE)
    except (PeerError, ValueError) as error:
        return _fail(str(error), EXIT_USAGE)
    with torch.inference_mode():
        return _bench(args, layers, candidates, recorded)


def select_layers(package: ModuleType, slug: str | None) -> list["Layer"]:
    """All layers of the package, or the one named. Raises ValueError that lists what there is."""
    layers = [layer for layer in package.LAYERS if slug in (None, layer.slug)]
    if not layers:
        known = ", ".join(layer.slug for layer in package.LAYERS)
        raise ValueError(f"--layer {slug}: the package has {known or 'no layers'}")
    return layers


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats this run, with every setting that changes its numbers."""
    words = ["moegen", "bench", str(args.package), "--tokens", ",".join(map(str, args.tokens))]
    words += ["--routing", args.routing, "--replays", str(args.replays), "--seed", str(args.seed)]
    words += ["--layer", args.layer] if args.layer else []
    words += ["--check", str(args.check)] if args.check else []
    for peer in args.peer:
        words += ["--peer", peer]
    return shlex.join(words)


def _recorded(args: argparse.Namespace, layers: Sequence["Layer"]) -> Recorded:
    """What --check compares with, cut down to the layers of the package; empty without --check."""
    if args.check is None:
        return {}
    import torch

    known = read_recorded(args.check, torch.cuda.get_device_name(), args.routing)
    slugs = {layer.slug for layer in layers}
    recorded = {cell: fraction for cell, fraction in known.items() if cell[0] in slugs}
    if not recorded:
        raise ValueError(f"--check {args.check}: holds none of the layers {', '.join(sorted(slugs))}")
    return recorded


def _bench(
    args: argparse.Namespace, layers: Sequence["Layer"], candidates: Sequence[Candidate], recorded: Recorded
) -> int:
    """Measure all cells, show them as they come, write what was asked for, compare with what is recorded."""
    import torch

    from moegen.bench.measure import Options

    device = torch.device("cuda", torch.cuda.current_device())
    options = Options(replays=args.replays, seed=args.seed)
    environment = _environment(args)
    # The table is read while the run goes on; beside a JSON document on stdout it moves to stderr.
    stream = sys.stderr if args.json else sys.stdout

    def show(text: str) -> None:
        stream.write(text + "\n")
        stream.flush()

    show(f"{environment.gpu} · torch {environment.torch} · triton {environment.triton}\n{environment.command}")
    ceilings: dict[torch.dtype, Ceilings] = {}
    cells: list[Cell] = []
    for layer in layers:
        tokens = sorted(count for slug, count in recorded if slug == layer.slug) if recorded else args.tokens
        cells += _bench_layer(args.routing, tokens, layer, candidates, ceilings, options, device, show)
    if args.json:
        settings = {"replays": options.replays, "seed": options.seed, "alpha": options.alpha}
        document = json_document(environment, list(ceilings.values()), cells, settings)
        sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if args.csv is not None:
        write_csv(args.csv, csv_rows(environment, cells))
    slower = regressions(cells, recorded)
    for line in slower:
        sys.stderr.write(f"moegen bench: slower than recorded: {line}\n")
    failed = slower or any(cell.result(PACKAGE).status != "ok" for cell in cells)
    return EXIT_FAILED if failed else EXIT_OK


def _bench_layer(
    routing: str,
    tokens_list: Sequence[int],
    layer: "Layer",
    candidates: Sequence[Candidate],
    ceilings: dict["torch.dtype", "Ceilings"],
    options: "Options",
    device: "torch.device",
    show: Callable[[str], None],
) -> list["Cell"]:
    """The cells of one layer; measures the ceilings of its operands if no layer before it had the same."""
    from moegen.bench.measure import measure_cell
    from moegen.bench.roofline import dtype_name, measure_ceilings, operand_dtype

    operands = operand_dtype(layer, device)
    if operands not in ceilings:
        ceilings[operands] = measure_ceilings(operands, device)
        show(ceilings_line(ceilings[operands]))
    table = Table([candidate.name for candidate in candidates])
    show("\n" + table.head(layer.slug, dtype_name(layer.dtype), routing))
    cells = []
    for tokens in tokens_list:
        cell = measure_cell(layer, tokens, routing, candidates, ceilings[operands], device=device, options=options)
        show(table.row(cell))
        cells.append(cell)
    return cells


def _environment(args: argparse.Namespace) -> Environment:
    import torch
    import triton

    gpu = torch.cuda.get_device_name()
    return Environment(gpu, torch.__version__, triton.__version__, command_line(args))


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"moegen bench: {message}\n")
    return code
