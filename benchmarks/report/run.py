"""Runs the programs of the plan, pass by pass, with progress, and writes their JSON into one folder."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import context, plan


class Progress:
    """On a terminal one line that is rewritten; elsewhere a line for every step."""

    def __init__(self, seconds):
        self.start, self.expected, self.passed = time.monotonic(), seconds, 0.0
        self.terminal = sys.stderr.isatty()

    @property
    def elapsed(self):
        return time.monotonic() - self.start

    def left(self, done):
        """Expected seconds still, by how long the part that is done was expected to take and took."""
        done = min(self.passed + done, self.expected)
        pace = self.elapsed / done if done > 5 else 1.0
        return max(0.0, (self.expected - done) * pace)

    def show(self, text, done=0.0, step=False):
        left = round(self.left(done))
        line = f"{100 * min(1, (self.passed + done) / self.expected):3.0f} %  {left // 60}:{left % 60:02d} left  {text}"
        if self.terminal:
            print("\r\x1b[K" + line[:118], end="", file=sys.stderr, flush=True)
        elif step:
            print(line, file=sys.stderr, flush=True)

    def say(self, text):
        print(("\r\x1b[K" if self.terminal else "") + "-- " + text, file=sys.stderr, flush=True)


def run_program(binary, arguments, progress, label, seconds, limit):
    """(JSON, None), (None, why it failed), or (None, None): not done after `limit` seconds. A row that is printed is done."""
    listed = subprocess.run([binary, *arguments, "--benchmark_list_tests=true"], capture_output=True, text=True)
    total = max(1, len(listed.stdout.splitlines()))
    out = Path(f"{binary}.json")
    process = subprocess.Popen([binary, *arguments, f"--benchmark_out={out}", "--benchmark_out_format=json"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done, start = 0, time.monotonic()
    stop = threading.Timer(limit, process.kill)
    stop.start()
    progress.show(f"{label}: {total} rows", step=True)
    for line in process.stdout:
        if re.match(r"^\w+/\S+:\S*|^\w+/\S+\s", line):
            done += 1
            progress.show(f"{label}: {done}/{total} {line.split()[0]}", seconds * done / total)
    errors = process.stderr.read().strip().splitlines()
    status = process.wait()
    stop.cancel()
    try:
        if status == -signal.SIGKILL and time.monotonic() - start >= limit:
            progress.say(f"{label}: left out, the time was up after {done} of {total} rows")
            return None, None
        if status != 0:
            return None, f"ended with status {status}: {errors[-1] if errors else 'nothing said'}"
        return json.loads(out.read_text()), None
    except (OSError, json.JSONDecodeError) as error:
        return None, f"wrote no results ({error.__class__.__name__}); is the filter empty?"
    finally:
        out.unlink(missing_ok=True)


def add_pass(merged, data, index):
    """Rows of one pass become repetition `index` of the whole."""
    for row in data["benchmarks"]:
        row["repetition_index"] = index
    if merged is None:
        data["context"] = context.stripped(data["context"])
        return data
    merged["benchmarks"] += data["benchmarks"]
    return merged


def write(path, data):
    repetitions = 1 + max((row.get("repetition_index", 0) for row in data["benchmarks"]), default=0)
    for row in data["benchmarks"]:
        row["repetitions"] = repetitions
    path.write_text(json.dumps(data, indent=1) + "\n")


def extra(command, out, progress, label, seconds, limit):
    """Memory and peers: programs that run once, write their own file and may be missing."""
    if not Path(command[0]).exists():
        progress.say(f"{label}: left out, {Path(command[0]).name} is not there")
        progress.expected -= seconds
        return
    if limit < 5:
        progress.say(f"{label}: left out, the time is up")
        progress.expected -= seconds
        return
    progress.show(label, step=True)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit,
                               env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
        if ended.returncode != 0 or not out.exists():
            said = (ended.stderr or ended.stdout).strip().splitlines()
            progress.say(f"{label}: left out, status {ended.returncode}: {said[-1] if said else 'nothing said'}")
            out.unlink(missing_ok=True)
        else:
            data = json.loads(out.read_text())
            data["context"] = context.stripped(data.get("context", {}))
            out.write_text(json.dumps(data, indent=1) + "\n")
    except subprocess.TimeoutExpired:
        progress.say(f"{label}: left out, not done after {limit:.0f} s")
        out.unlink(missing_ok=True)
    progress.passed += seconds


def run(build, source, folder, quick, about):
    """Returns the number of programs that failed."""
    mode = plan.QUICK if quick else plan.FULL
    binaries, folder = Path(build) / "benchmarks", Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    (folder / "context.json").write_text(json.dumps(about, indent=1) + "\n")
    seconds = {program.name: program.seconds if quick else program.full_seconds for program in plan.PROGRAMS}
    extras = (8, 35) if quick else (15, 480)
    progress = Progress(sum(seconds.values()) * mode.passes + sum(extras))
    merged, took, failed = {}, {}, set()
    for index in range(mode.passes):
        for program in plan.PROGRAMS:
            if program.name in failed:
                continue
            if index > 0 and progress.elapsed + took[program.name] > mode.limit:
                progress.say(f"{program.name}: pass {index + 1} left out, the time is up")
                progress.expected -= seconds[program.name]
                continue
            filter_ = [f"--benchmark_filter={program.quick}"] if quick else []
            start = time.monotonic()
            data, why = run_program(str(binaries / program.name), [*filter_, f"--benchmark_min_time={mode.min_time}"],
                                    progress, f"pass {index + 1}/{mode.passes} {program.name}", seconds[program.name],
                                    max(1.0, mode.limit - progress.elapsed))
            took[program.name] = time.monotonic() - start
            progress.passed += seconds[program.name]
            if why:
                progress.say(f"{program.name}: {why}")
                failed.add(program.name)
            if data is None:
                continue
            merged[program.name] = add_pass(merged.get(program.name), data, index)
            write(folder / f"{program.name}.json", merged[program.name])
        if index == 0:  # after the first pass, so that a report has all kinds of rows when time runs out
            short = ["--quick"] if quick else []
            out = folder / "memory.json"
            extra([str(binaries / "bench_memory"), f"--benchmark_out={out}", "--benchmark_out_format=json",
                   *(["--benchmark_filter=n:(1024|4096|16384)/"] if quick else [])], out, progress, "memory", extras[0],
                  min(4 * extras[0], mode.limit - progress.elapsed))
            out = folder / "peers.json"
            extra([str(Path(source) / "benchmarks" / "peers" / "run"), "--out", str(out), *short], out, progress, "peers",
                  extras[1], min((2 if quick else 1.5) * extras[1], mode.limit - progress.elapsed))
    for name in failed:
        progress.say(f"{name} failed; the report leaves it out")
    progress.say(f"measured in {progress.elapsed:.0f} s")
    return len(failed)
