"""A peer with libmooncake inside, driven through transfer_engine_c.h. Argument: LIBRARY.

Environment: MOONCAKE_PEER_METADATA, the URI of a metadata service, and MOONCAKE_PEER_NAME.
"""

import ctypes
import os
import sys
import time

import mooncake_lib as lib
import peer_commands


class DropInEngine:
    def __init__(self, path):
        self.library = lib.load(path)
        service = os.environ.get("MOONCAKE_PEER_METADATA", "P2PHANDSHAKE")
        name = os.environ.get("MOONCAKE_PEER_NAME", "127.0.0.1:0")
        self.engine = self.library.createTransferEngine(
            service.encode(), name.encode(), b"127.0.0.1", 0, 0
        )
        if not self.engine:
            sys.exit("createTransferEngine: " + self.reason())
        if not self.library.installTransport(self.engine, b"tcp", None):
            sys.exit("installTransport: " + self.reason())
        name = ctypes.create_string_buffer(512)
        if self.library.getLocalIpAndPort(self.engine, name, 512) != 0:
            sys.exit("getLocalIpAndPort: " + self.reason())
        self.segment = name.value.decode()

    def reason(self):
        return self.library.mooncake_error_message().decode(errors="replace")

    def register(self, address, length):
        return self.library.registerLocalMemory(self.engine, address, length, b"cpu:0", 1)

    def unregister(self, address):
        return self.library.unregisterLocalMemory(self.engine, address)

    def transfer(self, peer, operation, pieces, timeout, notify):
        segment = self.library.openSegment(self.engine, peer.encode())
        if segment < 0:
            return segment, "openSegment: " + self.reason()
        requests = (lib.TransferRequest * len(pieces))()
        for request, (source, target, length) in zip(requests, pieces):
            request.opcode = lib.READ if operation == "read" else lib.WRITE
            request.source = source
            request.target_id = segment
            request.target_offset = target
            request.length = length
        batch = self.library.allocateBatchID(self.engine, len(pieces))
        if batch == lib.INVALID_BATCH:
            return -1, "allocateBatchID: " + self.reason()
        if notify:
            message = lib.NotifyMessage(*(text.encode() for text in notify))
            code = self.library.submitTransferWithNotify(
                self.engine, batch, requests, len(pieces), message
            )
        else:
            code = self.library.submitTransfer(self.engine, batch, requests, len(pieces))
        text = "" if code == 0 else "submitTransfer: " + self.reason()
        if code == 0:
            code, text = self.wait(batch, len(pieces), timeout)
        freed = self.library.freeBatchID(self.engine, batch)
        if freed != 0 and code == 0:
            return freed, "freeBatchID: " + self.reason()
        return code, text

    def wait(self, batch, count, timeout):
        """Polls task after task, as programs with this interface do."""
        end = time.monotonic() + timeout
        status = lib.TransferStatus()
        failed, text = 0, ""
        for task in range(count):
            while True:
                code = self.library.getTransferStatus(self.engine, batch, task, lib.byref(status))
                if code != 0:
                    return code, "getTransferStatus: " + self.reason()
                if status.status in lib.TERMINAL:
                    break
                if time.monotonic() > end:
                    return -1, f"task {task} is still {status.status} after {timeout} s"
                time.sleep(0)
            if status.status != lib.COMPLETED and failed == 0:
                failed, text = status.status, f"task {task}: " + self.reason()
        return failed, text

    def notify(self, peer, name, message):
        segment = self.library.openSegment(self.engine, peer.encode())
        if segment < 0:
            return segment, "openSegment: " + self.reason()
        code = self.library.genNotifyInEngine(
            self.engine, segment, lib.NotifyMessage(name.encode(), message.encode())
        )
        return code, "" if code == 0 else self.reason()

    def notifications(self):
        size = ctypes.c_int(-1)
        items = self.library.getNotifsFromEngine(self.engine, lib.byref(size))
        found = [(items[i].name.decode(), items[i].msg.decode()) for i in range(size.value)]
        self.library.freeNotifsMsgBuf(items, size.value)
        return found

    def probe(self, peer):
        return -1, "transfer_engine_c.h has no probe"

    def first_buffer(self, peer):
        raise ValueError("transfer_engine_c.h cannot list buffers")

    def reopen(self, peer):
        segment = self.library.openSegmentNoCache(self.engine, peer.encode())
        return (0, "") if segment >= 0 else (segment, self.reason())

    def close(self):
        self.library.destroyTransferEngine(self.engine)


if __name__ == "__main__":
    peer_commands.serve(lambda: DropInEngine(sys.argv[1]))
