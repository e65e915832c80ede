"""An engine that registers more than its metadata service takes. Arguments: LIBRARY URI.

Prints one JSON line each: the result for a batch of many buffers, for a later batch of few, and
what a peer sees. Obeys "again" and "quit" on stdin.
"""

import ctypes
import json
import mmap
import sys
import time

import mooncake_lib as lib

MANY, FEW, PAGE = 30_000, 100, 4096


def create(library, uri, name):
    options = lib.EngineOptions()
    library.mooncake_engine_options_init(lib.byref(options), ctypes.sizeof(options))
    options.metadata_uri = uri
    if uri != b"P2PHANDSHAKE":
        options.name = name
    options.bind_address = b"127.0.0.1"
    options.transports = b"tcp"
    engine = ctypes.c_void_p()
    code = library.mooncake_engine_create(lib.byref(options), lib.byref(engine))
    if code != 0:
        sys.exit(library.mooncake_error_message().decode())
    return engine


def main():
    library = lib.load(sys.argv[1])
    uri = sys.argv[2].encode()
    memory = mmap.mmap(-1, 2 * MANY * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    target, peer = create(library, uri, b"target"), create(library, uri, b"peer")
    name = ctypes.create_string_buffer(512)
    library.mooncake_engine_name(target, name, 512, None)
    batch = library.mooncake_memory_register_batch
    batch.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint32]

    def register(first, count):
        pairs = (ctypes.c_uint64 * (2 * count))()
        for index in range(count):
            pairs[2 * index] = start + 2 * PAGE * (first + index)
            pairs[2 * index + 1] = PAGE
        begin = time.monotonic()
        code = batch(target, pairs, count, None, lib.ACCESS_REMOTE)
        seconds = time.monotonic() - begin
        segment, seen = ctypes.c_int32(), ctypes.c_uint64()
        text = library.mooncake_error_message().decode() if code else ""
        found = library.mooncake_segment_open(peer, name, 5000, lib.byref(segment))
        if found == 0:
            library.mooncake_segment_buffers(peer, segment, None, 0, lib.byref(seen))
        metrics = ctypes.create_string_buffer(1 << 16)
        library.mooncake_engine_metrics(target, metrics, 1 << 16, None)
        refused = [line.split()[-1] for line in metrics.value.decode().splitlines()
                   if line.startswith("mooncake_metadata_refused")]
        print(json.dumps({"code": code, "text": text, "seconds": seconds, "seen": seen.value,
                          "refused": refused}), flush=True)

    register(0, MANY)
    register(0, FEW)
    first = FEW
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        register(first, FEW)
        first += FEW
    library.mooncake_engine_destroy(target)
    library.mooncake_engine_destroy(peer)


main()
