#!/usr/bin/env python3
"""Tests the mooncake program and the examples from outside, as their users meet them.

  Tests/program/test_program.py [UNITTEST ARGUMENTS]

$BUILD is the build folder (default .build); `make all examples` fills it.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from program import BUILD, LIBRARY, LIMIT_SECONDS, PROGRAM, clean_environment, mooncake, run
from test_output import Options, Output, Watch  # noqa: F401  (run with the tests below)
from test_store_commands import Store  # noqa: F401

EXAMPLES = BUILD / "examples"
SWIFT_EXAMPLES = BUILD / "swift-examples" / "release"


class Server:
    """A process that prints `segment NAME buffer ADDRESS LENGTH` first and serves until stopped."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(),
        )
        line = self.process.stdout.readline()
        words = line.split()
        if words[:1] != ["segment"]:
            self.process.kill()
            raise AssertionError(f"{command}: {line}{self.process.communicate()[0]}")
        self.segment, self.address, self.length = words[1], int(words[3], 0), int(words[4])

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.communicate(timeout=LIMIT_SECONDS)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def target(*words):
    return Server(PROGRAM, "bench", "target", *words)


def unused_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Bench(unittest.TestCase):
    def initiator(self, server, *words):
        return mooncake("bench", "initiator", "--segment", server.segment, *words)

    def rows(self, done):
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_json_has_every_key_and_adds_up(self):
        with target("--buffer-size", "8MiB") as server:
            done = self.initiator(
                server, *("--block-size", "4KiB", "--batch-size", "16", "--threads", "2"),
                *("--iterations", "50", "--operation", "write", "--json"),
            )
        (row,) = self.rows(done)
        self.assertEqual(row["bytes"], 2 * 50 * 16 * 4096)
        self.assertEqual((row["operations"], row["batches"]), (2 * 50 * 16, 2 * 50))
        self.assertEqual((row["block_size"], row["batch_size"], row["threads"]), (4096, 16, 2))
        self.assertEqual((row["operation"], row["errors"]), ("write", 0))
        rate = row["bytes"] / row["seconds"]
        self.assertAlmostEqual(row["bytes_per_second"], rate, delta=rate / 100)
        latency = row["latency_us"]
        ordered = [latency[name] for name in ("p50", "p90", "p99", "p999", "max")]
        self.assertEqual(ordered, sorted(ordered))
        self.assertGreater(ordered[0], 0)
        self.assertGreater(row["cpu_seconds"], 0)
        self.assertGreater(row["cpu_seconds_per_gb"], 0)
        self.assertRegex(row["version"], r"^\d+\.\d+\.\d+$")

    def test_sweep_gives_one_row_for_each_combination(self):
        with target("--buffer-size", "4MiB") as server:
            done = self.initiator(
                server, *("--block-size", "1,4097,64KiB", "--batch-size", "1,3"),
                *("--iterations", "5", "--json"),
            )
        found = [(row["block_size"], row["batch_size"]) for row in self.rows(done)]
        self.assertEqual(found, [(1, 1), (1, 3), (4097, 1), (4097, 3), (65536, 1), (65536, 3)])

    def test_verifies_every_operation_and_order(self):
        with target("--buffer-size", "2MiB") as server:
            for operation in ("read", "write", "mixed"):
                for order in ("sequential", "random", "same", "fixed"):
                    for more in ((), ("--async",)):
                        done = self.initiator(
                            server, *("--operation", operation, "--access-pattern", order),
                            *("--block-size", "1,4095,65536", "--batch-size", "1,4"),
                            *("--threads", "2", "--iterations", "6", "--verify", "--json", *more),
                        )
                        for row in self.rows(done):
                            self.assertGreaterEqual(row["verified_bytes"], row["bytes"] // 2)
                            self.assertGreater(row["verified_bytes"], 0)

    def test_several_targets_share_each_batch(self):
        with target("--engines", "3", "--buffer-size", "1MiB") as server:
            lines = [server.process.stdout.readline() for _ in range(2)]
            segments = [server.segment] + [line.split()[1] for line in lines]
            self.assertEqual(len(set(segments)), 3)
            done = mooncake(
                "bench", "initiator", "--segment", ",".join(segments), "--operation", "mixed",
                *("--block-size", "4097", "--batch-size", "7", "--iterations", "30", "--verify"),
                *("--access-pattern", "random", "--json"))
            served = server.end()
        (row,) = self.rows(done)
        self.assertEqual(row["segments"], 3)
        self.assertGreater(row["verified_bytes"], 0)
        for segment in segments:
            self.assertIn(f"segment {segment}", served)

    def test_pattern_of_the_target_is_checked(self):
        with target("--buffer-size", "1MiB", "--pattern", "7", "--access", "read") as server:
            words = ("--block-size", "4097", "--batch-size", "8", "--iterations", "20", "--json")
            self.rows(self.initiator(server, "--pattern", "7", *words))
            wrong = self.initiator(server, "--pattern", "8", *words)
        self.assertEqual(wrong.returncode, 1)
        self.assertRegex(wrong.stderr, r"wrong data at offset \d+ of the target's buffer")
        self.assertGreater(json.loads(wrong.stdout)["errors"], 0)

    def test_refused_access_is_an_error(self):
        with target("--buffer-size", "64KiB", "--access", "read") as server:
            done = self.initiator(
                server, *("--operation", "write", "--block-size", "4KiB", "--batch-size", "1"),
                *("--iterations", "1"),
            )
        self.assertEqual(done.returncode, 1)
        self.assertIn(server.segment, done.stderr)

    def test_failures_say_what_to_do(self):
        with target("--buffer-size", "64KiB") as server:
            too_large = self.initiator(server, "--block-size", "1MiB", "--iterations", "1")
            no_buffer = self.initiator(server, "--buffer-index", "1", "--iterations", "1")
        self.assertEqual((too_large.returncode, no_buffer.returncode), (1, 1))
        self.assertIn("too small", too_large.stderr)
        self.assertIn("--buffer-index", no_buffer.stderr)
        port = unused_port()
        nobody = mooncake("bench", "initiator", "--segment", f"127.0.0.1:{port}")
        self.assertEqual(nobody.returncode, 1)
        self.assertIn(f"127.0.0.1:{port}", nobody.stderr)
        self.assertEqual(len(nobody.stderr.splitlines()), 1, nobody.stderr)

    def test_arguments_are_checked(self):
        for words in (
            ("target", "--buffer-size", "4x"),
            ("target", "--buffer-size", "0"),
            ("target", "--buffer-size", "99999999999TiB"),
            ("target", "--port", "70000"),
            ("target", "--pattern", "1", "--fill", "2"),
            ("initiator",),
            ("initiator", "--segment", "a", "--protocol", "carrier-pigeon"),
            ("initiator", "--segment", "a", "--block-size", "4KiB,,1MiB"),
            ("initiator", "--segment", "a", "--batch-size", "0"),
            ("initiator", "--segment", "a", "--threads", "100000"),
            ("initiator", "--segment", "a", "--duration", "-1"),
            ("initiator", "--segment", "a", "--duration", "1", "--iterations", "1"),
            ("initiator", "--segment", "a", "--operation", "write", "--pattern", "1"),
        ):
            done = mooncake("bench", *words)
            self.assertEqual(done.returncode, 64, f"{words}: {done.stderr}")
            self.assertIn("Error:", done.stderr)

    def test_interrupt_prints_what_was_measured(self):
        with target("--buffer-size", "4MiB") as server:
            process = subprocess.Popen(
                [PROGRAM, "bench", "initiator", "--segment", server.segment]
                + ["--duration", "600", "--warmup", "0", "--json", "--batch-size", "8"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=clean_environment(),
            )
            try:
                process.communicate(timeout=2)
                self.fail("ended before the interrupt")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        self.assertEqual(process.returncode, 0, errors)
        row = json.loads(output)
        self.assertTrue(row["interrupted"])
        self.assertGreater(row["bytes"], 0)
        self.assertLess(row["seconds"], 600)

    def test_death_of_the_target_is_an_error_in_time(self):
        server = target("--buffer-size", "4MiB")
        process = subprocess.Popen(
            [PROGRAM, "bench", "initiator", "--segment", server.segment]
            + ["--duration", "600", "--json", "--batch-size", "8", "--timeout", "3"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        try:
            process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            pass
        server.end(signal.SIGKILL)
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
        self.assertEqual(process.returncode, 1, output + errors)
        self.assertIn(server.segment, errors)
        self.assertGreater(json.loads(output)["bytes"], 0)

    def test_target_ends_when_told_to(self):
        server = target("--buffer-size", "64KiB", "--until-eof")
        server.process.stdin.close()
        self.assertEqual(server.process.wait(LIMIT_SECONDS), 0)
        self.assertIn("served for", server.process.stdout.read())
        server.process.stdout.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            server = target("--buffer-size", "64KiB")
            self.assertIn("served for", server.end(number))
            self.assertEqual(server.process.returncode, 0)
        server = target("--buffer-size", "64KiB", "--duration", "100ms")
        self.assertEqual(server.process.wait(LIMIT_SECONDS), 0)
        server.process.communicate()


class Doctor(unittest.TestCase):
    def findings(self, done):
        report = json.loads(done.stdout)
        flat = {}
        for group in report["groups"]:
            for finding in group["findings"]:
                flat[(group["group"], finding["subject"])] = finding
                if finding["level"] != "ok":
                    self.assertTrue(finding["advice"], finding)
        return report, flat

    def test_this_machine(self):
        done = mooncake("doctor", "--json")
        self.assertEqual(done.returncode, 0, done.stdout)
        report, flat = self.findings(done)
        self.assertEqual(report["problems"], 0)
        self.assertEqual(flat[("Self test", "4096 bytes there and back (tcp)")]["level"], "ok")
        self.assertEqual(flat[("Self test", "4096 bytes there and back (shm)")]["level"], "ok")
        self.assertIn(("Shared memory", "host identity"), flat)
        self.assertIn(("Limits", "locked memory"), flat)
        for name in "libcurl hiredis libibverbs librdmacm libnvme libfuse3 OpenSSL".split():
            self.assertIn(("Optional libraries", name), flat)
        text = mooncake("doctor")
        self.assertIn("0 problem(s)", text.stdout)

    def test_variables(self):
        variables = {"MC_HANDSHAKE_PORT": "http", "MC_NO_SUCH": "1", "MC_USE_IPV6": "0"}
        done = mooncake("doctor", "--json", **variables)
        self.assertEqual(done.returncode, 1)
        _, flat = self.findings(done)
        levels = {
            name: flat[("Environment variables", name)]["level"]
            for name in variables
        }
        self.assertEqual(
            levels, {"MC_HANDSHAKE_PORT": "problem", "MC_NO_SUCH": "warning", "MC_USE_IPV6": "ok"}
        )

    def test_peer(self):
        with target("--buffer-size", "64KiB") as server:
            done = mooncake("doctor", server.segment, "--json")
        self.assertEqual(done.returncode, 0, done.stdout)
        _, flat = self.findings(done)
        group = f"Peer {server.segment}"
        steps = (
            "RPC port", "probe", "segment descriptor", "TCP framing", "data port", "transfer",
            "shared memory",
        )
        for subject in steps:
            self.assertEqual(flat[(group, subject)]["level"], "ok", subject)
        self.assertIn("version 2", flat[(group, "TCP framing")]["detail"])

    def test_unreachable_peers(self):
        port = unused_port()
        for name, subject in (
            (f"127.0.0.1:{port}", "RPC port"),
            ("no-such-host.invalid:1", "name"),
            ("[::1", "name"),
        ):
            done = mooncake("doctor", name, "--json", "--timeout", "2")
            self.assertEqual(done.returncode, 1, done.stdout)
            _, flat = self.findings(done)
            self.assertEqual(flat[(f"Peer {name}", subject)]["level"], "problem")

    def test_silent_peer(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            name = f"127.0.0.1:{listener.getsockname()[1]}"
            done = mooncake("doctor", name, "--json", "--timeout", "500ms")
        self.assertEqual(done.returncode, 1)
        _, flat = self.findings(done)
        self.assertEqual(flat[(f"Peer {name}", "RPC port")]["level"], "ok")
        self.assertEqual(flat[(f"Peer {name}", "segment descriptor")]["level"], "problem")


class SharedMemoryBoundaries(unittest.TestCase):
    """Peers on this host that shared memory cannot reach, or not in every way: TCP serves them."""

    def pattern_read(self, server):
        done = mooncake(
            *("bench", "initiator", "--segment", server.segment, "--operation", "mixed"),
            *("--block-size", "64KiB", "--batch-size", "8", "--iterations", "20"),
            *("--verify", "--json"),
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(json.loads(done.stdout)["errors"], 0)

    def finding(self, server):
        done = mooncake("doctor", server.segment, "--json")
        self.assertEqual(done.returncode, 0, done.stdout)
        for group in json.loads(done.stdout)["groups"]:
            for finding in group["findings"]:
                if (group["group"], finding["subject"]) == (
                    f"Peer {server.segment}", "shared memory"
                ):
                    return finding
        self.fail(done.stdout)

    def serve_under(self, *prefix):
        probe = subprocess.run([*prefix, PROGRAM, "--version"], capture_output=True, text=True)
        if probe.returncode != 0:
            self.skipTest(f"{prefix[0]} does not work here: {probe.stderr.strip()}")
        return Server(*prefix, PROGRAM, "bench", "target", "--buffer-size", "8MiB", "--until-eof")

    def test_another_pid_namespace(self):
        with self.serve_under("unshare", "--pid", "--fork", "--kill-child") as server:
            self.assertIn("namespaces", self.finding(server)["detail"])
            self.pattern_read(server)

    def test_another_user(self):
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        with self.serve_under(*nobody) as server:
            finding = self.finding(server)
            self.assertEqual(finding["level"], "warning")
            self.assertIn("cannot be reached", finding["detail"])
            self.pattern_read(server)

    def test_switched_off_by_the_peer(self):
        with Server("env", "MC_FORCE_TCP=1", PROGRAM, "bench", "target") as server:
            self.assertIn("not offered", self.finding(server)["detail"])
            self.pattern_read(server)


class Examples(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.model = cls.folder / "model"
        # Not a multiple of requests, pages or words.
        cls.model.write_bytes(os.urandom((33 << 20) + 4097))
        cls.info = cls.folder / "info"

    def trainer(self):
        return Server(EXAMPLES / "trainer", "--info", self.info, self.model)

    def inferencer(self, *words):
        return run(EXAMPLES / "inferencer", *words)

    def test_model_arrives_and_is_written(self):
        output = self.folder / "copy"
        with self.trainer() as server:
            done = self.inferencer("--info", self.info, "--output", output)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertRegex(
                done.stdout,
                r"^bytes \d+ seconds \S+ gb_per_second \S+ sha256 \w{64} verified\n$",
            )
            self.assertEqual(output.read_bytes(), self.model.read_bytes())
            self.assertEqual(self.inferencer(server.segment).returncode, 0)
        self.assertEqual([path.name for path in self.folder.glob(".*")], [])

    def test_wrong_data_and_places_are_refused(self):
        with self.trainer():
            done = self.inferencer("--info", self.info, "--sha256", "0" * 64)
            self.assertEqual(done.returncode, 1)
            self.assertIn("the data is wrong", done.stderr)
            done = self.inferencer("--info", self.info, "--output", self.folder / "none" / "copy")
            self.assertEqual(done.returncode, 1)
            beyond = self.folder / "beyond"
            text = self.info.read_text()
            size = self.model.stat().st_size + 1
            beyond.write_text(re.sub(r" \d+ sha256", f" {size} sha256", text))
            done = self.inferencer("--info", beyond)
            self.assertEqual(done.returncode, 1)
            self.assertIn("MOONCAKE_ERROR_NOT_REGISTERED", done.stderr)
        done = self.inferencer("--info", self.info)
        self.assertEqual(done.returncode, 1)
        self.assertIn("MOONCAKE_ERROR_UNREACHABLE", done.stderr)

    def test_swift_pair(self):
        self.info.unlink(missing_ok=True)
        with Server(SWIFT_EXAMPLES / "Trainer", "--info", self.info, self.model):
            done = run(SWIFT_EXAMPLES / "Inferencer", "--info", self.info)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"^bytes \d+ .* sha256 \w{64} verified\n$")

    def test_trainer_ends_with_its_input(self):
        server = self.trainer()
        server.process.stdin.close()
        self.assertEqual(server.process.wait(LIMIT_SECONDS), 0)
        self.assertIn("served for", server.process.stdout.read())
        server.process.stdout.close()

    def test_bad_arguments(self):
        empty = self.folder / "empty"
        empty.touch()
        for words, code in (
            ((empty,), 1),
            ((self.folder / "none",), 1),
            (("--port", "70000", self.model), 2),
            ((), 2),
            (("--library", self.model, self.model), 1),
        ):
            done = run(EXAMPLES / "trainer", *words)
            self.assertEqual(done.returncode, code, f"{words}: {done.stderr}")
            self.assertTrue(done.stderr)

    def start(self, *command):
        """A process that prints one line when it is ready; returns it and the line."""
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=clean_environment(),
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, LIMIT_SECONDS)
        self.addCleanup(process.kill)
        return process, process.stdout.readline().strip()

    def test_store_publishes_and_gets(self):
        copy = self.folder / "store-copy"
        _, uri = self.start(PROGRAM, "metadata", "serve", "--port", "0")
        publisher, line = self.start(EXAMPLES / "store_publish", uri, "model-v1", self.model)
        size = self.model.stat().st_size
        match = re.fullmatch(rf"published model-v1 version (\w{{32}}) size {size}", line)
        self.assertTrue(match, line)
        done = run(EXAMPLES / "store_get", uri, "model-v1", copy)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"version {match[1]} size {size} ", done.stdout)
        self.assertIn(f" verified\n  {size} bytes from ", done.stdout)
        self.assertEqual(copy.read_bytes(), self.model.read_bytes())
        publisher.terminate()
        self.assertEqual(publisher.wait(LIMIT_SECONDS), 0)
        done = run(EXAMPLES / "store_get", uri, "model-v1", copy)
        self.assertEqual(done.returncode, 1)
        self.assertIn("MOONCAKE_ERROR_NOT_FOUND", done.stderr)


if __name__ == "__main__":
    for path in (PROGRAM, LIBRARY, EXAMPLES / "trainer", SWIFT_EXAMPLES / "Trainer"):
        if not path.exists():
            sys.exit(f"test-program: {path} does not exist; run `make all examples`")
    unittest.main(verbosity=2)
