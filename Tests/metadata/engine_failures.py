"""Engines that cannot reach their metadata service are not created, say why, and leak nothing.

Argument: LIBRARY.
"""

import ctypes
import os
import sys
import time

import lab
import mooncake_lib as lib

URIS = (
    (b"ftp://host", -1), (b"etcd://", -1), (b"etcd://127.0.0.1:1", -11),
    (b"redis://127.0.0.1:1", -11), (b"http://127.0.0.1:1/metadata", -11),
    (b"127.0.0.1:1", -11), (b"http://no-such-host.invalid/metadata", -10), (b"\xff\xfe", -1),
)


def tally():
    """The numbers of open descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def main():
    library = lib.load(sys.argv[1])
    counts = []
    for _ in range(3):
        for uri, expected in URIS:
            options = lib.EngineOptions()
            library.mooncake_engine_options_init(lib.byref(options), ctypes.sizeof(options))
            options.metadata_uri = uri
            options.default_timeout_ms = 3000
            engine = ctypes.c_void_p()
            begin = time.monotonic()
            code = library.mooncake_engine_create(lib.byref(options), lib.byref(engine))
            text = library.mooncake_error_message().decode(errors="replace")
            if code != expected or time.monotonic() - begin > 6:
                sys.exit(f"{uri}: {code}, not {expected}, in {time.monotonic() - begin} s: {text}")
            if expected != -1 and uri.decode() not in text:
                sys.exit(f"{uri}: not named in: {text}")
            if library.createTransferEngine(uri, b"name", b"127.0.0.1", 0, 0):
                sys.exit(f"{uri}: the drop-in interface created an engine")
        # The thread of a name lookup may still be ending.
        if counts:
            lab.wait_until(lambda: max(map(int.__sub__, tally(), counts[-1])) <= 0, 5)
        counts.append(tally())
    if max(map(int.__sub__, counts[2], counts[1])) > 0:
        sys.exit(f"descriptors and threads grow: {counts}")


main()
