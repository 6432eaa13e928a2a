"""The commands `moegen check`, `merge`, `export` and `import`: arguments, messages, exit codes. No torch to parse."""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegen.interop.strict import FileError, read_json, token_counts
from moegen.load import read_manifest
from moegen.render import data_folder
from moegen.spec import MoESpec, VariantSpec
from moegen.tune import journal_of, quiet_reader

if TYPE_CHECKING:
    from moegen.runtime.device import DeviceFacts
    from moegen.runtime.tile import LayerTiles, TileConfig
    from moegen.tune.record import Record

EXIT_OK, EXIT_INVALID, EXIT_STALE = 0, 3, 5
FORMATS = ("vllm", "sglang")

CHECK = f"""\
Checks config records: the schema, that every tile config is legal for its layer on its GPU, that the file lies where
the dispatcher looks for it, and that no bucket is slower than the heuristic default. Stale is a record whose kernels
have changed since, or whose Triton is not supported any more: it works, but may not be the best. Needs no GPU.

exit codes: {EXIT_OK} all is well, {EXIT_INVALID} something is invalid, {EXIT_STALE} nothing worse than stale"""

MERGE = """\
Merges record B into record A. Both must be of one GPU and layer. Where both have a token count, a measured bucket wins
over an imported one, then today's kernels over older ones, then the newer Triton, then the larger gain over the default
(the gain and not the time: only the two times of one bucket were measured side by side); on a tie A's stays."""

EXPORT = """\
Writes the tuned files that vLLM or SGLang look up, under their names and in their schemas. Fields that they do not know
(SWAP_AB, PDL, family) are left out; a BLOCK_SIZE_M of 8 becomes 16 where they cannot launch it. Their kernels are not
moegen's: what is best here is a good guess there; `moegen tune --engine vllm` measures vLLM's own. vLLM has one tile
config for both GEMMs: the best common one that was measured, if the journal has one, else gemm1's, which is said."""

IMPORT = """\
Reads a tuned file of vLLM or SGLang (and SGLang's _down file beside it) and adds its tile configs to the package's
record as a fallback: where nothing was measured, the dispatcher uses them in place of the heuristic, and `moegen tune`
starts from them. Buckets that were measured stay. Tile configs that are illegal here are left out and named."""


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, for which a file that cannot be used is a message and an exit code."""

    @functools.wraps(run)
    def guarded(args: argparse.Namespace) -> int:
        from moegen.runtime.configs import RecordError

        quiet_reader()
        try:
            return run(args)
        except BrokenPipeError:
            raise
        except (FileError, RecordError, OSError) as error:
            _complain(args, str(error))
            return EXIT_INVALID

    return guarded


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen check`."""
    _describe(parser, CHECK)
    help_ = "records, folders of records, packages (default: the published records)"
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help=help_)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def check(args: argparse.Namespace) -> int:
    """Check all records, print what was found; the exit code says the worst."""
    from moegen.tune.check import check_record, record_files

    quiet_reader()
    paths = args.paths or [data_folder("tuned_configs")]
    files = list(record_files(paths))
    findings = [finding for path, placed in files for finding in check_record(path, placed)]
    kinds = [finding.kind for finding in findings]
    if args.json:
        document = {"records": len(files), "findings": [asdict(finding) for finding in findings]}
        _print(json.dumps(document, indent=1))
    else:
        for finding in findings:
            _print(f"{finding.kind}: {finding.message}")
        _print(f"{len(files)} records: {kinds.count('invalid')} invalid, {kinds.count('stale')} stale findings")
    return EXIT_INVALID if "invalid" in kinds else EXIT_STALE if "stale" in kinds else EXIT_OK


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen merge`."""
    _describe(parser, MERGE)
    parser.add_argument("one", type=Path, metavar="A", help="a record")
    parser.add_argument("other", type=Path, metavar="B", help="another record of the same GPU and layer")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="where to write the result (default: A)")


@_guarded
def merge(args: argparse.Namespace) -> int:
    """Write the merged record and say where each bucket comes from."""
    from moegen.tune.record import load_record, merge_records, write_record

    one, other = load_record(args.one), load_record(args.other)
    merged = merge_records(one, other, (str(args.one), str(args.other)))
    write_record(args.out or args.one, merged)
    taken = [str(tokens) for tokens in sorted(merged.buckets) if merged.buckets[tokens] != one.buckets.get(tokens)]
    _print(f"{args.out or args.one}: {len(merged.buckets)} buckets, from {args.other}: {', '.join(taken) or 'none'}")
    return EXIT_OK


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen export`."""
    _describe(parser, EXPORT)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="records, folders of records, packages")
    parser.add_argument("--format", choices=FORMATS, required=True, help="whose files to write")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--layer", metavar="SLUG", help="only the records of this layer")
    parser.add_argument(
        "--journal", metavar="FILE", help="journal or storage URL of the tuning (default: PACKAGE.journal)"
    )


@_guarded
def export(args: argparse.Namespace) -> int:
    """Write the files and print their paths; what could not be carried over goes to stderr."""
    from moegen.tune.check import record_files
    from moegen.tune.record import load_record

    texts: dict[Path, str] = {}
    for source in args.paths:
        for record in (load_record(path) for path, _ in record_files([source])):
            if args.layer not in (None, record.variant.slug):
                continue
            for name, text in _exported(args, record, args.journal or journal_of(source)).items():
                if texts.setdefault(args.out / name, text) != text:
                    raise FileError(f"{args.out / name}: several layers have this name; choose one with --layer")
    if not texts:
        raise FileError(f"no record of {args.layer or 'any layer'} in {', '.join(map(str, args.paths))}")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        _print(str(path))
    return EXIT_OK


def _exported(args: argparse.Namespace, record: "Record", journal: str) -> dict[Path, str]:
    """Path below the output folder -> text. What was imported stays out: it is such a file already."""
    from moegen.interop import sglang, vllm
    from moegen.interop.table import offered

    own = {tokens: bucket for tokens, bucket in record.buckets.items() if not bucket.source}
    if not own:
        raise FileError(f"{record.name}: nothing to export, every bucket was imported")
    tiles = {tokens: offered(_portable(record, journal, tokens), record.variant, record.gpu) for tokens in own}
    versions = {tokens: bucket.triton for tokens, bucket in own.items()}
    if args.format == "sglang":
        return sglang.export(record.variant, record.gpu.name, tiles, versions)
    common = {tokens: pair.gemm1 for tokens, pair in tiles.items() if vllm.alike(pair)}
    for tokens in tiles:
        found = None if tokens in common else _best_common(record, journal, tokens)
        if found is not None:
            common[tokens] = found
    guessed = [str(tokens) for tokens in sorted(tiles) if tokens not in common]
    if guessed:
        _complain(
            args, f"{record.name}: token counts {', '.join(guessed)}: gemm1's tile config, no common one is known"
        )
    return vllm.export(record.variant, record.gpu.name, tiles, versions, common)


def _portable(record: "Record", journal: str, tokens: int) -> "LayerTiles":
    """What others have kernels for: the bucket's own pair, else the fastest measured one or the heuristic's."""
    from moegen.runtime.heuristic import default_tiles
    from moegen.runtime.layer import is_low_latency
    from moegen.tune.record import layer_of

    if record.buckets[tokens].tiles.gemm1.family == "portable":
        return record.buckets[tokens].tiles
    times = [(us, pair) for us, pair in _times(record, journal, tokens) if pair.gemm1.family == "portable"]
    if times:
        return min(times, key=lambda time: time[0])[1]
    layer = layer_of(record.variant)
    gemms, low_latency = (layer.gemm("gemm1"), layer.gemm("gemm2")), is_low_latency(layer, tokens, None)
    return default_tiles(*gemms, tokens, record.gpu, low_latency, portable=True)


def _times(record: "Record", journal: str, tokens: int) -> "list[tuple[float, LayerTiles]]":
    """µs and pair of all that the journal has of a bucket, if there is a journal."""
    from moegen.tune.session import measured

    if "://" not in journal and not Path(journal).is_file():
        return []
    return [(found.us, pair) for pair, found in measured(journal, record, tokens) if found.us]


def _best_common(record: "Record", journal: str, tokens: int) -> "TileConfig | None":
    """The fastest tile config that was measured for both GEMMs at once, if the journal is there and has one."""
    from moegen.interop import vllm
    from moegen.interop.table import offered

    alike = [(us, pair) for us, pair in _times(record, journal, tokens) if vllm.alike(pair)]
    times = [(us, pair) for us, pair in alike if pair.gemm1.family == "portable"]
    return offered(min(times, key=lambda time: time[0])[1], record.variant, record.gpu).gemm1 if times else None


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen import`."""
    _describe(parser, IMPORT)
    parser.add_argument("file", type=Path, metavar="FILE", help="E=…,N=…,device_name=….json")
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="folder of an emitted package")
    parser.add_argument("--layer", metavar="SLUG", help="the layer, where the file's name fits several")
    help_ = "the GPU's architecture, for example cuda:90, if neither moegen nor this machine knows the GPU in the name"
    parser.add_argument("--target", metavar="TARGET", help=help_)


@_guarded
def import_(args: argparse.Namespace) -> int:
    """Add the file's tile configs to the record of its layer and GPU in the package."""
    from moegen.interop.files import import_tiles, matching
    from moegen.tune.record import Record, TunedBucket, layer_of, update_record

    variant = matching(args.file, _variants(args.package, args.layer))
    gpu = _gpu(args.file, args.target)
    found = import_tiles(args.file, variant, layer_of(variant), gpu)
    buckets = {tokens: TunedBucket(tiles=tiles, source=args.file.name) for tokens, tiles in found.tiles.items()}

    def fallback(there: Record | None) -> Record:
        measured = {t: bucket for t, bucket in there.buckets.items() if not bucket.source} if there else {}
        return Record(gpu, variant, {**(there.buckets if there else {}), **buckets, **measured})

    path = args.package / "configs" / Record(gpu, variant).name
    written = update_record(path, Record(gpu, variant), fallback)
    for line in found.skipped:
        _complain(args, f"left out: {line}")
    used = sum(written.buckets[tokens] == bucket for tokens, bucket in buckets.items())
    _print(f"{path}: {used} of {len(buckets)} token counts in use as a fallback")
    return EXIT_OK


def _variants(package: Path, slug: str | None) -> list[VariantSpec]:
    variants = MoESpec.from_dict(read_manifest(package)["spec"], str(package)).variants()
    chosen = [variant for variant in variants if slug in (None, variant.slug)]
    if not chosen:
        raise FileError(f"--layer {slug}: {package} has {', '.join(variant.slug for variant in variants)}")
    return chosen


def _gpu(path: Path, target: str | None) -> "DeviceFacts":
    """The GPU that the file's name is of: known, at hand, or of the architecture that --target states."""
    import torch

    from moegen.device import target_facts
    from moegen.interop.files import gpu_of, known_gpu
    from moegen.runtime.device import device_facts

    name = gpu_of(path)
    if target is not None:
        try:
            return replace(target_facts(target), name=name.replace("_", " "))
        except ValueError as error:
            raise FileError(f"--{error}") from error
    here = [device_facts(index) for index in range(torch.cuda.device_count())]
    found = known_gpu(name, here)
    if found is None:
        raise FileError(f"{path}: the GPU {name} is not known here; state its architecture: --target cuda:90")
    return found


def record_lines(package: Path) -> list[str]:
    """One line for each config record of a package; imports no torch, and checks no more than it shows."""
    lines = []
    for path in sorted(package.glob("configs/*/*.json")):
        name = path.relative_to(package / "configs")
        try:
            data = read_json(path)
            buckets = token_counts(path, data.get("buckets"), "buckets.")
        except FileError as error:
            lines.append(f"{name}: broken: {error}")
            continue
        entries = [entry for entry in buckets.values() if isinstance(entry, dict)]
        gains = [gain for gain in map(_gain, entries) if gain is not None]
        mean = f", {math.exp(sum(map(math.log, gains)) / len(gains)):.3f} × default on average" if gains else ""
        imported = sum("source" in entry for entry in entries)
        extra = f", {imported} of them imported" if imported else ""
        lines.append(f"{name}: {len(buckets)} token counts from {min(buckets)} to {max(buckets)}{extra}{mean}")
    return lines


def _gain(entry: dict[str, Any]) -> float | None:
    times = [entry.get("default_us"), entry.get("us")]
    default_us, us = (time if isinstance(time, int | float) and 0 < time < 1e12 else None for time in times)
    return default_us / us if default_us and us else None


def _describe(parser: argparse.ArgumentParser, text: str) -> None:
    parser.description = text
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(args: argparse.Namespace, text: str) -> None:
    sys.stderr.write(f"moegen {args.command}: {text}\n")
