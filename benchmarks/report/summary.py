"""What was found, in words and in Markdown."""

from . import charts
from .charts import number


def machine_lines(context):
    machine = context.get("machine", {})
    lines = [("Processor", machine.get("cpu")), ("Cores", machine.get("cores")), ("Compiler", context.get("compiler")),
             ("Flags", context.get("flags")), ("Build", context.get("qkv build")), ("Commit", context.get("commit")),
             ("Date", context.get("date")), ("Run", context.get("mode") and f"scripts/bench --{context['mode']}"),
             ("Libraries", ", ".join(f"{k} {v}" for k, v in context.get("libraries", {}).items()))]
    return [(name, str(value)) for name, value in lines if value]


def context_of(results):
    """The machine's context with what single programs know."""
    whole = dict(results.context)
    for context in results.contexts.values():
        for key in ("qkv build", "libraries"):
            if key in context:
                whole.setdefault(key, context[key])
    return whole


def peer_lines(results):
    """One line for every case; a peer that is faster is named first, with by how much."""
    lines = []
    for case, storage, sizes, own, others in charts.peer_table(results):
        at = ", ".join(f"{key} {value}" for key, value in sizes.items())
        said = "; ".join(f"{library} {number(ms)} ms ({charts.verdict(ratio)})" for library, ms, ratio in others)
        lines.append((min(ratio for *_, ratio in others), f"{case} {storage}, {at}: qkv {number(own)} ms; {said}"))
    return [text for _, text in sorted(lines)]


def findings(results):
    """The page's first lines."""
    found = []
    peak, bandwidth = charts.machine_limits(results)
    if peak and bandwidth:
        found.append(f"One thread of this machine multiplies {number(peak / 1e9)} GFLOP/s in f32 and reads {number(bandwidth / 1e9)} GB/s.")
    best = {}
    for row in results.find("prefill", "causal", heads=8, kv_heads=8, d=128, n=2048, threads=1):
        best[row.path[2]] = row["peak_fraction"]
    said = [f"{s} {number(best[s], 2)}" for s in charts.STORAGES if best.get(s)]
    if said:
        found.append("A prompt of 2,048 tokens, as a fraction of that peak: " + ", ".join(said) + ".")
    decode = {row.path[2]: row for row in results.find("decode", "contiguous", n=32768, heads=32, kv_heads=8, threads=1)}
    said = [f"{s} {number(decode[s]['bandwidth_fraction'], 2)}" for s in charts.STORAGES if s in decode]
    if said:
        found.append("Decoding from 32,768 cached tokens, as a fraction of the read bandwidth: " + ", ".join(said) + ".")
    table = charts.peer_table(results)
    if table:
        faster = [(1 / ratio, library, case, storage, sizes) for case, storage, sizes, _, others in table
                  for library, _, ratio in others if ratio <= 1 / 1.05]
        pairs = sum(len(others) for *_, others in table)
        if faster:
            worst = max(faster, key=lambda item: item[0])
            found.append(f"Beside other libraries: in {len(faster)} of {pairs} comparisons the peer is faster, at most {worst[1]} with "
                         f"{number(worst[0])}x ({worst[2]} {worst[3]}, " + ", ".join(f"{k} {v}" for k, v in worst[4].items()) + ").")
        else:
            found.append(f"Beside other libraries: no peer is faster by 5 % or more in {pairs} comparisons.")
    return found


def row_cells(row):
    return [row.name, number(row.milliseconds), number(row["tokens_per_second"]), number(row["peak_fraction"], 2),
            number(row["bandwidth_fraction"], 2), number(row["cache_bytes_per_token"], 5), number(row["max_abs_error"], 2),
            number(row["rms_error"], 2)]


ROW_HEAD = ["row", "ms", "tokens/s", "of FMA peak", "of bandwidth", "cache B/token", "max error", "rms error"]


def markdown(results, all_charts, missing):
    out = ["# qkv: what was measured", ""]
    out += [f"- {name}: {value}" for name, value in machine_lines(context_of(results))]
    found = findings(results)
    if found:
        out += ["", *(f"- {line}" for line in found)]
    lines = peer_lines(results)
    if lines:
        out += ["", "## Beside other libraries", "", *(f"- {line}" for line in lines)]
    rows = charts.memory_table(results)
    if rows:
        out += ["", "## Memory, in bytes", "", "| cache | computed | allocated | resident |", "|---|---|---|---|"]
        out += ["| " + " | ".join(cell if isinstance(cell, str) else f"{cell:,.0f}" for cell in row) + " |" for row in rows]
    for chart in all_charts:
        head, rows = chart.table()
        out += ["", f"## {chart.title}", "", chart.text, "", f"![{chart.title}](figures/{chart.id}.svg)", ""]
        if len(rows) <= 40:
            out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            out += ["| " + " | ".join(number(cell) for cell in row) + " |" for row in rows]
    out += ["", "## All rows", "", "| " + " | ".join(ROW_HEAD) + " |", "|" + "---|" * len(ROW_HEAD)]
    out += ["| " + " | ".join(row_cells(row)) + " |" for row in results.rows.values() if not row.error and row.path[1:2] != ["slope"]]
    if missing:
        out += ["", "## Left out", "", *(f"- {name}: no {what}" for name, what in missing)]
    failed = results.failed()
    if failed:
        out += ["", "## Rows without a figure", "", *(f"- {row.name}: {row.error}" for row in failed)]
    return "\n".join(out) + "\n"
