"""Runs `mooncake store ...` for the tests, in nodes of a network or on loopback."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import tempfile
import time
import unittest

import lab
import network
import services

MIB = 1 << 20
KINDS = (services.Etcd, services.Redis, services.Ours)
# Exit codes.
OK, FAILURE, NOT_FOUND, MISMATCH, INTERRUPTED = 0, 1, 3, 4, 130
# Hidden while a get is in progress.
HIDDEN = ".mooncake-get-"


def clean_variables(extra):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    variables.update(MC_FORCE_TCP="1", MC_METADATA_TTL=str(services.TTL), MC_LOG_LEVEL="INFO")
    variables.update(extra or {})
    return variables


class StoreProcess:
    """One run of the program; its two outputs go to files."""

    def __init__(self, words, node=None, variables=None):
        self.words = words
        command = [services.cli(), "store", *words]
        self.output = tempfile.TemporaryFile(prefix="store-")
        self.errors = tempfile.TemporaryFile(prefix="store-")
        self.process = subprocess.Popen(
            node.command(command) if node else command, stdin=subprocess.DEVNULL,
            stdout=self.output, stderr=self.errors, env=clean_variables(variables))

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        return lab.written(self.errors)

    def lines(self):
        """The complete JSON objects so far."""
        text = lab.written(self.output)
        return [json.loads(line) for line in text.splitlines(keepends=True)
                if line.endswith("\n") and line.startswith("{")]

    def describe(self):
        state = self.process.poll()
        return (f"store {' '.join(self.words)}: " + ("running" if state is None else f"{state}")
                + f"\n{lab.written(self.output)[-1500:]}\n{self.log()[-2500:]}")

    def wait_for(self, condition, seconds):
        """Waits until condition(self) is true; fails if it ends first or the time is up."""
        def is_over():
            return condition(self) or self.process.poll() is not None
        lab.wait_until(is_over, seconds, pause=0.005)
        if not condition(self):
            raise AssertionError(self.describe())

    def line(self, seconds=30):
        """The first JSON line."""
        self.wait_for(lambda each: each.lines(), seconds)
        return self.lines()[0]

    def finish(self, code=OK, seconds=40):
        """Waits for its end; returns the last JSON line, or None."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {seconds} s: {self.describe()}") from None
        allowed = code if isinstance(code, tuple) else (code,)
        if self.process.returncode not in allowed:
            raise AssertionError(f"exit code is not {allowed}: {self.describe()}")
        lines = self.lines()
        return lines[-1] if lines else None

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def end(self):
        lab.end_process(self.process)
        self.output.close()
        self.errors.close()


def content(seed, length):
    return random.Random(seed).randbytes(length)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digests(folder):
    """Digest by relative path of every file below, including hidden ones."""
    folder = pathlib.Path(folder)
    return {str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def remains(folder):
    """What an unfinished get has left."""
    return [str(path) for path in pathlib.Path(folder).rglob(HIDDEN + "*")]


def bytes_from(result, is_origin):
    return sum(each["bytes"] for each in result["sources"] if each["origin"] == is_origin)


class StoreTest(unittest.TestCase):
    """Ends what it starts; fails if anything is left in the service or in a folder."""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="store-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.service = None
        self.processes = []

    def start_service(self, kind=services.Etcd, **arguments):
        self.service = kind(**arguments)
        self.addCleanup(self.service.end)
        return self.service

    def start(self, *words, node=None, variables=None, uri=None):
        words = [*words, "--metadata", uri or self.service.uri, "--json"]
        if node:
            words += ["--bind", node.address]
        process = StoreProcess(words, node, variables)
        self.processes.append(process)
        self.addCleanup(process.end)
        return process

    def run_store(self, *words, code=OK, seconds=40, **arguments):
        process = self.start(*words, **arguments)
        process.finish(code, seconds)
        return process

    def file(self, name, length, seed=None):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(seed or name, length))
        return path

    def publish(self, name, *paths, words=(), **arguments):
        """A process that holds it, once it is published."""
        process = self.start("publish", *map(str, paths), "--name", name, *words, **arguments)
        process.published = process.line()
        return process

    def get(self, name, *words, to=None, **arguments):
        """Starts it; finish() gives the result."""
        folder = self.folder / (to or f"got-{len(self.processes)}")
        process = self.start("get", name, "--to", str(folder), *words, **arguments)
        process.folder = folder
        return process

    def serve(self, name, *words, **arguments):
        """A process that has all of it and stays."""
        process = self.start("serve", name, *words, **arguments)
        process.result = process.line()
        return process

    def check_bytes(self, process, *paths):
        """Checks that a get has written exactly these files, complete."""
        found = sorted(digests(process.folder).values())
        self.assertEqual(found, sorted(sha256(path) for path in paths), process.describe())
        self.assertEqual(remains(process.folder), [])

    def nothing_is_left(self):
        """Ends all holders; their records must go with them."""
        for process in self.processes:
            lab.end_process(process.process)
        self.assertEqual(self.keys(), [], "in the metadata service")

    def keys(self):
        """All keys except those that remember for a while that a name was removed."""
        return [key for key in services.keys(self.service.uri)
                if not key.startswith("mooncake/store/removed/")]


class NetworkTest(StoreTest):
    """On its own network."""

    NODES, MEGABITS = 5, 200

    @classmethod
    def setUpClass(cls):
        if not network.is_private():
            raise unittest.SkipTest("no network namespace of its own: needs root or user "
                                    "namespaces; scripts/test-store says why")
        cls.network = network.Network(cls.NODES, cls.MEGABITS)
        cls.addClassCleanup(cls.network.end)
        cls.nodes = cls.network.nodes
        cls.rate = cls.MEGABITS * 1e6 / 8

    def start_service(self, kind=services.Etcd, **arguments):
        return super().start_service(kind, host=network.OWN_ADDRESS, **arguments)

    def wait_for_bytes(self, node, count, seconds=20):
        """Waits until the node has received that many more bytes: the transfer is in progress."""
        before = node.counters()[0]
        self.assertTrue(
            lab.wait_until(lambda: node.counters()[0] - before >= count, seconds, pause=0.002),
            "too little arrives:\n" + "\n".join(each.describe() for each in self.processes))
        return time.monotonic()
