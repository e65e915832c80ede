"""A network for tests: a bridge, and nodes behind rate-limited links.

The process that makes it must be in its own network namespace (scripts/test-store and
benchmarks/store-lab see to that), where the bridge is. Each node is another namespace, joined by a
veth pair with HTB in both directions. The namespaces end with the processes that hold them, so
nothing is left behind whatever happens. netem is not needed, because few kernels of virtual
machines have it.
"""

import os
import subprocess
import threading
import time

BRIDGE = "lab0"
OWN_ADDRESS = "10.98.0.254"


def is_private():
    """Whether this process may configure its network."""
    return os.environ.get("MOONCAKE_STORE_LAB") == "1"


def run(*words):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=20)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout}")
    return done.stdout


class Node:
    """A namespace with one link."""

    def __init__(self, index):
        self.port = f"port{index}"
        self.address = f"10.98.0.{index + 1}"
        # Ends with its input, so with this process at the latest.
        self.keeper = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)
        self.keeper.stdout.readline()
        run("ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns",
            str(self.keeper.pid))
        run("ip", "link", "set", self.port, "master", BRIDGE, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def command(self, words):
        """The same command inside the node, which keeps the process id of its start."""
        return ["nsenter", f"--net=/proc/{self.keeper.pid}/ns/net", *words]

    def run(self, *words):
        return run(*self.command(words))

    def limit(self, megabits):
        """Bits a second of the link, each way; like a switch, it buffers 50 ms."""
        queue = max(64_000, int(megabits * 1e6 / 8 * 0.05))
        for prefix, device in (((), self.port), (self.command(()), "eth0")):
            # HTB itself cannot be changed, and there may be none yet.
            subprocess.run([*prefix, "tc", "qdisc", "del", "dev", device, "root"],
                           stderr=subprocess.DEVNULL, check=False)
            run(*prefix, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "htb",
                "default", "1")
            run(*prefix, "tc", "class", "replace", "dev", device, "parent", "1:", "classid",
                "1:1", "htb", "rate", f"{megabits}mbit", "burst", "64k", "cburst", "64k",
                "quantum", "60000")
            run(*prefix, "tc", "qdisc", "replace", "dev", device, "parent", "1:1", "bfifo",
                "limit", str(queue))

    def plug(self, is_plugged):
        """Connects or cuts the link without notice to either end."""
        # The inner end stays up, like a cut in the middle of the network.
        words = ("master", BRIDGE) if is_plugged else ("nomaster",)
        run("ip", "link", "set", self.port, *words)

    def narrow(self, is_narrow):
        """Drops packets of more than 1,000 bytes on its link, without notice to either end."""
        # Segmentation offload would pass many packets as one piece.
        self.run("ip", "link", "set", "dev", "eth0", "gso_max_segs", "1" if is_narrow else "65535")
        run("ip", "link", "set", self.port, "mtu", "1000" if is_narrow else "1500")

    def counters(self):
        """Bytes (received, sent) by the node, with headers."""
        with open("/proc/self/net/dev", encoding="ascii") as table:
            for line in table:
                name, _, rest = line.partition(":")
                if name.strip() == self.port:
                    fields = rest.split()
                    return int(fields[8]), int(fields[0])
        raise RuntimeError(f"no {self.port}")

    def end(self):
        # The kernel ends what is in a namespace later, but the name must be free now.
        run("ip", "link", "del", self.port)
        self.keeper.stdin.close()
        self.keeper.wait(10)
        self.keeper.stdout.close()


class Network:
    """Nodes with equal links; the process that made it is at OWN_ADDRESS, unlimited."""

    def __init__(self, count, megabits):
        if not is_private():
            raise RuntimeError("not in a network namespace of its own")
        run("ip", "link", "set", "lo", "up")
        subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL, check=False)
        # No learning delay: ports forward at once.
        run("ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        run("ip", "addr", "add", f"{OWN_ADDRESS}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        self.nodes = [Node(index) for index in range(count)]
        for node in self.nodes:
            node.limit(megabits)

    def end(self):
        for node in self.nodes:
            node.end()
        run("ip", "link", "del", BRIDGE)


class FlowMeter:
    """Samples how many bytes a node receives, 100 times a second."""

    INTERVAL = 0.01

    def __init__(self, node):
        self.node = node
        self.samples = []
        self.is_ended = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def sample(self):
        while not self.is_ended.is_set():
            self.samples.append((time.monotonic(), self.node.counters()[0]))
            time.sleep(self.INTERVAL)

    def end(self):
        self.is_ended.set()
        self.thread.join(5)

    def received(self):
        return self.samples[-1][1] - self.samples[0][1] if self.samples else 0

    def longest_silence(self, begin, end, bytes_per_second):
        """Length in seconds of the longest stretch below a tenth of the rate."""
        points = [(at, count) for at, count in self.samples if begin <= at <= end]
        longest = since = 0.0
        if points:
            since = points[0][0]
        for (before, low), (after, high) in zip(points, points[1:]):
            if high - low > 0.1 * bytes_per_second * (after - before):
                since = after
            longest = max(longest, after - since)
        return longest
