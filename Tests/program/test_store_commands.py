"""Tests `mooncake store` from outside; scripts/test-program runs them."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import unittest

from program import LIMIT_SECONDS, PROGRAM, clean_environment, mooncake


class Store(unittest.TestCase):
    """`mooncake store`, with the built-in metadata server."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        server = subprocess.Popen(
            [PROGRAM, "metadata", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True,
            env=clean_environment())
        cls.addClassCleanup(server.communicate)
        cls.addClassCleanup(server.terminate)
        cls.uri = server.stdout.readline().strip()
        cls.model = cls.folder / "model"
        (cls.model / "deep" / "er").mkdir(parents=True)
        (cls.folder / "blob").write_bytes(os.urandom(300_001))
        (cls.model / "weights.bin").symlink_to("../blob")
        script = cls.model / "deep" / "er" / "run"
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        (cls.model / "empty").touch()

    def store(self, *words):
        return mooncake("store", *words, MC_METADATA_SERVER=self.uri)

    def start(self, *words, ready=True):
        """A command that stays; if `ready`, once it has printed its first line."""
        process = subprocess.Popen(
            [PROGRAM, "store", *words, "--metadata", self.uri, "--json"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=clean_environment())
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        process.first = json.loads(process.stdout.readline()) if ready else None
        return process

    def ended(self, process, number=None):
        """Its exit status, its further objects and what it said."""
        if number:
            process.send_signal(number)
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, [json.loads(line) for line in output.splitlines()], errors

    def rows(self, done):
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def contents(self, folder):
        return {
            str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK))
            for path in folder.rglob("*") if path.is_file()}

    def test_directory_arrives_whole(self):
        ready, copy = self.folder / "ready", self.folder / "copy" / "deeper"
        holder = self.start(
            "publish", self.model, "--name", "t/whole", "--segment", "origin", "--ready-file",
            ready, "--shard-size", "64KiB")
        self.assertEqual(json.loads(ready.read_text()), holder.first)
        self.assertEqual((holder.first["size"], holder.first["shards"]), (300_011, 6))
        (got,) = self.rows(self.store("get", "t/whole", "--to", copy, "--json"))
        self.assertEqual(self.contents(copy), self.contents(self.model))
        self.assertEqual(sorted(os.listdir(copy)), ["deep", "empty", "weights.bin"])
        self.assertTrue(got["verified"])
        self.assertEqual(got["version"], holder.first["version"])
        self.assertEqual(sorted(got["files"]), sorted(str(copy / n) for n in self.contents(copy)))
        self.assertEqual(got["sources"], [
            {"segment": "origin", "origin": True, "bytes": 300_011, "corrupt_shards": 0}])
        again = self.store("get", "t/whole", "--to", copy)
        self.assertEqual(again.returncode, 1)
        self.assertIn("deep/er/run exists", again.stderr)
        self.rows(self.store("get", "t/whole", "--to", copy, "--force", "--sync", "--json"))
        (stat,) = self.rows(self.store("stat", "t/whole", "--json"))
        self.assertEqual([holder["segment"] for holder in stat["holders"]], ["origin"])
        self.assertEqual(
            [row["name"] for row in self.rows(self.store("list", "t/wh", "--json"))], ["t/whole"])
        self.assertRegex(self.store("get", "t/whole", "--progress").stderr, "transferring .*100 %")
        taken = self.store("publish", self.model, "--name", "t/whole", "--create-only")
        self.assertEqual(taken.returncode, 1)
        self.assertIn("taken", taken.stderr)
        status, more, _ = self.ended(holder, signal.SIGTERM)
        self.assertEqual((status, list(more[0])), (0, ["sent_bytes"]))
        self.assertEqual(self.store("stat", "t/whole").returncode, 3)

    def test_replica_outlives_the_origin(self):
        origin = self.start("publish", self.folder / "blob", "--name", "t/two")
        replica = self.start("serve", "t/two", "--segment", "replica")
        self.assertEqual(self.ended(origin, signal.SIGTERM)[0], 0)
        (got,) = self.rows(self.store("get", "t/two", "--to", self.folder / "two", "--json"))
        self.assertEqual([source["segment"] for source in got["sources"]], ["replica"])
        self.assertEqual(self.ended(replica, signal.SIGINT)[0], 0)

    def test_changed_file_ends_its_publication(self):
        file = self.folder / "changing"
        file.write_bytes(b"x" * 100_000)
        holder = self.start("publish", file, "--name", "t/changing")
        with open(file, "ab") as opened:
            opened.write(b"y")
        status, _, errors = self.ended(holder)
        self.assertEqual(status, 4, errors)
        self.assertIn(f"{file} has changed", errors)
        self.assertEqual(self.store("get", "t/changing").returncode, 3)

    def test_watch_sees_what_comes_and_goes(self):
        watch = self.start("watch", "t/seen", ready=False)
        holder = self.start("publish", self.folder / "blob", "--name", "t/seen")
        appeared = json.loads(watch.stdout.readline())
        self.assertEqual((appeared["change"], appeared["name"]), ("appeared", "t/seen"))
        self.assertEqual(self.rows(self.store("rm", "t/seen", "--json")), [{"removed": "t/seen"}])
        vanished = json.loads(watch.stdout.readline())
        self.assertEqual(vanished, {"change": "vanished", "name": "t/seen"})
        self.assertEqual(self.ended(watch, signal.SIGTERM)[0], 0)
        status, _, errors = self.ended(holder)
        self.assertEqual(status, 1, errors)
        self.assertIn("removed by its name", errors)

    def test_interrupted_get_leaves_nothing(self):
        holder = self.start("publish", self.folder / "blob", "--name", "t/stopped")
        holder.send_signal(signal.SIGSTOP)
        getter = self.start("get", "t/stopped", "--to", self.folder / "none", ready=False)
        with self.assertRaises(subprocess.TimeoutExpired):
            getter.wait(1)
        status, output, errors = self.ended(getter, signal.SIGINT)
        self.assertEqual((status, output), (130, []), errors)
        self.assertFalse((self.folder / "none").exists())
        holder.send_signal(signal.SIGCONT)

    def test_failures_have_codes(self):
        for words, code, said in (
            (("get", "t/unknown"), 3, "t/unknown"), (("stat", "t/unknown"), 3, "t/unknown"),
            (("rm", "t/unknown"), 3, "t/unknown"), (("get", ""), 1, "name"),
            (("get", "x", "--payload-version", "12"), 64, "version"),
            (("get", "x", "--force"), 64, "--to"),
            (("publish", self.folder / "nowhere", "--name", "x"), 1, "nowhere"),
            (("publish", "x", "--name", "x", "--shard-size", "0"), 64, "--shard-size"),
        ):
            done = self.store(*words)
            self.assertIn(said, done.stderr)
            self.assertEqual(done.returncode, code, f"{words}: {done.stderr}")
        done = mooncake("store", "list")
        self.assertEqual(done.returncode, 64)
        self.assertIn("mooncake metadata serve", done.stderr)
