"""What the benchmark needs in .build/bench of the checkout: programs, libraries, this machine."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
SCRATCH = PROJECT / ".build" / "bench"
# NIXL's interface imports nothing but numpy.
WHEELS = ("libucx-cu12==1.22.0", "nixl-cu12==1.5.1", "numpy")
DEBIAN = {"ucx_perftest": "ucx-utils", "iperf3": "iperf3"}


class Unavailable(Exception):
    """A contender cannot run; the text says why."""


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def run(command, seconds, **more):
    """Runs a command to its end; returns its output. Fails with the last of what it printed."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            **more,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{pathlib.Path(command[0]).name} took over {seconds} s") from None
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        last = " ".join(done.stdout.split("\n")[-4:]).strip() or "no output"
        name = pathlib.Path(command[0]).name
        raise Unavailable(f"{name} ended with {done.returncode}: {last}")
    return done.stdout


def wheels():
    """The Python of a virtual environment with UCX and NIXL in it."""
    folder = SCRATCH / "wheels"
    python, marker = folder / "bin" / "python", folder / "complete"
    if marker.exists():
        return python
    say("installing " + ", ".join(WHEELS))
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", folder], 120)
    # Without dependencies: NIXL requires a whole CUDA stack, which host memory does not need.
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        run([*pip, *WHEELS], 900)
    except Unavailable:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    marker.touch()
    return python


def wheel_version(python, name):
    code = f"import importlib.metadata as m; print(m.version('{name}'))"
    return run([python, "-c", code], 60).strip()


def debian_program(name):
    """The path of a Debian program, installed if this user may."""
    if not shutil.which(name):
        package = DEBIAN[name]
        if not shutil.which("apt-get"):
            raise Unavailable(f"no {name} and no apt-get here; Debian has it in {package}")
        if os.getuid() != 0:
            raise Unavailable(f"no {name} here; run as root: apt-get install {package}")
        say(f"installing {package}")
        variables = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
        install = [*apt, "install", "--no-install-recommends", package]
        try:
            run(install, 600, env=variables)
        except Unavailable:  # the lists of a fresh machine are empty or old
            run([*apt, "update"], 600, env=variables)
            run(install, 600, env=variables)
    return shutil.which(name)


def debian_version(name):
    """Version of the package that contains a program; "unknown" if it was installed otherwise."""
    try:
        return run(["dpkg-query", "-W", "-f", "${Version}", DEBIAN[name]], 20).strip()
    except Unavailable:
        return "of unknown version"


def bound(name):
    """One of the programs of bounds/, compiled."""
    return compiled(PROJECT / "benchmarks" / "bounds" / f"{name}.c")


def compiled(source, *words):
    program = SCRATCH / source.stem
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        run(["cc", "-O2", "-pthread", "-o", program, source, *words], 120)
    return program


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = re.findall(r"^model name\s*:\s*(.*)$", file.read(), re.MULTILINE)
    with open("/proc/meminfo", encoding="utf-8") as file:
        memory = int(re.search(r"MemTotal:\s*(\d+) kB", file.read()).group(1)) * 1024
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def commit():
    def git(*words):
        done = subprocess.run(
            ["git", "-C", str(PROJECT), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "Sources", "include")
    return (git("rev-parse", "--short=12", "HEAD") or "none") + (" with changes" if changed else "")
