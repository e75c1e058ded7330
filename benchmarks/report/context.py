"""Where figures come from: CPU, cores, compiler, flags, commit, date. No host names, no paths, no load."""

import datetime
import os
import re
import subprocess
from pathlib import Path

# Of a context of Google Benchmark: what tells of the machine's owner or of the moment, or of its library only.
PRIVATE = {"host_name", "executable", "load_avg", "library_build_type", "command", "cwd"}


def _output(*command, cwd=None):
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu():
    """As the machine says it; family and model where the name alone tells little."""
    fields = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return os.uname().machine
    name = re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)", "", fields.get("model name", ""))).strip()
    if "cpu family" in fields:
        name = f"{name} (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name or os.uname().machine


def gather(source, cache, mode):
    """`cache` is the CMakeCache.txt of the build that is measured."""
    settings = {}
    if Path(cache).exists():
        for line in Path(cache).read_text().splitlines():
            key, _, value = line.partition("=")
            settings[key.split(":")[0]] = value
    compiler = _output(settings.get("CMAKE_CXX_COMPILER", "c++"), "--version").partition("\n")[0]
    commit = _output("git", "rev-parse", "--short=10", "HEAD", cwd=source) or "unknown"
    # The page, stored results and texts do not change what is measured.
    changed = _output("git", "status", "--porcelain", "-uno", "--", "include", "benchmarks/*.cpp", "benchmarks/support",
                      "benchmarks/peers", "CMakePresets.json", cwd=source)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit + ("+" if changed else ""),
        "mode": mode,
        "machine": {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "system": os.uname().sysname,
                    "isa": os.uname().machine},
        "compiler": compiler,
        "flags": " ".join((settings.get("CMAKE_CXX_FLAGS", "") + " " + settings.get("CMAKE_CXX_FLAGS_RELEASE", "")).split()),
    }


def stripped(context):
    """A context without what must not be stored."""
    return {key: value for key, value in context.items()
            if key not in PRIVATE and not (isinstance(value, str) and re.match(r"^(/|[A-Za-z]:\\|~)", value))}


def machine_name(context):
    """The file name of a machine type: amd-epyc-family-26-model-2-2-cores."""
    machine = context["machine"]
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")
