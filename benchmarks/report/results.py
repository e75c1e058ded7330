"""Rows of Google Benchmark JSON: read from a folder or a file, one row a name, medians of repetitions."""

import json
import statistics
from pathlib import Path

MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}
# What Google Benchmark writes itself; every other number of a row is a counter.
OWN_KEYS = {"family_index", "per_family_instance_index", "repetitions", "repetition_index", "threads", "iterations",
            "real_time", "cpu_time"}
SUFFIXES = ("/manual_time", "/real_time", "/process_time")


class Row:
    """All repetitions of one benchmark. `row["peak_fraction"]` is the median of a counter, None where it has none."""

    def __init__(self, program, name):
        self.program, self.name, self.error = program, name, None
        self.times, self.counters = [], {}
        self.path = [part for part in name.split("/") if ":" not in part]
        self.sizes = {}
        for part in name.split("/"):
            key, colon, value = part.partition(":")
            if colon and value.isdigit():
                self.sizes[key] = int(value)

    def __getitem__(self, counter):
        values = self.counters.get(counter)
        return statistics.median(values) if values else None

    @property
    def milliseconds(self):
        return statistics.median(self.times) if self.times else None

    def add(self, raw):
        if raw.get("error_occurred") or raw.get("skipped"):
            self.error = raw.get("error_message") or raw.get("skip_message") or "no reason given"
            return
        if isinstance(raw.get("real_time"), (int, float)) and raw["real_time"] > 0:
            self.times.append(raw["real_time"] * MILLISECONDS[raw.get("time_unit", "ns")])
        for key, value in raw.items():
            if key not in OWN_KEYS and isinstance(value, (int, float)) and not isinstance(value, bool):
                self.counters.setdefault(key, []).append(float(value))


def clean_name(name):
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return "/".join(part for part in name.split("/") if not part.startswith("iterations:"))


class Results:
    """Rows by name in the order in which they were read, and the context of every program."""

    def __init__(self):
        self.rows, self.contexts, self.context = {}, {}, {}

    def add(self, program, data):
        self.contexts.setdefault(program, data.get("context", {}))
        for raw in data.get("benchmarks", []):
            if raw.get("run_type", "iteration") != "iteration":
                continue  # aggregates: medians are taken here
            name = clean_name(raw.get("run_name", raw["name"]))
            of = raw.get("program", program)
            self.rows.setdefault(name, Row(of, name)).add(raw)

    def find(self, *path, **sizes):
        """Good rows whose name begins with `path` (None: anything) and has these sizes."""
        return [row for row in self.rows.values()
                if not row.error and len(row.path) >= len(path)
                and all(want in (None, have) for want, have in zip(path, row.path))
                and all(row.sizes.get(key) == value for key, value in sizes.items())]

    def failed(self):
        return [row for row in self.rows.values() if row.error]


def read(path):
    """A folder of scripts/bench, one JSON file of Google Benchmark, or a stored result."""
    path, results = Path(path), Results()
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"{path}: no results; scripts/bench writes them")
    for file in files:
        try:
            data = json.loads(file.read_text())
        except FileNotFoundError:
            raise SystemExit(f"{file}: not there") from None
        except json.JSONDecodeError as error:
            raise SystemExit(f"{file}: not JSON ({error})") from None
        if file.name == "context.json":
            results.context = data
        elif "benchmarks" in data:
            results.add(file.stem, data)
            if not path.is_dir() and "machine" in data.get("context", {}):
                results.context = data["context"]
    return results
