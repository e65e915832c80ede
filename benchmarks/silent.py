#!/usr/bin/env python3
"""How much stopped holders delay gets, compared with the same gets without them.

usage: silent.py [--repetitions N] [FOLDER_OF_LIBRARY]

On loopback with the built-in metadata server. Every holder is a separate process, stopped by
SIGSTOP after it has published its records, whose leases go on. Prints medians and ranges:

  one get with 15 stopped holders among its records: first byte, and all of it
  64 gets at once by one store, each name with three stopped holders: until the last has ended
"""

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("Tests/interop", "Tests/metadata")]

SIZE = 300_000
NAMES = [b"m%d" % number for number in range(64)]


def own_store(uri, name):
    import store_lib
    return store_lib.store(store_lib.engine(uri, name, 30_000))


def hold(uri, name, registers):
    """Registers every name, or gets it, reports that and waits."""
    import store_lib
    store = own_store(uri, name)
    memories = [store_lib.Memory(SIZE) for _ in NAMES]
    call = store_lib.register if registers else store_lib.get
    for payload, memory in zip(NAMES, memories):
        store_lib.check(call(store, payload, memory))
    print("ready", flush=True)
    sys.stdin.read()


class Holders:
    """The origin of all names, and a number of stopped replicas."""

    def __init__(self, uri, count):
        self.processes = []
        self.start(uri, "origin", True)
        for number in range(count):
            self.start(uri, f"replica-{number}", False)
        for process in self.processes[1:]:
            process.send_signal(signal.SIGSTOP)

    def start(self, uri, name, registers):
        role = "origin" if registers else "replica"
        process = subprocess.Popen(
            [sys.executable, __file__, "--role", role, "--uri", uri, "--name", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{name} did not start")

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def one_get(store):
    """Milliseconds until the first byte and until the end."""
    import store_lib
    memory = store_lib.Memory(SIZE)
    operation = store_lib.Operation.within(30_000)
    first = []
    begin = time.monotonic()

    @store_lib.ProgressCallback
    def progress(report, _):
        if report.contents.done and not first:
            first.append(time.monotonic())
        return 0

    operation.progress = progress
    store_lib.check(store_lib.get(store, NAMES[0], memory, operation))
    end = time.monotonic()
    store_lib.check(store_lib.delete(store, NAMES[0]))
    return ((first or [end])[0] - begin) * 1000, (end - begin) * 1000


def many_gets(store):
    import store_lib
    memories = [store_lib.Memory(SIZE) for _ in NAMES]
    codes = []

    def get(name, memory):
        codes.append(store_lib.get(store, name, memory))

    threads = [threading.Thread(target=get, args=pair) for pair in zip(NAMES, memories)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begin
    if any(codes):
        raise RuntimeError(f"a get failed: {codes}")
    for name in NAMES:
        store_lib.check(store_lib.delete(store, name))
    return seconds * 1000


def show(what, values):
    print(f"{what}: median {statistics.median(values):.0f} ms, "
          f"{min(values):.0f} to {max(values):.0f}", flush=True)


def measure(count, repetitions, action):
    import services
    service = services.Ours()
    holders = None
    try:
        holders = Holders(service.uri, count)
        store = own_store(service.uri, "receiver")
        return [action(store) for _ in range(repetitions)]
    finally:
        if holders:
            holders.end()
        service.end()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library", nargs="?", default=str(ROOT / ".build/release"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--role", choices=("origin", "replica"), help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        hold(options.uri, options.name, options.role == "origin")
        return
    folder = pathlib.Path(options.library).resolve()
    os.environ["MOONCAKE_LIBRARY"] = str(folder / "libmooncake.so")
    os.environ["MOONCAKE_CLI"] = str(folder / "mooncake-cli")
    os.environ["MC_METADATA_TTL"] = "60"
    os.environ["MC_LOG_LEVEL"] = "ERROR"
    for count in (0, 15):
        times = measure(count, options.repetitions, one_get)
        show(f"one get, {count} stopped holders, first byte", [first for first, _ in times])
        show(f"one get, {count} stopped holders, all", [end for _, end in times])
    for count in (0, 3):
        show(f"64 gets at once, {count} stopped holders each",
             measure(count, options.repetitions, many_gets))


if __name__ == "__main__":
    main()
