"""How fast storage is, against what the medium could do at most, measured in the same run.

python -m experiments.storage_bench [--only disk] [--repeats 9]

Rounds of an operation and of its limit are interleaved and medians taken: these machines are noisy, and the virtual
disk itself varies twofold between minutes. Exits 1 when a floor is missed in two measurements. A piece whose server or
package is not here is skipped, and says why.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import experiments.bench.storage.cases
from experiments.bench.storage.case import Case

COLUMNS = "{:<34} {:<26} {:>12} {:>22} {:>22} {:>7}  {}"


def pieces() -> list[str]:
    """The modules of the folder ``cases``; each has a function ``cases``."""
    return sorted(module.name for module in pkgutil.iter_modules(experiments.bench.storage.cases.__path__))


def cases(piece: str) -> Iterator[Case]:
    module = importlib.import_module(f"experiments.bench.storage.cases.{piece}")
    yield from module.cases()


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(case: Case, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each round of the operation and of its limit, the first round left out."""
    calls = [case.run, *([case.limit] if case.limit else [])]
    rounds = [[_time(call) for call in calls] for _ in range(repeats + 1)][1:]
    seconds = [list(column) for column in zip(*rounds, strict=True)]
    return seconds[0], seconds[1] if case.limit else []


def shares(own: Sequence[float], limit: Sequence[float]) -> float | None:
    """Of the limit's rate: the median of the rounds' ratios, because what slows a machine down slows both."""
    return statistics.median(b / a for a, b in zip(own, limit, strict=True)) if limit else None


def _shown(case: Case, seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    low, median, high = min(seconds), statistics.median(seconds), max(seconds)
    if case.nbytes:
        rates = [case.nbytes / each / 1e9 for each in (median, high, low)]
        return "{:.2f} ({:.2f}..{:.2f}) GB/s".format(*rates)
    return f"{median * 1e3:.2f} ({low * 1e3:.2f}..{high * 1e3:.2f}) ms"


def report(case: Case, repeats: int) -> bool:
    """Print a line; whether the floor holds."""
    try:
        own, limit = measure(case, repeats)
        share = shares(own, limit)
        if _missed(case, own, share):
            again, limit_again = measure(case, 2 * repeats)
            own, limit = [*own, *again], [*limit, *limit_again]
            share = shares(own, limit)
    finally:
        case.close()
    verdict = []
    if case.floor is not None and share is not None:
        verdict.append(f"{'BELOW' if share < case.floor else 'floor'} {case.floor:.0%}")
    if case.most_s is not None:
        verdict.append(f"{'OVER' if statistics.median(own) > case.most_s else 'at most'} {case.most_s * 1e3:g} ms")
    size = f"{case.nbytes / 2**20:.1f} MiB" if case.nbytes else ""
    ratio = "" if share is None else f"{share:.0%}"
    row = (case.name, case.size, size, _shown(case, own), _shown(case, limit), ratio)
    print(COLUMNS.format(*row, ", ".join([*verdict, case.limit_name]) if case.limit_name else ", ".join(verdict)))
    sys.stdout.flush()
    return not _missed(case, own, share)


def _missed(case: Case, own: Sequence[float], share: float | None) -> bool:
    slow = case.most_s is not None and statistics.median(own) > case.most_s
    return slow or (case.floor is not None and share is not None and share < case.floor)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed of storage")
    parser.add_argument("--only", default="", help=f"pieces whose name contains this: {', '.join(pieces())}")
    parser.add_argument("--repeats", type=int, help="rounds, instead of what each case takes")
    options = parser.parse_args(argv)
    chosen = [name for name in pieces() if options.only in name]
    if not chosen:
        print(f"--only {options.only}: no piece has that in its name; there are {', '.join(pieces())}", file=sys.stderr)
        return 2
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; medians (min..max)")
    print(COLUMNS.format("operation", "size", "bytes", "reached", "limit", "share", ""))
    good = []
    for piece in chosen:
        try:
            for case in cases(piece):
                good.append(report(case, options.repeats or case.repeats))
        except (ImportError, FileNotFoundError) as missing:
            print(f"{piece}: skipped, {missing}")
    if not good:
        print(f"nothing was measured: none of {', '.join(chosen)} can run here")
    return 0 if good and all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
