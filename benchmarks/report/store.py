"""One stored result per machine type: a single file of Google Benchmark JSON, one line a row, nothing private in it."""

import json
from pathlib import Path

from . import context

DROPPED = {"family_index", "per_family_instance_index", "run_name"}  # run_name: the name again


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def merged(folder):
    """(context, rows) of all programs in a folder of scripts/bench; every row says of which program it is."""
    folder = Path(folder)
    about = json.loads((folder / "context.json").read_text())
    rows, libraries = [], {}
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text())
        if file.name == "context.json" or "benchmarks" not in data:
            continue
        of = context.stripped(data.get("context", {}))
        libraries.update(of.get("libraries", {}))
        if "qkv build" in of:
            about.setdefault("qkv build", of["qkv build"])
        for row in data["benchmarks"]:
            kept = {key: _short(value) for key, value in row.items() if key not in DROPPED}
            rows.append({"program": file.stem, **kept})
    if libraries:
        about["libraries"] = libraries
    return context.stripped(about), rows


def store(folder, where):
    """Writes the file and returns its path."""
    about, rows = merged(folder)
    path = Path(where) / (context.machine_name(about) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text('{"context": ' + json.dumps(about, indent=1) + ',\n"benchmarks": [\n' + lines + "\n]}\n")
    return path
