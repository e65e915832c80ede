"""Both stores in one etcd. Mooncake's is simulated by its documented schema: documents under
mooncake/checkpoint/, and an engine of a Mooncake release that serves and reads the memory.
"""

import hashlib
import json
import subprocess
import unittest

import lab
import services
import stores
from stores import MIB, NOT_FOUND

DOCUMENT = "mooncake/checkpoint/"
# etcd refuses requests beyond 1.5 MiB.
REQUEST_LIMIT = 1536 << 10


class Coexistence(stores.StoreTest):
    def setUp(self):
        super().setUp()
        self.start_service()

    def stock(self, name):
        peer = services.start_stock(lab.releases()[-1], self.service.uri, name)
        self.addCleanup(peer.kill)
        return peer

    def document(self, name):
        text = self.service.control("get", "--print-value-only", DOCUMENT + name).strip()
        return json.loads(text) if text else None

    def register_as_existing_store(self, peer, name, sizes, shard):
        """What its Register writes for buffers that lie one after another."""
        shards, address = [], peer.address
        for size in sizes:
            for offset in range(0, size, shard):
                shards.append({
                    "size": min(shard, size - offset),
                    "gold": [{"segment_name": peer.segment, "offset": address + offset}],
                    "replica_list": None,
                })
            address += size
        text = json.dumps({"name": name, "size": sum(sizes), "size_list": sizes,
                           "max_shard_size": shard, "shards": shards}, separators=(",", ":"))
        services.plant(self.service.uri, DOCUMENT + name, text.encode())
        return text

    def test_theirs_is_fetched_by_ours(self):
        peer = self.stock("trainer")
        size = 6 * MIB + 12345
        peer.ask("fill", offset=0, length=size, seed="theirs")
        text = self.register_as_existing_store(peer, "theirs/a", [4 * MIB, size - 4 * MIB], MIB)
        process = self.get("theirs/a")
        result = process.finish()
        self.assertFalse(result["verified"], result)
        self.assertEqual(result["size"], size)
        told = subprocess.run(
            [services.cli(), "store", "get", "theirs/a", "--metadata", self.service.uri],
            stdout=subprocess.PIPE, text=True, timeout=30, env=stores.clean_variables({})).stdout
        self.assertIn("not verified", told)
        data = b"".join(path.read_bytes() for path in sorted(process.folder.rglob("*"))
                        if path.is_file())
        wanted = peer.ask("digest", offset=0, length=size)["digest"]
        self.assertEqual(hashlib.sha256(data).hexdigest(), wanted)
        self.assertEqual([each["name"] for each in self.run_store("list").lines()], ["theirs/a"])
        # It was listed as a replica while it ran; nothing else has changed.
        self.assertEqual(
            json.dumps(self.document("theirs/a"), separators=(",", ":")).replace("[]", "null"),
            text)

    def test_theirs_with_a_dead_owner(self):
        peer = self.stock("dead")
        self.register_as_existing_store(peer, "theirs/b", [2 * MIB], MIB)
        peer.kill()
        process = self.get("theirs/b", "--timeout", "5")
        process.process.wait(30)
        self.assertGreater(process.process.returncode, 0, process.describe())
        self.assertIn("dead", process.log())
        self.assertEqual(list(process.folder.rglob("*")), [])

    def read_as_existing_store(self, reader, document, place):
        """What its GetReplica does: reads every shard from one of its locations."""
        offset = 0
        for shard in document["shards"]:
            location = shard[place][-1]
            answer = reader.ask(
                "transfer", peer=location["segment_name"], operation="read",
                pieces=[[offset, location["offset"], shard["size"]]], timeout=10.0)
            self.assertEqual(answer["code"], 0, f"{location}: {reader.log_tail()}")
            offset += shard["size"]
        return reader.ask("digest", offset=0, length=offset)["digest"]

    def test_ours_is_read_by_theirs(self):
        source = self.file("model", 5 * MIB + 99)
        origin = self.publish("ours/a", source, words=("--shard-size", "1MiB"))
        document = self.document("ours/a")
        self.assertEqual(document["name"], "ours/a")
        self.assertEqual(document["size"], source.stat().st_size)
        self.assertEqual(document["size_list"], [source.stat().st_size])
        self.assertEqual(document["max_shard_size"], MIB)
        self.assertEqual([shard["size"] for shard in document["shards"]], [MIB] * 5 + [99])
        reader = self.stock("inferencer")
        self.assertEqual(self.read_as_existing_store(reader, document, "gold"),
                         stores.sha256(source))
        # A completed replica of ours is listed and read too.
        replica = self.serve("ours/a")
        self.assertTrue(lab.wait_until(
            lambda: self.document("ours/a")["shards"][0]["replica_list"], 5), replica.describe())
        document = self.document("ours/a")
        self.assertTrue(all(len(shard["replica_list"]) == 1 for shard in document["shards"]))
        self.assertEqual(self.read_as_existing_store(reader, document, "replica_list"),
                         stores.sha256(source))
        lab.end_process(replica.process)
        self.assertFalse(self.document("ours/a")["shards"][0]["replica_list"])
        lab.end_process(origin.process)
        self.assertIsNone(self.document("ours/a"))
        self.run_store("get", "ours/a", "--to", str(self.folder / "x"), code=NOT_FOUND)

    def test_a_replica_of_theirs_survives_ours(self):
        """Only our own entries are removed from the document."""
        source = self.file("model", 2 * MIB)
        origin = self.publish("ours/b", source, words=("--shard-size", "1MiB"))
        peer = self.stock("other")
        document = self.document("ours/b")
        for index, shard in enumerate(document["shards"]):
            shard["replica_list"] = [{"segment_name": "other",
                                      "offset": peer.address + index * MIB}]
        self.read_as_existing_store(peer, document, "gold")
        services.plant(self.service.uri, DOCUMENT + "ours/b", json.dumps(document).encode())
        lab.end_process(origin.process)
        left = self.document("ours/b")
        self.assertEqual([len(shard["replica_list"]) for shard in left["shards"]], [1, 1])
        self.assertFalse(any(shard["gold"] for shard in left["shards"]))
        process = self.get("ours/b")
        result = process.finish()
        self.check_bytes(process, source)
        self.assertFalse(result["verified"], result)

    def largest_value(self):
        done = json.loads(self.service.control("get", "", "--prefix", "-w", "json"))
        # Base64: four characters for three bytes.
        return max(len(pair.get("value", "")) * 3 // 4 for pair in done.get("kvs", []))

    def check_no_request_was_too_large(self):
        for process in self.processes:
            for words in ("too large", "RESOURCE_EXHAUSTED", "larger than max"):
                self.assertNotIn(words, process.log(), process.describe())
        self.assertNotIn("too large", self.service.text())

    def test_large_payloads_get_no_document(self):
        source = self.file("large", 40 * MIB)
        origin = self.publish("ours/large", source, words=("--shard-size", "4KiB"))
        self.assertIsNone(self.document("ours/large"))
        self.assertIn("Mooncake's store does not see it", origin.log())
        self.serve("ours/large")
        process = self.get("ours/large")
        process.finish()
        self.check_bytes(process, source)
        self.assertLess(self.largest_value(), 4096)
        self.check_no_request_was_too_large()

    def test_a_document_does_not_outgrow_a_request(self):
        source = self.file("almost", 10 * MIB)
        self.publish("ours/almost", source, words=("--shard-size", "4KiB"))
        self.assertIsNotNone(self.document("ours/almost"), "2,560 shards fit")
        for _ in range(8):
            self.start("serve", "ours/almost")
        for process in self.processes[1:]:
            process.line()
        process = self.get("ours/almost")
        process.finish()
        self.check_bytes(process, source)
        self.assertLess(self.largest_value(), REQUEST_LIMIT)
        self.check_no_request_was_too_large()
        self.nothing_is_left()


if __name__ == "__main__":
    unittest.main()
