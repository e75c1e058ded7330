"""The figures as numbers: what is drawn, what is written under it, and the table beside it. No drawing here.

Every function takes Results and returns a Chart, or a string that says what is missing."""

import math
from dataclasses import dataclass, field

STORAGES = ("f32", "f16", "bf16", "int8")
VARIANTS = {"mha": "MHA", "gqa": "GQA", "gqa8": "GQA, 8 key/value heads", "mqa": "MQA", "mla": "MLA",
            "mla_naive": "MLA, naive cache", "absorbed": "MLA"}


@dataclass
class Series:
    label: str
    points: list  # (x, y); bars: (category, y)
    dashed: bool = False  # what is expected, not measured
    notes: list = field(default_factory=list)  # bars: a text behind each


@dataclass
class Chart:
    id: str
    title: str
    text: str
    kind: str  # lines, bars, dots
    x: str
    y: str
    series: list
    log_x: bool = False
    log_y: bool = False
    mark: float = None  # bars: a line at this value

    def table(self):
        """Head and rows of the numbers that are drawn."""
        drawn = [s for s in self.series if not s.dashed]
        notes = any(s.notes for s in drawn)
        return ["", self.x, self.y, *([""] if notes else [])], [
            [s.label, x, y, *([s.notes[i]] if notes else [])] for s in drawn for i, (x, y) in enumerate(s.points)]


def number(value, digits=3):
    """A number as a person reads it: 12,345; 0.0123; 1.2e-07."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        text = f"{value:.{digits}g}"
        return f"{value:,.0f}" if "e" in text or abs(value) >= 1000 else text
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.{max(2, digits - 1)}g}"


def cache_bytes(results):
    """Bytes that one token adds to one layer."""
    heads = next((h for h in (128, 16) if results.find("decode", "mha", heads=h)), None)
    series = []
    for storage in STORAGES:
        points = {}
        for variant in ("mha", "gqa8", "mqa", "absorbed"):
            for row in results.find("decode", variant, storage, heads=heads, threads=1):
                if row["cache_bytes_per_token"]:
                    points.setdefault(VARIANTS[variant], row["cache_bytes_per_token"])
        if points:
            series.append(Series(storage, list(points.items())))
    if heads is None or not series:
        return "cache bytes of bench_latent (decode/mha, gqa8, mqa, absorbed)"
    return Chart("cache-bytes", "What one token adds to the cache",
                 f"Bytes per token and layer of caches that were allocated, {heads} query heads of 128; MLA keeps a latent of "
                 "512 and a rope key of 64. Less is better: a new token must read all of it once.", "bars", "variant",
                 "bytes per token", series, log_y=True)


def with_and_without(results):
    series = []
    for kind, label in (("recompute", "without a cache"), ("cached", "with a cache")):
        points = sorted((row.sizes["n"], row.milliseconds / row.sizes["n"])
                        for row in results.find("scaling", "generate", kind, "f32"))
        if points:
            series.append(Series(label, points))
    if not series:
        return "scaling/generate of bench_scaling"
    text = "Mean time of a token when n tokens are generated one by one, a layer with 8 heads of 64."
    if len(series) == 2:
        both = sorted(set(dict(series[0].points)) & set(dict(series[1].points)))
        if both:
            n = both[-1]
            ratio = dict(series[0].points)[n] / dict(series[1].points)[n]
            text += f" At {n:,} tokens the cache makes a token {number(ratio)} times cheaper."
    return Chart("cache-or-not", "With and without a cache", text, "lines", "tokens generated", "ms per token", series,
                 log_x=True, log_y=True)


def variants(results):
    series = []
    for variant in ("mha", "gqa", "mqa", "mla_naive", "mla"):
        points = sorted((row.sizes["n"], row.milliseconds) for row in results.find("variant", variant, "decode"))
        if points:
            series.append(Series(VARIANTS[variant], points))
    if not series:
        return "variant/*/decode of bench_variants"
    return Chart("variants", "A new token, by variant",
                 "One whole layer, projections included, f32: model_dim 512, 16 heads of 64, GQA with 4 key/value heads, MLA with "
                 "a latent of 256.", "lines", "tokens in the cache", "ms per token", series, log_x=True, log_y=True)


def decode_storage(results):
    rows = {}
    for row in results.find("decode", "contiguous", threads=1, batch=1, kv_heads=8, n=32768, heads=32):
        if "queries" not in row.sizes:
            rows[row.path[2]] = row
    eigen = results.find("decode", "eigen", n=32768, heads=32)
    if eigen:
        rows["f32, Eigen's products"] = eigen[0]
    if not rows:
        return "decode/contiguous/…/n:32768 of bench_decode"
    points, notes = [], []
    for label in sorted(rows, key=lambda s: (*[s.startswith(x) for x in STORAGES][::-1], len(s))):
        row = rows[label]
        points.append((label.replace("_", " "), row["tokens_per_second"]))
        notes.append(f"{number(row['bandwidth_fraction'], 2)} of the bandwidth, error {number(row['max_abs_error'], 2)}")
    return Chart("decode-storage", "Decoding by storage of the cache",
                 "One token against 32,768 cached ones, 32 query heads of 128 on 8 key/value heads, one thread, attention only; "
                 "caches in memory. Behind each bar (on a phone: in the numbers): bytes read over the read bandwidth of the same moment, and the largest "
                 "error against the formula in double on the stored rows.", "bars", "storage", "tokens per second",
                 [Series("tokens per second", points, notes=notes)])


def _prefill_rows(results, storage):
    return sorted((row.sizes["n"], row["peak_fraction"], row)
                  for row in results.find("prefill", "causal", storage, heads=8, kv_heads=8, d=128, threads=1)
                  if row["peak_fraction"])


def prefill_sizes(results):
    series = []
    for storage in (*STORAGES, "int8_throughout"):
        points = [(n, fraction) for n, fraction, _ in _prefill_rows(results, storage)]
        if len(points) > 1:
            series.append(Series(storage.replace("_", " "), points))
    if not series:
        return "prefill/causal of bench_prefill at several n"
    return Chart("prefill", "A prompt, by its length",
                 "Causal attention over n tokens, 8 heads of 128, one thread; useful flops only. 1 is the peak of f32 multiply-adds "
                 "in the same process.", "lines", "tokens", "fraction of the f32 FMA peak", series, log_x=True)


def prefill_storages(results):
    points, notes = [], []
    names = {"eigen_gemm": "Eigen, one matrix product", "eigen_tiled": "Eigen, in blocks", "eigen_naive": "Eigen, all scores"}
    for storage in (*STORAGES, "int8_throughout", "bf16_exact", "int8_exact", *names):
        for n, fraction, row in _prefill_rows(results, storage):
            if n == 2048:
                points.append((names.get(storage, storage.replace("_", " ")), fraction))
                notes.append(f"{number(row.milliseconds)} ms"
                             + (f", error {number(row['max_abs_error'], 2)}" if row["max_abs_error"] else ""))
    if not points:
        return "prefill/causal/…/n:2048 of bench_prefill"
    return Chart("prefill-storage", "A prompt of 2,048 tokens, by storage",
                 "Causal, 8 heads of 128, one thread; behind each bar (on a phone: in the numbers) the time and the largest error against the formula in double on "
                 "the stored rows. bf16 and int8 pass the f32 peak where the processor multiplies them directly; int8 multiplies "
                 "queries with keys in int8 and weights with values in bf16, int8 throughout both in int8, exact widens to f32.",
                 "bars", "storage", "fraction of the f32 FMA peak", [Series("fraction", points, notes=notes)])


def latent(results):
    series = []
    for storage in STORAGES:
        points = [(f"{row.sizes['heads']} heads, {row.sizes['n']:,} cached", row["peak_fraction"])
                  for row in sorted(results.find("decode", "absorbed", storage, threads=1),
                                    key=lambda r: (r.sizes["heads"], r.sizes["n"])) if row["peak_fraction"]]
        if points:
            series.append(Series(storage, points))
    if not series:
        return "decode/absorbed of bench_latent"
    return Chart("latent", "MLA: one token on a latent cache",
                 "Absorbed form of DeepSeek-V2-Lite (16 heads) and V3 (128), one thread.", "bars", "case",
                 "fraction of the f32 FMA peak", series)


def work(row):
    """(flops, bytes, flops per second) of one call where name and counters tell them, else None."""
    seconds = (row.milliseconds or 0) / 1000
    size = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1, "f64": 8}.get(row.path[2 if row.path[0] != "projection" else 1].split("_")[0]
                                                               if len(row.path) > 2 or row.path[0] == "projection" else "")
    s, flops, moved = row.sizes, row["flops"], row["bytes"]
    if not seconds or size is None:
        return None
    flops, moved = (flops or 0) * seconds, (moved or 0) * seconds
    if row.program == "bench_decode" and row.path[1] in ("contiguous", "ring", "paged") and moved:
        flops = 4.0 * s["n"] * s["heads"] * s["d"] * s.get("batch", 1) * s.get("queries", 1)
    if row.program == "bench_prefill" and flops and row.path[1] in ("causal", "full"):
        moved = s["n"] * s["d"] * (2 * s["heads"] * 4 + 2 * s["kv_heads"] * size)
    return (flops, moved, flops / seconds) if flops and moved else None


def machine_limits(results):
    """(f32 FMA peak, read bandwidth) of one thread: medians of what rows were measured against."""
    peaks, reads = [], []
    for row in results.rows.values():
        if row.error or row.sizes.get("threads", 1) != 1 or "f64" in row.path or row.program.startswith("peer"):
            continue
        if row["flops"] and row["peak_fraction"]:
            peaks.append(row["flops"] / row["peak_fraction"])
        if row["bytes"] and row["bandwidth_fraction"]:
            reads.append(row["bytes"] / row["bandwidth_fraction"])
    middle = lambda values: sorted(values)[len(values) // 2] if values else None
    return middle(peaks), middle(reads)


def roofline(results):
    peak, bandwidth = machine_limits(results)
    if not peak or not bandwidth:
        return "rows with peak_fraction and with bandwidth_fraction"
    series = []
    for program, label in (("bench_prefill", "prefill"), ("bench_decode", "decode"), ("bench_latent", "MLA"),
                           ("bench_projection", "projections")):
        points = []
        for row in results.rows.values():
            if row.error or row.program != program or row.sizes.get("threads", 1) != 1 or row.path[0] == "break_even" \
                    or any(part.startswith("eigen") for part in row.path) or "f64" in row.path:
                continue
            done = work(row)
            if done:
                points.append((done[0] / done[1], done[2] / 1e9))
        if points:
            series.append(Series(label, sorted(points)))
    if not series:
        return "rows with flops and bytes"
    low = min(x for s in series for x, _ in s.points) / 1.5
    high = max(x for s in series for x, _ in s.points) * 1.5
    corner = peak / bandwidth
    roof = [(low, low * bandwidth / 1e9), (corner, peak / 1e9), (high, peak / 1e9)] if low < corner < high else \
        [(low, min(peak, low * bandwidth) / 1e9), (high, min(peak, high * bandwidth) / 1e9)]
    series.append(Series("f32 roof", roof, dashed=True))
    return Chart("roofline", "Roofline: every kernel is a dot",
                 f"One thread. The roof is what this machine multiplies in f32 ({number(peak / 1e9)} GFLOP/s) and reads "
                 f"({number(bandwidth / 1e9)} GB/s), medians of samples taken beside every call. bf16 and int8 kernels multiply "
                 "above the f32 roof; left of the corner a dot above the slope has part of its bytes in the caches.", "dots",
                 "flops per byte", "GFLOP/s", series, log_x=True, log_y=True)


def _break_even_lines(results):
    lines = {}
    for row in results.find("break_even", "naive", "f32"):
        n, heads, new = (row.sizes[key] for key in ("n", "heads", "new"))
        other = results.find("break_even", "absorbed", "f32", n=n, heads=heads, new=new)
        if other:
            lines.setdefault((heads, n), []).append((new, row.milliseconds / other[0].milliseconds))
    return {key: sorted(points) for key, points in sorted(lines.items())}


def crossing(points):
    """Where the ratio falls through 1, between two measured points (linear in both), else None."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 >= 1 > y1:
            return x0 + (y0 - 1) / (y0 - y1) * (x1 - x0)
    return None


def break_even(results):
    lines = _break_even_lines(results)
    if not lines:
        return "break_even of bench_latent"
    series, said = [], []
    for (heads, n), points in lines.items():
        series.append(Series(f"{heads} heads, {n:,} cached", points))
        at, by_flops = crossing(points), math.sqrt(n * n + 341.3 * n) - n
        said.append(f"{n:,} cached, {heads} heads: "
                    + (f"about {at:.0f} new tokens" if at else "naive is faster at every size that was timed" if points[0][1] < 1
                       else "past what was timed") + f" (by counting flops {by_flops:.0f})")
    xs = [x for s in series for x, _ in s.points]
    series.append(Series("equal", [(min(xs), 1), (max(xs), 1)], dashed=True))
    return Chart("break-even", "MLA: absorbed or naive",
                 "Time of the naive form over that of the absorbed one, f32, for new tokens on a cache: above 1 absorbed is faster. "
                 "Break-even: " + "; ".join(said) + ".", "lines", "new tokens", "naive / absorbed", series)


def scaling(results):
    series = []
    for what, label in (("prefill", "prompt of n tokens"), ("decode", "one token on n")):
        for threads in (1, 2):
            points = sorted((row.sizes["n"], row.milliseconds)
                            for row in results.find("scaling", what, "f32", threads=threads))
            if points:
                series.append(Series(f"{label}, {threads} thread{'s' if threads > 1 else ''}", points))
    for kind, label in (("recompute", "generate n, no cache"), ("cached", "generate n, cached")):
        points = sorted((row.sizes["n"], row.milliseconds) for row in results.find("scaling", "generate", kind))
        if points:
            series.append(Series(label, points))
    if not series:
        return "bench_scaling"
    said = [f"{name}: {number(slope)} ({number(expected)} for large n)" for name, slope, expected in slopes(results)]
    faster = []
    for what in ("prefill", "decode"):
        one, two = (sorted(results.find("scaling", what, threads=t), key=lambda r: r.sizes["n"]) for t in (1, 2))
        if one and two and one[-1].sizes["n"] == two[-1].sizes["n"]:
            faster.append(f"{what} {number(one[-1].milliseconds / two[-1].milliseconds)}x at n = {one[-1].sizes['n']:,}")
    text = "Whole time, log-log."
    if said:
        text += " Fitted slopes: " + "; ".join(said) + "."
    if faster:
        text += " Two threads: " + ", ".join(faster) + "."
    return Chart("scaling", "How time grows", text, "lines", "n", "ms", series, log_x=True, log_y=True)


def slopes(results):
    """[(name, fitted, expected)]"""
    return [(" ".join(row.path[2:-1] + [f"({row.sizes['threads']} thread{'s' if row.sizes['threads'] > 1 else ''})"]
                      if "threads" in row.sizes else row.path[2:-1]), row["slope"], row["expected"])
            for row in results.find("scaling", "slope")]


def batch(results):
    series = []
    for threads in (1, 2):
        for cache in ("each", "contiguous", "paged", "cascade"):
            points = sorted((row.sizes["batch"], row["tokens_per_second"])
                            for row in results.find("batch", cache, "f32", threads=threads))
            if points and (threads == 1 or cache == "contiguous"):
                label = {"each": "one call each", "contiguous": "one call", "paged": "one call, pages",
                         "cascade": "one call, common prefix once"}[cache]
                series.append(Series(label + (", 2 threads" if threads == 2 else ""), points))
    if not series:
        return "bench_batch"
    return Chart("batch", "Many sequences at once",
                 "Tokens per second of one f32 layer (model_dim 2048, 16 heads of 128, 4 key/value heads), one new token for each "
                 "sequence, about 1,024 cached.", "lines", "sequences", "tokens per second", series, log_x=True, log_y=True)


def peer_groups(results):
    """{(case, storage, sizes): {library: row}}: what can be compared."""
    groups = {}
    for row in results.rows.values():
        if row.path[0] == "peer" and len(row.path) >= 4 and not row.error and row.milliseconds:
            key = ("/".join(row.path[2:-1]), row.path[-1], tuple(sorted(row.sizes.items())))
            groups.setdefault(key, {})[row.path[1]] = row
    return groups


def peer_table(results):
    """[(case, storage, sizes, qkv ms, [(library, ms, times as long as qkv)])], fastest library first."""
    table = []
    for (case, storage, sizes), rows in peer_groups(results).items():
        if "qkv" in rows and len(rows) > 1:
            own = rows["qkv"].milliseconds
            others = sorted((row.milliseconds, library) for library, row in rows.items() if library != "qkv")
            table.append((case, storage, dict(sizes), own, [(name, ms, ms / own) for ms, name in others]))
    return table


def verdict(ratio):
    """Of a peer that takes `ratio` times as long as qkv; gaps under 5 % are ties."""
    return "tie" if 1 / 1.05 < ratio < 1.05 else f"qkv {number(ratio)}x faster" if ratio > 1 else f"peer {number(1 / ratio)}x faster"


def peers(results):
    """Times of peers over ours, one case of each kind: the one with most libraries."""
    best = {}
    for case, storage, sizes, own, others in peer_table(results):
        if sizes.get("threads", 1) == 1:
            kind = case.split("/")[0]
            rank = (storage == "f32", sizes.get("kv_heads") == sizes.get("heads"), len(others), sizes.get("n", 0))
            if kind not in best or rank > best[kind][0]:
                best[kind] = (rank, storage, sizes, others)
    if not best:
        return "peers.json of benchmarks/peers/run"
    series = [Series(f"{kind.replace('_', ' ')} {storage}, n {sizes.get('n', 0):,}", [(name.replace("_", " "), ratio) for name, _, ratio in others])
              for kind, (_, storage, sizes, others) in best.items()]
    return Chart("peers", "Other libraries: how many times as long they take",
                 "Time of a library over that of qkv on the same inputs, one thread: below 1 the library is faster. All cases, also "
                 "those of two threads, are in the table of peers.", "bars", "library", "times as long as qkv", series,
                 log_y=True, mark=1.0)


def peer_sizes(results):
    lines = {}
    for (case, storage, sizes), rows in peer_groups(results).items():
        sizes = dict(sizes)
        if case.startswith("prefill") and "n" in sizes:
            rest = (case, storage, tuple(sorted((k, v) for k, v in sizes.items() if k != "n")))
            for library, row in rows.items():
                lines.setdefault(rest, {}).setdefault(library, []).append((sizes["n"], row.milliseconds))
    lines = {rest: by for rest, by in lines.items() if max(map(len, by.values())) > 1}
    if not lines:
        return "prefill at several n in peers.json (benchmarks/peers/run without --quick)"
    (case, storage, sizes), by_library = max(
        lines.items(), key=lambda item: (item[0][1] == "f32", len({n for p in item[1].values() for n, _ in p}), len(item[1])))
    said = ", ".join(f"{key} {value}" for key, value in sizes)
    order = sorted(by_library, key=lambda library: (library != "qkv", library))
    return Chart("peers-n", "A prompt, beside other libraries",
                 f"{case.replace('_', ' ')}, {storage}, {said}; same inputs, threads and session.", "lines", "tokens", "ms",
                 [Series(library.replace("_", " "), sorted(by_library[library])) for library in order], log_x=True, log_y=True)


def memory(results):
    rows = [row for row in results.find("memory") if row["resident_bytes"] and "n" in row.sizes]
    storages = [row.path[2] for row in rows if len(row.path) > 2]
    if not rows:
        return "memory.json of bench_memory"
    storage = next((s for s in ("bf16", "f32") if s in storages), storages[0] if storages else None)
    lines = {}
    for row in rows:
        if storage is None or row.path[2] == storage:
            lines.setdefault(row.path[1].replace("_", " "), []).append((row.sizes["n"], row["resident_bytes"] / 1e6))
    return Chart("memory", "Memory, measured",
                 f"Growth of the resident set while a {storage} cache of n tokens is made and filled: one layer with 8 key/value heads of "
                 "128, or a latent of 512 and a rope key of 64. Computed, allocated and resident bytes are compared below.", "lines", "tokens", "MB resident",
                 [Series(label, sorted(points)) for label, points in lines.items()], log_x=True, log_y=True)


ALL = (cache_bytes, with_and_without, variants, decode_storage, prefill_storages, prefill_sizes, peers, peer_sizes, latent, break_even, roofline,
       scaling, batch, memory)


def memory_table(results):
    """[(name, computed, allocated, resident)] in bytes."""
    return [(row.name.removeprefix("memory/"), row["computed_bytes"], row["allocated_bytes"], row["resident_bytes"])
            for row in results.find("memory")]


def all_charts(results):
    """([Chart], [(name, what is missing)])"""
    charts, missing = [], []
    for make in ALL:
        made = make(results)
        if isinstance(made, Chart):
            charts.append(made)
        else:
            missing.append((make.__name__.replace("_", " "), made))
    return charts, missing
