"""README's table of results, written from a stored result file. `--check` says whether README still agrees with it."""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

from . import charts, results

BEGIN, END = "<!-- results of {}: written by scripts/bench --store, not by hand -->", "<!-- end of results -->"
MARKED = re.compile(re.escape(BEGIN).replace(r"\{\}", r"(\S+)") + ".*?" + re.escape(END), re.S)

# (what, row, how the speed is said); rows that the file has not are left out.
ROWS = (
    ("prompt of 2,048 tokens, 8 heads of 128, f32", "prefill/causal/f32/n:2048/heads:8/kv_heads:8/d:128/threads:1", "peak"),
    ("… bf16", "prefill/causal/bf16/n:2048/heads:8/kv_heads:8/d:128/threads:1", "peak"),
    ("… int8", "prefill/causal/int8/n:2048/heads:8/kv_heads:8/d:128/threads:1", "peak"),
    ("one token on 32,768, 32/8 heads of 128, f32", "decode/contiguous/f32/n:32768/heads:32/kv_heads:8/d:128/batch:1/threads:1", "bandwidth"),
    ("… int8", "decode/contiguous/int8/n:32768/heads:32/kv_heads:8/d:128/batch:1/threads:1", "bandwidth"),
    ("MLA, one token on 4,096, 128 heads, f32", "decode/absorbed/f32/n:4096/heads:128/threads:1", "peak"),
    ("… bf16", "decode/absorbed/bf16/n:4096/heads:128/threads:1", "peak"),
    ("projection 4096 x 4096 of one token, f32", "projection/f32/rows:1/in:4096/out:4096/threads:1", "bandwidth"),
)


def peer_sentence(read):
    table = charts.peer_table(read)
    if not table:
        return ""
    pairs = [(ratio, library, case, storage, sizes) for case, storage, sizes, _, others in table for library, _, ratio in others]
    slow = [pair for pair in pairs if pair[0] <= 1 / 1.05]
    text = f"Beside other libraries (`benchmarks/peers/`), {len(pairs)} comparisons: "
    if not slow:
        return text + "none is faster by 5 % or more."
    ratio, library, case, storage, sizes = min(slow, key=lambda pair: pair[0])
    return text + (f"the peer is faster in {len(slow)}, at most {library} by {charts.number(1 / ratio)}x ({case} {storage}, "
                   + ", ".join(f"{k} {v}" for k, v in sizes.items()) + ").")


def section(path, name):
    read = results.read(path)
    about = read.context
    lines = [BEGIN.format(name), "",
             textwrap.fill(f"{about['machine']['cpu']}, {about['machine']['cores']} cores, one thread; {about['compiler']}; "
                           f"commit `{about['commit']}`, {about['date'][:10]}; medians. `scripts/bench --{about['mode']}` measures it "
                           "anew and draws the figures.", 120, break_on_hyphens=False), "",
             "| | time | fraction of the machine | largest error |", "|---|---|---|---|"]
    for what, row_name, of in ROWS:
        row = read.rows.get(row_name)
        if row is None or row.error or row.milliseconds is None:
            continue
        fraction = row["peak_fraction" if of == "peak" else "bandwidth_fraction"]
        lines.append(f"| {what} | {charts.number(row.milliseconds)} ms | {charts.number(fraction, 2)} of "
                     f"{'f32 multiply-adds' if of == 'peak' else 'read bandwidth'} | {charts.number(row['max_abs_error'], 2)} |")
    peers = peer_sentence(read)
    return "\n".join([*lines, *(["", textwrap.fill(peers, 120, break_on_hyphens=False)] if peers else []), "", END])


def update(readme, path):
    """Writes the section of `readme` between its markers from the stored file at `path`."""
    readme, path = Path(readme), Path(path)
    text = readme.read_text()
    if not MARKED.search(text):
        raise SystemExit(f"{readme}: no markers of a results section")
    new = section(path, f"benchmarks/results/{path.name}")
    readme.write_text(MARKED.sub(lambda _: new, text, count=1))


def check(readme):
    """An error in words, or None."""
    readme = Path(readme)
    text = readme.read_text()
    found = MARKED.search(text)
    if not found:
        return "README.md has no results section"
    path = readme.parent / found[1]
    if not path.exists():
        return f"README.md's results are of {found[1]}, which is not there"
    if found[0] != section(path, found[1]):
        return f"README.md's results differ from {found[1]}: run scripts/bench --store, or python3 -m report.readme"
    private = {"host_name", "executable", "load_avg"} & json.loads(path.read_text())["context"].keys()
    return f"{found[1]} holds {', '.join(sorted(private))}" if private else None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme"), parser.add_argument("stored", nargs="?")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.check:
        wrong = check(options.readme)
        print(wrong or "README.md agrees with its stored results")
        return 1 if wrong else 0
    update(options.readme, options.stored)
    return 0


if __name__ == "__main__":
    sys.exit(main())
