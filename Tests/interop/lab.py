"""Starts and stops the processes of the interop tests and keeps every wait bounded.

Settings come from the environment, which scripts/test-interop fills:
  MOONCAKE_LIBRARY              path of libmooncake.so
  MOONCAKE_CLI                  path of the mooncake program; absent: its tests are skipped
  MOONCAKE_STOCK_VERSIONS       comma list of Mooncake releases, default RELEASES
  MOONCAKE_INTEROP_SELF_CHECK   if set, Mooncake takes the library's place: shows that the tests
                                themselves work
"""

import functools
import json
import os
import pathlib
import random
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import weakref

HERE = pathlib.Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "scripts"
# One of each kind of wire behavior: v1 framing with a connection per request, v2 framing, v2
# framing with kept connections.
RELEASES = ("0.3.9", "0.3.12.post1", "0.3.13.post1")
# Publishes metadata_version, and has tokens for HTTP metadata servers.
NEWEST = "0.3.14"
# 0.3.13 does not work with releases that close after each request; this one works with all.
SELF_CHECK_RELEASE = "0.3.12.post1"
SELF_CHECK = bool(os.environ.get("MOONCAKE_INTEROP_SELF_CHECK"))
APIS = ("stock",) if SELF_CHECK else ("native", "dropin")
ANSWER_SECONDS = 60

_environments = {}


def releases():
    chosen = os.environ.get("MOONCAKE_STOCK_VERSIONS")
    return tuple(chosen.split(",")) if chosen else RELEASES


def need_newest():
    """Skips a test that needs 0.3.14 if the caller has chosen other releases."""
    chosen = os.environ.get("MOONCAKE_STOCK_VERSIONS")
    if chosen and NEWEST not in chosen.split(","):
        raise unittest.SkipTest(f"MOONCAKE_STOCK_VERSIONS does not name {NEWEST}")


def library():
    path = os.environ.get("MOONCAKE_LIBRARY")
    if not path:
        raise RuntimeError("MOONCAKE_LIBRARY is not set; run scripts/test-interop LIBRARY")
    return path


def stock_environment(version):
    """The virtual environment of a release; made on first use."""
    if version not in _environments:
        made = subprocess.run(
            [str(SCRIPTS / "stock-env"), version],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=1200,
        )
        if made.returncode != 0:
            raise RuntimeError(f"scripts/stock-env {version} failed:\n{made.stderr}")
        _environments[version] = pathlib.Path(made.stdout.strip())
    return _environments[version]


def stock_bench(version):
    """Mooncake's benchmark program inside its wheel."""
    (path,) = stock_environment(version).glob(
        "lib/python3*/site-packages/mooncake/transfer_engine_bench"
    )
    return str(path)


def stock_variables(**extra):
    """Keeps Mooncake on loopback and its waits short."""
    variables = dict(os.environ)
    for name in list(variables):
        if name.startswith("MC_"):
            del variables[name]
    variables.update(
        MC_TCP_BIND_ADDRESS="127.0.0.1",
        MC_FORCE_TCP="1",
        MC_TRANSFER_TIMEOUT="5",
        MC_TCP_STATUS_TIMEOUT_SEC="5",
        MC_TCP_PROGRESS_TIMEOUT_SEC="5",
        MC_HANDSHAKE_CONNECT_TIMEOUT="3",
        PYTHONDONTWRITEBYTECODE="1",
    )
    variables.update(extra)
    return variables


def port_range(first, last):
    """Variables that make Mooncake choose its ports from a range; releases differ in spelling."""
    return {
        "MC_MIN_PRC_PORT": str(first),
        "MC_MAX_PRC_PORT": str(last),
        "MC_MIN_RPC_PORT": str(first),
        "MC_MAX_RPC_PORT": str(last),
    }


class PortBlock:
    """Ports outside of the ephemeral range that no other test process takes from while this one
    lives: between a look whether a port is free and its use by a server, another may take it."""

    SIZE = 200

    def __init__(self):
        self.lock = threading.Lock()
        self.next = 0
        for self.first in random.sample(range(20000, 30000, self.SIZE), 10000 // self.SIZE):
            # An abstract name belongs to the network namespace, as ports do, and ends with us.
            self.claim = socket.socket(socket.AF_UNIX)
            try:
                self.claim.bind(f"\0mooncake-test-ports-{self.first}")
                return
            except OSError:
                self.claim.close()
        raise RuntimeError("every block of ports is taken")

    def take(self, count):
        """The first of count neighboring ports; what was given last comes again last."""
        with self.lock:
            for _ in range(self.SIZE):
                if self.next + count > self.SIZE:
                    self.next = 0
                first = self.first + self.next
                if all(is_free(port) for port in range(first, first + count)):
                    self.next += count
                    return first
                self.next += 1
        raise RuntimeError("no free ports found")


def is_free(port):
    with socket.socket() as one:
        try:
            one.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


@functools.cache
def port_block():
    return PortBlock()


def free_ports(count):
    """The first of count neighboring ports that are free now and that no other test takes."""
    return port_block().take(count)


def end_process(process, seconds=10):
    """Ends one process by its pid, first with SIGTERM."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(seconds)


def written(file):
    """What a process has written; does not move the offset, which the process shares."""
    length = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), length, 0).decode(errors="replace")


class PeerError(AssertionError):
    """A peer did not do what it was asked; the text includes its log."""


class PeerProcess:
    """One engine in its own process, controlled by JSON lines (see peer_commands.py)."""

    def __init__(self, label, command, variables=None):
        self.label = label
        self.log = tempfile.TemporaryFile(prefix="peer-")
        weakref.finalize(self, self.log.close)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=variables if variables is not None else dict(os.environ),
            cwd=str(HERE),
        )
        self.pending = b""
        try:
            hello = self.receive(ANSWER_SECONDS)
        except BaseException:
            self.kill()
            raise
        self.segment = hello["segment"]
        self.address = hello["address"]
        self.length = hello["length"]

    @property
    def pid(self):
        return self.process.pid

    def log_tail(self, lines=12):
        text = written(self.log).splitlines()
        return f"--- last log lines of {self.label}:\n" + "\n".join(text[-lines:])

    def fail(self, reason):
        state = self.process.poll()
        ended = "" if state is None else f" (ended with {state})"
        raise PeerError(f"{self.label}{ended}: {reason}\n{self.log_tail()}")

    def receive(self, seconds):
        end = time.monotonic() + seconds
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.pending:
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.fail(f"no answer within {seconds} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    pass
                self.fail("closed its output")
            self.pending += chunk
        line, self.pending = self.pending.split(b"\n", 1)
        return json.loads(line)

    def send(self, what, /, **arguments):
        """Sends a command without waiting for the answer, which receive() returns later."""
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail("no longer listens")

    def ask(self, what, /, **arguments):
        self.send(what, **arguments)
        answer = self.receive(ANSWER_SECONDS)
        if not answer.pop("ok"):
            self.fail(answer["error"])
        return answer

    def alive(self):
        return self.process.poll() is None

    def kill(self):
        """Kills it; returns when it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.close()

    def stop(self):
        """Freezes it: its ports stay open, but it does not answer."""
        self.process.send_signal(signal.SIGSTOP)
        if not wait_until(self.is_stopped, 10, pause=0.005):
            self.fail("did not stop")

    def is_stopped(self):
        """Whether every thread has stopped, which takes a while on a busy machine."""
        for status in pathlib.Path(f"/proc/{self.pid}/task").glob("*/stat"):
            # The command name before the state may contain anything but ends with the last ")".
            if status.read_text().rpartition(")")[2].split()[0] not in "Tt":
                return False
        return True

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def quit(self):
        """Ends it properly; any exit code but 0 is a failure."""
        try:
            if self.process.poll() is None:
                self.send("quit")
                self.receive(20)
            code = self.process.wait(20)
            if code != 0:
                self.fail("did not end in order")
        finally:
            end_process(self.process)
            self.close()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()


class Program:
    """A program that runs in the background, with its output in a file."""

    def __init__(self, command, variables=None):
        self.output = tempfile.TemporaryFile(prefix="program-")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=variables,
        )

    def text(self):
        return written(self.output)

    def find(self, pattern, seconds=20):
        """The first match in its output; fails if none comes."""
        found = wait_until(
            lambda: re.search(pattern, self.text()) or self.process.poll() is not None, seconds
        )
        if not isinstance(found, re.Match):
            found = re.search(pattern, self.text())
        if not found:
            raise AssertionError(f"'{pattern}' did not appear:\n{self.text()}")
        return found

    def end(self):
        end_process(self.process)
        self.process.stdin.close()
        self.output.close()


def start_stock(version, **variables):
    python = stock_environment(version) / "bin" / "python"
    return PeerProcess(
        f"Mooncake {version}",
        [str(python), str(HERE / "stock_peer.py")],
        stock_variables(**variables),
    )


def start_ours(api, **variables):
    """The engine under test, through one of its interfaces."""
    if api == "stock":
        return start_stock(SELF_CHECK_RELEASE, **variables)
    return PeerProcess(
        f"libmooncake ({api})",
        [sys.executable, "-B", str(HERE / f"{api}_peer.py"), library()],
        dict(os.environ, **variables),
    )


class PairTest(unittest.TestCase):
    """Tests of one release of Mooncake against one interface of the library; both stay up."""

    version = None
    api = None

    @classmethod
    def setUpClass(cls):
        cls.stock = start_stock(cls.version)
        cls.addClassCleanup(lambda: cls.stock.quit())
        cls.ours = start_ours(cls.api)
        cls.addClassCleanup(lambda: cls.ours.quit())

    def needs_ours(self):
        if SELF_CHECK:
            self.skipTest("self-check: Mooncake does not promise this")

    def succeed(self, actor, what, /, **arguments):
        answer = actor.ask(what, **arguments)
        if answer["code"] != 0:
            self.fail(f"{what} gave {answer}\n{self.stock.log_tail()}\n{self.ours.log_tail()}")
        return answer


def all_pairs():
    return [(version, api) for version in releases() for api in APIS]


def for_each_pair(namespace, mixin, pairs=None):
    """Defines a mixin's tests for each release and interface; it is not a TestCase itself."""
    for version, api in all_pairs() if pairs is None else pairs:
        suffix = f"{version.replace('.', '_')}_{api}"
        name = f"{mixin.__name__}_{suffix}"
        namespace[name] = type(
            name,
            (mixin, PairTest),
            {"version": version, "api": api, "__module__": namespace["__name__"]},
        )


def wait_until(condition, seconds, pause=0.02):
    """Polls until condition() is true; returns its value, false when the time is up."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(pause)
