"""The cost of engines that have nothing to do, and of waiters whose peer is stopped.

  idle.py PROGRAM LIBRARY SECONDS idle|waiting

A target (`mooncake bench target`) and an initiator (an engine in this process) move some data, so
that threads and connections exist. Then both stay silent with open connections, or the target is
stopped while the initiator waits for one long read. Prints percent of a core as one line of JSON:
for idle, of the engine's threads at the busier end; for waiting, of the whole initiator.
"""

import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "Tests" / "interop"))

import mooncake_lib as lib  # noqa: E402
from native_peer import NativeEngine  # noqa: E402

SMALL, LARGE = 64 << 10, 256 << 20
ROUNDS = 2000


def processor_seconds(pid, prefix=""):
    """Of a process's threads whose names begin with that."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        folder = f"/proc/{pid}/task/{thread}"
        with open(f"{folder}/comm") as name, open(f"{folder}/schedstat") as times:
            if name.read().startswith(prefix):
                total += int(times.read().split()[0])
    return total / 1e9


def percent(seconds, pids, prefix):
    before = {pid: processor_seconds(pid, prefix) for pid in pids}
    if min(before.values()) <= 0:
        sys.exit("the engines' threads have not run: there is nothing to compare with")
    start = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - start
    return max(100 * (processor_seconds(pid, prefix) - before[pid]) / elapsed for pid in pids)


def read(engine, segment, memory, address, size):
    request = lib.MooncakeRequest(lib.READ, segment, ctypes.addressof(memory), address, size)
    return engine.library.mooncake_transfer_sync(engine.engine, ctypes.byref(request), 1, 0)


def waiting(engine, segment, address, target, seconds):
    memory = ctypes.create_string_buffer(LARGE)
    codes = []

    def work():
        codes.append(read(engine, segment, memory, address, LARGE))

    target.send_signal(signal.SIGSTOP)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        time.sleep(0.2)
        return percent(seconds, [os.getpid()], "")
    finally:
        target.send_signal(signal.SIGCONT)
        thread.join()
        engine.check(codes[0])


def main():
    program, library, seconds, what = *sys.argv[1:3], float(sys.argv[3]), sys.argv[4]
    os.environ["MC_FORCE_TCP"] = "1"
    target = subprocess.Popen(
        [program, "bench", "target", "--buffer-size", str(LARGE), "--until-eof"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        words = target.stdout.readline().split()
        name, address = words[1], int(words[3], 0)
        engine = NativeEngine(library)
        engine.check(engine.open(name)[0])
        segment = engine.segments[name]
        memory = ctypes.create_string_buffer(SMALL)
        for _ in range(ROUNDS):
            engine.check(read(engine, segment, memory, address, SMALL))
        time.sleep(0.5)
        if what == "waiting":
            result = waiting(engine, segment, address, target, seconds)
        else:
            result = percent(seconds, [target.pid, os.getpid()], "mc-")
        print(json.dumps({"percent": result}))
    finally:
        target.kill()
        target.wait()


main()
