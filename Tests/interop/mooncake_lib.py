"""Minimal ctypes declarations of both headers, only as far as the interop tests need them.

Deliberately separate from the Python binding: a mistake there must not hide one here.
"""

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)

MOONCAKE_ERROR_TIMEOUT = -14
ACCESS_REMOTE = 3  # read and write
READ, WRITE = 0, 1
COMPLETED = 4
TERMINAL = (3, 4, 5, 6)
INVALID_BATCH = 0xFFFFFFFFFFFFFFFF


class EngineOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("port", c_uint32),
        ("name", c_char_p),
        ("bind_address", c_char_p),
        ("advertised_address", c_char_p),
        ("metadata_uri", c_char_p),
        ("transports", c_char_p),
        ("default_timeout_ms", c_uint64),
        ("io_threads", c_uint32),
        ("connections_per_peer", c_uint32),
        ("spin_us", c_uint32),
        ("reserved", c_uint32),
        ("processors", c_char_p),
    ]


class RemoteBuffer(Structure):
    _fields_ = [
        ("address", c_uint64),
        ("length", c_uint64),
        ("access", c_uint32),
        ("reserved", c_uint32),
    ]


class MooncakeRequest(Structure):
    _fields_ = [
        ("opcode", c_int32),
        ("segment", c_int32),
        ("source", c_void_p),
        ("target_offset", c_uint64),
        ("length", c_uint64),
    ]


class BatchStatus(Structure):
    _fields_ = [
        ("state", c_int32),
        ("error", c_int32),
        ("submitted_count", c_uint64),
        ("completed_count", c_uint64),
        ("terminal_count", c_uint64),
        ("transferred_bytes", c_uint64),
    ]


class Notification(Structure):
    _fields_ = [("name", c_char_p), ("message", c_char_p)]


class TransferRequest(Structure):
    """struct transfer_request of transfer_engine_c.h."""

    _fields_ = [
        ("opcode", c_int),
        ("source", c_void_p),
        ("target_id", c_int32),
        ("target_offset", c_uint64),
        ("length", c_uint64),
    ]


class TransferStatus(Structure):
    """struct transfer_status of transfer_engine_c.h."""

    _fields_ = [("status", c_int), ("transferred_bytes", c_uint64)]


class NotifyMessage(Structure):
    """struct notify_msg of transfer_engine_c.h."""

    _fields_ = [("name", c_char_p), ("msg", c_char_p)]


_NATIVE = {
    "mooncake_version": (c_char_p, []),
    "mooncake_error_name": (c_char_p, [c_int32]),
    "mooncake_error_message": (c_char_p, []),
    "mooncake_engine_options_init": (c_int32, [POINTER(EngineOptions), c_uint32]),
    "mooncake_engine_create": (c_int32, [POINTER(EngineOptions), POINTER(c_void_p)]),
    "mooncake_engine_destroy": (c_int32, [c_void_p]),
    "mooncake_engine_name": (c_int32, [c_void_p, c_char_p, c_uint64, POINTER(c_uint64)]),
    "mooncake_engine_metrics": (c_int32, [c_void_p, c_char_p, c_uint64, POINTER(c_uint64)]),
    "mooncake_memory_register": (c_int32, [c_void_p, c_void_p, c_uint64, c_char_p, c_uint32]),
    "mooncake_memory_unregister": (c_int32, [c_void_p, c_void_p]),
    "mooncake_segment_open": (c_int32, [c_void_p, c_char_p, c_uint64, POINTER(c_int32)]),
    "mooncake_segment_close": (c_int32, [c_void_p, c_int32]),
    "mooncake_segment_buffers": (
        c_int32,
        [c_void_p, c_int32, POINTER(RemoteBuffer), c_uint64, POINTER(c_uint64)],
    ),
    "mooncake_peer_probe": (c_int32, [c_void_p, c_char_p, c_uint64]),
    "mooncake_batch_create": (c_int32, [c_void_p, c_uint64, POINTER(c_uint64)]),
    "mooncake_batch_submit": (
        c_int32,
        [c_void_p, c_uint64, POINTER(MooncakeRequest), c_uint64, c_uint64],
    ),
    "mooncake_batch_submit_notify": (
        c_int32,
        [c_void_p, c_uint64, POINTER(MooncakeRequest), c_uint64, c_uint64, c_char_p, c_char_p],
    ),
    "mooncake_batch_wait": (c_int32, [c_void_p, c_uint64, c_uint64, POINTER(BatchStatus)]),
    "mooncake_batch_free": (c_int32, [c_void_p, c_uint64]),
    "mooncake_transfer_sync": (
        c_int32,
        [c_void_p, POINTER(MooncakeRequest), c_uint64, c_uint64],
    ),
    "mooncake_notification_send": (c_int32, [c_void_p, c_int32, c_char_p, c_char_p, c_uint64]),
    "mooncake_notification_receive": (c_int32, [c_void_p, POINTER(POINTER(Notification))]),
    "mooncake_notification_free": (None, [POINTER(Notification)]),
}

_DROP_IN = {
    "createTransferEngine": (c_void_p, [c_char_p, c_char_p, c_char_p, c_uint64, c_int]),
    "destroyTransferEngine": (None, [c_void_p]),
    "getLocalIpAndPort": (c_int, [c_void_p, c_char_p, c_size_t]),
    "installTransport": (c_void_p, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "openSegment": (c_int32, [c_void_p, c_char_p]),
    "openSegmentNoCache": (c_int32, [c_void_p, c_char_p]),
    "registerLocalMemory": (c_int, [c_void_p, c_void_p, c_size_t, c_char_p, c_int]),
    "unregisterLocalMemory": (c_int, [c_void_p, c_void_p]),
    "allocateBatchID": (c_uint64, [c_void_p, c_size_t]),
    "submitTransfer": (c_int, [c_void_p, c_uint64, POINTER(TransferRequest), c_size_t]),
    "submitTransferWithNotify": (
        c_int,
        [c_void_p, c_uint64, POINTER(TransferRequest), c_size_t, NotifyMessage],
    ),
    "getTransferStatus": (c_int, [c_void_p, c_uint64, c_size_t, POINTER(TransferStatus)]),
    "freeBatchID": (c_int, [c_void_p, c_uint64]),
    "getNotifsFromEngine": (POINTER(NotifyMessage), [c_void_p, POINTER(c_int)]),
    "freeNotifsMsgBuf": (c_int, [POINTER(NotifyMessage), c_int]),
    "genNotifyInEngine": (c_int, [c_void_p, c_uint64, NotifyMessage]),
}


def load(path):
    """Loads the library with the declarations of both headers in place."""
    library = ctypes.CDLL(path)
    for name, (result, arguments) in {**_NATIVE, **_DROP_IN}.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


__all__ = [name for name in dir() if not name.startswith("_")] + ["byref"]
