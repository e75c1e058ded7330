"""README's table of results, written from all stored result files, a column each. `--check` says whether it still agrees."""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

from . import charts, results

STORED = Path("benchmarks/results")
BEGIN, END = "<!-- benchmarks/results: written by scripts/bench --store, not by hand -->", "<!-- end of results -->"
MARKED = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)

# (what, row, what its speed is a fraction of); rows that no file has are left out.
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


def isa(build):
    """AVX-512 of abi_avx512_fma_f16c: what a build was compiled for."""
    return next((name for key, name in (("avx512", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("neon", "NEON")) if key in build), "")


def peer_sentence(read):
    table = charts.peer_table(read)
    if not table:
        return ""
    pairs = [(ratio, library, case, storage, sizes) for case, storage, sizes, _, others in table for library, _, ratio in others]
    slow = [pair for pair in pairs if pair[0] <= 1 / 1.05]
    text = f" Beside other libraries (`benchmarks/peers/`), {len(pairs)} comparisons: "
    if not slow:
        return text + "none is faster by 5 % or more."
    ratio, library, case, storage, sizes = min(slow, key=lambda pair: pair[0])
    return text + (f"the peer is faster in {len(slow)}, at most {library} by {charts.number(1 / ratio)}x ({case} {storage}, "
                   + ", ".join(f"{k} {v}" for k, v in sizes.items()) + ").")


def cell(row, of):
    if row is None or row.error or row.milliseconds is None:
        return "–"
    return (f"{charts.number(row.milliseconds)} ms · {charts.number(row[f'{of}_fraction'], 2)} · "
            f"{charts.number(row['max_abs_error'], 2)}")


def machine(read):
    """What the numbers of a column come from, in a sentence or two."""
    about, (peak, bandwidth) = read.context, charts.machine_limits(read)
    build = isa(about.get("qkv build", ""))
    limits = (f", {charts.number(peak / 1e9)} GFLOP/s and {charts.number(bandwidth / 1e9)} GB/s on one thread"
              if peak and bandwidth else "")
    return (f"- {about['machine']['cpu']}, {build + ', ' if build else ''}{about['machine']['cores']} cores{limits}; "
            f"{about['compiler']}; commit `{about['commit']}`, {about['date'][:10]}, `scripts/bench --{about['mode']}`."
            + peer_sentence(read))


def section(folder):
    """Newest results first."""
    stored = sorted((results.read(path) for path in sorted(Path(folder).glob("*.json"))),
                    key=lambda read: read.context["date"], reverse=True)
    titles = [f"{isa(read.context.get('qkv build', '')) or 'baseline'}, {read.context['machine']['cpu']}" for read in stored]
    lines = [BEGIN, "",
             textwrap.fill("One thread, medians: time · fraction of the f32 multiply-adds (of the read bandwidth) that the machine "
                           "reached in the same moment · largest error. `scripts/bench` measures it anew and draws the figures.",
                           120, break_on_hyphens=False), "",
             "| | of | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    for what, name, of in ROWS:
        cells = [cell(read.rows.get(name), of) for read in stored]
        if any(text != "–" for text in cells):
            lines.append(f"| {what} | {'multiply-adds' if of == 'peak' else 'bandwidth'} | " + " | ".join(cells) + " |")
    about = [textwrap.fill(machine(read), 120, break_on_hyphens=False, subsequent_indent="  ") for read in stored]
    return "\n".join([*lines, "", *about, "", END])


def update(readme):
    """Writes the section of `readme` between its markers from the stored files beside it."""
    readme = Path(readme)
    text = readme.read_text()
    if not MARKED.search(text):
        raise SystemExit(f"{readme}: no markers of a results section")
    new = section(readme.parent / STORED)
    readme.write_text(MARKED.sub(lambda _: new, text, count=1))


def check(readme):
    """An error in words, or None."""
    readme = Path(readme)
    found = MARKED.search(readme.read_text())
    if not found:
        return "README.md has no results section"
    stored = sorted((readme.parent / STORED).glob("*.json"))
    if not stored:
        return f"{STORED} holds no results"
    if found[0] != section(readme.parent / STORED):
        return f"README.md's results differ from {STORED}: run scripts/bench --store, or python3 -m report.readme README.md"
    for path in stored:
        private = {"host_name", "executable", "load_avg"} & json.loads(path.read_text())["context"].keys()
        if private:
            return f"{STORED / path.name} holds {', '.join(sorted(private))}"
    return None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.check:
        wrong = check(options.readme)
        print(wrong or "README.md agrees with its stored results")
        return 1 if wrong else 0
    update(options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
