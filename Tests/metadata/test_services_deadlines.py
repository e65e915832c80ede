"""Every call that can block returns in time while its metadata service stands still.

A frozen service takes connections and requests and answers nothing, so that only deadlines and
cancellations end a call. Each row of a table is one call; the service is thawed between two.
"""

import concurrent.futures
import ctypes
import os
import threading
import time
import unittest

import lab
import services
import store_lib as lib

KINDS = (services.Etcd, services.Redis, services.Ours)
# Milliseconds: of an operation, and of the engine's calls that name no timeout.
TIMEOUT, DEFAULT = 400, 600
LATENESS, CANCEL_LATENESS = 0.1, 0.2
DESTROY_SECONDS = 5
SIZE = 300_000
# The lease is long, so that nothing but the calls themselves bounds their waits.
TTL = 20


class Heartbeat:
    """How late this machine wakes a thread, in the worst case since `reset`."""

    def __init__(self):
        self.worst = 0.0
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self):
        while True:
            begin = time.monotonic()
            time.sleep(0.005)
            self.worst = max(self.worst, time.monotonic() - begin - 0.005)

    def reset(self):
        self.worst = 0.0

    @property
    def slack(self):
        return 4 * self.worst


class Bench:
    """Two stores that share a service: the peer offers, the other's calls are timed."""

    def __init__(self, service, label, heartbeat):
        self.heartbeat = heartbeat
        self.service = service
        self.label = label
        self.failures = []
        # An etcd that listens may still elect itself.
        services.command("list", self.service.uri, "mooncake/")
        self.engine = lib.engine(self.service.uri, "caller", DEFAULT)
        self.store = lib.store(self.engine)
        self.peer_engine = lib.engine(self.service.uri, "peer", 10_000)
        self.peer = lib.store(self.peer_engine)
        self.memory = [lib.Memory(SIZE) for _ in range(5)]
        lib.check(lib.register(self.peer, b"there", self.memory[0]))
        lib.check(lib.register(self.peer, b"open", self.memory[1], writable=True))

    def end(self):
        self.service.resume()
        for store in (self.store, self.peer):
            lib.library.mooncake_store_destroy(store)
        for engine in (self.engine, self.peer_engine):
            lib.library.mooncake_engine_destroy(engine)
        self.service.end()

    def recover(self):
        """Thaws the service and waits until everything is published again."""
        self.service.resume()

        def is_back():
            begin = time.monotonic()
            codes = [
                lib.stat(self.store, b"there", lib.Operation.within(2000)),
                lib.stat(self.store, b"open", lib.Operation.within(2000)),
                lib.memory_register(self.engine, self.memory[4]),
                lib.memory_unregister(self.engine, self.memory[4]),
                lib.memory_register(self.peer_engine, self.memory[4]),
                lib.memory_unregister(self.peer_engine, self.memory[4]),
            ]
            return not any(codes) and time.monotonic() - begin < 0.5

        if not lab.wait_until(is_back, 30, pause=0.05):
            raise AssertionError(f"{self.label}: not back: {lib.message()}")

    def measure(self, name, limit, call, begin=None):
        """Runs a call; what it returns does not matter here, only when."""
        self.heartbeat.reset()
        start = time.monotonic()
        code = call()
        end = time.monotonic()
        seconds = end - (begin() if begin else start)
        if seconds > limit + self.heartbeat.slack:
            self.failures.append(
                f"{self.label}: {name} took {seconds:.3f} s, not {limit:.3f} (result {code}, "
                f"{lib.message() if code else ''})")
        return code

    # Rows: what comes before the freeze, the call with an operation, what undoes it afterwards.

    def operations(self):
        mine, fetched, part = self.memory[2], self.memory[3], self.memory[4]
        store = self.store
        nothing = lambda: None
        drop = lambda: lib.unregister(store, b"mine")
        forget = lambda: lib.delete(store, b"there")
        return {
            "register": (nothing, lambda op: lib.register(store, b"mine", mine, op), drop),
            "register, create only": (
                nothing, lambda op: lib.register(store, b"mine", mine, op, create_only=True), drop),
            "register, writable": (
                nothing, lambda op: lib.register(store, b"mine", mine, op, writable=True), drop),
            "register, a new version": (
                lambda: lib.check(lib.register(store, b"mine", fetched)),
                lambda op: lib.register(store, b"mine", mine, op), drop),
            "unregister": (
                lambda: lib.check(lib.register(store, b"mine", mine)),
                lambda op: lib.unregister(store, b"mine", op), nothing),
            "get": (nothing, lambda op: lib.get(store, b"there", fetched, op), forget),
            "get, allocated": (nothing, lambda op: lib.get(store, b"there", None, op), forget),
            "get, receive only": (
                nothing, lambda op: lib.get(store, b"there", fetched, op, receive_only=True),
                forget),
            "delete_replica": (
                lambda: lib.check(lib.get(store, b"there", fetched)),
                lambda op: lib.delete(store, b"there", op), nothing),
            "remove": (
                lambda: lib.check(lib.register(self.peer, b"victim", part)),
                lambda op: lib.remove(store, b"victim", op),
                lambda: lib.unregister(self.peer, b"victim")),
            "list": (nothing, lambda op: lib.list_all(store, op), nothing),
            "stat": (nothing, lambda op: lib.stat(store, b"there", op), nothing),
            "read": (nothing, lambda op: lib.read(store, b"there", part, op), nothing),
            "write": (nothing, lambda op: lib.write(store, b"open", part, op), nothing),
        }

    def engine_calls(self):
        """Calls with a timeout, or with the engine's default: (limit, before, call, after)."""
        engine, memory = self.engine, self.memory[2]
        nothing = lambda: None
        short, default = TIMEOUT / 1000, DEFAULT / 1000
        segment = ctypes.c_int32()
        address = ctypes.c_void_p()

        def open_segment(name=b"peer"):
            return lib.library.mooncake_segment_open(
                engine, name, ctypes.c_uint64(TIMEOUT), ctypes.byref(segment))

        def close_segment():
            return lib.library.mooncake_segment_close(engine, segment)

        def opened():
            lib.check(open_segment())

        def notify():
            return lib.library.mooncake_notification_send(
                engine, segment, b"name", b"text", ctypes.c_uint64(TIMEOUT))

        def allocate():
            return lib.library.mooncake_memory_allocate(
                engine, ctypes.c_uint64(SIZE), None, 3, ctypes.byref(address))

        def free():
            return lib.library.mooncake_memory_free(engine, address)

        def create():
            other = ctypes.c_void_p()
            code = lib.create_engine(self.service.uri, "third", DEFAULT, other)
            if code == 0:
                lib.library.mooncake_engine_destroy(other)
            return code

        return {
            "segment_open": (short, nothing, open_segment, close_segment),
            "segment_open, known": (
                short, opened, open_segment, lambda: (close_segment(), close_segment())),
            "segment_open, nobody's": (short, nothing, lambda: open_segment(b"nobody"), nothing),
            "peer_probe": (
                short, nothing, lambda: lib.library.mooncake_peer_probe(
                    engine, b"peer", ctypes.c_uint64(TIMEOUT)), nothing),
            "notification_send": (short, opened, notify, close_segment),
            "memory_register": (
                default, nothing, lambda: lib.memory_register(engine, memory),
                lambda: lib.memory_unregister(engine, memory)),
            "memory_unregister": (
                default, lambda: lib.check(lib.memory_register(engine, memory)),
                lambda: lib.memory_unregister(engine, memory), nothing),
            "memory_allocate": (default, nothing, allocate, free),
            "memory_free": (default, lambda: lib.check(allocate()), free, nothing),
            "engine_create": (default, nothing, create, nothing),
        }

    def watch(self):
        """Watches neither wait for the service when they begin nor when they end."""
        watch = ctypes.c_void_p()
        self.recover()
        self.service.stop()
        self.measure("watch_create", LATENESS, lambda: lib.watch(self.store, watch))
        time.sleep(0.2)
        self.measure(
            "watch_destroy", LATENESS, lambda: lib.library.mooncake_store_watch_destroy(watch))

    def run(self):
        for name, (limit, before, call, after) in self.engine_calls().items():
            self.recover()
            before()
            self.service.stop()
            self.measure(name, limit + LATENESS, call)
            self.recover()
            after()
        for name, (before, call, after) in self.operations().items():
            phase = {"register": lib.PHASE_PUBLISHING, "get": lib.PHASE_TRANSFERRING}
            for phase in {None, phase.get(name.split(",")[0])}:
                self.deadline(name, before, call, after, phase)
                self.cancel(name, before, call, after, phase)
        self.watch()
        self.recover()
        self.service.stop()
        store, engine = self.store, self.engine
        self.measure("store_destroy", DESTROY_SECONDS,
                     lambda: lib.library.mooncake_store_destroy(store))
        self.measure("engine_destroy", DESTROY_SECONDS,
                     lambda: lib.library.mooncake_engine_destroy(engine))

    def deadline(self, name, before, call, after, phase):
        """`phase`: the service freezes when the call's progress comes to it."""
        self.recover()
        before()
        operation = lib.Operation.within(TIMEOUT)
        self.freeze(operation, phase)
        self.measure(f"{name} with a deadline, frozen at {phase}", TIMEOUT / 1000 + LATENESS,
                     lambda: call(operation))
        self.recover()
        after()

    def freeze(self, operation, phase):
        if phase is None:
            self.service.stop()
        else:
            operation.at_phase(phase, self.service.stop)

    def cancel(self, name, before, call, after, phase):
        self.recover()
        before()
        cancellation = lib.Cancellation()
        operation = lib.Operation.until(cancellation)
        canceled = []

        def press():
            time.sleep(0.25)
            canceled.append(time.monotonic())
            cancellation.cancel()

        self.freeze(operation, phase)
        thread = threading.Thread(target=press)
        thread.start()
        self.measure(
            f"{name}, canceled, frozen at {phase}", CANCEL_LATENESS, lambda: call(operation),
            begin=lambda: (thread.join(), canceled[0])[1])
        cancellation.end()
        self.recover()
        after()


class Deadlines(unittest.TestCase):
    def test_every_call_ends_in_time(self):
        os.environ["MC_METADATA_TTL"] = str(TTL)
        heartbeat = Heartbeat()

        def check(kind):
            bench = Bench(kind(), kind.__name__, heartbeat)
            try:
                bench.run()
            finally:
                bench.end()
            return bench.failures

        with concurrent.futures.ThreadPoolExecutor(len(KINDS)) as pool:
            failures = [failure for found in pool.map(check, KINDS) for failure in found]
        self.assertEqual(failures, [], "\n".join(failures))

    def test_what_was_withdrawn_meanwhile_vanishes(self):
        """A record whose deletion the frozen service did not answer goes when it is back."""
        os.environ["MC_METADATA_TTL"] = str(TTL)

        def check(kind):
            bench = Bench(kind(), kind.__name__, Heartbeat())
            try:
                # The lease that its record hangs on is kept by another one.
                lib.check(lib.register(bench.store, b"other", bench.memory[3]))
                lib.check(lib.register(bench.store, b"mine", bench.memory[2]))
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
