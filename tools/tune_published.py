"""Tune what `tuned_configs/` is to hold for this GPU: every released mode of twelve models that has no record yet.

    python tools/tune_published.py --seconds 600        # again and again, until nothing is left; uses all GPUs

Every layer gets some buckets before any gets all; each GPU works on a layer of its own. A bucket counts until its
family's kernels change (`moegen check`), unless its search was cut short.
"""

import argparse
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from moegen.load import import_package
from moegen.runtime.device import device_facts
from moegen.tune.record import load_record
from moegen.tune.search import EFFORTS, FINALISTS

# Model, and what `moegen build` is told of it; all that `moegen list --quant` shows unless that says otherwise.
MODELS = (
    ("qwen3-30b-a3b", ()),
    ("deepseek-v3", ("--tp", "8")),
    ("mixtral-8x7b", ()),
    ("qwen3-235b-a22b", ("--tp", "4")),
    ("qwen3-next-80b-a3b", ()),
    ("deepseek-v3", ("--ep", "8")),
    ("gpt-oss-120b", ()),
    ("glm-4.5-air", ()),
    ("nemotron-3-nano-30b-a3b", ()),
    ("kimi-k2", ("--ep", "8")),
    ("olmoe-1b-7b", ()),
    ("deepseek-v2-lite", ()),
    ("llama-4-scout", ()),
    ("qwen3-235b-a22b", ()),
    ("deepseek-v3", ("--tp", "8", "--quant", "none")),  # a row of docs/performance.md
)
# A record answers for half an octave around each of its buckets.
SOME, ALL = ({1 << power for power in range(0, 13, step)} for step in (2, 1))
ROOT = Path(__file__).resolve().parents[1]
LEAST_S = 40  # no layer is begun with less
LEAST_TRIED = EFFORTS["quick"].budget - FINALISTS


def main() -> int:
    """The exit code: 0 if nothing is left to tune."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True, help="for all of it")
    parser.add_argument("--effort", default="quick", help="of moegen tune (default %(default)s)")
    parser.add_argument("--packages", type=Path, default=Path("out"), help="where they are built")
    parser.add_argument("--out", type=Path, default=ROOT / "tuned_configs")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    records = args.out / device_facts(torch.cuda.current_device()).slug
    count = torch.cuda.device_count()
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(count):
        free.put(gpu)
    jobs = max(1, len(os.sched_getaffinity(0)) // count - 1)

    def tune(layer: tuple[Path, str], wanted: set[int]) -> bool:
        """Whether something is left of this layer."""
        package, slug = layer
        missing = wanted - current(records / f"{slug}.json")
        rest = deadline - time.monotonic()
        if not missing or rest < LEAST_S:
            return bool(missing)
        gpu = free.get()
        limit = ["--time-limit", f"{rest - 10:.0f}", "--effort", args.effort, "--gpus", f"{gpu}", "--jobs", f"{jobs}"]
        buckets = ",".join(map(str, sorted(missing)))
        command = ["tune", str(package), "--layer", slug, "--buckets", buckets, "--out", str(args.out), *limit]
        done = subprocess.run([sys.executable, "-m", "moegen", *command], check=False)  # noqa: S603
        free.put(gpu)
        return done.returncode != 0

    left, found = 0, list(layers(args.packages))
    for wanted in (SOME, ALL):
        with ThreadPoolExecutor(count) as pool:
            left += sum(pool.map(partial(tune, wanted=wanted), found))
    print(f"{left} runs are left")
    return int(left > 0)


def current(path: Path) -> set[int]:
    """Buckets of a record whose times still hold and whose search was as long as the shortest effort is."""
    if not path.is_file():
        return set()
    record = load_record(path)
    return {
        tokens
        for tokens, bucket in record.buckets.items()
        if (bucket.tried or 0) >= LEAST_TRIED and bucket.why_stale(record.variant) is None
    }


def layers(folder: Path) -> Iterator[tuple[Path, str]]:
    """(package, slug) of every layer; a package is built when it is its turn."""
    for number, (model, options) in enumerate(MODELS):
        out = folder / str(number)
        build = ["build", "--model", model, "--quant", "released", *options, "-o", str(out)]
        subprocess.run([sys.executable, "-m", "moegen", *build], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        (package,) = out.iterdir()
        yield from ((package, layer.slug) for layer in import_package(package).LAYERS)


if __name__ == "__main__":
    sys.exit(main())
