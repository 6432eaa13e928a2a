"""The command `moegen tune`: arguments, what is shown before and after, exit codes. Imports torch only when it runs."""

import argparse
import json
import math
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegen.interop.strict import FileError
from moegen.load import read_manifest
from moegen.spec import MoESpec, VariantSpec
from moegen.tune import journal_of, quiet_reader

if TYPE_CHECKING:
    from moegen.tune.journal import Journal
    from moegen.tune.keep import Records, VllmFiles
    from moegen.tune.session import Task
    from moegen.tune.sources import GpuSource, ReplaySource

EXIT_OK, EXIT_USAGE, EXIT_INVALID, EXIT_DEVICE, EXIT_NOTHING, EXIT_INTERRUPTED = 0, 2, 3, 4, 6, 130
EFFORTS = ("quick", "standard", "full")
ENGINES = ("moegen", "vllm")

DESCRIPTION = f"""\
Finds the fastest tile configs of a package's layers on this GPU, by measurement, and writes them into the package:
configs/<gpu>/<layer>.json. The package uses them from its next import on.

Each candidate is checked against the reference before it is timed. Candidates that do not compile, hang, crash or
compute something else are counted by class and never end the run. A result replaces the heuristic default only if it
beats it by more than the noise in a side-by-side comparison.

The run may be interrupted at any time, in any way: the same command goes on where it was. What was measured is in the
journal, which `optuna-dashboard` opens; `--fresh` forgets it.

exit codes: {EXIT_OK} done, or as much as --time-limit allowed, {EXIT_USAGE} usage,
{EXIT_INVALID} invalid package, record or file, {EXIT_DEVICE} no or wrong device, {EXIT_NOTHING} nothing could be tuned,
{EXIT_INTERRUPTED} interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen tune` but those that name the package; imports no torch."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--layer", metavar="SLUG", help="one layer of the package (default: all)")
    add("--buckets", type=buckets, metavar="T,A-B,…", help="token counts; A-B: the standard ones from A to B")
    help_ = "how many configs are measured for each bucket (default: %(default)s)"
    add("--effort", choices=EFFORTS, default="standard", help=help_)
    add("--time-limit", type=seconds, metavar="SECONDS", help="for the whole run; the buckets share it")
    add("--gpus", type=gpus, default=(0,), metavar="all|N,N", help="GPUs to use, one process each (default: 0)")
    help_ = "where the journal is: a file or a database URL of Optuna's (default: PACKAGE.journal)"
    add("--storage", metavar="URL", help=help_)
    help_ = "recorded topk_ids [N, k], .npy or torch.save, in place of balanced and power-law routing"
    add("--routing", type=Path, metavar="FILE", help=help_)
    help_ = "a tuned file of vLLM or SGLang to start from, of any GPU; may be repeated"
    add("--warm", type=Path, action="append", default=[], metavar="FILE", help=help_)
    add("--seed", type=int, default=0, help="of the search and the workload (default: %(default)s)")
    add("--fresh", action="store_true", help="forget what the journal knows of these layers")
    help_ = "also write the records there, for example tuned_configs/; with --engine, the files (default: vllm_configs)"
    add("--out", type=Path, metavar="FOLDER", help=help_)
    add("--jobs", type=count, metavar="N", help="compiler processes (default: the cores, shared by the GPUs)")
    add("--replay", type=Path, metavar="FOLDER", help="take times from recorded sweeps: tunes without a GPU")
    help_ = "whose kernel: the package's, or that of the vLLM which is installed, whose tuned file is then written"
    add("--engine", choices=ENGINES, default=ENGINES[0], help=help_)
    add("--json", action="store_true", help="print one JSON document, not the table")
    add("-q", "--quiet", action="store_true", help="no progress")


def buckets(text: str) -> tuple[int, ...]:
    """`1-64,100` -> the standard token counts from 1 to 64, and 100; ascending, for argparse."""
    from moegen.bench.run import positive
    from moegen.interop.strict import MAX_TOKENS
    from moegen.runtime.configs import BUCKETS

    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.partition("-")
        chosen = [positive(low)] if not dash else [t for t in BUCKETS if positive(low) <= t <= positive(high)]
        if not chosen or max(chosen) > MAX_TOKENS:
            raise argparse.ArgumentTypeError(f"{part!r} holds no token count from 1 to {MAX_TOKENS}")
        found.update(chosen)
    return tuple(sorted(found))


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    from moegen.bench.run import positive

    return positive(text)


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def gpus(text: str) -> tuple[int, ...] | None:
    """`all` -> None, `0,2` -> (0, 2), for argparse."""
    if text == "all":
        return None
    parts = text.split(",")
    if not all(part.isdecimal() and part.isascii() for part in parts) or len(set(parts)) != len(parts):
        raise argparse.ArgumentTypeError(f"must be `all` or different numbers of GPUs, for example 0,1, got {text!r}")
    return tuple(int(part) for part in parts)


def main(args: argparse.Namespace, package: Path) -> int:
    """Tune the package and return the exit code; the result goes to stdout, all else to stderr."""
    from moegen.runtime.configs import RecordError
    from moegen.tune.client import MeasurerError
    from moegen.tune.workers import WorkersFailedError, spread

    quiet_reader()
    storage = args.storage or journal_of(package)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs is ended in order
    try:
        if args.replay is not None and args.engine != "moegen":
            return _fail(
                f"--engine {args.engine}: sweeps of its kernel are not recorded; leave --replay away", EXIT_USAGE
            )
        if args.replay is not None:
            return _tune(args, package, storage, None)
        chosen = _gpus(args.gpus)
        if len(chosen) == 1:
            return _tune(args, package, storage, chosen[0])
        if args.fresh:
            _forget(args, package, storage, chosen)
        return _print(args, spread(_command(args, package, storage), chosen, args.jobs))
    except BrokenPipeError:
        raise
    except (FileError, RecordError, OSError) as error:
        return _fail(str(error), EXIT_INVALID)
    except (_DeviceError, MeasurerError) as error:
        return _fail(str(error), EXIT_DEVICE)
    except WorkersFailedError as error:
        return error.code  # each has said why
    except KeyboardInterrupt:
        return _fail(
            f"interrupted; what was measured is in {_shown(storage)}, the same command goes on", EXIT_INTERRUPTED
        )
    finally:
        signal.signal(signal.SIGTERM, before)


class _DeviceError(Exception):
    """There is no such GPU."""


def _gpus(wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    import torch

    there = torch.cuda.device_count()
    if not there:
        raise _DeviceError("no CUDA or HIP device; recorded sweeps need none: --replay FOLDER")
    chosen = tuple(range(there)) if wanted is None else wanted
    if max(chosen) >= there:
        raise _DeviceError(f"--gpus {max(chosen)}: this machine has the GPUs 0 to {there - 1}")
    return chosen


# ------------------------------------------------------------------------------------------------------------ one GPU


def _tune(args: argparse.Namespace, package: Path, storage: str, gpu: int | None) -> int:
    from moegen.tune.progress import Progress
    from moegen.tune.report import document, plan_lines
    from moegen.tune.session import Session

    began = time.monotonic()
    variants = _variants(args, package)
    with _source(args, package, variants, gpu, args.jobs) as source:
        keeper = _keeper(args, package, source)
        tasks = _tasks(args, package, variants, source)
        for task in tasks:
            keeper.earlier(task.variant)  # a broken file is better found now than when the first result is there
        journal = _journal(args, storage, source, tasks)
        with Progress(sum(len(task.buckets) for task in tasks), args.quiet) as progress:
            session = Session(
                source,
                journal,
                tasks,
                keeper,
                effort=args.effort,
                seed=args.seed,
                deadline=None if args.time_limit is None else began + args.time_limit,
                progress=progress,
            )
            for line in plan_lines(tasks, source, session, _shown(storage)):
                progress.say(line)
            session.run()
        found = document(str(package), tasks, source, session, time.monotonic() - began)
    return _print(args, found)


def _source(
    args: argparse.Namespace, package: Path, variants: Sequence[VariantSpec], gpu: int | None, jobs: int | None
) -> "GpuSource | ReplaySource":
    from moegen.tune.engines import VllmSource
    from moegen.tune.sources import GpuSource, ReplaySource

    if gpu is None:
        return ReplaySource(args.replay)
    kind = VllmSource if args.engine == "vllm" else GpuSource
    return kind(package, variants, gpu, jobs, args.routing, args.seed)


def _variants(args: argparse.Namespace, package: Path) -> tuple[VariantSpec, ...]:
    """The layers to tune, with everything checked that a run would otherwise fail on when it has begun."""
    from moegen.tune.engines import check_variant, engine_version
    from moegen.tune.record import layer_of
    from moegen.tune.workload import read_routing

    every = MoESpec.from_dict(read_manifest(package)["spec"], str(package)).variants()
    chosen = tuple(variant for variant in every if args.layer in (None, variant.slug))
    if not chosen:
        raise FileError(f"--layer {args.layer}: {package} has {', '.join(variant.slug for variant in every)}")
    if args.engine == "vllm":
        engine_version()
        for variant in chosen:
            check_variant(variant)
    for variant in chosen if args.routing is not None else ():
        try:
            read_routing(args.routing, layer_of(variant))
        except ValueError as error:
            raise FileError(f"--routing {error}") from error
    return chosen


def _tasks(
    args: argparse.Namespace, package: Path, variants: Sequence[VariantSpec], source: "GpuSource | ReplaySource"
) -> list["Task"]:
    from moegen.interop.files import import_tiles, matching
    from moegen.tune.engines import engine_version
    from moegen.tune.fingerprint import package_kernels
    from moegen.tune.record import layer_of
    from moegen.tune.session import Task

    imported: dict[VariantSpec, list[dict[int, Any]]] = {}
    for path in args.warm:
        variant = matching(path, variants)
        tiles = import_tiles(path, variant, layer_of(variant), source.device).tiles
        imported.setdefault(variant, []).append(tiles)
    tasks = []
    for variant in variants:
        chosen = source.buckets(variant, args.buckets)
        if chosen:
            kernels = engine_version() if args.engine == "vllm" else package_kernels(package, variant.slug)
            tasks.append(Task(variant, kernels, chosen, tuple(imported.get(variant, ()))))
    if not tasks:
        raise FileError(f"--replay {args.replay}: no sweep of these layers and buckets is recorded there")
    return tasks


def _keeper(args: argparse.Namespace, package: Path, source: "GpuSource | ReplaySource") -> "Records | VllmFiles":
    """Where results go."""
    from moegen.tune.keep import Records, VllmFiles

    if args.engine == "vllm":
        return VllmFiles(args.out or Path("vllm_configs"), source.device, source.triton)
    return Records([package / "configs", *([args.out] if args.out is not None else [])], source.device)


def _journal(
    args: argparse.Namespace, storage: str, source: "GpuSource | ReplaySource", tasks: Sequence["Task"]
) -> "Journal":
    """The journal of all that this run's times depend on; with --fresh it knows nothing of the layers."""
    from moegen.tune.journal import Journal
    from moegen.tune.session import scope_of

    scope = scope_of(source.device, source.triton, source.torch, source.routing, args.seed)
    try:
        journal = Journal(storage, scope)
    except Exception as error:  # whatever Optuna and a database driver raise
        text = f"--storage {_shown(storage)}: {type(error).__name__}: {error}"
        if isinstance(error, ImportError) and storage.startswith("postgresql:"):
            text += " pip install 'moegen[postgresql]' brings it."
        raise FileError(text) from error
    for name in (*(task.key for task in tasks), "queue") if args.fresh else ():
        journal.forget(name)
    return journal


def _shown(storage: str) -> str:
    """The storage without the password of a URL."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", storage)


# -------------------------------------------------------------------------------------------------------- several GPUs


def _forget(args: argparse.Namespace, package: Path, storage: str, chosen: Sequence[int]) -> None:
    """What --fresh means, once and before the workers begin."""
    variants = _variants(args, package)
    for gpu in chosen:
        with _source(args, package, variants, gpu, 1) as source:
            _journal(args, storage, source, _tasks(args, package, variants, source))


def _command(args: argparse.Namespace, package: Path, storage: str) -> list[str]:
    """The command of a worker, but for its GPU."""
    words = [sys.executable, "-m", "moegen", "tune", str(package), "--json", "--storage", storage]
    words += ["--effort", args.effort, "--seed", str(args.seed), "--engine", args.engine]
    words += ["--layer", args.layer] if args.layer else []
    words += ["--buckets", ",".join(map(str, args.buckets))] if args.buckets else []
    words += ["--time-limit", str(args.time_limit)] if args.time_limit else []
    words += ["--routing", str(args.routing)] if args.routing else []
    words += ["--out", str(args.out)] if args.out else []
    words += ["--quiet"] if args.quiet else []
    for path in args.warm:
        words += ["--warm", str(path)]
    return words


# -------------------------------------------------------------------------------------------------------------- result


def _print(args: argparse.Namespace, found: dict[str, Any]) -> int:
    """Show the result; the exit code."""
    from moegen.tune.report import summary

    sys.stdout.write((json.dumps(found, indent=1) if args.json else summary(found)) + "\n")
    failed = all(bucket["reason"] and bucket["complete"] for bucket in found["buckets"])
    return EXIT_NOTHING if failed else EXIT_OK


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"moegen tune: {message}\n")
    return code
