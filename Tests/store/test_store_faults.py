"""Holders, origins, links and services fail in the middle of a transfer.

Rate-limited links make the middle long enough to act in it. Lines printed as `measured ...` go to
the report of scripts/test-store.
"""

import signal
import time
import unittest

import lab
import network
import services
import stores
from stores import FAILURE, INTERRUPTED, MIB, NOT_FOUND, OK

SIZE = 24 * MIB
SHARD = ("--shard-size", "1MiB")
# The promise: how long a get may receive nothing after a holder is lost.
GAP_SECONDS = 1.0


class FaultTest(stores.NetworkTest):
    def setUp(self):
        super().setUp()
        self.source = self.file("model", SIZE)

    def begin(self, *words, node, part=0.3, name="m"):
        """A get of which that part has arrived."""
        process = self.get(name, *words, node=node)
        process.at = self.wait_for_bytes(node, int(SIZE * part))
        return process

    def finish_and_measure(self, process, node, meter, lost_at, what):
        result = process.line(40)
        ended = time.monotonic()
        meter.end()
        process.finish()
        self.check_bytes(process, self.source)
        self.assertTrue(result["verified"], result)
        # Neither the end of the last shards nor the renaming counts as a standstill.
        gap = meter.longest_silence(lost_at, ended - 0.05, self.rate)
        print(f"measured {what}: {gap:.3f} s without data, {result['seconds']:.2f} s in all",
              flush=True)
        self.assertLess(gap, GAP_SECONDS, process.describe())
        return result


class Holders(FaultTest):
    def lose(self, number, what):
        self.start_service()
        origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        replicas = [self.serve("m", node=node) for node in self.nodes[1:3]]
        receiver = self.nodes[3]
        meter = network.FlowMeter(receiver)
        process = self.begin(node=receiver)
        lost_at = time.monotonic()
        for holder in (origin, replicas[0]):
            holder.signal(number)
        self.finish_and_measure(process, receiver, meter, lost_at, what)
        for holder in (origin, replicas[0]):
            holder.process.kill()
        self.nothing_is_left_but_expired()

    def nothing_is_left_but_expired(self):
        for process in self.processes:
            lab.end_process(process.process)
        def records():
            # The shared document has no lease: see docs of the store.
            return [key for key in self.keys() if "/store/" in key]
        self.assertTrue(lab.wait_until(lambda: not records(), 3 * services.TTL + 2, 0.2), records())

    def test_origin_and_replica_killed(self):
        self.lose(signal.SIGKILL, "two of three holders killed")

    def test_origin_and_replica_stopped(self):
        self.lose(signal.SIGSTOP, "two of three holders stopped")

    def test_one_killed_of_two(self):
        self.start_service(services.Ours)
        self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        replica = self.serve("m", node=self.nodes[1])
        receiver = self.nodes[2]
        meter = network.FlowMeter(receiver)
        process = self.begin(node=receiver)
        lost_at = time.monotonic()
        replica.kill()
        self.finish_and_measure(process, receiver, meter, lost_at, "one of two holders killed")

    def test_origin_killed_after_the_first_full_copy(self):
        self.start_service()
        origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        self.serve("m", node=self.nodes[1])
        gets = [self.begin(node=node, part=0.1) for node in self.nodes[2:4]]
        origin.kill()
        for process in gets:
            process.finish()
            self.check_bytes(process, self.source)
        # The origin's records have expired; the replica's still lead to the payload.
        time.sleep(services.TTL * 2)
        late = self.get("m", node=self.nodes[4])
        result = late.finish()
        self.check_bytes(late, self.source)
        self.assertEqual(stores.bytes_from(result, True), 0, result)
        self.assertEqual([each["name"] for each in self.run_store("list").lines()], ["m"])

    def test_every_holder_killed(self):
        self.start_service(services.Redis)
        origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        process = self.begin(node=self.nodes[1])
        origin.kill()
        process.finish((FAILURE, NOT_FOUND), 45)
        self.assertIn(self.nodes[0].address, process.log(), "the holders that were tried")
        self.assertEqual(list(process.folder.rglob("*")), [])

    def test_lease_expires_while_transferring(self):
        # Without a document of Mooncake's store, which is on no lease.
        self.start_service(services.Ours)
        origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        process = self.begin(node=self.nodes[1])
        origin.signal(signal.SIGSTOP)
        # It is no longer listed, but its readers wait for it.
        self.assertTrue(
            lab.wait_until(lambda: not self.run_store("list").lines(), services.TTL + 3, 0.2))
        self.assertIsNone(process.process.poll(), process.describe())
        origin.signal(signal.SIGCONT)
        result = process.finish()
        self.check_bytes(process, self.source)
        self.assertTrue(result["verified"], result)
        self.assertEqual(stores.bytes_from(result, True), SIZE, result)
        print(f"measured origin frozen beyond its lease: {result['seconds']:.2f} s in all",
              flush=True)
        # It is published again, with a new lease.
        self.assertTrue(lab.wait_until(lambda: self.run_store("list").lines(), 10, 0.2))
        later = self.get("m", node=self.nodes[2])
        later.finish()
        self.check_bytes(later, self.source)


class Links(FaultTest):
    def test_receiver_cut_off_for_a_while(self):
        self.start_service()
        self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        self.serve("m", node=self.nodes[1])
        receiver = self.nodes[2]
        process = self.begin(node=receiver)
        receiver.plug(False)
        self.addCleanup(receiver.plug, True)
        time.sleep(1.5)
        receiver.plug(True)
        result = process.finish()
        self.check_bytes(process, self.source)
        print(f"measured receiver cut off for 1.5 s: {result['seconds']:.2f} s in all", flush=True)

    def test_holder_cut_off(self):
        self.start_service(services.Ours)
        self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        self.serve("m", node=self.nodes[1])
        cut, receiver = self.nodes[1], self.nodes[2]
        meter = network.FlowMeter(receiver)
        process = self.begin(node=receiver)
        lost_at = time.monotonic()
        cut.plug(False)
        self.addCleanup(cut.plug, True)
        self.finish_and_measure(process, receiver, meter, lost_at, "one of two holders cut off")


class Metadata(FaultTest):
    def check(self, kind, empty):
        self.start_service(kind)
        origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        receiver = self.nodes[1]
        process = self.begin(node=receiver)
        self.service.restart(empty)
        process.finish()
        self.check_bytes(process, self.source)
        # The holder puts back what an emptied service has lost.
        self.assertTrue(
            lab.wait_until(lambda: self.run_store("list").lines(), 15, 0.2), origin.describe())
        later = self.get("m", node=self.nodes[2])
        later.finish()
        self.check_bytes(later, self.source)
        self.nothing_is_left()

    def test_etcd_restarts_with_its_data(self):
        self.check(services.Etcd, False)

    def test_etcd_restarts_empty(self):
        self.check(services.Etcd, True)

    def test_redis_restarts_empty(self):
        self.check(services.Redis, True)

    def test_our_server_restarts_empty(self):
        self.check(services.Ours, True)


class Versions(FaultTest):
    def setUp(self):
        super().setUp()
        self.other = self.file("other/model", SIZE, "other")

    def test_new_version_while_the_old_one_is_fetched(self):
        self.start_service()
        self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        process = self.begin(node=self.nodes[2])
        self.publish("m", self.other, words=SHARD, node=self.nodes[1])
        process.finish()
        self.check_bytes(process, self.source)
        later = self.get("m", node=self.nodes[3])
        later.finish()
        self.check_bytes(later, self.other)

    def vanish(self, *words):
        self.start_service()
        origin = self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        process = self.begin(*words, node=self.nodes[2])
        self.publish("m", self.other, words=SHARD, node=self.nodes[1])
        origin.kill()
        return process

    def test_version_vanishes(self):
        process = self.vanish()
        process.finish((FAILURE, NOT_FOUND), 45)
        self.assertTrue(process.log().strip())
        self.assertEqual(list(process.folder.rglob("*")), [])

    def test_version_vanishes_and_get_follows(self):
        process = self.vanish("--follow")
        lost_at = time.monotonic()
        process.finish(OK, 45)
        seconds = time.monotonic() - lost_at
        self.check_bytes(process, self.other)
        print(f"measured version lost, with the next one there: {seconds:.2f} s", flush=True)
        # Ten seconds and more if it waited for the lost holder to come back.
        self.assertLess(seconds, 8, process.describe())

    def test_removed_while_it_is_fetched(self):
        """The holder withdraws: the get receives no more, and ends without a file."""
        self.start_service()
        # Its holder learns of the removal long before the get could have everything.
        source = self.file("long", 5 * SIZE)
        origin = self.publish("m", source, words=SHARD, node=self.nodes[0])
        process = self.get("m", node=self.nodes[2])
        self.wait_for_bytes(self.nodes[2], MIB)
        self.run_store("rm", "m")
        removed_at = time.monotonic()
        later = self.get("m", node=self.nodes[3])
        later.finish(NOT_FOUND, 5)
        self.assertEqual(self.run_store("list").lines(), [])
        self.assertIsNone(process.process.poll(), process.describe())
        process.finish(FAILURE, 40)
        print(f"measured removed while fetched: the get ended after "
              f"{time.monotonic() - removed_at:.2f} s", flush=True)
        self.assertIn("no live holder", process.log())
        for each in (process, later):
            self.assertEqual(list(each.folder.rglob("*")), [])
        origin.finish(FAILURE, 30)
        self.assertIn("removed by its name", origin.log())
        self.assertEqual(self.keys(), [])


class Interrupted(FaultTest):
    def test_sigint(self):
        self.start_service()
        self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        before = self.keys()
        process = self.begin(node=self.nodes[1])
        begin = time.monotonic()
        process.signal(signal.SIGINT)
        process.finish(INTERRUPTED, 10)
        print(f"measured SIGINT: ended after {time.monotonic() - begin:.2f} s", flush=True)
        self.assertEqual(list(process.folder.rglob("*")), [])
        self.assertEqual(self.keys(), before)

    def test_deadline(self):
        self.start_service(services.Redis)
        self.publish("m", self.source, words=SHARD, node=self.nodes[0])
        before = self.keys()
        process = self.get("m", "--timeout", "1", node=self.nodes[1])
        process.finish(FAILURE, 10)
        self.assertEqual(list(process.folder.rglob("*")), [])
        self.assertEqual(self.keys(), before)


if __name__ == "__main__":
    unittest.main()
