"""A peer with NIXL inside (UCX backend, ordinary memory); runs in the scratch environment.

Prints one JSON line with its name and memory, then answers each JSON line on stdin with another:
`meet` with the other's metadata, `measure`, `quit`. Transfers are prepared before the clock starts;
what is measured is post and poll.
"""

import base64
import ctypes
import json
import mmap
import os
import sys

import peer_commands

BYTES = int(os.environ["NIXL_PEER_BYTES"])
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever the library prints

from nixl_cu12 import nixl_agent, nixl_agent_config  # noqa: E402


class Peer:
    def __init__(self, name):
        # The initiator polls anyway; a second polling thread halves its speed on two cores.
        progress = name == "target"
        self.agent = nixl_agent(name, nixl_agent_config(progress, backends=["UCX"]))
        self.memory = mmap.mmap(-1, BYTES)
        for page in range(0, BYTES, mmap.PAGESIZE):
            self.memory[page] = 1
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self.anchor)
        self.agent.register_memory([(self.address, BYTES, 0, "")], "DRAM")
        self.prepared = (None, [])

    def hello(self):
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"segment": metadata, "address": self.address, "length": BYTES}

    def do_meet(self, metadata):
        self.other = self.agent.add_remote_agent(base64.b64decode(metadata))
        return {}

    def descriptors(self, base, start, block, batch):
        return self.agent.get_xfer_descs(
            [(base + start + index * block, block, 0) for index in range(batch)], "DRAM"
        )

    def prepare(self, *work):
        """Transfers through fresh addresses, at most as many as can be made in reasonable time."""
        if self.prepared[0] == work:
            return self.prepared[1]
        for handle in self.prepared[1]:
            self.agent.release_xfer_handle(handle)
        operation, remote, block, batch = work
        count = min(BYTES // (block * batch), max(64, 4096 // batch))
        handles = [
            self.agent.initialize_xfer(
                operation,
                self.descriptors(self.address, index * block * batch, block, batch),
                self.descriptors(remote, index * block * batch, block, batch),
                self.other,
            )
            for index in range(count)
        ]
        self.prepared = (work, handles)
        return handles

    def transfer(self, handle):
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended with {state}")

    def do_measure(self, operation, remote, length, seconds, count=1):
        handles = self.prepare(operation.upper(), remote, length, count)
        for handle in handles[:2]:
            self.transfer(handle)
        return peer_commands.measure(
            lambda index: self.transfer(handles[index % len(handles)]),
            *(seconds, length * count, count),
        )


def say(**words):
    print(json.dumps(words), file=answers, flush=True)


def main():
    peer = Peer(sys.argv[1])
    say(**peer.hello())
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        if what == "quit":
            break
        try:
            say(ok=True, **getattr(peer, "do_" + what)(**request))
        except Exception as error:
            say(ok=False, error=f"{type(error).__name__}: {error}")
    say(ok=True)
    os._exit(0)  # the library sometimes crashes when the interpreter ends


main()
