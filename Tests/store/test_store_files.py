"""Files and directories there and back, through every metadata service, and what goes wrong."""

import os
import shutil
import signal
import subprocess
import threading
import time
import unittest

import lab
import network
import services
import stores
from stores import FAILURE, MIB, MISMATCH, NOT_FOUND, OK


class RoundTrip(stores.StoreTest):
    def make_tree(self):
        tree = self.folder / "tree"
        for name, length in (("config.json", 812), ("weights/a.bin", 9 * MIB + 17),
                             ("weights/b.bin", 4 * MIB), ("weights/deep/er/c", 1), ("empty", 0),
                             ("names/with space, ünïcode", 100_001)):
            self.file(f"tree/{name}", length)
        (tree / "weights/a.bin").chmod(0o755)
        return tree

    def check(self, kind):
        self.start_service(kind)
        tree = self.make_tree()
        single = self.file("model.safetensors", 20 * MIB + 3)
        self.publish("run/tree", tree, words=("--shard-size", "1MiB"))
        published = self.publish("run/single", single).published
        for name, wanted in (("run/tree", stores.digests(tree)),
                             ("run/single", {single.name: stores.sha256(single)})):
            process = self.get(name)
            result = process.finish()
            self.assertEqual(stores.digests(process.folder), wanted, process.describe())
            self.assertEqual(stores.remains(process.folder), [])
            self.assertTrue(result["verified"], result)
            self.assertEqual(stores.bytes_from(result, True), result["size"], result)
        self.assertEqual(result["version"], published["version"])
        listed = self.run_store("list", "run/").lines()
        self.assertEqual([each["name"] for each in listed], ["run/single", "run/tree"])
        self.assertEqual(listed[0]["size"], 20 * MIB + 3)
        self.assertEqual(self.run_store("list", "elsewhere/").lines(), [])
        stat = self.run_store("stat", "run/single").lines()
        self.assertIn(published["version"], str(stat))
        self.run_store("rm", "run/single")
        self.run_store("get", "run/single", "--to", str(self.folder / "no"), code=NOT_FOUND)
        self.assertEqual([each["name"] for each in self.run_store("list").lines()], ["run/tree"])
        self.nothing_is_left()

    def test_etcd(self):
        self.check(services.Etcd)

    def test_redis(self):
        self.check(services.Redis)

    def test_our_server(self):
        self.check(services.Ours)

    def test_replica_serves_alone(self):
        self.start_service()
        source = self.file("model", 12 * MIB)
        origin = self.publish("m", source, words=("--shard-size", "1MiB"))
        self.serve("m", "--to", str(self.folder / "replica"))
        in_memory = self.serve("m")
        origin.signal(signal.SIGTERM)
        origin.process.wait(15)
        self.assertEqual(origin.process.returncode, OK, origin.describe())
        process = self.get("m")
        result = process.finish()
        self.check_bytes(process, source)
        self.assertEqual(stores.bytes_from(result, True), 0, result)
        self.assertTrue(in_memory.process.poll() is None)
        self.nothing_is_left()

    def test_an_existing_file_is_kept_unless_forced(self):
        self.start_service(services.Ours)
        source = self.file("model", MIB)
        self.publish("m", source)
        place = self.folder / "place"
        place.mkdir()
        (place / "model").write_bytes(b"mine")
        self.get("m", to="place").finish(FAILURE)
        self.assertEqual((place / "model").read_bytes(), b"mine")
        forced = self.get("m", "--force", to="place")
        forced.finish()
        self.check_bytes(forced, source)

    def test_versions(self):
        self.start_service()
        one, two = self.file("one/model", 3 * MIB, 1), self.file("two/model", 3 * MIB, 2)
        first = self.publish("m", one)
        refused = self.start("publish", str(two), "--name", "m", "--create-only")
        refused.finish(FAILURE)
        second = self.publish("m", two)
        self.assertNotEqual(first.published["version"], second.published["version"])
        newest = self.get("m")
        newest.finish()
        self.check_bytes(newest, two)
        older = self.get("m", "--payload-version", first.published["version"])
        older.finish()
        self.check_bytes(older, one)
        unknown = self.get("m", "--payload-version", "0" * 32)
        unknown.finish((NOT_FOUND, FAILURE), 30)
        self.assertEqual(list(unknown.folder.rglob("*")), [])
        # The same content is the same version, whoever publishes it.
        self.assertEqual(self.publish("n", one).published["version"], first.published["version"])
        self.nothing_is_left()


class Wrong(stores.StoreTest):
    def test_names(self):
        self.start_service(services.Ours)
        source = self.file("f", 1000)
        for name in ("", "/absolute", "line\nbreak", "n" * 513, "\x7f"):
            words = ["publish", str(source), "--name", name, "--metadata", self.service.uri]
            for command in (words, ["get", name, "--to", str(self.folder / "x"), *words[-2:]],
                            ["stat", name, *words[-2:]], ["rm", name, *words[-2:]]):
                done = subprocess.run(
                    [services.cli(), "store", *command], stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, timeout=20, env=stores.clean_variables({}))
                self.assertGreater(done.returncode, 0, command)
                self.assertTrue(done.stderr.strip(), command)
        self.assertEqual(self.keys(), [])

    def test_odd_names_that_are_allowed(self):
        self.start_service()
        self.folder = self.folder / "one" / "two"
        source = self.file("f", 100_000)
        for name in ("a/../../b", "100%/ß?&=#+", "x" * 512, "trailing/", "..", "a b", "{}[]\"\\"):
            holder = self.publish(name, source)
            process = self.get(name)
            process.finish()
            self.check_bytes(process, source)
            self.assertIn(name, [each["name"] for each in self.run_store("list").lines()])
            holder.signal(signal.SIGINT)
            holder.process.wait(15)
        self.assertEqual([path.name for path in self.folder.parent.iterdir()], ["two"])
        self.nothing_is_left()

    def test_paths(self):
        self.start_service(services.Ours)
        for words in (("publish", str(self.folder / "none"), "--name", "m"),
                      ("publish", "/dev/null", "--name", "m"),
                      ("get", "m", "--to", "/proc/nothing/here"),
                      ("get", "m", "--to", str(self.file("plain", 5))),
                      ("publish", str(self.file("f", 10)), "--name", "m", "--shard-size", "0x"),
                      ("publish",), ("get",), ("rm", "m"), ("stat", "m")):
            process = self.start(*words)
            process.process.wait(20)
            self.assertGreater(process.process.returncode, 0, process.describe())
            self.assertTrue(process.log().strip(), process.describe())

    def test_no_service(self):
        port = lab.free_ports(1)
        source = self.file("f", 10)
        for uri in (f"etcd://127.0.0.1:{port}", f"redis://127.0.0.1:{port}",
                    f"http://127.0.0.1:{port}/metadata", "P2PHANDSHAKE", "nonsense://"):
            for words in (("get", "m", "--to", str(self.folder / "x")), ("list",),
                          ("publish", str(source), "--name", "m")):
                process = self.start(*words, "--timeout", "3", uri=uri)
                process.process.wait(20)
                self.assertGreater(process.process.returncode, 0, process.describe())
                self.assertTrue(process.log().strip(), process.describe())

    def test_full_disk(self):
        if not network.is_private():
            self.skipTest("mounting needs a mount namespace of its own")
        self.start_service(services.Ours)
        self.publish("m", self.file("model", 12 * MIB), words=("--shard-size", "1MiB"))
        small = self.folder / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], check=True)
        self.addCleanup(subprocess.run, ["umount", str(small)], check=False)
        process = self.get("m", to="small")
        process.finish(FAILURE)
        self.assertIn("space", process.log())
        self.assertEqual(list(small.rglob("*")), [])
        self.nothing_is_left()


class Changing(stores.StoreTest):
    """A published file is mapped: changing it meanwhile must never go unnoticed."""

    def check_changed(self, holder):
        """The get fails and leaves nothing; the holder notices and says why it ends."""
        process = self.get("m", "--timeout", "15")
        process.finish((MISMATCH, FAILURE, NOT_FOUND))
        self.assertEqual(list(process.folder.rglob("*")), [], process.describe())
        # A missing page must not end it by a signal.
        holder.finish(MISMATCH, 20)
        self.assertIn("has changed", holder.log())
        self.assertEqual(self.keys(), [])

    def publish_one(self):
        self.start_service()
        source = self.file("model", 16 * MIB)
        return source, self.publish("m", source, words=("--shard-size", "1MiB"))

    def test_written_after_publishing(self):
        source, holder = self.publish_one()
        with open(source, "r+b") as file:
            file.seek(5 * MIB)
            file.write(b"something else")
        self.check_changed(holder)

    def test_truncated_after_publishing(self):
        source, holder = self.publish_one()
        os.truncate(source, 3 * MIB)
        self.check_changed(holder)

    def test_changed_while_hashing(self):
        self.start_service(services.Ours)
        tree = self.folder / "tree"
        paths = [self.file(f"tree/{index}", 24 * MIB) for index in range(4)]
        is_over = threading.Event()

        def disturb():
            while not is_over.is_set():
                with open(paths[2], "r+b") as file:
                    file.seek(7 * MIB)
                    file.write(os.urandom(64))
                os.truncate(paths[3], 10 * MIB)
                os.truncate(paths[3], 24 * MIB)
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            process = self.start("publish", str(tree), "--name", "m", "--shard-size", "1MiB")
            lab.wait_until(lambda: process.lines() or process.process.poll() is not None, 40)
        finally:
            is_over.set()
            thread.join()
        if process.lines():
            # Published before anything could be noticed: then the digests must reveal it.
            get = self.get("m", "--timeout", "15")
            get.process.wait(40)
            self.assertNotEqual(get.process.returncode, OK, "bytes of two different states")
        else:
            self.assertEqual(process.process.returncode, MISMATCH, process.describe())
            self.assertIn("chang", process.log())
            self.assertEqual(self.keys(), [])


class Republishing(stores.StoreTest):
    def test_bytes_of_two_versions_never_mix(self):
        self.start_service()
        contents = [self.file(f"{index}/model", 12 * MIB, index) for index in range(3)]
        good = {stores.sha256(path) for path in contents}
        shard = ("--shard-size", "256KiB")
        holders = [self.publish("m", contents[0], words=shard)]
        seen, failed = set(), []
        is_over = threading.Event()

        def fetch(index):
            count = 0
            while not is_over.is_set():
                count += 1
                process = self.get("m", "--follow", "--timeout", "12", to=f"got-{index}-{count}")
                process.process.wait(30)
                found = set(stores.digests(process.folder).values())
                if process.process.returncode == OK and len(found) == 1 and found <= good:
                    seen.update(found)
                else:
                    failed.append(process.describe() + str(found))
                shutil.rmtree(process.folder, ignore_errors=True)
        threads = [threading.Thread(target=fetch, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for turn in range(1, 10):
            time.sleep(0.3)
            holders.append(self.publish("m", contents[turn % 3], words=shard))
            # Replaced while it is fetched: a get that follows versions continues with the new one.
            holders.pop(0).signal(signal.SIGTERM if turn % 2 else signal.SIGKILL)
        is_over.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failed, [])
        self.assertGreater(len(seen), 1)


if __name__ == "__main__":
    unittest.main()
