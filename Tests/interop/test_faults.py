"""Peers that die, freeze or come back: every transfer ends in time, and with a reason."""

import subprocess
import sys
import time
import unittest

import lab

# Faults depend more on the release than on the interface.
PAIRS = [pair for pair in lab.all_pairs() if pair[1] == lab.APIS[0]]
if "dropin" in lab.APIS:
    PAIRS.append((lab.releases()[-1], "dropin"))
DEADLINE = 5.0
MARGIN = 3.0  # for a busy machine
MIB = 1 << 20


class Faults:
    """Each test breaks its pair, so each has its own."""

    def setUp(self):
        self.stock = lab.start_stock(self.version)
        self.addCleanup(self.end, self.stock)
        # The drop-in interface takes its deadline from the environment.
        self.ours = lab.start_ours(self.api, MC_TRANSFER_TIMEOUT=str(int(DEADLINE)))
        self.addCleanup(self.end, self.ours)

    def end(self, peer):
        if peer.alive():
            peer.resume()
            peer.quit()

    def check_killed(self, operation):
        self.ours.send(
            "flood",
            peer=self.stock.segment,
            operation=operation,
            remote=self.stock.address,
            length=4 * MIB,
            count=16,
            seconds=40,
            timeout=DEADLINE,
        )
        time.sleep(1)
        killed = time.time()
        self.stock.kill()
        answer = self.ours.receive(60)
        self.assertNotEqual(answer["code"], 0, answer)
        self.assertNotEqual(answer["text"], "", answer)
        self.assertGreaterEqual(answer["rounds"], 1)
        self.assertLess(answer["ended"] - killed, DEADLINE + MARGIN, answer)
        # The next one reaches nobody and says so.
        begin = time.monotonic()
        answer = self.ours.ask(
            "transfer",
            peer=self.stock.segment,
            operation=operation,
            pieces=[[0, self.stock.address, 4096]],
            timeout=DEADLINE,
        )
        self.assertNotEqual(answer["code"], 0, answer)
        self.assertLess(time.monotonic() - begin, DEADLINE + MARGIN, answer)

    def test_stock_killed_during_reads(self):
        self.check_killed("read")

    def test_stock_killed_during_writes(self):
        self.check_killed("write")

    def check_frozen(self, operation):
        pieces = [[0, self.stock.address, 4 * MIB]]
        transfer = {"peer": self.stock.segment, "operation": operation, "pieces": pieces}
        self.assertEqual(self.ours.ask("transfer", **transfer)["code"], 0)
        self.stock.stop()
        answer = self.ours.ask("transfer", timeout=DEADLINE, **transfer)
        if not (self.version == "0.3.9" and operation == "write"):
            # With v1 framing a write may end once the frozen peer's kernel has it.
            self.assertNotEqual(answer["code"], 0, answer)
        self.assertLess(answer["seconds"], DEADLINE + MARGIN, answer)
        # Terminal means terminal: what the peer sends later must not be stored.
        self.ours.ask("fill", offset=0, length=4 * MIB, seed="reused")
        before = self.ours.ask("digest", offset=0, length=4 * MIB)["digest"]
        self.stock.resume()
        time.sleep(1)
        after = self.ours.ask("digest", offset=0, length=4 * MIB)["digest"]
        if not lab.SELF_CHECK:  # Mooncake does let it land
            self.assertEqual(after, before)
        if operation == "write":
            self.ours.ask("fill", offset=0, length=4 * MIB, seed="newer")
        again = lab.wait_until(
            lambda: self.ours.ask("transfer", **transfer)["code"] == 0, 15, pause=0.5
        )
        self.assertTrue(again, "no transfer succeeds after the peer has woken")
        if operation == "write" and not lab.SELF_CHECK:
            # What the frozen peer had received must not overwrite later data.
            self.check_stays()

    def check_stays(self):
        expected = self.ours.ask("digest", offset=0, length=4 * MIB)["digest"]
        for pause in (0, 0.3, 1):
            time.sleep(pause)
            stored = self.stock.ask("digest", offset=0, length=4 * MIB)["digest"]
            self.assertEqual(stored, expected, f"{pause} s after the write")

    def test_overwriting_what_timed_out(self):
        """Short deadlines and random freezes: what a completed write has stored stays."""
        if lab.SELF_CHECK:
            self.skipTest("Mooncake promises no order here")
        pieces = [[0, self.stock.address, 4 * MIB]]
        transfer = {"peer": self.stock.segment, "operation": "write", "pieces": pieces}
        self.assertEqual(self.ours.ask("transfer", **transfer)["code"], 0)
        for round in range(6):
            self.ours.ask("fill", offset=0, length=4 * MIB, seed=f"early {round}")
            self.stock.stop()
            timeout = DEADLINE if self.api == "dropin" else 0.2
            answer = self.ours.ask("transfer", timeout=timeout, **transfer)
            self.assertNotEqual(answer["code"], 0, answer)
            self.assertLess(answer["seconds"], timeout + MARGIN, answer)
            self.stock.resume()
            self.ours.ask("fill", offset=0, length=4 * MIB, seed=f"late {round}")
            answer = self.ours.ask("transfer", timeout=DEADLINE, **transfer)
            self.assertEqual(answer["code"], 0, answer)
            self.check_stays()
            if self.api == "dropin":
                break  # its deadline is in whole seconds

    def test_stock_frozen_during_reads(self):
        self.check_frozen("read")

    def test_stock_frozen_during_writes(self):
        self.check_frozen("write")

    def test_ours_ends_under_load(self):
        """An engine that is destroyed while a peer uses it ends properly, and the peer notices."""
        self.stock.send(
            "flood",
            peer=self.ours.segment,
            operation="read",
            remote=self.ours.address,
            length=4 * MIB,
            count=4,
            seconds=30,
            timeout=DEADLINE,
        )
        time.sleep(1)
        self.ours.quit()
        answer = self.stock.receive(60)
        self.assertNotEqual(answer["code"], 0, answer)
        self.assertGreaterEqual(answer["rounds"], 1)


class Restarts(unittest.TestCase):
    """A peer that returns under its name, with other ports and addresses, is found again."""

    def test_stock_restarts(self):
        for version, api in PAIRS:
            with self.subTest(version=version, api=api):
                self.check(version, api)

    def check(self, version, api):
        done = subprocess.run(
            [sys.executable, "-B", str(lab.HERE / "restart_scenario.py"), version, api],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        self.assertEqual(done.returncode, 0, done.stdout)


lab.for_each_pair(globals(), Faults, PAIRS)
for name in list(globals()):
    if name.startswith("Faults_"):
        # Not the pair of the class, which is shared between tests elsewhere.
        globals()[name].setUpClass = classmethod(lambda cls: None)
