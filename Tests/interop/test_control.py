"""Notifications and probes between the library and Mooncake."""

import lab

# Text that JSON must escape, text that UTF-8 must encode, and more than a socket buffer holds.
TEXTS = (
    ("layer 0", "done"),
    ('na"me', 'back\\slash "quotes"\nline\ttab'),
    ("größe", "模型 ✓"),
    ("long", "x" * 200_000),
)


class Control:
    def received(self, peer, count):
        found = []

        def enough():
            found.extend(peer.ask("notifications")["notifications"])
            return len(found) >= count

        lab.wait_until(enough, 10)
        return found

    def send_with_transfers(self, initiator, target):
        initiator.ask("fill", offset=0, length=4096, seed="notified")
        for text in TEXTS:
            self.succeed(
                initiator,
                "transfer",
                peer=target.segment,
                operation="write",
                pieces=[[0, target.address, 4096]],
                notify=text,
            )
        self.assertEqual(self.received(target, len(TEXTS)), [list(text) for text in TEXTS])
        self.assertEqual(target.ask("notifications")["notifications"], [])

    def test_stock_notifies_with_transfer(self):
        self.send_with_transfers(self.stock, self.ours)

    def test_ours_notifies_with_transfer(self):
        self.send_with_transfers(self.ours, self.stock)

    def test_ours_notifies_alone(self):
        self.needs_ours()
        for name, message in TEXTS:
            self.succeed(
                self.ours, "notify", peer=self.stock.segment, name=name, message=message
            )
        self.assertEqual(self.received(self.stock, len(TEXTS)), [list(text) for text in TEXTS])

    def test_failed_transfer_does_not_notify(self):
        self.needs_ours()
        answer = self.ours.ask(
            "transfer",
            peer=self.stock.segment,
            operation="read",
            pieces=[[0, self.stock.address + self.stock.length, 4096]],
            notify=["never", "sent"],
        )
        self.assertNotEqual(answer["code"], 0)
        self.assertEqual(self.stock.ask("notifications")["notifications"], [])

    def test_stock_probes_ours(self):
        if self.version == "0.3.9":
            self.skipTest("0.3.9 has no probe")
        self.succeed(self.stock, "probe", peer=self.ours.segment)

    def test_ours_probes_stock(self):
        if self.api == "dropin":
            self.skipTest("transfer_engine_c.h has no probe")
        answer = self.ours.ask("probe", peer=self.stock.segment)
        if self.version == "0.3.9":
            # Mooncake closes the connection on the unknown message. Whatever the result, it comes
            # at once, and the peer still works.
            self.assertLess(answer["seconds"], 10, answer)
            self.succeed(
                self.ours,
                "transfer",
                peer=self.stock.segment,
                operation="read",
                pieces=[[0, self.stock.address, 64]],
            )
        else:
            self.assertEqual(answer["code"], 0, answer)

    def test_probe_of_nobody(self):
        nobody = f"127.0.0.1:{lab.free_ports(1)}"
        for peer in (self.ours, self.stock):
            if (peer is self.stock and self.version == "0.3.9") or (
                peer is self.ours and self.api == "dropin"
            ):
                continue
            answer = peer.ask("probe", peer=nobody)
            self.assertLess(answer["code"], 0, answer)
            self.assertLess(answer["seconds"], 10, answer)


lab.for_each_pair(globals(), Control)
