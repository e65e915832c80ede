"""Mooncake's benchmark program and ours, each against the other's target."""

import json
import os
import re
import subprocess
import time
import unittest

import lab

BUFFER = 64 << 20
MISSING = "the mooncake program is not beside the library; set MOONCAKE_CLI"


def common_arguments(mode):
    return [
        f"--mode={mode}",
        "--protocol=tcp",
        "--metadata_server=P2PHANDSHAKE",
        "--local_server_name=127.0.0.1:12345",
        f"--buffer_size={BUFFER}",
    ]


def run_stock_initiator(version, segment, operation, block_size=4096, batch_size=128):
    """Runs Mooncake's initiator for a second; returns its batch count."""
    done = subprocess.run(
        [
            lab.stock_bench(version),
            *common_arguments("initiator"),
            f"--segment_id={segment}",
            f"--operation={operation}",
            f"--block_size={block_size}",
            f"--batch_size={batch_size}",
            "--threads=1",
            "--duration=1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        env=lab.stock_variables(),
    )
    found = re.search(r"Test completed: duration .*, batch count (\d+)", done.stdout)
    if done.returncode != 0 or not found:
        raise AssertionError(f"transfer_engine_bench {version} failed:\n{done.stdout}")
    return int(found.group(1))


def start_stock_target(version):
    command = [lab.stock_bench(version), *common_arguments("target")]
    program = lab.Program(command, lab.stock_variables())
    try:
        segment = program.find(r"P2P handshake, listening on (127\.0\.0\.1:\d+)").group(1)
        program.find(r"TcpTransport: listen on port")
        # It publishes its buffer some moments after the port.
        time.sleep(1)
    except BaseException:
        program.end()
        raise
    return program, segment


class StockInitiator:
    """transfer_engine_bench against the library."""

    def test_read(self):
        self.assertGreater(run_stock_initiator(self.version, self.ours.segment, "read"), 0)

    def test_write(self):
        self.assertGreater(run_stock_initiator(self.version, self.ours.segment, "write"), 0)

    def test_large_blocks(self):
        for operation in ("read", "write"):
            count = run_stock_initiator(
                self.version, self.ours.segment, operation, block_size=1 << 20, batch_size=16
            )
            self.assertGreater(count, 0)


class Programs(unittest.TestCase):
    def setUp(self):
        self.cli = os.environ.get("MOONCAKE_CLI")
        if lab.SELF_CHECK:
            self.skipTest("self-check: the mooncake program has no counterpart")
        if not self.cli:
            self.skipTest(MISSING)

    def initiate(self, segment, operation, *more):
        done = subprocess.run(
            [
                *(self.cli, "bench", "initiator", "--segment", segment),
                *("--operation", operation, "--block-size", "64KiB", "--batch-size", "32"),
                *("--threads", "2", "--duration", "1", "--json", *more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        result = json.loads(done.stdout)
        self.assertEqual(result["errors"], 0, result)
        self.assertGreater(result["bytes_per_second"], 0, result)
        self.assertGreater(result["latency_us"]["p50"], 0, result)

    def test_our_initiator_with_stock_target(self):
        for version in lab.releases():
            with self.subTest(version=version):
                target, segment = start_stock_target(version)
                try:
                    for operation in ("read", "write", "mixed"):
                        self.initiate(segment, operation)
                finally:
                    target.end()

    def test_our_initiator_verifies_with_stock_peer(self):
        for version in lab.releases():
            with self.subTest(version=version):
                stock = lab.start_stock(version)
                try:
                    self.initiate(stock.segment, "write", "--verify")
                    self.assertTrue(stock.ask("guards")["intact"])
                finally:
                    stock.quit()

    def test_stock_initiator_with_our_target(self):
        target = lab.Program(
            [
                *(self.cli, "bench", "target", "--bind", "127.0.0.1", "--port", "0"),
                *("--buffer-size", "64MiB", "--duration", "300"),
            ]
        )
        self.addCleanup(target.end)
        segment = target.find(r"segment (\S+) buffer \S+ \d+").group(1)
        for version in lab.releases():
            for operation in ("read", "write"):
                with self.subTest(version=version, operation=operation):
                    self.assertGreater(run_stock_initiator(version, segment, operation), 0)


lab.for_each_pair(globals(), StockInitiator)
