"""Every call returns in time while its metadata service is frozen.

A frozen service accepts connections and requests but never answers, so that only deadlines and
cancellations end a call. Each row of a table (deadline_rows.py) is one call; the service is thawed
between rows. Each function of both headers is in a row, or is known to wait for nobody.
"""

import concurrent.futures
import contextlib
import ctypes
import os
import pathlib
import re
import threading
import time
import unittest

import deadline_rows as table
import lab
import mooncake_lib
import services
import store_lib as lib

HEADERS = pathlib.Path(__file__).resolve().parent.parent.parent / "include"
KINDS = (services.Etcd, services.Redis, services.Ours)
SIZE = 300_000
# The lease is long, so that only the calls themselves bound their waits.
TTL = 20
# How many seconds a machine that wakes threads late may add to a limit, and how often a call is
# repeated if it took too long while the machine was that late.
LARGEST_SLACK, ATTEMPTS = 0.15, 6


def queue_times():
    """How many seconds each thread of this process has been ready to run and did not; nothing where
    the kernel does not count it."""
    times = {}
    for file in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # The thread has ended.
            times[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return times


class Heartbeat:
    """How late this machine wakes a thread, in the worst case since `reset`, and how long it has
    kept those of this process waiting for a processor."""

    def __init__(self):
        self.worst = 0.0
        self.queued = {}
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self):
        while True:
            begin = time.monotonic()
            time.sleep(0.005)
            self.worst = max(self.worst, time.monotonic() - begin - 0.005)

    def reset(self):
        self.worst = 0.0
        self.queued = queue_times()

    @property
    def slack(self):
        return min(4 * self.worst, LARGEST_SLACK)

    @property
    def is_disturbed(self):
        queued = sum(time - self.queued.get(thread, 0) for thread, time in queue_times().items())
        return max(4 * self.worst, queued) > LARGEST_SLACK


class Bench:
    """Two stores that share a service: the peer offers, and the other's calls are timed."""

    def __init__(self, service, label):
        self.heartbeat = Heartbeat()
        self.service = service
        self.label = label
        self.failures = []
        # An etcd that listens may still be electing itself.
        services.command("list", self.service.uri, "mooncake/")
        self.engine = lib.engine(self.service.uri, "caller", table.DEFAULT)
        self.store = lib.store(self.engine)
        self.peer_engine = lib.engine(self.service.uri, "peer", 10_000)
        self.peer = lib.store(self.peer_engine)
        self.memory = [lib.Memory(SIZE) for _ in range(8)]
        (self.there, self.open, self.mine, self.other, self.fetched, self.part, self.probe,
         self.peer_probe) = self.memory
        half = SIZE // 2
        self.pair = (lib.Buffer * 2)(
            (self.mine.address, half), (self.mine.address + half, half))
        # Where calls put their results.
        self.segment, self.batch = ctypes.c_int32(), ctypes.c_uint64()
        self.allocated, self.server = ctypes.c_void_p(), ctypes.c_void_p()
        self.second, self.watch = ctypes.c_void_p(), ctypes.c_void_p()
        self.bytes = lib.Memory(4096)
        lib.check(lib.register(self.peer, b"there", self.there))
        lib.check(lib.register(self.peer, b"open", self.open, writable=True))
        if label == "Etcd":
            self.plant()

    def plant(self):
        """A payload as Mooncake's Go store registers it, in the memory of the peer."""
        text = services.command("get", self.service.uri, "mooncake/checkpoint/there")
        services.command("put", self.service.uri, "mooncake/checkpoint/foreign", "-",
                         text=text.replace('"there"', '"foreign"'))

    def end(self):
        self.service.resume()
        for store in (self.store, self.peer):
            lib.library.mooncake_store_destroy(store)
        for engine in (self.engine, self.peer_engine):
            lib.library.mooncake_engine_destroy(engine)
        self.service.end()

    def request(self, is_known):
        """A read from the peer, of registered or unregistered memory."""
        offset = self.there.address + (0 if is_known else 1 << 40)
        return mooncake_lib.MooncakeRequest(
            mooncake_lib.READ, self.segment.value, self.bytes.address, offset, self.bytes.count)

    @staticmethod
    def pause():
        time.sleep(0.2)

    def recover(self):
        """Thaws the service and waits until everything is published again."""
        self.service.resume()

        def is_back():
            begin = time.monotonic()
            codes = [
                lib.stat(self.store, b"there", lib.Operation.within(2000)),
                lib.stat(self.store, b"open", lib.Operation.within(2000)),
                lib.memory_register(self.engine, self.probe),
                lib.memory_unregister(self.engine, self.probe),
                lib.memory_register(self.peer_engine, self.peer_probe),
                lib.memory_unregister(self.peer_engine, self.peer_probe),
            ]
            return not any(codes) and time.monotonic() - begin < 0.5

        if not lab.wait_until(is_back, 30, pause=0.05):
            raise AssertionError(f"{self.label}: not back: {lib.message()}")

    # One call.

    def fail(self, what):
        self.failures.append(f"{self.label}: {what}")

    def measure(self, name, limit, call, expected, begin=None):
        """Runs a call that must return a code within a time, counted from `begin` if given.

        Returns whether to repeat it because the machine was too slow to tell.
        """
        self.heartbeat.reset()
        start = time.monotonic()
        code = call()
        end = time.monotonic()
        message = lib.message() if code else ""
        seconds = end - (begin() if begin else start)
        if code != expected:
            # It may not have had time for its last step.
            if code == lib.TIMEOUT and self.heartbeat.is_disturbed:
                return True
            self.fail(f"{name} returned {code}, not {expected} ({message})")
        elif seconds > limit + self.heartbeat.slack:
            if self.heartbeat.is_disturbed:
                return True
            self.fail(f"{name} took {seconds:.3f} s, not {limit:.3f} ({code}, {message})")
        return False

    def attempt(self, name, once):
        for _ in range(ATTEMPTS):
            if not once():
                return
        self.fail(f"{name}: the machine wakes threads too late to judge it")

    def run(self):
        kind = type(self.service).__name__
        for row in table.engine_rows() + table.operation_rows():
            if row.kinds and kind not in row.kinds:
                continue
            if row.canceled is None:
                self.attempt(row.name, lambda: self.plain(row))
            else:
                self.attempt(row.name, lambda: self.deadline(row))
                self.attempt(row.name, lambda: self.cancel(row))
        self.together(table.quick_rows(), table.opened)
        self.together(table.last_rows(), table.holding)

    def together(self, rows, before=table.nothing):
        """Consecutive calls while the service is frozen."""
        self.recover()
        before(self)
        self.service.stop()
        for row in rows:
            # A finished object cannot be used again.
            if self.measure(row.name, row.limit, lambda: row.call(self), row.code):
                print(f"{self.label}: {row.name}: the machine was too busy to tell")
        self.service.resume()

    def plain(self, row):
        self.recover()
        row.before(self)
        self.service.stop()
        again = self.measure(row.name, row.limit, lambda: row.call(self), row.code)
        self.recover()
        row.after(self)
        return again

    def deadline(self, row):
        self.recover()
        row.before(self)
        operation = lib.Operation.within(table.TIMEOUT)
        self.freeze(operation, row)
        again = self.measure(
            f"{row.name}, with a deadline", row.limit, lambda: row.call(self, operation), row.code)
        self.check_freeze(operation, row)
        self.recover()
        row.after(self)
        return again

    def freeze(self, operation, row):
        if row.phase is None:
            self.service.stop()
        else:
            operation.at_phase(row.phase, self.service.stop, row.is_done)

    def check_freeze(self, operation, row):
        if row.phase is not None and not operation.has_reached:
            self.fail(f"{row.name}: it did not tell of phase {row.phase}")

    def cancel(self, row):
        self.recover()
        row.before(self)
        cancellation = lib.Cancellation()
        operation = lib.Operation.until(cancellation, table.PATIENCE)
        canceled = []
        is_over = threading.Event()

        def press():
            if is_over.wait(0.25) and not row.ends_first:
                self.fail(f"{row.name}: it was over before it could be canceled")
            canceled.append(time.monotonic())
            cancellation.cancel()

        def call():
            code = row.call(self, operation)
            is_over.set()
            return code

        self.freeze(operation, row)
        thread = threading.Thread(target=press)
        thread.start()
        again = self.measure(
            f"{row.name}, canceled", table.CANCEL_LATENESS, call, row.canceled,
            begin=lambda: (thread.join(), canceled[0])[1])
        self.check_freeze(operation, row)
        cancellation.end()
        self.recover()
        row.after(self)
        return again


def functions():
    """The functions that the headers declare."""
    found = set()
    for header in ("mooncake.h", "mooncake_store.h"):
        text = (HEADERS / header).read_text()
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        found.update(re.findall(r"\b(mooncake_\w+)\(", text))
    return found


class Completeness(unittest.TestCase):
    def test_every_function_is_in_the_table(self):
        declared = functions()
        self.assertGreater(len(declared), 60)
        rows = (table.engine_rows() + table.operation_rows() + table.quick_rows()
                + table.last_rows())
        timed = {row.function for row in rows}
        idle = {name for names in table.NEVER_WAIT.values() for name in names}
        self.assertEqual(declared - timed - idle, set(), "neither timed nor known not to wait")
        self.assertEqual((timed | idle) - declared, set(), "not in the headers")
        self.assertEqual(timed & idle, set(), "both")


class Deadlines(unittest.TestCase):
    def test_every_call_ends_in_time(self):
        os.environ["MC_METADATA_TTL"] = str(TTL)

        def check(kind):
            bench = Bench(kind(), kind.__name__)
            try:
                bench.run()
            finally:
                bench.end()
            return bench.failures

        with concurrent.futures.ThreadPoolExecutor(len(KINDS)) as pool:
            failures = [failure for found in pool.map(check, KINDS) for failure in found]
        self.assertEqual(failures, [], "\n".join(failures))

    def test_what_was_withdrawn_meanwhile_vanishes(self):
        """A record whose deletion the frozen service did not answer goes once it is back."""
        os.environ["MC_METADATA_TTL"] = str(TTL)

        def check(kind):
            bench = Bench(kind(), kind.__name__)
            try:
                # Another client keeps the lease of its record alive.
                lib.check(lib.register(bench.store, b"other", bench.other))
                lib.check(lib.register(bench.store, b"mine", bench.mine))
                bench.service.stop()
                code = lib.unregister(bench.store, b"mine", lib.Operation.within(300))
                bench.recover()

                def is_gone():
                    left = services.keys(bench.service.uri, "mooncake/store/")
                    return not [key for key in left if "/mine" in key]

                gone = lab.wait_until(is_gone, TTL / 2, pause=0.2)
                self.assertTrue(gone, f"{bench.label} after {code}")
            finally:
                bench.end()

        with concurrent.futures.ThreadPoolExecutor(len(KINDS)) as pool:
            list(pool.map(check, KINDS))


if __name__ == "__main__":
    unittest.main()
