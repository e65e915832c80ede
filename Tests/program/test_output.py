"""Tests how the program ends when what it prints cannot be written, and the options that all
commands share; scripts/test-program runs them."""

import os
import subprocess
import time
import unittest

from program import LIMIT_SECONDS, PROGRAM, clean_environment, mooncake


class Output(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        server = subprocess.Popen(
            [PROGRAM, "metadata", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True,
            env=clean_environment())
        cls.addClassCleanup(server.communicate)
        cls.addClassCleanup(server.terminate)
        cls.uri = server.stdout.readline().strip()
        done = mooncake("metadata", "put", "--metadata", cls.uri, "mooncake/key", "value")
        assert done.returncode == 0, done.stderr

    def start(self, *words, stdout):
        return subprocess.Popen(
            [PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            text=True, env=clean_environment(MC_METADATA_SERVER=self.uri))

    COMMANDS = (
        ("metadata", "list"), ("metadata", "get", "mooncake/key"), ("metadata", "watch"),
        ("store", "list"), ("doctor", "--json"), ("doctor",), ("metadata", "serve", "--port", "0"),
        ("bench", "target", "--buffer-size", "1MiB"),
    )

    def test_full_device(self):
        for words in self.COMMANDS:
            with open("/dev/full", "wb") as full:
                process = self.start(*words, stdout=full)
            errors = process.communicate(timeout=LIMIT_SECONDS)[1]
            # `store list` prints its titles, and doctor's own findings may be worth a 1, too.
            self.assertEqual(process.returncode, 1, f"{words}: {errors}")
            if words[0] != "doctor" or errors:
                self.assertIn("writing to stdout: No space left on device", errors)

    def test_closed_pipe(self):
        for words in self.COMMANDS[:4]:
            reader, writer = os.pipe()
            os.close(reader)
            process = self.start(*words, stdout=writer)
            os.close(writer)
            errors = process.communicate(timeout=LIMIT_SECONDS)[1]
            self.assertEqual((process.returncode, errors), (0, ""), words)

    def test_watch_ends_with_its_reader(self):
        for command in ("metadata watch", "metadata watch --json"):
            begin = time.monotonic()
            done = subprocess.run(
                ["sh", "-c", f'"$0" {command} 2>&1 | head -1', PROGRAM], capture_output=True,
                text=True, timeout=LIMIT_SECONDS,
                env=clean_environment(MC_METADATA_SERVER=self.uri))
            self.assertIn("mooncake/key", done.stdout)
            self.assertLess(time.monotonic() - begin, 10)

    def test_bench_reports_and_full_device(self):
        target = subprocess.Popen(
            [PROGRAM, "bench", "target", "--buffer-size", "4MiB"], stdout=subprocess.PIPE,
            text=True, env=clean_environment())
        self.addCleanup(target.communicate)
        self.addCleanup(target.kill)
        segment = target.stdout.readline().split()[1]
        words = ("bench", "initiator", "--segment", segment, "--block-size", "4KiB",
                 "--batch-size", "4", "--iterations", "5", "--json")
        for more, variables, carried in (
            ((), {}, "shm"), ((), {"MC_FORCE_TCP": "1"}, "tcp"), (("--protocol", "tcp"), {}, "tcp"),
        ):
            done = mooncake(*words, *more, **variables)
            self.assertIn(f'"protocol":"{carried}"', done.stdout, done.stderr)
        with open("/dev/full", "wb") as full:
            process = self.start(*words, stdout=full)
        errors = process.communicate(timeout=LIMIT_SECONDS)[1]
        self.assertEqual(process.returncode, 1)
        self.assertIn("writing to stdout", errors)

    def test_closed_descriptors(self):
        """Nothing of the program gets the number of stdout."""
        done = subprocess.run(
            ["sh", "-c", 'exec "$0" metadata list >&- <&-', PROGRAM], stderr=subprocess.PIPE,
            text=True, timeout=LIMIT_SECONDS, env=clean_environment(MC_METADATA_SERVER=self.uri))
        self.assertEqual((done.returncode, done.stderr), (0, ""))


class Options(unittest.TestCase):
    def test_metadata_is_an_option_everywhere(self):
        for words in (("metadata", "list"), ("metadata", "watch"), ("metadata", "get", "k"),
                      ("store", "list")):
            done = mooncake(*words)
            self.assertEqual(done.returncode, 64, words)
            self.assertIn("--metadata", done.stderr)

    def test_timeouts_have_units(self):
        for words in (("metadata", "list", "--metadata", "http://127.0.0.1:1/metadata"),
                      ("doctor",), ("bench", "initiator", "--segment", "x")):
            for value in ("0", "2h30", "-1", "25h"):
                done = mooncake(*words, "--timeout", value)
                self.assertEqual(done.returncode, 64, (words, value, done.stderr))
            self.assertEqual(mooncake(*words, "--timeout-ms", "1000").returncode, 64)

    def test_watch_waits_as_long_as_it_is_told(self):
        begin = time.monotonic()
        done = mooncake(
            "metadata", "watch", "--metadata", "http://127.0.0.1:1/metadata", "--timeout", "1500ms")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertGreater(time.monotonic() - begin, 1.4)
        self.assertLess(time.monotonic() - begin, 10)
        self.assertIn("127.0.0.1:1", done.stderr)
