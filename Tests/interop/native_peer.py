"""A peer with libmooncake inside, driven through mooncake.h. Arguments: LIBRARY [PORT].

Environment: MOONCAKE_PEER_METADATA, the URI of a metadata service, and MOONCAKE_PEER_NAME.
"""

import ctypes
import os
import sys

import mooncake_lib as lib
import peer_commands


class NativeEngine:
    def __init__(self, path, port=0):
        self.library = lib.load(path)
        options = lib.EngineOptions()
        self.check(
            self.library.mooncake_engine_options_init(
                lib.byref(options), ctypes.sizeof(lib.EngineOptions)
            )
        )
        options.bind_address = b"127.0.0.1"
        options.port = port
        if "MOONCAKE_PEER_METADATA" in os.environ:
            options.metadata_uri = os.environ["MOONCAKE_PEER_METADATA"].encode()
        if "MOONCAKE_PEER_NAME" in os.environ:
            options.name = os.environ["MOONCAKE_PEER_NAME"].encode()
        self.engine = ctypes.c_void_p()
        self.check(
            self.library.mooncake_engine_create(lib.byref(options), lib.byref(self.engine))
        )
        name = ctypes.create_string_buffer(512)
        self.check(self.library.mooncake_engine_name(self.engine, name, 512, None))
        self.segment = name.value.decode()
        self.segments = {}

    def reason(self, code):
        if code == 0:
            return ""
        name = self.library.mooncake_error_name(code).decode()
        return f"{name}: {self.library.mooncake_error_message().decode(errors='replace')}"

    def check(self, code):
        if code != 0:
            sys.exit(self.reason(code))

    def register(self, address, length):
        return self.library.mooncake_memory_register(
            self.engine, address, length, None, lib.ACCESS_REMOTE
        )

    def unregister(self, address):
        return self.library.mooncake_memory_unregister(self.engine, address)

    def open(self, peer):
        if peer not in self.segments:
            return self.reopen(peer)
        return 0, ""

    def reopen(self, peer):
        segment = ctypes.c_int32()
        code = self.library.mooncake_segment_open(
            self.engine, peer.encode(), 5000, lib.byref(segment)
        )
        if code == 0:
            self.segments[peer] = segment.value
        return code, self.reason(code)

    def transfer(self, peer, operation, pieces, timeout, notify):
        code, text = self.open(peer)
        if code != 0:
            return code, text
        opcode = lib.READ if operation == "read" else lib.WRITE
        requests = (lib.MooncakeRequest * len(pieces))()
        for request, (source, target, length) in zip(requests, pieces):
            request.opcode = opcode
            request.segment = self.segments[peer]
            request.source = source
            request.target_offset = target
            request.length = length
        milliseconds = int(timeout * 1000)
        if len(pieces) == 1 and not notify:
            code = self.library.mooncake_transfer_sync(self.engine, requests, 1, milliseconds)
            return code, self.reason(code)
        return self.transfer_batch(requests, milliseconds, notify)

    def transfer_batch(self, requests, milliseconds, notify):
        batch = ctypes.c_uint64()
        count = len(requests)
        code = self.library.mooncake_batch_create(self.engine, count, lib.byref(batch))
        if code != 0:
            return code, self.reason(code)
        if notify:
            code = self.library.mooncake_batch_submit_notify(
                self.engine, batch, requests, count, milliseconds, *(s.encode() for s in notify)
            )
        else:
            code = self.library.mooncake_batch_submit(
                self.engine, batch, requests, count, milliseconds
            )
        text = self.reason(code)
        if code == 0:
            status = lib.BatchStatus()
            code = self.library.mooncake_batch_wait(
                self.engine, batch, milliseconds + 5000, lib.byref(status)
            )
            text = self.reason(code)
            if code == 0 and status.state != lib.COMPLETED:
                code = status.error
                text = self.reason(code)
        freed = self.library.mooncake_batch_free(self.engine, batch)
        if freed != 0 and code == 0:
            return freed, self.reason(freed)
        return code, text

    def notify(self, peer, name, message):
        code, text = self.open(peer)
        if code != 0:
            return code, text
        code = self.library.mooncake_notification_send(
            self.engine, self.segments[peer], name.encode(), message.encode(), 5000
        )
        return code, self.reason(code)

    def notifications(self):
        found = []
        while True:
            item = ctypes.POINTER(lib.Notification)()
            self.check(
                self.library.mooncake_notification_receive(self.engine, lib.byref(item))
            )
            if not item:
                return found
            found.append((item.contents.name.decode(), item.contents.message.decode()))
            self.library.mooncake_notification_free(item)

    def probe(self, peer):
        code = self.library.mooncake_peer_probe(self.engine, peer.encode(), 5000)
        return code, self.reason(code)

    def first_buffer(self, peer):
        self.check(self.open(peer)[0])
        buffers = (lib.RemoteBuffer * 16)()
        count = ctypes.c_uint64()
        self.check(
            self.library.mooncake_segment_buffers(
                self.engine, self.segments[peer], buffers, 16, lib.byref(count)
            )
        )
        return buffers[0].address if count.value else 0

    def metrics(self):
        text = ctypes.create_string_buffer(1 << 16)
        self.check(self.library.mooncake_engine_metrics(self.engine, text, 1 << 16, None))
        return text.value.decode()

    def close(self):
        self.check(self.library.mooncake_engine_destroy(self.engine))


if __name__ == "__main__":
    peer_commands.serve(
        lambda: NativeEngine(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    )
