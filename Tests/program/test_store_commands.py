"""Tests `mooncake store` from outside; Tests/program/test_program.py runs them."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
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
        """A command that keeps running; if `ready`, waits for its first line."""
        process = subprocess.Popen(
            [PROGRAM, "store", *words, "--metadata", self.uri, "--json"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=clean_environment())
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        process.first = json.loads(process.stdout.readline()) if ready else None
        return process

    def ended(self, process, number=None):
        """Its exit status, its remaining objects and its messages."""
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

    def test_records_of_later_releases_are_named(self):
        record = {"store_version": 9, "name": "t/later", "origin": {
            "holding": "0000000000000001", "rpc": "10.0.0.1:7", "segment": "their-node"}}
        key = "mooncake/store/object/t/later"
        put = mooncake("metadata", "put", key, json.dumps(record), MC_METADATA_SERVER=self.uri)
        self.assertEqual(put.returncode, 0, put.stderr)
        self.addCleanup(mooncake, "metadata", "delete", key, MC_METADATA_SERVER=self.uri)
        listed = self.store("list", "t/later")
        self.assertEqual(listed.returncode, 0, listed.stderr)
        stat, get, remove = (self.store(verb, "t/later") for verb in ("stat", "get", "rm"))
        for done in (stat, get, remove):
            self.assertEqual(done.returncode, 1, done.stderr)
        for done in (listed, stat, get, remove):
            for part in (key, "needs version 9", "knows 1", "their-node at 10.0.0.1:7", "update"):
                self.assertEqual(done.stderr.count(part), 1, done.stderr)

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
        self.assertEqual((status, list(more[0])), (0, ["sent_bytes", "memory_bytes"]))
        self.assertEqual(self.store("stat", "t/whole").returncode, 3)

    def test_what_carried_the_bytes(self):
        """Two on the same host share memory, and what they read is counted."""
        for variables, over_tcp in (({}, False), ({"MC_FORCE_TCP": "1"}, True)):
            name = f"t/carried-{over_tcp}"
            holder = self.start("publish", self.folder / "blob", "--name", name)
            for _ in range(2):
                done = mooncake("store", "get", name, "--metadata", self.uri, **variables)
                self.assertEqual(done.returncode, 0, done.stderr)
            # A reader's last message is sent after it has everything.
            time.sleep(0.2)
            _, more, _ = self.ended(holder, signal.SIGTERM)
            if over_tcp:
                self.assertGreaterEqual(more[0]["sent_bytes"], 600_002)
                self.assertEqual(more[0]["memory_bytes"], 0)
            else:
                self.assertGreater(more[0]["memory_bytes"], 590_000)
                self.assertLess(more[0]["sent_bytes"], 100_000)

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

    def test_watch_ends_with_a_reader_that_hangs_up(self):
        """For a socket or a terminal, that is not an error of stdout, but its end."""
        for pair in (socket.socketpair, os.openpty):
            ours, theirs = (end if isinstance(end, int) else end.detach() for end in pair())
            watch = subprocess.Popen(
                [PROGRAM, "store", "watch", "t/nothing", "--metadata", self.uri], stdout=theirs,
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env=clean_environment())
            self.addCleanup(watch.communicate)
            self.addCleanup(watch.kill)
            os.close(theirs)
            time.sleep(0.5)
            self.assertIsNone(watch.poll())
            os.close(ours)
            self.assertEqual(watch.wait(LIMIT_SECONDS), 0, pair)

    def test_watch_that_writes_to_a_dead_terminal_ends_quietly(self):
        ours, theirs = os.openpty()
        watch = subprocess.Popen(
            [PROGRAM, "store", "watch", "t/late", "--metadata", self.uri], stdout=theirs,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_environment())
        self.addCleanup(watch.communicate)
        self.addCleanup(watch.kill)
        os.close(theirs)
        time.sleep(0.5)
        # What it has to write when it resumes fails.
        watch.send_signal(signal.SIGSTOP)
        holder = self.start("publish", self.folder / "blob", "--name", "t/late")
        os.close(ours)
        watch.send_signal(signal.SIGCONT)
        self.assertEqual(watch.wait(LIMIT_SECONDS), 0)
        self.assertEqual(watch.stderr.read(), "")
        self.assertEqual(self.ended(holder, signal.SIGTERM)[0], 0)

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
        done = mooncake("store", "list", "--timeout", "0")
        self.assertEqual(done.returncode, 64)
        done = mooncake("store", "list")
        self.assertEqual(done.returncode, 64)
        self.assertIn("mooncake metadata serve", done.stderr)

    # Files where others may write

    def together(self, *commands):
        """Runs commands at once; their exit codes and messages."""
        running = [
            subprocess.Popen(
                [PROGRAM, "store", *words, "--metadata", self.uri], stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, env=clean_environment())
            for words in commands]
        errors = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in running]
        return [process.returncode for process in running], errors

    def test_link_that_looks_like_a_leftover(self):
        self.start("publish", self.folder / "blob", "--name", "t/link")
        victim, place = self.folder / "victim", self.folder / "link-place"
        for folder in (victim, place):
            folder.mkdir()
        (victim / "file").write_text("mine")
        (place / ".mooncake-get-AAAAAA").symlink_to(victim)
        self.rows(self.store("get", "t/link", "--to", place, "--json"))
        self.assertEqual((victim / "file").read_text(), "mine")
        self.assertEqual(sorted(os.listdir(place)), [".mooncake-get-AAAAAA", "blob"])

    def test_many_gets_into_one_directory(self):
        for index in range(8):
            file = self.folder / f"part-{index}"
            file.write_bytes(os.urandom(100_000 + index))
            self.start("publish", file, "--name", f"t/part-{index}")
        for turn in range(3):
            place = self.folder / f"parts-{turn}"
            codes, errors = self.together(
                *(("get", f"t/part-{index}", "--to", place) for index in range(8)))
            self.assertEqual(codes, [0] * 8, errors)
            self.assertEqual(sorted(os.listdir(place)), [f"part-{index}" for index in range(8)])
            codes, errors = self.together(
                *(("get", "t/part-0", "--to", place, "--force") for _ in range(4)))
            self.assertEqual(codes, [0] * 4, errors)
            for index in range(8):
                self.assertEqual((place / f"part-{index}").read_bytes(),
                                 (self.folder / f"part-{index}").read_bytes())
            self.assertEqual(sorted(os.listdir(place)), [f"part-{index}" for index in range(8)])

    def test_killed_get_is_undone(self):
        tree, place = self.folder / "tree", self.folder / "killed"
        for folder, text in ((tree, "new"), (place, "old")):
            folder.mkdir()
            for index in range(3000):
                (folder / str(index)).write_text(text)
        self.start("publish", tree, "--name", "t/tree")
        self.start("publish", self.folder / "blob", "--name", "t/undo")
        numbers = [str(index) for index in range(3000)]
        for delay in (0.0, 0.002, 0.005, 0.01):
            getter = self.start("get", "t/tree", "--to", place, "--force", ready=False)
            end = time.monotonic() + LIMIT_SECONDS
            while time.monotonic() < end and getter.poll() is None and not list(
                    place.glob(".mooncake-get-*/switch")):
                pass
            time.sleep(delay)
            getter.kill()
            getter.communicate()
            # A get of something else undoes what was begun.
            self.rows(self.store("get", "t/undo", "--to", place, "--force", "--json"))
            self.assertEqual(sorted(os.listdir(place)), sorted([*numbers, "blob"]))
            self.assertEqual(len({(place / number).read_text() for number in numbers}), 1)
            self.rows(self.store("get", "t/tree", "--to", place, "--force", "--json"))
            self.assertEqual({(place / number).read_text() for number in numbers}, {"new"})
            self.assertEqual(sorted(os.listdir(place)), sorted([*numbers, "blob"]))
            for number in numbers:
                (place / number).unlink()
                (place / number).write_text("old")

    def test_bytes_changed_in_place(self):
        file = self.folder / "in-place"
        file.write_bytes(b"x" * 300_000)
        times = file.stat()
        holder = self.start(
            "publish", file, "--name", "t/in-place", "--segment", "wrong", "--shard-size", "64KiB")
        with open(file, "r+b") as opened:
            opened.seek(200_000)
            opened.write(b"y")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        for words in ((), ("--to", self.folder / "in-place-copy")):
            done = self.store("get", "t/in-place", *words)
            self.assertEqual(done.returncode, 4, done.stderr)
            self.assertRegex(done.stderr, "wrong at .*sent shard 3 with a wrong digest")
        self.assertFalse((self.folder / "in-place-copy").exists())
        self.assertIsNone(holder.poll())

    def test_paths_are_bytes_and_names_are_text(self):
        odd = os.fsencode(self.folder) + b"/odd-\xff"
        os.mkdir(odd)
        with open(odd + b"/file", "wb") as opened:
            opened.write(b"odd")
        self.start("publish", odd, "--name", "t/odd", "--ready-file", odd + b"-ready")
        self.assertTrue(os.path.exists(odd + b"-ready"))
        for words in ((b"--to", odd + b"-copy"), (b"--to=" + odd + b"-again",)):
            done = self.store("get", "t/odd", *words)
            self.assertEqual(done.returncode, 0, done.stderr)
        for suffix in (b"-copy", b"-again"):
            with open(odd + suffix + b"/file", "rb") as opened:
                self.assertEqual(opened.read(), b"odd")
        for words in ((b"get", b"t/\xff"), (b"get", b"x", b"--segment=\xfe"),
                      (b"publish", odd, b"--name", b"\xff")):
            done = self.store(*words)
            self.assertEqual(done.returncode, 64, done.stderr)
            self.assertIn("not UTF-8", done.stderr)
        done = self.store("publish", odd, self.folder / "blob", "--name", "t/two-odd")
        self.assertEqual(done.returncode, 1)
        self.assertIn("not UTF-8", done.stderr)

    def test_too_many_files(self):
        limit = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
        if limit > 66_000:
            self.skipTest(f"{limit} mappings are allowed")
        tree = self.folder / "many"
        tree.mkdir()
        for index in range(min(limit - 100, 65_500)):
            (tree / str(index)).write_text("x")
        done = self.store("publish", tree, "--name", "t/many")
        self.assertEqual(done.returncode, 1)
        self.assertIn("vm.max_map_count", done.stderr)

    def test_thousands_of_files_over_tcp(self):
        tree, copy = self.folder / "thousands", self.folder / "thousands-copy"
        tree.mkdir()
        for index in range(6_000):
            (tree / str(index)).write_text(str(index))
        self.start("publish", tree, "--name", "t/thousands")
        done = mooncake(
            "store", "get", "t/thousands", "--to", copy, "--metadata", self.uri, MC_FORCE_TCP="1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(
            {path.name for path in copy.iterdir()}, {str(index) for index in range(6_000)})
        self.assertEqual((copy / "5999").read_text(), "5999")

    def test_more_memory_than_there_is(self):
        with open(self.folder / "sparse", "wb") as opened:
            opened.truncate(64 << 20)
        group = pathlib.Path("/sys/fs/cgroup") / f"mooncake-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            self.skipTest(f"no control group can be made: {error}")
        self.addCleanup(group.rmdir)
        if not (group / "memory.max").exists():
            self.skipTest("no control group of memory can be made")
        # Swap counts as room too.
        if not (group / "memory.swap.max").exists():
            self.skipTest("no control group can limit swap, which is room beyond its memory")
        (group / "memory.max").write_text(str(48 << 20))
        (group / "memory.swap.max").write_text("0")
        self.start("publish", self.folder / "sparse", "--name", "t/sparse")
        command = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", command, "sh", PROGRAM, "store", "get", "t/sparse", "--metadata",
             self.uri],
            capture_output=True, text=True, timeout=LIMIT_SECONDS, env=clean_environment())
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("67108864 bytes of memory are needed, the limit of control", done.stderr)
