"""Small results of made-up numbers: every figure has rows, and nothing was timed."""

import json
from pathlib import Path

FRACTION = {"f32": 0.8, "f16": 0.79, "bf16": 1.5, "int8": 1.9}
SIZE = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}
ABOUT = {"date": "2020-02-29 12:00 UTC", "commit": "0123456789", "mode": "quick", "compiler": "c++ 12", "flags": "-O3",
         "machine": {"cpu": "Test CPU (family 1, model 2)", "cores": 2, "system": "Linux", "isa": "x86_64"}}
PEAK, BANDWIDTH, REPETITIONS = 200e9, 40e9, 3


def row(name, ms, **counters):
    """Three repetitions around the median."""
    return [{"name": name + "/manual_time", "run_name": name + "/manual_time", "run_type": "iteration", "repetitions": REPETITIONS,
             "repetition_index": i, "threads": 1, "iterations": 3, "real_time": ms * factor, "cpu_time": ms, "time_unit": "ms",
             "max_abs_error": 2e-7, **counters} for i, factor in enumerate((1.02, 1.0, 0.99))]


def rows():
    decode, prefill, latent, projection, scaling, batch, variant = ([] for _ in range(7))
    for n in (512, 1024, 2048, 4096):
        prefill += row(f"prefill/causal/f32/n:{n}/heads:8/kv_heads:8/d:128/threads:1", n * n / 1e5, flops=PEAK * (0.6 + n / 20480),
                       peak_fraction=0.6 + n / 20480)
    for s in ("f16", "bf16", "int8"):
        prefill += row(f"prefill/causal/{s}/n:2048/heads:8/kv_heads:8/d:128/threads:1", 20, flops=PEAK * FRACTION[s],
                       peak_fraction=FRACTION[s])
    prefill += row("prefill/causal/eigen_naive/n:2048/heads:8/kv_heads:8/d:128/threads:1", 400, flops=PEAK * 0.09, peak_fraction=0.09)
    for s, size in SIZE.items():
        decode += row(f"decode/contiguous/{s}/n:32768/heads:32/kv_heads:8/d:128/batch:1/threads:1", 2.0 * size,
                      bytes=BANDWIDTH * 0.85, bandwidth_fraction=0.85, tokens_per_second=500 / size, cache_bytes_per_token=2048 * size)
        for heads in (16, 128):
            latent += row(f"decode/absorbed/{s}/n:1024/heads:{heads}/threads:1", 1.0, flops=PEAK * FRACTION[s], bytes=1e9 * size,
                          peak_fraction=FRACTION[s], cache_bytes_per_token=576.0 * size)
        for variant_name, numbers in (("mha", 4096), ("gqa8", 2048), ("mqa", 256)):
            latent += row(f"decode/{variant_name}/{s}/n:1024/heads:16/threads:1", 3.0, flops=PEAK * 0.1, bytes=BANDWIDTH * 0.8,
                          peak_fraction=0.1, cache_bytes_per_token=numbers * size)
    for new, ratio in ((64, 2.0), (128, 1.25), (192, 0.75), (256, 0.5)):
        latent += row(f"break_even/absorbed/f32/n:1024/heads:16/new:{new}", 10.0)
        latent += row(f"break_even/naive/f32/n:1024/heads:16/new:{new}", 10.0 * ratio)
    for rows_ in (1, 16):
        projection += row(f"projection/f32/rows:{rows_}/in:4096/out:4096/threads:1", rows_ * 1.7, flops=2e10 * rows_, bytes=BANDWIDTH * 0.97,
                          peak_fraction=0.1 * rows_, bandwidth_fraction=0.97)
    for threads in (1, 2):
        for n in (512, 1024, 2048):
            scaling += row(f"scaling/prefill/f32/n:{n}/threads:{threads}", n**2 / 2e5 / threads)
            scaling += row(f"scaling/decode/f32/n:{n * 8}/threads:{threads}", n / 1e4 / threads)
        for name, expected in (("prefill", 2), ("decode", 1)):
            scaling += row(f"scaling/slope/{name}/f32/threads:{threads}", 1e-6, slope=expected * 1.01, expected=expected)
    for n in (256, 512, 1024):
        scaling += row(f"scaling/generate/cached/f32/n:{n}", n**2 / 1e5)
        scaling += row(f"scaling/generate/recompute/f32/n:{n}", n**3 / 1e7)
    for b in (1, 4, 16):
        batch += row(f"batch/contiguous/f32/n:1024/batch:{b}/threads:1", 1.0, tokens_per_second=1000.0 * b**0.5)
    for name, cost in (("mha", 4), ("gqa", 2), ("mqa", 1), ("mla", 3)):
        for n in (128, 512):
            variant += row(f"variant/{name}/decode/n:{n}", cost * n / 1e3, cache_bytes_per_token=100.0 * cost)
    peers, memory = [], []
    for n in (512, 1024, 2048):
        for library, times in (("qkv", 1.0), ("torch", 1.5), ("fastlib", 0.5)):
            peers += row(f"peer/{library}/prefill/f32/n:{n}/heads:8/kv_heads:8/d:128/threads:1", times * n / 100)
        for cache in ("contiguous", "latent"):
            memory += row(f"memory/{cache}/bf16/n:{n}", 1.0, cache_bytes_per_token=100.0, computed_bytes=100.0 * n,
                          allocated_bytes=100.0 * n, resident_bytes=101.0 * n)
    return {"bench_prefill": prefill, "bench_decode": decode, "bench_latent": latent, "bench_projection": projection,
            "bench_scaling": scaling, "bench_batch": batch, "bench_variants": variant, "peers": peers, "memory": memory}


def write(folder, change=lambda name, raw: raw, only=None):
    """Writes a folder of results; `change(name, row)` may alter a row or return None to leave it out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "context.json").write_text(json.dumps(ABOUT))
    for program, all_rows in rows().items():
        if only and program not in only:
            continue
        kept = [changed for raw in all_rows if (changed := change(raw["name"], dict(raw))) is not None]
        context = {"host_name": "secret-host", "executable": "/home/someone/bench", "load_avg": [1, 2, 3], "num_cpus": 2}
        if program == "peers":
            context["libraries"] = {"torch": "1.2.3", "fastlib": "4.5"}
        (folder / f"{program}.json").write_text(json.dumps({"context": context, "benchmarks": kept}))
    return folder
