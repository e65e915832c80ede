"""Reads and writes in both directions between the library and Mooncake, byte for byte."""

import lab
from peer_commands import digest, pattern

SIZES = (1, 7, 4096, 65536 + 1, 1 << 20, 64 << 20)
EDGE = 64  # bytes before and after a transfer that must not change


class Transfers:
    def check_sizes(self, initiator, target, operation):
        for size in SIZES:
            with self.subTest(size=size):
                self.check_transfer(initiator, target, operation, size)

    def check_transfer(self, initiator, target, operation, size):
        source, sink = (target, initiator) if operation == "read" else (initiator, target)
        # Odd offsets: nothing may depend on alignment.
        offsets = {source.pid: 4096 + 3, sink.pid: 8192 + 5}
        before = pattern(f"sink {size}", size + 2 * EDGE)
        source.ask("fill", offset=offsets[source.pid], length=size, seed=f"source {size}")
        sink.ask("fill", offset=offsets[sink.pid] - EDGE, length=len(before), seed=f"sink {size}")
        piece = [offsets[initiator.pid], target.address + offsets[target.pid], size]
        self.succeed(
            initiator, "transfer", peer=target.segment, operation=operation, pieces=[piece]
        )
        moved = pattern(f"source {size}", size)
        expected = before[:EDGE] + moved + before[EDGE + size :]
        window = {"offset": offsets[sink.pid] - EDGE, "length": len(before)}
        # A release with v1 framing reports a write once it was sent, not once it has arrived.
        arrived = lab.wait_until(
            lambda: sink.ask("digest", **window)["digest"] == digest(expected), 5
        )
        self.assertTrue(arrived, f"{operation} of {size} bytes arrived damaged")

    def check_batch(self, initiator, target, operation, count=128, size=4096):
        source, sink = (target, initiator) if operation == "read" else (initiator, target)
        # Different strides and orders on the two sides, odd offsets on both.
        local = [(index * 37 % count) * 12288 + 1 for index in range(count)]
        remote = [(index * 61 % count) * 8192 + 513 for index in range(count)]
        pieces = [[a, target.address + b, size] for a, b in zip(local, remote)]
        source_at, sink_at = (remote, local) if operation == "read" else (local, remote)
        window = count * 12288 + 4096
        for peer, seed in ((source, "batch source"), (sink, "batch sink")):
            peer.ask("fill", offset=0, length=window, seed=seed)
        self.succeed(
            initiator, "transfer", peer=target.segment, operation=operation, pieces=pieces
        )
        data = pattern("batch source", window)
        expected = bytearray(pattern("batch sink", window))
        for a, b in zip(source_at, sink_at):
            expected[b : b + size] = data[a : a + size]
        arrived = lab.wait_until(
            lambda: sink.ask("digest", offset=0, length=window)["digest"] == digest(expected), 5
        )
        self.assertTrue(arrived, f"batch {operation} arrived damaged")

    def test_ours_reads(self):
        self.check_sizes(self.ours, self.stock, "read")

    def test_ours_writes(self):
        self.check_sizes(self.ours, self.stock, "write")

    def test_stock_reads(self):
        self.check_sizes(self.stock, self.ours, "read")

    def test_stock_writes(self):
        self.check_sizes(self.stock, self.ours, "write")

    def test_ours_reads_batch(self):
        self.check_batch(self.ours, self.stock, "read")

    def test_ours_writes_batch(self):
        self.check_batch(self.ours, self.stock, "write")

    def test_stock_reads_batch(self):
        self.check_batch(self.stock, self.ours, "read")

    def test_stock_writes_batch(self):
        self.check_batch(self.stock, self.ours, "write")

    def test_batch_of_large_and_small(self):
        """Sizes that are split and sizes that are gathered, in one batch."""
        sizes = [1, 8 << 20, 5, 65537, 4096, 3 << 20, 2]
        for initiator, target in ((self.ours, self.stock), (self.stock, self.ours)):
            length = sum(sizes)
            initiator.ask("fill", offset=0, length=length, seed="mixed")
            pieces, offset = [], 0
            for size in sizes:
                pieces.append([offset, target.address + offset, size])
                offset += size
            self.succeed(
                initiator, "transfer", peer=target.segment, operation="write", pieces=pieces
            )
            expected = digest(pattern("mixed", length))
            arrived = lab.wait_until(
                lambda: target.ask("digest", offset=0, length=length)["digest"] == expected, 5
            )
            self.assertTrue(arrived, f"{initiator.label} wrote something else")

    def test_both_directions_at_once(self):
        """Each side is initiator and target at the same time, in separate halves."""
        half, size = 32 << 20, 16 << 20
        sides = ((self.ours, self.stock), (self.stock, self.ours))
        for initiator, _ in sides:
            initiator.ask("fill", offset=0, length=size, seed=initiator.label)
        for initiator, target in sides:
            pieces = [
                [index << 20, target.address + half + (index << 20), 1 << 20]
                for index in range(16)
            ]
            initiator.send("transfer", peer=target.segment, operation="write", pieces=pieces)
        for initiator, _ in sides:
            answer = initiator.receive(lab.ANSWER_SECONDS)
            self.assertEqual(answer.get("code"), 0, answer)
        for initiator, target in sides:
            expected = digest(pattern(initiator.label, size))
            arrived = lab.wait_until(
                lambda: target.ask("digest", offset=half, length=size)["digest"] == expected, 5
            )
            self.assertTrue(arrived, f"{initiator.label} wrote something else")

    def test_first_buffer_address(self):
        self.assertEqual(
            self.stock.ask("first_buffer", peer=self.ours.segment)["address"], self.ours.address
        )
        if self.api != "dropin":
            self.assertEqual(
                self.ours.ask("first_buffer", peer=self.stock.segment)["address"],
                self.stock.address,
            )


lab.for_each_pair(globals(), Transfers)
