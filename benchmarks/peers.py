"""Other engines: the Mooncake wheel, UCX and NIXL."""

import pathlib
import re
import sys
import time

from contenders import (
    BYTES,
    Program,
    children_seconds,
    clean_environment,
    leashed,
    processor_seconds,
    resume,
    stop,
    wait_for_port,
)
from scratch import PROJECT, Unavailable, debian_program, debian_version, run, wheel_version

import lab

INTEROP = PROJECT / "Tests" / "interop"


class Pair:
    """Two processes with an engine from Python. They are stopped while they are not measured, since
    some poll without end, and restarted after a failure."""

    def __init__(self, label, command, variables, meet=False):
        self.label, self.command, self.variables, self.meet = label, command, variables, meet
        self.both = []

    def start(self):
        variables = clean_environment(PYTHONPATH=str(INTEROP), **self.variables)
        try:
            for name in ("initiator", "target"):
                command = leashed([*self.command, *([name] if self.meet else [])])
                self.both.append(lab.PeerProcess(self.label, command, variables))
            initiator, target = self.both
            if self.meet:
                initiator.ask("meet", metadata=target.segment)
                target.ask("meet", metadata=initiator.segment)
        except lab.PeerError as error:
            self.close()
            raise Unavailable(str(error)) from None

    def use(self, action):
        """Runs action(initiator, target) with both running."""
        if not self.both:
            self.start()
        try:
            for peer in self.both:
                resume(peer.process)
            result = action(*self.both)
            for peer in self.both:
                stop(peer.process)
            return result
        except lab.PeerError as error:
            self.close()
            raise Unavailable(str(error)) from None

    def measure(self, seconds, operation, block, batch):
        words = {"operation": operation, "length": block, "count": batch}

        def action(initiator, target):
            before = sum(processor_seconds(peer.pid) for peer in self.both)
            to = {} if self.meet else {"peer": target.segment}
            answer = initiator.ask(
                "measure", remote=target.address, seconds=seconds, **to, **words
            )
            used = sum(processor_seconds(peer.pid) for peer in self.both) - before
            answer["cpu_seconds_per_gb"] = used / answer.pop("bytes") * 1e9
            return answer

        return self.use(action)

    def idle(self, seconds):
        """Percent of a core used by the busier end while nothing happens."""

        def action(initiator, target):
            time.sleep(0.2)
            before = [processor_seconds(peer.pid) for peer in self.both]
            time.sleep(seconds)
            after = [processor_seconds(peer.pid) for peer in self.both]
            used = [100 * (b - a) / seconds for a, b in zip(before, after)]
            return {"percent": max(used)}

        return self.use(action)

    def close(self):
        for peer in self.both:
            peer.kill()
        self.both = []


class Stock:
    """Mooncake with its defaults: its own program, and its Python interface on touched memory."""

    def __init__(self, version):
        self.version = version
        environment = lab.stock_environment(version)
        self.program = lab.stock_bench(version)
        self.variables = {"MC_TCP_BIND_ADDRESS": "127.0.0.1"}
        command = [environment / "bin" / "python", "-B", INTEROP / "stock_peer.py"]
        settings = dict(self.variables, MOONCAKE_PEER_BYTES=str(BYTES))
        self.python = Pair("stock", command, settings)
        self.tuned = Pair("stock", command, dict(settings, MC_TCP_SLICE_SIZE=str(1 << 20)))
        self.target = None

    def common(self, mode):
        return [
            *(self.program, f"--mode={mode}", "--protocol=tcp"),
            *("--metadata_server=P2PHANDSHAKE", "--local_server_name=127.0.0.1:12345"),
            f"--buffer_size={BYTES}",
        ]

    def start(self):
        self.target = Program(self.common("target"), clean_environment(**self.variables))
        pattern = r"P2P handshake, listening on (127\.0\.0\.1:\d+)"
        self.segment = self.target.find(pattern).group(1)
        time.sleep(2)  # it registers its buffer after the port is known

    def measure(self, seconds, operation, block, batch):
        if self.target is None or not self.target.alive():
            self.start()
        pid = self.target.process.pid
        before = processor_seconds(pid) + children_seconds()
        text = run(
            leashed([
                *self.common("initiator"), f"--segment_id={self.segment}", "--threads=1",
                f"--operation={operation}", f"--block_size={block}", f"--batch_size={batch}",
                f"--duration={max(1, round(seconds))}", "--report_unit=MB",
            ]),
            seconds + 60,
            env=clean_environment(**self.variables),
        )  # fmt: skip
        used = processor_seconds(pid) + children_seconds() - before
        found = re.search(r"duration ([\d.]+), batch count (\d+), throughput ([\d.]+) MB/s", text)
        if not found:
            raise Unavailable(f"transfer_engine_bench printed no result: {text[-300:]}")
        batches = int(found.group(2))
        return {
            "bytes_per_second": float(found.group(3)) * 1e6,
            "operations_per_second": batches * batch / float(found.group(1)),
            "cpu_seconds_per_gb": used / (batches * batch * block) * 1e9,
        }

    def close(self):
        self.python.close()
        self.tuned.close()
        if self.target:
            self.target.end()


class UCX:
    """ucx_perftest: one buffer repeatedly, with as many operations in flight as in a batch."""

    TESTS = {"read": "ucp_get", "write": "ucp_put_bw"}

    def __init__(self, program, variables, version):
        self.program, self.variables, self.version = program, variables, version
        self.microseconds = {}  # of one operation, by the last measurement

    @classmethod
    def of_debian(cls):
        return cls(debian_program("ucx_perftest"), {}, debian_version("ucx_perftest"))

    @classmethod
    def of_wheel(cls, python):
        folder = next(python.parent.parent.glob("lib/python3*/site-packages/libucx"))
        # Otherwise the loader takes the system's libucp.
        paths = {"LD_LIBRARY_PATH": f"{folder}/lib", "UCX_MODULE_DIR": f"{folder}/lib/ucx"}
        version = wheel_version(python, "libucx-cu12")
        return cls(folder / "bin" / "ucx_perftest", paths, version)

    def measure(self, seconds, operation, block, batch, protocol="tcp", rank=50):
        key = (operation, block, batch, protocol)
        guess = (20 if protocol == "tcp" else 2) + block / 1500
        for _ in range(3):
            count = max(8, int(seconds * 1e6 / self.microseconds.get(key, guess)))
            values, each = self.run(*key, count, rank)
            self.microseconds[key] = each
            if count * each > seconds * 5e5:  # otherwise the guess was too low
                break
        return values

    def run(self, operation, block, batch, protocol, count, rank):
        transports = {"tcp": "tcp,self", "shm": "posix,cma,self"}[protocol]
        variables = clean_environment(
            UCX_TLS=transports, UCX_NET_DEVICES="lo", UCX_WARN_UNUSED_ENV_VARS="n",
            **self.variables,
        )  # fmt: skip
        port = lab.free_ports(1)
        warmup = min(count, max(2, count // 20))
        before = children_seconds()
        server = Program([self.program, "-p", port], variables)
        try:
            wait_for_port(port)
            text = run(
                leashed([
                    *(self.program, "127.0.0.1", "-p", port, "-t", self.TESTS[operation]),
                    *("-s", block, "-n", count, "-w", warmup, "-O", batch, "-R", rank),
                    *("-f", "-v"),
                ]),
                60,
                env=variables,
            )  # fmt: skip
            server.process.wait(10)
        finally:
            server.end()
        used = children_seconds() - before
        rows = [line.split(",") for line in text.strip().split("\n")]
        found = [row for row in rows if len(row) == 8 and row[0].strip() == str(count)]
        if not found:
            raise Unavailable(f"ucx_perftest printed no result: {text[-300:]}")
        percentile, each, rate = (float(found[-1][column]) for column in (1, 3, 7))
        values = {
            "bytes_per_second": 1e6 / each * block,
            "operations_per_second": 1e6 / each,
            "cpu_seconds_per_gb": used / ((count + warmup) * block) * 1e9,
            f"p{rank}_us": percentile,
        }
        return values, each

    def latency(self, seconds, block, protocol="tcp"):
        """Its tests report one percentile a run."""
        median = self.measure(seconds / 2, "read", block, 1, protocol, 50)
        tail = self.measure(seconds / 2, "read", block, 1, protocol, 99)
        return dict(median, p99_us=tail["p99_us"])

    def close(self):
        pass


class NIXL:
    """Post and poll from Python, over TCP only and as its UCX chooses by itself."""

    def __init__(self, python):
        self.version = wheel_version(python, "nixl-cu12")
        command = [python, pathlib.Path(__file__).parent / "nixl_peer.py"]
        settings = {"NIXL_PEER_BYTES": str(BYTES), "NIXL_LOG_LEVEL": "WARN"}
        tcp = dict(settings, UCX_TLS="tcp,self", UCX_NET_DEVICES="lo")
        self.pairs = {
            "tcp": Pair("NIXL", command, tcp, meet=True),
            "shm": Pair("NIXL", command, settings, meet=True),
        }

    def measure(self, seconds, operation, block, batch, protocol="tcp"):
        return self.pairs[protocol].measure(seconds, operation, block, batch)

    def idle(self, seconds):
        return self.pairs["tcp"].idle(seconds)

    def close(self):
        for pair in self.pairs.values():
            pair.close()


def our_python(library):
    """The library in the same Python loop as the Mooncake wheel, over TCP."""
    command = [sys.executable, "-B", INTEROP / "native_peer.py", library]
    settings = {"MOONCAKE_PEER_BYTES": str(BYTES), "MC_FORCE_TCP": "1"}
    return Pair("libmooncake", command, settings)
