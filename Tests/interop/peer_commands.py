"""What every peer process of the interop tests does, whatever engine is inside.

A peer owns one registered buffer between two guard zones. It prints one JSON line with its segment
name and buffer, then answers each JSON line on stdin with one of its own until "quit" or the end of
input. The engine adapters (stock_peer.py, native_peer.py, dropin_peer.py) supply:

  segment                          name under which peers open it
  register(address, length), unregister(address)
  transfer(peer, operation, pieces, timeout, notify)    pieces: (local address, remote, length)
  notify(peer, name, message)      without a transfer
  notifications()                  [(name, message)], drained
  probe(peer)
  first_buffer(peer)               address
  reopen(peer)
  metrics()                        text, of one adapter only
  close()

Those that can fail return (code, text): 0 is success.
"""

import base64
import ctypes
import hashlib
import json
import mmap
import os
import random
import sys
import time

GUARD = 1 << 20
LENGTH = int(os.environ.get("MOONCAKE_PEER_BYTES", 66 << 20))


def pattern(seed, length):
    """Bytes that differ with seed and position."""
    return random.Random(seed).randbytes(length)


def digest(data):
    return hashlib.sha256(data).hexdigest()


def private_stdout():
    """A stream for the answers; what an engine prints to stdout goes to stderr instead."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


class Memory:
    """The buffer and its guards, all pages touched."""

    def __init__(self, length):
        self.length = length
        self.mapping = mmap.mmap(-1, GUARD + length + GUARD)
        self.view = memoryview(self.mapping)
        self.view[:GUARD] = pattern("guard before", GUARD)
        self.view[GUARD + length :] = pattern("guard after", GUARD)
        for page in range(GUARD, GUARD + length, mmap.PAGESIZE):
            self.mapping[page] = 1
        anchor = ctypes.c_char.from_buffer(self.mapping)
        self.address = ctypes.addressof(anchor) + GUARD
        self.anchor = anchor

    def span(self, offset, length):
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError("outside of the buffer")
        return self.view[GUARD + offset : GUARD + offset + length]

    def guards_intact(self):
        return self.view[:GUARD] == pattern("guard before", GUARD) and self.view[
            GUARD + self.length :
        ] == pattern("guard after", GUARD)


def measure(transfer, seconds, length, count):
    """Calls transfer(index), which moves `length` bytes in `count` blocks, until the time is up."""
    samples = []
    begin = now = time.perf_counter()
    while now < begin + seconds:
        transfer(len(samples))
        after = time.perf_counter()
        samples.append(after - now)
        now = after
    samples.sort()
    result = {
        "bytes": len(samples) * length,
        "bytes_per_second": len(samples) * length / (now - begin),
        "operations_per_second": len(samples) * count / (now - begin),
    }
    for name, rank in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}.items():
        result[name + "_us"] = samples[int(len(samples) * rank)] * 1e6
    return result


class Peer:
    def __init__(self, engine, memory):
        self.engine = engine
        self.memory = memory

    def answer(self, request):
        return getattr(self, "do_" + request.pop("do"))(**request)

    # Memory

    def do_fill(self, offset, length, seed):
        self.memory.span(offset, length)[:] = pattern(seed, length)
        return {}

    def do_read_back(self, offset, length):
        return {"bytes": base64.b64encode(self.memory.span(offset, length)).decode()}

    def do_digest(self, offset=0, length=None):
        length = self.memory.length if length is None else length
        return {"digest": digest(self.memory.span(offset, length))}

    def do_guards(self):
        return {"intact": self.memory.guards_intact()}

    # Engine

    def do_transfer(self, peer, operation, pieces, timeout=20.0, notify=None):
        local = [(self.memory.address + offset, remote, n) for offset, remote, n in pieces]
        begin = time.monotonic()
        code, text = self.engine.transfer(peer, operation, local, timeout, notify)
        return {"code": code, "text": text, "seconds": time.monotonic() - begin}

    def do_flood(self, peer, operation, remote, length, count, seconds, timeout):
        """Repeats a batch of transfers of the same memory until one fails or the time is up."""
        pieces = [(self.memory.address, remote, length)] * count
        begin = time.monotonic()
        rounds, code, text = 0, 0, ""
        while code == 0 and time.monotonic() - begin < seconds:
            code, text = self.engine.transfer(peer, operation, pieces, timeout, None)
            rounds += 1
        return {"code": code, "text": text, "rounds": rounds, "ended": time.time()}

    def do_measure(self, peer, operation, remote, length, seconds, count=1):
        """Repeats a synchronous batch of `count` transfers through fresh offsets."""
        batch = length * count
        starts = range(0, self.memory.length // batch * batch, batch)
        rounds = [
            [
                (self.memory.address + offset, remote + offset, length)
                for offset in range(start, start + batch, length)
            ]
            for start in starts
        ]

        def transfer(index):
            pieces = rounds[index % len(rounds)]
            code, text = self.engine.transfer(peer, operation, pieces, 20.0, None)
            if code != 0:
                raise RuntimeError(f"{code}: {text}")

        transfer(0)
        return measure(transfer, seconds, batch, count)

    def do_notify(self, peer, name, message):
        code, text = self.engine.notify(peer, name, message)
        return {"code": code, "text": text}

    def do_notifications(self):
        return {"notifications": [list(pair) for pair in self.engine.notifications()]}

    def do_probe(self, peer):
        begin = time.monotonic()
        code, text = self.engine.probe(peer)
        return {"code": code, "text": text, "seconds": time.monotonic() - begin}

    def do_first_buffer(self, peer):
        return {"address": self.engine.first_buffer(peer)}

    def do_unregister(self):
        code = self.engine.unregister(self.memory.address)
        return {"code": code, "text": ""}

    def do_register(self):
        code = self.engine.register(self.memory.address, self.memory.length)
        return {"code": code, "text": ""}

    def do_metrics(self):
        return {"metrics": self.engine.metrics()}

    def do_reopen(self, peer):
        code, text = self.engine.reopen(peer)
        return {"code": code, "text": text}


def serve(make_engine, length=LENGTH):
    """Runs a peer until its stdin ends. make_engine creates the adapter."""
    out = private_stdout()

    def say(value):
        out.write(json.dumps(value) + "\n")
        out.flush()

    memory = Memory(length)
    engine = make_engine()
    code = engine.register(memory.address, memory.length)
    if code != 0:
        sys.exit(f"registering the buffer failed: {code}")
    say({"segment": engine.segment, "address": memory.address, "length": memory.length})
    peer = Peer(engine, memory)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            say({"ok": True, **peer.answer(request)})
        except Exception as error:  # the test that asked decides what a failure means
            say({"ok": False, "error": f"{type(error).__name__}: {error}"})
    engine.close()
    say({"ok": True})
