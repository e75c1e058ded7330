"""scripts/bench-compare OLD NEW — what got slower beyond noise. OLD and NEW are folders of scripts/bench, or files.

A row is slower (or faster) where its median moved by more than the threshold and the rank test of its repetitions gives
chance less than alpha. Compared is the fraction of what the machine reached in the same moment (roofline_fraction,
peak_fraction, bandwidth_fraction) where both have it, else the time, with twice the threshold. Peers and memory are
measured once a run and not compared. Status: 0 nothing slower, 1 something slower, 2 nothing to compare."""

import argparse
import statistics
import sys

from . import ranks, results

FRACTIONS = ("roofline_fraction", "peak_fraction", "bandwidth_fraction")
FEWEST = 3
ONCE = ("scaling/slope/", "memory/", "peer/")  # rows without repetitions


def costs(row, metric):
    """Numbers that are larger where a row is slower."""
    if metric == "time":
        return row.times
    return [1 / value for value in row.counters.get(metric, []) if value > 0]


def compare_rows(old, new, threshold, alpha):
    """(verdict, metric, ratio of medians, p); a ratio above 1 is slower."""
    if new.error:
        return ("wrong" if not old.error else "still wrong"), "-", None, None
    if old.error:
        return "right now", "-", None, None
    metric = next((name for name in FRACTIONS if costs(old, name) and costs(new, name)), "time")
    a, b = costs(old, metric), costs(new, metric)
    if not a or not b:
        return "no time", metric, None, None
    ratio = statistics.median(b) / statistics.median(a)
    if min(len(a), len(b)) < FEWEST or ranks.smallest_p(len(a), len(b)) > alpha:
        return "too few", metric, ratio, None
    p = ranks.p_larger(a, b) if ratio > 1 else ranks.p_larger(b, a)
    if metric == "time":  # clocks move between runs, and nothing beside it says by how much
        threshold *= 2
    if p > alpha or 1 - threshold < ratio < 1 + threshold:
        return "same", metric, ratio, p
    return ("slower" if ratio > 1 else "faster"), metric, ratio, p


def compare(old, new, threshold=0.05, alpha=0.05):
    """[(name, verdict, metric, ratio, p)] of the rows that both have."""
    return [(name, *compare_rows(row, new.rows[name], threshold, alpha))
            for name, row in old.rows.items() if name in new.rows and not name.startswith(ONCE)]


def table(rows):
    width = max((len(row[0]) for row in rows), default=0)
    for name, verdict, metric, ratio, p in rows:
        yield "  ".join([f"{name:<{width}}", f"{verdict:<11}", f"{ratio:6.3f}x" if ratio else " " * 7,
                         f"p {p:.3f}" if p is not None else " " * 7, metric])


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="scripts/bench-compare", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old"), parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=0.05, help="change that counts (default: 0.05)")
    parser.add_argument("--alpha", type=float, default=0.05, help="chance that counts (default: 0.05, one-sided)")
    parser.add_argument("--all", action="store_true", help="print rows that did not change as well")
    options = parser.parse_args(arguments)
    old, new = results.read(options.old), results.read(options.new)
    machines = [r.context.get("machine", {}).get("cpu") for r in (old, new)]
    if all(machines) and machines[0] != machines[1]:
        print(f"note: two machines, {machines[0]} and {machines[1]}: times and fractions differ for that alone")
    rows = compare(old, new, options.threshold, options.alpha)
    count = {}
    for row in rows:
        count[row[1]] = count.get(row[1], 0) + 1
    for line in table([row for row in rows if options.all or row[1] not in ("same", "too few", "still wrong")]):
        print(line)
    for text, names in (("only in OLD", old.rows.keys() - new.rows.keys()),
                        ("only in NEW", new.rows.keys() - old.rows.keys())):
        if names:
            print(f"{text}: {len(names)} rows")
    print(f"{len(rows)} rows in both: " + (", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items())) or "none"))
    if count.get("too few"):
        print(f"too few: a row needs {FEWEST} repetitions, and so many that chance can fall below {options.alpha}")
    if all(row[1] in ("too few", "no time") for row in rows):
        return 2
    return 1 if count.get("slower") or count.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
