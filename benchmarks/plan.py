"""The contenders, and what is measured of them."""

import dataclasses
import json
import sys

import contenders
import peers
from contenders import BYTES, KIB, MIB, clean_environment, leashed
from scratch import PROJECT, Unavailable, commit, run, say, wheels

# Every contender's key, and its name in tables.
NAMES = {
    "ours": "libmooncake",
    "ours fixed": "libmooncake, one address",
    "ours python": "libmooncake, Python",
    "ours kernel": "libmooncake, kernel copy",
    "ours ordinary": "libmooncake, waiting",
    "ours polled": "libmooncake, drop-in header, polling",
    "ours paused": "libmooncake, drop-in header, 100 µs between polls",
    "raw": "plain sockets",
    "raw bulk": "plain sockets, bulk",
    "iperf3": "iperf3, 2 streams",
    "stock": "Mooncake, its program",
    "stock python": "Mooncake, Python",
    "stock tuned": "Mooncake, Python, tuned",
    "ucx 1.22": "UCX 1.22",
    "ucx 1.13": "UCX 1.13",
    "nixl": "NIXL",
    "memcpy": "memcpy",
    "stream": "non-temporal copy",
    "stream 2": "non-temporal copy, 2 threads",
    "readv": "process_vm_readv",
    "readv 2": "process_vm_readv, 2 threads",
    "mapped memcpy": "memcpy, mapped",
    "mapped stream": "non-temporal copy, mapped",
    "pingpong": "round trip of a word",
    "waiting": "libmooncake, waiting for a stopped peer",
    "one": "1 peer",
    "many": "256 peers",
}


@dataclasses.dataclass
class Row:
    """One kind of work; its contenders run in turn."""

    section: str
    title: str
    goal: str = ""  # see goals.py
    operation: str = ""
    block: int = 0
    entries: dict = dataclasses.field(default_factory=dict)

    def add(self, label, contender, action):
        """action(contender, seconds); left out where the contender is."""
        if contender is not None:
            self.entries[label] = lambda seconds: action(contender, seconds)


# Sections of the report: title, quantity, scale, unit, digits.
RATE = ("bytes_per_second", 1e-9, "GB/s", 2)
SECTIONS = {
    "bulk": ("TCP, bulk", RATE),
    "small": ("TCP, batches of small blocks", RATE),
    "polled": ("TCP, drop-in header and a loop of polls, ordinary memory", RATE),
    "latency": ("TCP, one 4 KiB read at a time", ("p50_us", 1, "µs", 1)),
    "engine": ("Same host, engine-owned memory", RATE),
    "ordinary": ("Same host, ordinary memory", RATE),
    "each": (
        "Same host, one 4 KiB read at a time",
        ("operations_per_second", 1e-3, "thousand a second", 0),
    ),
    "peers": ("TCP, 256 blocks of 1 MiB at once, spread over peers", RATE),
    "idle": ("Percent of a core while nothing happens", ("percent", 1, "%", 3)),
    "memory": ("What memory allows", RATE),
}


def size_name(size):
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


class Lab:
    """The contenders; `missing` says why some are None."""

    def __init__(self, program, library, stock_version):
        self.library, self.program = library, program
        self.missing = {}
        self.ours = contenders.Ours(program)
        self.ours_python = peers.our_python(library)
        self.dropin = self.attempt("the drop-in header", lambda: contenders.DropIn(library))
        self.sockets = self.attempt("plain sockets", contenders.Sockets)
        self.memory = self.attempt("copies in memory", contenders.Memory)
        self.stock = self.attempt("Mooncake", lambda: peers.Stock(stock_version))
        self.iperf = self.attempt("iperf3", contenders.Iperf)
        self.ucx13 = self.attempt("UCX 1.13", peers.UCX.of_debian)
        self.ucx22 = self.attempt("UCX 1.22", lambda: peers.UCX.of_wheel(wheels()))
        self.nixl = self.attempt("NIXL", lambda: peers.NIXL(wheels()))

    def attempt(self, name, make):
        try:
            return make()
        except (Unavailable, RuntimeError) as error:
            self.missing[name] = str(error)
            say(f"{name} cannot run: {error}")
            return None

    def idle(self, seconds, what):
        script = PROJECT / "benchmarks" / "idle.py"
        words = [sys.executable, "-B", script, self.program, self.library, seconds, what]
        return json.loads(run(leashed(words), 60, env=clean_environment()))

    def versions(self):
        found = {"libmooncake": f"{self.ours.version()}, commit {commit()}"}
        for name, each in (
            ("Mooncake", self.stock), ("UCX", self.ucx22), ("UCX of Debian", self.ucx13),
            ("NIXL", self.nixl), ("iperf3", self.iperf),
        ):  # fmt: skip
            if each is not None:
                found[name] = each.version
        return found

    def close(self):
        for each in (self.ours, self.ours_python, self.dropin, self.stock, self.nixl):
            if each is not None:
                each.close()


class Plan:
    """The rows of a run."""

    def __init__(self, lab, quick):
        self.lab, self.quick = lab, quick
        self.rows = []
        operations = ("read", "write")
        for block, batch in ((MIB, 16), (16 * MIB, 1)) if quick else (
            (MIB, 1), (MIB, 16), (4 * MIB, 4), (16 * MIB, 1), (64 * MIB, 1)
        ):  # fmt: skip
            for operation in operations:
                self.bulk(operation, block, batch)
        for block, batch in ((4 * KIB, 128), (64 * KIB, 128)) if quick else (
            (4 * KIB, 128), (16 * KIB, 128), (64 * KIB, 128), (256 * KIB, 64)
        ):  # fmt: skip
            for operation in operations:
                self.small(operation, block, batch)
        for block, batch in ((16 * MIB, 1),) if quick else (
            (16 * MIB, 1), (MIB, 1), (4 * KIB, 128)
        ):  # fmt: skip
            for operation in operations:
                self.polled(operation, block, batch)
        self.latency()
        for block in (MIB, 16 * MIB) if quick else (MIB, 16 * MIB, 64 * MIB):
            for operation in ("read",) if quick else operations:
                self.engine_owned(operation, block)
                self.ordinary(operation, block)
        self.each()
        for operation in operations:
            self.peers(operation)
        self.idle()
        if not quick:
            for block in (4 * KIB, MIB, 64 * MIB):
                self.bounds(block)

    def row(self, section, title, goal="", operation="", block=0):
        row = Row(section, title, goal, operation, block)
        self.rows.append(row)
        return row

    def bulk(self, operation, block, batch):
        title = f"{operation}, {size_name(block)} x {batch}"
        row = self.row("bulk", title, "bulk", operation, block)
        lab, work = self.lab, (operation, block, batch)
        row.add("raw", lab.sockets, lambda c, s: c.bulk(s))
        row.add("ours", lab.ours, lambda c, s: c.measure(s, *work))
        row.add("ours fixed", lab.ours, lambda c, s: c.measure(s, *work, pattern="fixed"))
        row.add("ucx 1.22", lab.ucx22, lambda c, s: c.measure(s, *work))
        row.add("stock tuned", lab.stock, lambda c, s: c.tuned.measure(s, *work))
        if self.quick:
            return
        if block != 4 * MIB:
            row.add("stock python", lab.stock, lambda c, s: c.python.measure(s, *work))
        if (block, batch) in ((MIB, 16), (16 * MIB, 1)):
            row.add("stock", lab.stock, lambda c, s: c.measure(s, *work))
        if block == 16 * MIB:
            row.add("ucx 1.13", lab.ucx13, lambda c, s: c.measure(s, *work))
            row.add("nixl", lab.nixl, lambda c, s: c.measure(s, *work))
            if operation == "read":
                row.add("iperf3", lab.iperf, lambda c, s: c.measure(s, 2))

    def small(self, operation, block, batch):
        title = f"{operation}, {size_name(block)} x {batch}"
        row = self.row("small", title, size_name(block), operation, block)
        lab, work = self.lab, (operation, block, batch)
        row.add("raw", lab.sockets, lambda c, s: c.gathered(s, block, batch))
        if block == 64 * KIB:
            row.add("raw bulk", lab.sockets, lambda c, s: c.bulk(s))
        row.add("ours", lab.ours, lambda c, s: c.measure(s, *work))
        row.add("ucx 1.22", lab.ucx22, lambda c, s: c.measure(s, *work))
        if not self.quick or block == 4 * KIB:
            row.add("stock", lab.stock, lambda c, s: c.measure(s, *work))
        if not self.quick and block in (4 * KIB, 64 * KIB):
            row.add("ucx 1.13", lab.ucx13, lambda c, s: c.measure(s, *work))
            row.add("nixl", lab.nixl, lambda c, s: c.measure(s, *work))

    def polled(self, operation, block, batch):
        title = f"{operation}, {size_name(block)} x {batch}"
        goal = "polled" if block == 16 * MIB else ""
        row = self.row("polled", title, goal, operation, block)
        lab, work = self.lab, (operation, block, batch)
        row.add("ours ordinary", lab.ours, lambda c, s: c.measure(s, *work, ordinary=True))
        row.add("ours polled", lab.dropin, lambda c, s: c.measure(s, *work))
        row.add("ours paused", lab.dropin, lambda c, s: c.measure(s, *work, pause_us=100))
        row.add("stock python", lab.stock, lambda c, s: c.python.measure(s, *work))

    def latency(self):
        row = self.row("latency", "read, 4 KiB", "latency", "read", 4 * KIB)
        lab, work = self.lab, ("read", 4 * KIB, 1)
        row.add("raw", lab.sockets, lambda c, s: c.pingpong(s, 4 * KIB))
        row.add("ours", lab.ours, lambda c, s: c.measure(s, *work))
        row.add("stock python", lab.stock, lambda c, s: c.python.measure(s, *work))
        row.add("ours python", lab.ours_python, lambda c, s: c.measure(s, *work))
        row.add("ucx 1.22", lab.ucx22, lambda c, s: c.latency(s, 4 * KIB))
        row.add("nixl", lab.nixl, lambda c, s: c.measure(s, *work))

    def engine_owned(self, operation, block):
        title = f"{operation}, {size_name(block)}"
        row = self.row("engine", title, "engine", operation, block)
        lab, work = self.lab, (operation, block, 1)
        # Up to 1 MiB the library copies with the caller's thread alone.
        threads = 1 if block <= MIB else 2
        label = "stream" if threads == 1 else "stream 2"
        row.add(label, lab.memory, lambda c, s: c.copy(s, "stream", block, threads))
        row.add("ours", lab.ours, lambda c, s: c.measure(s, *work, "shm"))
        row.add("ours fixed", lab.ours, lambda c, s: c.measure(s, *work, "shm", "fixed"))
        row.add("nixl", lab.nixl, lambda c, s: c.measure(s, *work, "shm"))
        row.add("ucx 1.22", lab.ucx22, lambda c, s: c.measure(s, *work, "shm"))
        if not self.quick:
            row.add("ucx 1.13", lab.ucx13, lambda c, s: c.measure(s, *work, "shm"))

    def ordinary(self, operation, block):
        title = f"{operation}, {size_name(block)}"
        row = self.row("ordinary", title, "ordinary", operation, block)
        lab, work = self.lab, (operation, block, 1)
        threads = 1 if block <= MIB else 2
        label = "readv" if threads == 1 else "readv 2"
        row.add(label, lab.memory, lambda c, s: c.copy(s, "readv", block, threads))
        row.add("ours kernel", lab.ours, lambda c, s: c.measure(s, *work, "shm", ordinary=True))

    def each(self):
        row = self.row("each", "read, 4 KiB", "each", "read", 4 * KIB)
        lab, work = self.lab, ("read", 4 * KIB, 1)
        row.add("ours", lab.ours, lambda c, s: c.measure(s, *work, "shm"))
        row.add("ours kernel", lab.ours, lambda c, s: c.measure(s, *work, "shm", ordinary=True))
        row.add("nixl", lab.nixl, lambda c, s: c.measure(s, *work, "shm"))
        if self.quick:
            return
        row.add("ours fixed", lab.ours, lambda c, s: c.measure(s, *work, "shm", "fixed"))
        row.add("ucx 1.22", lab.ucx22, lambda c, s: c.latency(s, 4 * KIB, "shm"))
        row.add("mapped memcpy", lab.memory, lambda c, s: c.copy(s, "mapped-memcpy", 4 * KIB))
        row.add("readv", lab.memory, lambda c, s: c.copy(s, "readv", 4 * KIB))
        row.add("pingpong", lab.memory, lambda c, s: c.pingpong(s))

    def peers(self, operation):
        row = self.row("peers", operation, "peers", operation)
        row.add("one", self.lab.ours, lambda c, s: c.peers(s, operation, 1))
        row.add("many", self.lab.ours, lambda c, s: c.peers(s, operation, 256))

    def idle(self):
        row = self.row("idle", "connections open", "idle")
        lab = self.lab
        row.add("ours", lab, lambda c, s: c.idle(3 * s, "idle"))
        row.add("waiting", lab, lambda c, s: c.idle(s, "waiting"))
        if not self.quick:
            row.add("stock python", lab.stock, lambda c, s: c.python.idle(s))
            row.add("nixl", lab.nixl, lambda c, s: c.idle(s))

    def bounds(self, block):
        row = self.row("memory", f"{size_name(block)}, cold")
        warm = self.row("memory", f"{size_name(block)}, in the caches")
        kinds = {
            "memcpy": ("memcpy", 1),
            "stream": ("stream", 1),
            "stream 2": ("stream", 2),
            "readv": ("readv", 1),
            "readv 2": ("readv", 2),
            "mapped memcpy": ("mapped-memcpy", 1),
            "mapped stream": ("mapped-stream", 1),
        }
        for label, (kind, threads) in kinds.items():
            row.add(label, self.lab.memory, copying(kind, block, threads, BYTES))
            if block <= MIB and threads == 1 and "stream" not in kind:
                warm.add(label, self.lab.memory, copying(kind, block, 1, block))
        if not warm.entries:
            self.rows.remove(warm)


def copying(kind, block, threads, total):
    return lambda c, s: c.copy(s / 2, kind, block, threads, total)
