"""What is wrong with a config record: illegal, not where look-ups find it, slower than the default, or stale."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegen.interop.strict import FileError
from moegen.runtime.configs import RecordError
from moegen.tune.record import load_record
from moegen.tune.trial import NEVER_SLOWER


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a record: kind is "invalid" or "stale"."""

    path: str
    kind: str
    message: str


def record_files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """The records in files, folders of records and packages, each with whether its place counts: a file that is named
    on its own may lie anywhere.
    """
    for path in paths:
        if path.is_dir():
            folder = path / "configs" if (path / "manifest.json").is_file() else path
            yield from ((found, True) for found in sorted(folder.glob("*/*.json")))
        else:
            yield path, False


def check_record(path: Path, placed: bool) -> list[Finding]:
    """Everything that is wrong with one record. placed: it must lie where look-ups find it."""

    def found(kind: str, message: str) -> Finding:
        return Finding(str(path), kind, message)

    try:
        record = load_record(path)
    except (FileError, RecordError) as error:
        return [found("invalid", str(error))]
    findings = []
    if placed and Path(*path.parts[-2:]) != record.name:
        findings.append(found("invalid", f"{path}: look-ups find it as {record.name} only"))
    stale: dict[str, list[str]] = {}
    for tokens, bucket in record.buckets.items():
        if bucket.gain is not None and bucket.gain * NEVER_SLOWER < 1:
            slower = f"{bucket.us} µs, the default {bucket.default_us} µs"
            findings.append(found("invalid", f"{path}: buckets.{tokens}.us: slower than the default: {slower}"))
        reason = None if bucket.source else bucket.why_stale(record.variant)
        if reason is not None:
            stale.setdefault(reason, []).append(str(tokens))
    for reason, tokens_of in stale.items():
        findings.append(found("stale", f"{path}: buckets {', '.join(tokens_of)}: {reason}"))
    return findings
