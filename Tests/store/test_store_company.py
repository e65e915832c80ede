"""Gets with holders and receivers that fail without ending: they stay silent, send nothing, or are
so slow that everybody else might wait for them."""

import signal
import time
import unittest

import lab
import stores
from stores import FAILURE, MIB, NOT_FOUND

SIZE = 24 * MIB
SHARD = ("--shard-size", "1MiB")
SLOW_MEGABITS = 4


class CompanyTest(stores.NetworkTest):
    NODES = 9

    def setUp(self):
        super().setUp()
        self.source = self.file("model", SIZE)
        self.start_service()
        self.origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])

    def begin(self, node, part):
        process = self.get("m", node=node)
        self.wait_for_bytes(node, int(SIZE * part))
        return process

    def narrow(self, node):
        node.narrow(True)
        self.addCleanup(node.narrow, False)


class Narrow(CompanyTest):
    """Grants arrive, but shards do not."""

    def test_the_only_holder(self):
        process = self.begin(self.nodes[1], 0.3)
        self.narrow(self.nodes[0])
        begin = time.monotonic()
        process.finish((FAILURE, NOT_FOUND), 30)
        print(f"measured origin that sends nothing: get ended after "
              f"{time.monotonic() - begin:.1f} s", flush=True)
        self.assertIn("sends nothing", process.log())
        self.assertEqual(list(process.folder.rglob("*")), [])

    def test_one_of_two_holders(self):
        self.serve("m", node=self.nodes[1])
        process = self.begin(self.nodes[2], 0.2)
        self.narrow(self.nodes[1])
        process.finish(seconds=20)
        self.check_bytes(process, self.source)


class Silent(CompanyTest):
    def test_stopped_holders(self):
        replicas = [self.serve("m", node=node) for node in self.nodes[1:5]]
        for replica in replicas:
            replica.signal(signal.SIGSTOP)
        # Their records stay as long as their leases.
        process = self.get("m", node=self.nodes[5])
        result = process.finish()
        self.check_bytes(process, self.source)
        print(f"measured four silent holders of five: {result['seconds']:.2f} s in all",
              flush=True)
        for replica in replicas:
            replica.kill()
        # Alone 1.1 s; waiting for a silent one takes two seconds each.
        self.assertLess(result["seconds"], 2.5, process.describe())


class SlowFirst(CompanyTest):
    def fetch(self, nodes):
        """Seconds until all of these have it. Their processes end later, because slow ones may
        still be reading from them."""
        gets = [self.get("m", node=node) for node in nodes]
        seconds = [process.finish(seconds=60)["seconds"] for process in gets]
        for process in gets:
            self.check_bytes(process, self.source)
        return max(seconds)

    def test_fast_receivers_behind_slow_ones(self):
        slow, fast = self.nodes[1:5], self.nodes[5:9]
        alone = self.fetch(fast)
        for node in slow:
            node.limit(SLOW_MEGABITS)
            self.addCleanup(node.limit, self.MEGABITS)
        before = [node.counters()[0] for node in slow]
        waiting = [self.get("m", node=node) for node in slow]
        for node in slow:
            self.wait_for_bytes(node, MIB // 4)
        behind = self.fetch(fast)
        print(f"measured four receivers behind four of {SLOW_MEGABITS} Mbit/s: {behind:.2f} s, "
              f"alone {alone:.2f} s", flush=True)
        self.assertLess(behind, 1.5 * alone + 0.5)
        after = [node.counters()[0] for node in slow]
        self.assertTrue(lab.wait_until(
            lambda: all(node.counters()[0] > count + MIB // 2
                        for node, count in zip(slow, after)), 15), "the slow ones starve")
        self.assertTrue(all(late > early for early, late in zip(before, after)))
        for process in waiting:
            process.kill()


if __name__ == "__main__":
    unittest.main()
