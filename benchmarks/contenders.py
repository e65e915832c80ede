"""The library and the physical bounds. Every measure() returns quantities by name."""

import json
import os
import pathlib
import re
import resource
import signal
import sys

from scratch import PROJECT, Unavailable, bound, compiled, debian_program, debian_version, run

sys.path.insert(0, str(PROJECT / "Tests" / "interop"))

import lab  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
BYTES = 256 * MIB  # what transfers are spread over, on each side
TICKS = os.sysconf("SC_CLK_TCK")


def leashed(command):
    """The command, killed by the kernel when this process ends for whatever reason."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *(str(word) for word in command)]


def clean_environment(**more):
    """Without settings that would change the behavior of an engine or of UCX."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MC_", "UCX_", "MOONCAKE_", "NIXL_"))
    }
    return dict(kept, PYTHONDONTWRITEBYTECODE="1", **more)


def processor_seconds(pid):
    """Of all threads of a process, including ended ones; usually in ticks of 10 ms."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def children_seconds():
    """Processor time of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Program(lab.Program):
    """A program in the background that ends with this process."""

    def __init__(self, command, variables):
        super().__init__(leashed(command), variables)
        self.name = pathlib.Path(command[0]).name

    def find(self, pattern, seconds=60):
        try:
            return super().find(pattern, seconds)
        except AssertionError:
            self.end()
            raise Unavailable(f"{self.name} did not start") from None

    def alive(self):
        return self.process.poll() is None


class Ours:
    """`mooncake bench` on both ends."""

    def __init__(self, program):
        self.program = str(program)
        self.targets = {}

    def version(self):
        return run([self.program, "--version"], 20).strip()

    def target(self, *words):
        """The process and the segments of `bench target`, started on first use."""
        found = self.targets.get(words)
        if found and found[0].alive():
            return found
        program = Program(
            [self.program, "bench", "target", "--bind", "127.0.0.1", *words], clean_environment()
        )
        self.targets[words] = (program, [])
        count = int(words[words.index("--engines") + 1]) if "--engines" in words else 1
        lines = program.find(rf"(segment .*\n){{{count}}}").group(0)
        self.targets[words] = (program, re.findall(r"segment (\S+)", lines))
        return self.targets[words]

    def measure(self, seconds, operation, block, batch, protocol="tcp", pattern="sequential",
                ordinary=False):  # fmt: skip
        words = ["--buffer-size", str(BYTES), *(["--ordinary"] if ordinary else [])]
        return self.initiate(
            self.target(*words), seconds, protocol, "--operation", operation, "--block-size", block,
            "--batch-size", batch, "--access-pattern", pattern,
        )  # fmt: skip

    def initiate(self, target, seconds, protocol, *words):
        program, segments = target
        # The first pass through shared memory maps its pages. TCP needs no such warm-up, and
        # without it the target's processor time is only that of what is measured.
        warmup = "0" if protocol == "tcp" else "200ms"
        before = processor_seconds(program.process.pid)
        text = run(
            leashed([
                *(self.program, "bench", "initiator", "--segment", ",".join(segments)),
                *("--protocol", protocol, "--local-size", BYTES, "--warmup", warmup),
                *("--duration", f"{int(seconds * 1000)}ms", "--json", *words),
            ]),
            seconds + 40,
            env=clean_environment(),
        )  # fmt: skip
        result = json.loads(text.strip().split("\n")[-1])
        if result["errors"] != 0:
            raise Unavailable(result.get("first_error", "transfers failed"))
        used = processor_seconds(program.process.pid) - before
        values = {
            "bytes_per_second": result["bytes_per_second"],
            "operations_per_second": result["operations_per_second"],
            **{f"{name}_us": result["latency_us"][name] for name in ("p50", "p90", "p99", "p999")},
        }
        if protocol == "tcp":
            used += result["cpu_seconds"]
            values["cpu_seconds_per_gb"] = used / result["bytes"] * 1e9
        return values

    def peers(self, seconds, operation, count):
        """Blocks spread over many engines, all at once, with as much memory in total as one."""
        if "--engines" not in run([self.program, "bench", "target", "--help"], 20):
            raise Unavailable("this build's `bench target` has no --engines")
        target = self.target(
            # At least a huge page for each, as the single one has.
            *("--engines", str(count), "--buffer-size", str(2 * BYTES // count))
        )
        return self.initiate(
            target, seconds, "tcp", "--operation", operation, "--block-size", MIB,
            "--batch-size", BYTES // MIB,
        )  # fmt: skip

    def close(self):
        for program, _ in self.targets.values():
            program.end()


class DropIn:
    """Two programs on the drop-in header that poll: dropin_poll.c."""

    def __init__(self, library):
        folder = pathlib.Path(library).resolve().parent
        self.program = compiled(
            PROJECT / "benchmarks" / "dropin_poll.c", "-I", PROJECT / "include", "-L", folder,
            "-lmooncake",
        )  # fmt: skip
        # Both are on one host, where an engine would not use TCP.
        self.variables = clean_environment(LD_LIBRARY_PATH=str(folder), MC_FORCE_TCP="1")
        self.target = None

    def measure(self, seconds, operation, block, batch, pause_us=0):
        if self.target is None or not self.target.alive():
            self.target = Program([self.program, "target", BYTES], self.variables)
        found = self.target.find(r"segment (\S+) address (\d+)")
        words = [*found.groups(), BYTES, operation, block, batch, seconds, pause_us]
        before = processor_seconds(self.target.process.pid)
        result = json.loads(
            run(leashed([self.program, "initiator", *words]), seconds + 40, env=self.variables)
        )
        used = processor_seconds(self.target.process.pid) - before + result.pop("cpu_seconds")
        return dict(result, cpu_seconds_per_gb=used / result.pop("bytes") * 1e9)

    def close(self):
        if self.target is not None:
            self.target.end()


class Sockets:
    """Two processes and plain sockets: bounds/tcp_bound.c."""

    def __init__(self):
        self.program = bound("tcp_bound")

    def run(self, *words):
        return json.loads(run(leashed([self.program, *words]), 60))

    def bulk(self, seconds):
        return self.run("bulk", 2, 256 * KIB, 512 * KIB, BYTES, seconds)

    def gathered(self, seconds, block, batch):
        return self.run("gathered", block, batch, seconds)

    def pingpong(self, seconds, block):
        return self.run("pingpong", block, seconds)


class Memory:
    """Copies within this machine: bounds/memory_bound.c."""

    def __init__(self):
        self.program = bound("memory_bound")

    def copy(self, seconds, kind, block, threads=1, total=BYTES):
        words = ["copy", kind, block, total, threads, seconds]
        return json.loads(run(leashed([self.program, *words]), 60))

    def pingpong(self, seconds):
        return json.loads(run(leashed([self.program, "pingpong", seconds]), 60))


class Iperf:
    def __init__(self):
        self.program, self.version = debian_program("iperf3"), debian_version("iperf3")

    def measure(self, seconds, streams):
        port = lab.free_ports(1)
        common = [self.program, "-p", port]
        server = Program([*common, "-s", "-1", "-B", "127.0.0.1"], clean_environment())
        try:
            wait_for_port(port)
            before = children_seconds()
            words = ["-c", "127.0.0.1", "-P", streams, "-l", "256K", "-J"]
            # It only takes whole seconds.
            text = run(leashed([*common, *words, "-t", max(1, round(seconds))]), 60)
            server.process.wait(10)
            sums = json.loads(text)["end"]["sum_received"]
            used = children_seconds() - before
            return {
                "bytes_per_second": sums["bits_per_second"] / 8,
                "cpu_seconds_per_gb": used / sums["bytes"] * 1e9,
            }
        finally:
            server.end()


def wait_for_port(port, seconds=10):
    """Waits until a process listens on a TCP port, without connecting, which would disturb it."""
    wanted = f":{port:04X}"

    def listening():
        for name in ("tcp", "tcp6"):
            with open(f"/proc/net/{name}", encoding="utf-8") as file:
                for line in file.read().split("\n")[1:-1]:
                    fields = line.split()
                    if fields[1].endswith(wanted) and fields[3] == "0A":
                        return True
        return False

    if not lab.wait_until(listening, seconds):
        raise Unavailable(f"nothing listened on port {port} within {seconds} s")


def stop(process):
    process.send_signal(signal.SIGSTOP)


def resume(process):
    process.send_signal(signal.SIGCONT)
