"""What `moegen tune` says before and after: the shapes and spaces, the document of a run, the table of its buckets."""

from collections.abc import Sequence
from typing import Any

from moegen.tune.progress import table
from moegen.tune.search import EFFORTS
from moegen.tune.session import Outcome, Session, Task
from moegen.tune.sources import Source
from moegen.tune.trial import plain_tiles


def plan_lines(tasks: Sequence[Task], source: Source, session: Session, storage: str) -> list[str]:
    """What is about to be done, before it is."""
    budget = EFFORTS[session.effort].budget
    lines = [f"{source.device.name}, Triton {source.triton}, routing {source.routing}, effort {session.effort}"]
    for task in tasks:
        v = task.variant
        experts = f"E {v.num_experts}" + (f" ({v.local_experts} here)" if v.local_experts != v.num_experts else "")
        form = f"{v.dtype}, {v.quant}, {v.activation.slug}{', bias' if v.bias else ''}"
        lines.append(f"{v.slug}: {experts}, top_k {v.top_k}, H {v.hidden_size}, I {v.intermediate_size}, {form}")
        sizes = [f"T={tokens} {source.space(v, tokens).size}" for tokens in task.buckets]
        lines.append(f"  legal tile configs of both GEMMs: {', '.join(sizes)}; at most {budget} measurements each")
    done, known = session.known()
    total = sum(len(task.buckets) for task in tasks)
    state = f"{done} of {total} buckets done, {known} measurements known: going on" if known else "a new run"
    return [*lines, f"journal {storage}: {state}"]


def document(package: str, tasks: Sequence[Task], source: Source, session: Session, wall_s: float) -> dict[str, Any]:
    """The whole run in plain types.

    waiting_for_compiler is the share of the wall time that the GPU spent waiting for it; preparing_s and measuring_s
    are seconds in which workloads were set up and configs measured; compiled_late are kernels nobody compiled ahead.
    compilers processes compiled `compiled` kernels in compiler_s seconds of all of them together. Where that is about
    all the time there was, more cores would help; else the GPU waited for single kernels.
    """
    usage, slugs = source.usage, {task.key: task.variant.slug for task in tasks}
    measured = sum(number for status, number in usage.statuses.items() if status != "final")
    return {
        "package": package,
        "gpu": source.device.name,
        "effort": session.effort,
        "seed": session.seed,
        "wall_s": round(wall_s, 2),
        "measured": measured,
        "per_minute": round(60 * measured / wall_s, 1),
        "waiting_for_compiler": round(usage.waiting_s / wall_s, 4),
        "preparing_s": round(usage.preparing_s, 2),
        "measuring_s": round(usage.measuring_s, 2),
        "compilers": usage.compilers,
        "compiled": usage.ahead,
        "compiler_s": round(usage.compiler_s, 2),
        "compiled_late": usage.compiled,
        "processes_lost": max(0, usage.starts - 1),
        "files": [str(path) for path in session.files()],
        "buckets": [_plain(slugs[key], outcome) for (key, _), outcome in sorted(session.outcomes.items())],
    }


def _plain(slug: str, outcome: Outcome) -> dict[str, Any]:
    found = outcome.found
    plain: dict[str, Any] = {"layer": slug, "tokens": outcome.tokens}
    if found is not None:
        plain |= {
            "us": round(found.us, 3),
            "default_us": found.default_us and round(found.default_us, 3),
            "spread": round(found.spread, 5),
            "tried": found.tried,
            "failures": dict(found.failures),
            "wrong": [{"tiles": plain_tiles(tiles), "message": message} for tiles, message in outcome.wrong],
        }
    return {**plain, "complete": outcome.complete, "reason": outcome.reason}


_SUMS = ("preparing_s", "measuring_s", "compilers", "compiled", "compiler_s", "compiled_late", "processes_lost")


def merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of several workers of a run: of each bucket the result of whoever has it."""
    buckets: dict[tuple[str, int], dict[str, Any]] = {}
    for bucket in (bucket for one in documents for bucket in one["buckets"]):
        key = bucket["layer"], bucket["tokens"]
        if key not in buckets or (bucket["complete"], not bucket["reason"]) > (
            buckets[key]["complete"],
            not buckets[key]["reason"],
        ):
            buckets[key] = bucket
    wall_s = max(one["wall_s"] for one in documents)
    measured = sum(one["measured"] for one in documents)
    return {
        **documents[0],
        "gpu": ", ".join(sorted({one["gpu"] for one in documents})),
        "wall_s": wall_s,
        "measured": measured,
        "per_minute": round(60 * measured / wall_s, 1),
        "waiting_for_compiler": round(sum(one["waiting_for_compiler"] for one in documents) / len(documents), 4),
        **{key: sum(one[key] for one in documents) for key in _SUMS},
        "files": sorted({path for one in documents for path in one["files"]}),
        "buckets": [buckets[key] for key in sorted(buckets)],
    }


def summary(found: dict[str, Any]) -> str:
    """The result for people: a table a layer, then what it took."""
    lines = []
    for layer in dict.fromkeys(bucket["layer"] for bucket in found["buckets"]):
        rows: list[tuple[str, ...]] = [("tokens", "default µs", "tuned µs", "×", "tried", "")]
        for bucket in (bucket for bucket in found["buckets"] if bucket["layer"] == layer):
            rows.append(_row(bucket))
        lines += [f"{layer} on {found['gpu']}", table(rows), ""]
    for bucket in found["buckets"]:
        for one in bucket.get("wrong", ()):
            lines.append(f"{bucket['layer']} T={bucket['tokens']} wrong, not used: {one['message']}: {one['tiles']}")
    waited, rate = f"{found['waiting_for_compiler']:.1%}", f"{found['per_minute']:.0f} a minute"
    lines.append(f"{found['wall_s']:.0f} s, {found['measured']} measurements, {rate}; waited {waited} for the compiler")
    late = f", {found['compiled_late']} kernels compiled meanwhile" if found["compiled_late"] else ""
    lines.append(
        f"workloads were set up in {found['preparing_s']:.0f} s, measuring took {found['measuring_s']:.0f} s{late}"
    )
    if found["compilers"]:
        busy = found["compiler_s"] / (found["compilers"] * found["wall_s"])
        took = f"{found['compiler_s']:.0f} s of compiling"
        lines.append(f"{found['compiled']} kernels in {took}; {found['compilers']} compilers were busy {busy:.0%}")
    lines += [f"result: {path}" for path in found["files"]]
    return "\n".join(line.rstrip() for text in lines for line in text.split("\n"))


def _row(bucket: dict[str, Any]) -> tuple[str, ...]:
    if "us" not in bucket:
        return str(bucket["tokens"]), "-", "-", "-", "-", bucket["reason"]
    default = bucket["default_us"]
    gain = f"{default / bucket['us']:.3f}" if default else "-"
    failed = ", ".join(f"{number} {status}" for status, number in sorted(bucket["failures"].items()))
    remarks = [f"failed: {failed}" if failed else "", "" if bucket["complete"] else "cut short"]
    shown = f"{default:.1f}" if default else "-"
    tried = str(bucket["tried"])
    return str(bucket["tokens"]), shown, f"{bucket['us']:.1f}", gain, tried, ", ".join(r for r in remarks if r)
