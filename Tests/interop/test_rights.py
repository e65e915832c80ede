"""Memory outside a registered buffer is neither read nor written, by either side."""

import time
import unittest

import lab
from peer_commands import GUARD


def outside(target):
    """Ranges not entirely inside the target's buffer: what, address, length."""
    begin, end = target.address, target.address + target.length
    return (
        ("just before", begin - 16, 16),
        ("across the begin", begin - 8, 16),
        ("large, across the begin", begin - 4096, 1 << 20),
        ("across the end", end - 8, 16),
        ("large, across the end", end - (1 << 20) + 1, 1 << 20),
        ("just after", end, 16),
        ("mapped, far after", end + GUARD - 4096, 4096),
        ("never mapped", 4096, 4096),
        ("wraps around", 2**64 - 8, 16),
    )


class Rights:
    def check_refused(self, initiator, target, operation, must_fail, names_peer):
        target.ask("fill", offset=0, length=target.length, seed="rights")
        before = target.ask("digest")["digest"]
        initiator.ask("fill", offset=0, length=1 << 20, seed="intruder")
        for what, address, length in outside(target):
            with self.subTest(what=what):
                answer = initiator.ask(
                    "transfer",
                    peer=target.segment,
                    operation=operation,
                    pieces=[[0, address, length]],
                    timeout=8.0,
                )
                if must_fail:
                    self.assertNotEqual(answer["code"], 0, f"{operation} was not refused")
                self.assertLess(answer["seconds"], 4, answer)
                if names_peer and what != "wraps around":  # this one involves no peer
                    self.assertIn(target.segment, answer["text"])
                self.check_still_served(initiator, target)
        time.sleep(0.3)  # for a write whose initiator does not wait for the outcome
        self.assertTrue(target.ask("guards")["intact"], "bytes outside of the buffer changed")
        self.assertEqual(target.ask("digest")["digest"], before, "bytes of the buffer changed")

    def check_still_served(self, initiator, target):
        """After a refused transfer, the next one works."""
        # Once each of its four connections has had a refusal, 0.3.13 fails everything for a second.
        patience = 4 if initiator is self.stock or lab.SELF_CHECK else 0
        piece = [2 << 20, target.address, 4096]
        served = lab.wait_until(
            lambda: initiator.ask(
                "transfer", peer=target.segment, operation="read", pieces=[piece]
            )["code"]
            == 0,
            patience,
            pause=0.2,
        )
        self.assertTrue(served, initiator.log_tail() + target.log_tail())

    def test_stock_cannot_write_outside_ours(self):
        # With v1 framing nothing tells the initiator that its write was dropped.
        must_fail = self.version != "0.3.9"
        self.check_refused(self.stock, self.ours, "write", must_fail, names_peer=False)

    def test_stock_cannot_read_outside_ours(self):
        self.check_refused(self.stock, self.ours, "read", True, names_peer=False)

    def needs_checking_initiator(self):
        if lab.SELF_CHECK and self.version == "0.3.9":
            self.skipTest("self-check: neither side of this pair checks addresses")

    def test_ours_cannot_write_outside_stock(self):
        """0.3.9 to 0.3.11 check nothing, so the initiator has to."""
        self.needs_checking_initiator()
        self.check_refused(self.ours, self.stock, "write", True, not lab.SELF_CHECK)

    def test_ours_cannot_read_outside_stock(self):
        self.needs_checking_initiator()
        self.check_refused(self.ours, self.stock, "read", True, not lab.SELF_CHECK)

    def test_one_bad_request_of_a_batch(self):
        """The bad one fails the batch; the good ones' bytes arrive, and nothing else does."""
        self.needs_ours()
        count, size = 32, 4096
        self.ours.ask("fill", offset=0, length=count * size, seed="partly")
        pieces = [[i * size, self.stock.address + i * size, size] for i in range(count)]
        pieces[count // 2][1] = self.stock.address + self.stock.length - 8
        answer = self.ours.ask(
            "transfer", peer=self.stock.segment, operation="write", pieces=pieces, timeout=8.0
        )
        self.assertNotEqual(answer["code"], 0)
        self.assertLess(answer["seconds"], 9, answer)
        self.assertTrue(self.stock.ask("guards")["intact"])


class Revoked(unittest.TestCase):
    """A peer with an outdated descriptor is refused once a buffer is unregistered."""

    def check(self, version, api):
        stock = lab.start_stock(version)
        self.addCleanup(stock.quit)
        ours = lab.start_ours(api)
        self.addCleanup(ours.quit)
        ours.ask("fill", offset=0, length=8192, seed="revoked")
        pieces = [[0, ours.address, 4096]]
        transfer = {"peer": ours.segment, "pieces": pieces}
        for operation in ("read", "write"):
            answer = stock.ask("transfer", operation=operation, **transfer)
            self.assertEqual(answer["code"], 0, answer)
        # A v1 write may be reported while it is still on its way.
        time.sleep(0.3)
        self.assertEqual(ours.ask("unregister")["code"], 0)
        before = ours.ask("digest", offset=0, length=1 << 20)["digest"]
        stock.ask("fill", offset=0, length=4096, seed="too late")
        self.assertNotEqual(stock.ask("transfer", operation="read", **transfer)["code"], 0)
        stock.ask("fill", offset=0, length=4096, seed="too late")
        written = stock.ask("transfer", operation="write", **transfer)
        if version != "0.3.9":
            self.assertNotEqual(written["code"], 0)
        time.sleep(0.3)
        self.assertEqual(ours.ask("digest", offset=0, length=1 << 20)["digest"], before)

    def test_revoked(self):
        for version, api in lab.all_pairs():
            with self.subTest(version=version, api=api):
                self.check(version, api)


lab.for_each_pair(globals(), Rights)
