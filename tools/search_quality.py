"""How close the tuner's search comes to the optimum of recorded sweeps, over ten seeds; needs no GPU.

python tools/search_quality.py tests/data/*__t*.csv.gz
python tools/search_quality.py tests/data/*__t*.csv.gz --effort quick --noise 0.01
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from moegen.tune.replay import Replay, Sweep, read_sweep
from moegen.tune.search import EFFORTS, search


def main() -> None:
    """Print one row a sweep and the worst of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--effort", choices=EFFORTS, action="append", help="default: standard; may be repeated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.0, help="relative deviation of each measurement")
    parser.add_argument("--least-mean", type=float, default=0.0, help="fail if a sweep's mean is below this")
    parser.add_argument("--least-worst", type=float, default=0.0, help="fail if any seed is below this")
    args = parser.parse_args()
    failed = False
    for effort in args.effort or ["standard"]:
        print(f"{effort}: % of the optimum over {args.seeds} seeds, noise {args.noise:g}")
        print(
            f"{'layer':44} {'tokens':>6} {'legal':>6} {'default':>8} {'mean':>7} {'worst':>7} {'measured':>9} {'s':>6}"
        )
        worst, mean = 100.0, 100.0
        for path in args.sweeps:
            sweep = read_sweep(path)
            began = time.perf_counter()
            found, measured = quality(sweep, effort, args.seeds, args.noise)
            seconds = (time.perf_counter() - began) / args.seeds
            worst, mean = min(worst, *found), min(mean, statistics.mean(found))
            default = percent(sweep, Replay([sweep]).true(sweep.tokens, sweep.space.default).us)
            print(
                f"{sweep.layer:44} {sweep.tokens:6} {sweep.space.size:6} {default:8.2f} "
                f"{statistics.mean(found):7.2f} {min(found):7.2f} {measured:9} {seconds:6.2f}"
            )
        print(f"smallest mean {mean:.2f}, worst seed {worst:.2f}")
        failed |= mean < args.least_mean or worst < args.least_worst
    sys.exit(failed)


def quality(sweep: Sweep, effort: str, seeds: int, noise: float = 0.0) -> tuple[list[float], int]:
    """(% of the optimum for each seed, the most measurements that a seed took, finalists included)."""
    found, measured = [], 0
    for seed in range(seeds):
        replay = Replay([sweep], noise, seed)
        winner = search(sweep.space, replay, effort=effort, seed=seed).tiles
        found.append(percent(sweep, replay.true(sweep.tokens, winner).us))
        measured = max(measured, replay.measured)
    return found, measured


def percent(sweep: Sweep, us: float | None) -> float:
    """100 · the optimum's time / us; 0 for no time."""
    return 100 * Replay([sweep]).optimum(sweep.tokens)[1] / us if us else 0.0


if __name__ == "__main__":
    main()
