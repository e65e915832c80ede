"""Tests how the program ends when its output cannot be written, and the options that all commands
share; Tests/program/test_program.py runs them."""

import http.server
import json
import os
import select
import signal
import subprocess
import threading
import time
import unittest
import urllib.request

from program import LIMIT_SECONDS, PROGRAM, clean_environment, mooncake


def start_server(add_cleanup):
    """A metadata server that ends with the test; returns it and its URI."""
    server = subprocess.Popen(
        [PROGRAM, "metadata", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True,
        env=clean_environment())
    add_cleanup(server.communicate)
    add_cleanup(server.terminate)
    # A stopped one would ignore the other signal.
    add_cleanup(server.send_signal, signal.SIGCONT)
    return server, server.stdout.readline().strip()


class Output(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        _, cls.uri = start_server(cls.addClassCleanup)
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
            # `store list` prints its header, and doctor's own findings may give a 1 too.
            self.assertEqual(process.returncode, 1, f"{words}: {errors}")
            self.assertIn("writing to stdout: No space left on device", errors, words)

    def test_help_and_full_device(self):
        for words in (("--help",), ("--version",), ("metadata", "put", "--help"),
                      ("help", "store")):
            with open("/dev/full", "wb") as full:
                process = self.start(*words, stdout=full)
            errors = process.communicate(timeout=LIMIT_SECONDS)[1]
            self.assertEqual(process.returncode, 1, words)
            self.assertIn("writing to stdout: No space left on device", errors)
            self.assertEqual(mooncake(*words).returncode, 0)
        self.assertIn("OVERVIEW", mooncake("--help").stdout)
        wrong = mooncake("--no-such-option")
        self.assertEqual((wrong.returncode, wrong.stdout), (64, ""))
        self.assertIn("no-such-option", wrong.stderr)

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
        """No file of the program gets the descriptor number of stdout."""
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

    def test_lives_of_keys(self):
        for value in ("0", "99ms", "2h"):
            done = mooncake("metadata", "put", "--metadata", "http://127.0.0.1:1/metadata",
                            "k", "v", "--ttl", value)
            self.assertEqual(done.returncode, 64, (value, done.stderr))
            self.assertIn("--ttl must be between 100ms and 1h", done.stderr)

    def test_refused_puts_leave_no_lease(self):
        _, uri = start_server(self.addCleanup)
        put = ("metadata", "put", "--metadata", uri, "k", "v", "--ttl", "30s")
        self.assertEqual(mooncake(*put).returncode, 0)
        for _ in range(3):
            self.assertEqual(mooncake(*put, "--if-absent").returncode, 1)
        too_long = ("metadata", "put", "--metadata", uri, "k" * 3000, "v", "--ttl", "30s")
        self.assertEqual(mooncake(*too_long).returncode, 1)
        health = urllib.request.urlopen(uri.replace("/metadata", "/health"), timeout=10)
        self.assertEqual(json.load(health)["leases"], 1)
        self.assertEqual(mooncake("metadata", "get", "--metadata", uri, "k").stdout, "v\n")


class SlowService(http.server.BaseHTTPRequestHandler):
    """Takes three seconds for a listing, and never has changes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        is_listing = "limit=" in self.path
        time.sleep(3 if is_listing else 0.2)
        entries = [{"key": "mooncake/slow", "value": "v"}]
        answer = {"revision": 7, "more": 0, "entries": entries} if is_listing else {
            "revision": 7, "changes": []}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        try:
            self.wfile.write(text)
        except OSError:
            pass  # The client has given up.

    def log_message(self, *_):
        pass


class Watch(unittest.TestCase):
    def watch(self, uri, *words):
        process = subprocess.Popen(
            [PROGRAM, "metadata", "watch", "--metadata", uri, *words], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=clean_environment())
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def line(self, stream):
        """The next line; empty if none comes in time."""
        return stream.readline() if select.select([stream], [], [], 20)[0] else ""

    def end(self, process):
        """Asks it to end; returns its exit status and the time that took."""
        begin = time.monotonic()
        process.terminate()
        process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, time.monotonic() - begin

    def test_a_server_that_stands_still(self):
        for timeout in ("1s", "3s"):
            server, uri = start_server(self.addCleanup)
            put = ("metadata", "put", "--metadata", uri, "mooncake/key", "value")
            self.assertEqual(mooncake(*put).returncode, 0)
            watch = self.watch(uri, "--timeout", timeout)
            self.assertEqual(self.line(watch.stdout), "put mooncake/key\n")
            server.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            errors = watch.communicate(timeout=LIMIT_SECONDS)[1]
            self.assertEqual(watch.returncode, 1, errors)
            self.assertLess(time.monotonic() - begin, 10)
            self.assertIn("deadline", errors)
            server.send_signal(signal.SIGCONT)

    def test_goes_on_when_the_server_does(self):
        server, uri = start_server(self.addCleanup)
        watch = self.watch(uri)
        time.sleep(0.5)
        server.send_signal(signal.SIGSTOP)
        self.assertIn("deadline", self.line(watch.stderr))
        server.send_signal(signal.SIGCONT)
        put = ("metadata", "put", "--metadata", uri, "mooncake/key", "value")
        self.assertEqual(mooncake(*put).returncode, 0)
        self.assertEqual(self.line(watch.stdout), "put mooncake/key\n")
        self.assertEqual(self.end(watch)[0], 0)

    def test_a_listing_may_take_long_and_can_be_ended(self):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowService)
        server.daemon_threads = True
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/metadata"
        watch = self.watch(uri)
        self.assertEqual(self.line(watch.stdout), "put mooncake/slow\n")
        self.assertEqual(self.end(watch)[0], 0)
        watch = self.watch(uri)
        time.sleep(1)
        code, seconds = self.end(watch)
        self.assertEqual(code, 0)
        self.assertLess(seconds, 1)
