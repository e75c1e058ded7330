"""What scripts/bench runs: rows of every program, how long each is timed, and about how long a pass takes.

`--quick` takes the rows that the figures, README and its check need; `--full` takes all. A pass runs every program once;
passes are repeated, so that the repetitions of a row lie minutes apart and a busy minute cannot pass for a slow kernel."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    name: str
    quick: str  # --benchmark_filter
    seconds: float  # of a quick pass, on two cores of an EPYC of family 26
    full_seconds: float  # of family 25


@dataclass(frozen=True)
class Mode:
    passes: int
    min_time: float  # seconds per row and pass
    limit: float  # seconds for everything after the build; passes that do not fit are left out and said so


QUICK = Mode(passes=3, min_time=0.01, limit=165)
FULL = Mode(passes=3, min_time=0.02, limit=28 * 60)

PROGRAMS = (
    Program("bench_prefill",
            "prefill/causal/f32/n:(512|1024|2048|4096)/heads:8/kv_heads:8/d:128/"
            "|prefill/causal/(f16|bf16|int8|int8_throughout|f64|eigen_.*)/n:2048/heads:8/kv_heads:8/d:128/"
            "|prefill/(full|chunk|alibi)/f32/", 6, 20),
    Program("bench_decode",
            "decode/(contiguous|eigen)/(f32|f16|bf16|int8)/n:32768/heads:32/.*/threads:1/manual"
            "|decode/contiguous/(f32|int8)/n:32768/heads:32/.*/threads:2/", 6, 36),
    Program("bench_projection", "projection/(f32|bf16|int8|eigen)/rows:(1|4|16|64)/in:4096/out:4096/threads:1/", 4, 38),
    Program("bench_batch", "batch/(each|contiguous|cascade)/f32/n:1024/batch:(1|4|16)/threads:1/", 4, 90),
    Program("bench_latent",
            "decode/(absorbed|mha|gqa8|mqa)/(f32|bf16|int8)/n:1024/heads:16/threads:1/"
            "|decode/absorbed/(f32|bf16|int8)/n:4096/heads:(16|128)/threads:1/"
            "|break_even/.*/n:1024/heads:16/new:(64|128|192|256|512)/", 5, 160),
    Program("bench_variants", ".", 3, 6),
    Program("bench_scaling",
            "scaling/prefill/f32/n:(512|1024|2048|4096)/|scaling/decode/f32/n:(8192|16384|32768|65536)/"
            "|scaling/generate/cached/f32/n:(256|512|1024|2048)/|scaling/generate/recompute/f32/n:(256|512|1024)/"
            "|scaling/slope/", 9, 35),
)
