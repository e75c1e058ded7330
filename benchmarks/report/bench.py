"""scripts/bench [--quick|--full] [--out DIR] — measure everything, then write report.html, figures and a summary.

--quick (default) ends within 3 minutes after the build on two cores, --full within 30. Into DIR go the JSON of every
program, report.html (one file, opens without a network), summary.md and figures/*.svg."""

import argparse
import sys
from pathlib import Path

from . import context, readme, results, run, store


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="the rows that the figures need (default)")
    mode.add_argument("--full", action="store_true", help="all rows, more repetitions")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: build/bench")
    parser.add_argument("--report-only", action="store_true", help="measure nothing: draw what DIR already holds")
    parser.add_argument("--store", action="store_true",
                        help="keep the result as this machine's baseline in benchmarks/results/, and write README's table from it")
    parser.add_argument("--source", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--build", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.out or options.source / "build" / "bench"
    failed = 0
    if not options.report_only:
        about = context.gather(options.source, options.build / "CMakeCache.txt", "full" if options.full else "quick")
        failed = run.run(options.build, options.source, folder, not options.full, about)
    from . import page  # needs matplotlib; what was measured is safe on disk by now
    for path in page.write(results.read(folder), folder):
        print(path)
    if options.store:
        if failed:
            raise SystemExit("not stored: a program failed")
        path = store.store(folder, options.source / "benchmarks" / "results")
        print(path)
        readme.update(options.source / "README.md")
        print(options.source / "README.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
