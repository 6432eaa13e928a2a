"""The command line: parse, call, print. Results go to stdout, messages to stderr.

Exit codes: 0 ok, 1 internal error, 2 usage, 3 invalid spec, package, record or file, 4 no or wrong device, 5 a target
does not compile (build) or a record is stale (check), 6 nothing could be tuned, 130 interrupted (state is kept).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moegen.bench import run as bench
from moegen.emit import EmitError, emit
from moegen.load import PackageError, read_manifest
from moegen.models import find_model, load_models, model_spec
from moegen.plan import Plan, make_plan
from moegen.render import RenderError
from moegen.runtime.quant import MODES, Scheme
from moegen.spec import DTYPES, MoESpec, Parallel, SpecError, load_spec
from moegen.tune import commands as records
from moegen.tune import plot
from moegen.tune import run as tune

EXIT_INVALID, EXIT_TARGET = 3, 5
RELEASED = "released"

_RECORD_COMMANDS = {
    "check": ("validate config records", records.add_check_arguments, records.check),
    "merge": ("merge two config records", records.add_merge_arguments, records.merge),
    "export": ("write vLLM's or SGLang's tuned files", records.add_export_arguments, records.export),
    "plot": ("draw speed-up, roofline and convergence", plot.add_arguments, plot.main),
    "import": ("use a tuned file of vLLM or SGLang", records.add_import_arguments, records.import_),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `moegen list | head`: the reader has seen enough, and the exit would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SpecError, PackageError, EmitError, RenderError) as error:
        print(f"moegen {args.command}: {error}", file=sys.stderr)
        return EXIT_INVALID


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moegen", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser("build", help="build a package from a spec, a known model or a config.json")
    _add_spec_arguments(build, "SPEC", "spec.yaml, or a Hugging Face config.json or its folder")
    build.add_argument("-o", "--out", type=Path, default=Path("out"), help="folder for the package (default: out)")
    build.add_argument("--target", type=_targets, help="compile everything for cuda:90,hip:gfx942,… and report")
    build.add_argument("--json", action="store_true", help="print one JSON document")
    build.set_defaults(run=_build)

    models = commands.add_parser("list", help="known models and their shapes")
    models.add_argument("--quant", action="store_true", help="also the quant schemes of released checkpoints")
    models.add_argument("--json", action="store_true", help="print one JSON document")
    models.set_defaults(run=_list)

    show = commands.add_parser("show", help="what a package holds")
    show.add_argument("package", type=Path, help="folder of an emitted package")
    show.add_argument("--json", action="store_true", help="print its manifest")
    show.set_defaults(run=_show)

    timing = commands.add_parser("bench", help="time a package and its peers on this GPU")
    bench.add_arguments(timing)
    timing.set_defaults(run=bench.main)

    tuning = commands.add_parser("tune", help="find the fastest tile configs of a package on this GPU")
    _add_spec_arguments(
        tuning, "PACKAGE", "folder of an emitted package, or what `moegen build` takes: it is built first"
    )
    tuning.add_argument("--packages", type=Path, default=Path("out"), help="where it is built (default: out)")
    tune.add_arguments(tuning)
    tuning.set_defaults(run=_tune)

    for name, (help_, add_arguments, run) in _RECORD_COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _add_spec_arguments(parser: argparse.ArgumentParser, metavar: str, help_: str) -> None:
    """What `_spec` reads."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("spec", nargs="?", type=Path, metavar=metavar, help=help_)
    source.add_argument("--model", help="a known model (moegen list)")
    parser.add_argument("--tp", type=_sizes, help="tensor-parallel sizes, for example 1,4 (default: the spec's, or 1)")
    parser.add_argument("--ep", type=_sizes, help="expert-parallel sizes (default: the spec's, or 1)")
    parser.add_argument("--dtype", type=_names(DTYPES), help=f"of {', '.join(DTYPES)} (default: the model's)")
    quant = (
        f"mode[:granularity] of {', '.join(MODES)}; {RELEASED}: all that `moegen list --quant` shows (default: none)"
    )
    parser.add_argument("--quant", type=_schemes, help=quant)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: positive integers, separated by commas")
    return sizes


def _schemes(text: str) -> tuple[str, ...]:
    """An argparse type: quant schemes, separated by commas, or RELEASED alone."""
    if text == RELEASED:
        return (RELEASED,)
    try:
        return tuple(Scheme.parse(part).name for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _names(allowed: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names out of `allowed`, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not allowed; allowed: {', '.join(allowed)}")
        return names

    return parse


def _targets(text: str) -> tuple[str, ...]:
    """An argparse type that imports torch, with the facts of devices, only when it is used."""
    from moegen.device import TARGETS

    return _names(TARGETS)(text)


def _build(args: argparse.Namespace) -> int:
    plan = make_plan(_spec(args))
    folder = emit(plan, args.out)
    compiled = []
    if args.target:
        from moegen.aot import compile_targets

        compiled = compile_targets(folder, list(args.target))
    if args.json:
        print(json.dumps({"package": str(folder), "compiled": [asdict(item) for item in compiled]}, indent=1))
    else:
        _print_plan(plan, folder)
        _print_compiled(compiled)
    failed = [item for item in compiled if item.error is not None]
    for item in failed:
        print(
            f"moegen build: {item.layer} {item.kernel} does not compile for {item.target}: {item.error}",
            file=sys.stderr,
        )
    return EXIT_TARGET if failed else 0


def _tune(args: argparse.Namespace) -> int:
    package = args.spec
    if package is None or not (package / "manifest.json").is_file():
        package = emit(make_plan(_spec(args)), args.packages)
    elif args.tp or args.ep or args.dtype or args.quant:
        raise SpecError(f"{package} is built already; --tp, --ep, --dtype and --quant are for a spec or a model")
    return tune.main(args, package)


def _spec(args: argparse.Namespace) -> MoESpec:
    """The spec that the arguments describe; --tp, --ep, --dtype and --quant override what it says."""
    if args.model is not None:
        spec = model_spec(args.model)
    elif args.spec.is_dir() or args.spec.suffix == ".json":
        from moegen.huggingface import spec_from_config

        spec = spec_from_config(args.spec)
    else:
        spec = load_spec(args.spec)
    changes: dict[str, Any] = {}
    if args.tp or args.ep:
        changes["parallel"] = tuple(Parallel(tp=tp, ep=ep) for tp in args.tp or (1,) for ep in args.ep or (1,))
    if args.dtype:
        changes["dtypes"] = args.dtype
    if args.quant:
        changes["quant"] = _released(args.model) if args.quant == (RELEASED,) else args.quant
    return replace(spec, **changes)


def _released(model: str | None) -> tuple[str, ...]:
    if model is None:
        raise SpecError(f"--quant: {RELEASED!r} is not allowed for a file; allowed: mode[:granularity], or --model")
    found = find_model(model)
    if not found.quant:
        raise SpecError(f"--quant: models.yaml has no released scheme of {found.name}; allowed: mode[:granularity]")
    return found.quant


def _print_plan(plan: Plan, folder: Path) -> None:
    print(f"{plan.spec.name}: {len(plan.layers)} layer{'s' * (len(plan.layers) > 1)} in {folder}")
    for item in plan.layers:
        v = item.variant
        shapes = [list(v.scheme.weight_shape(*shape)) for shape in (v.w13_shape, v.w2_shape)]
        stored = "/".join(v.scheme.weight_dtypes) or v.dtype
        print(f"  {v.slug}: w13 {shapes[0]}, w2 {shapes[1]} {stored}, top_k {v.top_k}, {item.module}")


def _print_compiled(compiled: Sequence[object]) -> None:
    if not compiled:
        return
    columns = ("target", "kernel", "tokens", "registers", "shared_memory", "spills", "tensor_cores", "constants")
    rows = [[str(getattr(item, name)) for name in columns] for item in compiled if not getattr(item, "error")]  # noqa: B009
    widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
    for row in [list(columns), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _list(args: argparse.Namespace) -> int:
    models = load_models()
    if args.json:
        print(json.dumps({name: model_spec(name).to_dict() for name in models}, indent=1))
        return 0
    width = max(map(len, models))
    print(f"{'model'.ljust(width)}     E  top_k      H      I  activation{'  released quant' if args.quant else ''}")
    for name, model in models.items():
        s = model.shape
        sizes = f"{s.num_experts:5d} {s.top_k:6d} {s.hidden_size:6d} {s.intermediate_size:6d}"
        quant = f"  {', '.join(model.quant) or '?'}" if args.quant else ""
        print(f"{name.ljust(width)} {sizes}  {model.activation.slug}{' + bias' if model.bias else ''}{quant}")
    return 0


def _show(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.package)
    if args.json:
        print(json.dumps(manifest, indent=1))
        return 0
    tested = ", ".join(f"torch {pair['torch']} + triton {pair['triton']}" for pair in manifest["tested"])
    print(f"{manifest['package']}: built by moegen {manifest['moegen']}, tested with {tested}")
    print(f"spec: {json.dumps(manifest['spec'])}")
    print("layers: " + ", ".join(manifest["layers"]))
    print("kernels: " + ", ".join(manifest["modules"]))
    print("targets: any GPU that Triton knows; ahead of time: moegen build --target cuda:90,hip:gfx942,…")
    lines = records.record_lines(args.package)
    print("\n  ".join(["tuned configs:", *lines]) if lines else "tuned configs: none, the heuristic default everywhere")
    return 0
