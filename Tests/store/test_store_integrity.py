"""Wrong bytes at a holder, and wrong texts in the metadata service."""

import concurrent.futures
import json
import pathlib
import resource
import signal
import subprocess
import unittest

import lab
import services
import stores
from stores import FAILURE, MIB, MISMATCH, NOT_FOUND, OK

SHARD = 256 << 10


def corrupt(pid, data):
    """Changes a byte of every shard in the memory of a process that holds these bytes."""
    changed = 0
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps:
        areas = [[int(word, 16) for word in line.split()[0].split("-")] for line in maps
                 if "w" in line.split()[1]]
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for low, high in areas:
            if high - low < len(data):
                continue
            memory.seek(low)
            try:
                place = memory.read(high - low).find(data[:4096])
            except OSError:
                continue
            if place < 0:
                continue
            for offset in range(1000, len(data), SHARD):
                memory.seek(low + place + offset)
                memory.write(bytes([data[offset] ^ 1]))
                changed += 1
    return changed


class Corrupted(stores.StoreTest):
    def setUp(self):
        super().setUp()
        self.start_service()
        self.source = self.file("model", 24 * MIB)
        self.shards = 24 * MIB // SHARD
        self.origin = self.publish("m", self.source, words=("--shard-size", "256KiB"))
        self.replica = self.serve("m")

    def plant(self):
        try:
            changed = corrupt(self.replica.pid, self.source.read_bytes())
        except PermissionError as error:
            self.skipTest(f"the memory of another process cannot be written here: {error}")
        self.assertGreaterEqual(changed, self.shards)

    def test_corrupted_replica_is_found_out_and_left(self):
        self.plant()
        corrupted = 0
        for _ in range(4):
            process = self.get("m")
            result = process.finish()
            self.check_bytes(process, self.source)
            self.assertTrue(result["verified"])
            bad = [each for each in result["sources"] if not each["origin"]]
            corrupted += sum(each["corrupt_shards"] for each in bad)
            # It is dropped at once, instead of being asked for all it has.
            self.assertLess(sum(each["corrupt_shards"] for each in bad), self.shards / 4, result)
        self.assertGreater(corrupted, 0, "the corrupted holder was never read: nothing is proven")

    def test_only_a_corrupted_replica_is_left(self):
        self.plant()
        self.origin.signal(signal.SIGTERM)
        self.origin.process.wait(15)
        process = self.get("m", "--timeout", "20")
        process.finish((MISMATCH, FAILURE), 30)
        self.assertIn("digest", process.log())
        self.assertEqual(list(process.folder.rglob("*")), [])


def hostile_texts(good):
    """Texts that might be found in place of a JSON object like `good`."""
    yield from ("", " ", "nonsense", "{", "[]", "null", "{}", "0", '"text"', "[" * 20_000,
                '{"a":' * 20_000, "\ufeff{}", '{"name":"\\ud800"}', "\\", "é" * 100_000,
                good[:-1], good + good, good.replace('"', "'"))
    value = json.loads(good)
    odd = (None, True, -1, 1.5, 1e300, 2**63, 2**64 - 1, 2**64, 10**400, "", "x" * 100_000,
           "0" * 32, [], {}, [None], [[]], {"a": 1})
    for key in value:
        for replacement in odd:
            yield json.dumps({**value, key: replacement})
        yield json.dumps({name: each for name, each in value.items() if name != key})


class Hostile(stores.StoreTest):
    """Arbitrary texts written by an attacker with access: no process ends by a signal."""

    def limited(self, *words):
        """Runs a command with limited memory and time."""
        return subprocess.run(
            [services.cli(), "store", *words, "--metadata", self.service.uri, "--json",
             "--timeout", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30,
            env=stores.clean_variables({"MC_LOG_LEVEL": "ERROR"}),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)))

    def try_text(self, number, key, text, old_name, name):
        """Plants each text under another name's key, so that all are tried at once."""
        services.plant(self.service.uri, key.replace(old_name, name),
                       text.replace(old_name, name).encode("utf-8", "replace"))
        folder = self.folder / f"hostile-{number}"
        problems = []
        for words in (("stat", name), ("get", name, "--to", str(folder)), ("list", name)):
            try:
                done = self.limited(*words)
            except subprocess.TimeoutExpired:
                problems.append(f"{words[0]} does not end: {key}: {text[:200]}")
                continue
            if done.returncode < 0 or done.returncode > 100:
                problems.append(f"{words[0]} ended with {done.returncode}: {key}: {text[:200]}\n"
                                f"{done.stderr[-500:]}")
            if words[0] != "list" and done.returncode != OK and not done.stderr.strip():
                problems.append(f"{words[0]} says nothing: {text[:200]}")
            if words[0] == "get" and done.returncode == OK:
                problems.extend(self.wrong_bytes(folder, text))
        if folder.exists() and stores.remains(folder):
            problems.append(f"left behind: {stores.remains(folder)}")
        return problems

    def wrong_bytes(self, folder, text):
        found = list(stores.digests(folder).values())
        return [] if found == [self.good] else [f"wrong bytes, but no error: {text[:200]}"]

    def test_texts_under_every_key(self):
        self.start_service()
        source = self.file("model", MIB)
        self.good = stores.sha256(source)
        holder = self.publish("planted", source)
        keys = [key for key in services.keys(self.service.uri)
                if "planted" in key]
        self.assertGreaterEqual(len(keys), 3, keys)
        tries = []
        for key in keys:
            value = self.service.control("get", "--print-value-only", key).rstrip("\n")
            texts = list(dict.fromkeys(hostile_texts(value)))
            # A sample spread over all of them keeps this within its time.
            tries += [(key, text) for text in texts[:18] + texts[18::9]]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = pool.map(lambda item: self.try_text(item[0], *item[1], "planted",
                                                        f"name-{item[0]}"), enumerate(tries))
            problems = [problem for each in found for problem in each]
        print(f"measured {len(tries)} hostile texts under {len(keys)} keys", flush=True)
        self.assertEqual(problems[:12], [], f"{len(problems)} in all")
        # The listing skips them, and good payloads stay listed.
        listed = self.run_store("list").lines()
        self.assertIn("planted", [each["name"] for each in listed])
        process = self.get("planted")
        process.finish()
        self.check_bytes(process, source)
        self.assertIsNone(holder.process.poll(), holder.describe())

    def test_watch_passes_over_nonsense(self):
        self.start_service()
        watch = self.start("watch", "w/")
        source = self.file("model", MIB)
        lab.wait_until(lambda: False, 0.5)
        holder = self.publish("w/first", source)
        for number, text in enumerate(("", "{", "[]", "{}", "\x00", "[" * 5000)):
            services.plant(self.service.uri, f"mooncake/store/object/w/bad{number}",
                           text.encode())
        self.publish("w/second", source)
        holder.signal(signal.SIGTERM)

        def names(process):
            return [each.get("name") for each in process.lines()]
        watch.wait_for(lambda each: "w/second" in names(each) and names(each).count("w/first") > 1,
                       15)
        watch.signal(signal.SIGINT)
        watch.process.wait(10)
        self.assertIn(watch.process.returncode, (OK, stores.INTERRUPTED), watch.describe())

    def test_holders_that_are_not_there(self):
        """Records of processes that never existed: the get uses the one that does."""
        self.start_service()
        source = self.file("model", 4 * MIB)
        self.publish("m", source)
        (key,) = [key for key in services.keys(self.service.uri) if "/store/holder/" in key]
        record = json.loads(self.service.control("get", "--print-value-only", key))
        folder = pathlib.PurePosixPath(key).parent
        port = lab.free_ports(1)
        for number in range(40):
            holding = f"{number + 1:016x}"
            # Nobody listening, a network without answers, an odd port, no address at all.
            rpc = (f"127.0.0.1:{port}", "192.0.2.1:9", "127.0.0.1:0", "?")[number % 4]
            fake = {**record, "holding": holding, "rpc": rpc, "segment": rpc}
            services.plant(self.service.uri, f"{folder}/{holding}", json.dumps(fake).encode())
        for _ in range(3):
            process = self.get("m", "--timeout", "20")
            result = process.finish()
            self.check_bytes(process, source)
            self.assertLess(result["seconds"], 8, result)


class Unknown(stores.StoreTest):
    def test_names(self):
        for kind in stores.KINDS:
            with self.subTest(kind=kind.__name__):
                self.start_service(kind)
                for words in (("get", "nothing", "--to", str(self.folder / "x")),
                              ("serve", "nothing"), ("stat", "nothing"), ("rm", "nothing")):
                    process = self.start(*words)
                    process.finish(NOT_FOUND, 15)
                    self.assertIn("nothing", process.log())


if __name__ == "__main__":
    unittest.main()
