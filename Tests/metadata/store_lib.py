"""Minimal ctypes declarations of the store's header, as far as the tests need them."""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_uint32, c_uint64, c_void_p

import lab
import mooncake_lib

PHASE_HASHING, PHASE_TRANSFERRING, PHASE_PUBLISHING = 1, 2, 3
OK, NOT_REGISTERED, BUSY, NOT_FOUND, TIMEOUT, CANCELED = 0, -3, -6, -13, -14, -15
ACCESS_REMOTE = mooncake_lib.ACCESS_REMOTE
library = mooncake_lib.load(lab.library())


class Buffer(Structure):
    _fields_ = [("address", c_void_p), ("length", c_uint64)]


class Progress(Structure):
    _fields_ = [("phase", c_int32), ("reserved", c_uint32)] + [
        (name, c_uint64) for name in ("done", "total", "active", "holders")]


ProgressCallback = ctypes.CFUNCTYPE(c_int32, POINTER(Progress), c_void_p)
WatchCallback = ctypes.CFUNCTYPE(None, c_int32, c_void_p, c_void_p)


class Operation(Structure):
    _fields_ = [
        ("struct_size", c_uint32), ("reserved", c_uint32), ("timeout_ms", c_uint64),
        ("cancellation", c_void_p), ("progress", ProgressCallback), ("context", c_void_p)]

    @classmethod
    def within(cls, milliseconds):
        operation = cls()
        operation.struct_size = ctypes.sizeof(cls)
        operation.timeout_ms = milliseconds
        return operation

    @classmethod
    def until(cls, cancellation, milliseconds):
        operation = cls.within(milliseconds)
        operation.cancellation = cancellation.handle
        return operation

    def at_phase(self, phase, action, is_done=False):
        """Calls action once, when the operation reports a phase, or the last byte of it; then
        has_reached is true."""
        self.has_reached = False

        @ProgressCallback
        def progress(report, _):
            is_there = not is_done or report.contents.done == report.contents.total > 0
            if report.contents.phase == phase and is_there and not self.has_reached:
                self.has_reached = True
                action()
            return 0

        self.progress = progress
        # Otherwise it ends with this function.
        self.callback = progress


class StoreOptions(Structure):
    _fields_ = [("struct_size", c_uint32), ("reserved", c_uint32), ("metadata_uri", c_char_p),
                ("drain_ms", c_uint64)]


class RegisterOptions(Structure):
    _fields_ = [("struct_size", c_uint32), ("create_only", c_uint32), ("shard_bytes", c_uint64),
                ("location", c_char_p), ("writable", c_uint32), ("reserved", c_uint32)]


class GetOptions(Structure):
    _fields_ = [("struct_size", c_uint32), ("follow_versions", c_uint32), ("version", c_char_p),
                ("location", c_char_p), ("receive_only", c_uint32), ("reserved", c_uint32)]


class MetadataServerOptions(Structure):
    _fields_ = [("struct_size", c_uint32), ("port", c_uint32), ("host", c_char_p),
                ("directory", c_char_p), ("maximum_bytes", c_uint64), ("token", c_char_p)]


class Buffers(Structure):
    """The arguments of a call that lists buffers."""

    _fields_ = [("list", mooncake_lib.RemoteBuffer * 64), ("count", c_uint64)]


class RequestStatus(Structure):
    _fields_ = [("state", c_int32), ("error", c_int32), ("bytes", c_uint64)]


BatchCallback = ctypes.CFUNCTYPE(None, c_uint64, c_void_p, c_void_p)

for _name, _arguments in {
    "mooncake_engine_event_fd": [c_void_p, POINTER(c_int32)],
    "mooncake_memory_register_batch": [
        c_void_p, POINTER(Buffer), c_uint64, c_char_p, c_uint32],
    "mooncake_memory_unregister_batch": [c_void_p, POINTER(c_void_p), c_uint64],
    "mooncake_segment_describe": [c_void_p, c_int32, c_char_p, c_uint64, POINTER(c_uint64)],
    "mooncake_batch_poll": [c_void_p, c_uint64, POINTER(mooncake_lib.BatchStatus)],
    "mooncake_batch_poll_request": [c_void_p, c_uint64, c_uint64, POINTER(RequestStatus)],
    "mooncake_batch_cancel": [c_void_p, c_uint64],
    "mooncake_batch_event_fd": [c_void_p, c_uint64, POINTER(c_int32)],
    "mooncake_batch_set_callback": [c_void_p, c_uint64, BatchCallback, c_void_p],
    "mooncake_metadata_server_start": [POINTER(MetadataServerOptions), POINTER(c_void_p)],
    "mooncake_metadata_server_stop": [c_void_p],
    "mooncake_memory_allocate": [c_void_p, c_uint64, c_char_p, c_uint32, POINTER(c_void_p)],
    "mooncake_memory_free": [c_void_p, c_void_p],
    "mooncake_store_create": [c_void_p, c_void_p, POINTER(StoreOptions), POINTER(c_void_p)],
    "mooncake_store_destroy": [c_void_p],
    "mooncake_store_engine": [c_void_p, POINTER(c_void_p)],
    "mooncake_cancellation_create": [POINTER(c_void_p)],
    "mooncake_cancellation_cancel": [c_void_p],
    "mooncake_cancellation_destroy": [c_void_p],
    "mooncake_store_result_free": [c_void_p],
    "mooncake_store_register": [
        c_void_p, c_char_p, POINTER(Buffer), c_uint64, POINTER(RegisterOptions),
        POINTER(Operation), c_void_p],
    "mooncake_store_unregister": [c_void_p, c_char_p, POINTER(Operation)],
    "mooncake_store_get": [
        c_void_p, c_char_p, POINTER(Buffer), c_uint64, POINTER(GetOptions), POINTER(Operation),
        POINTER(c_void_p)],
    "mooncake_store_delete_replica": [c_void_p, c_char_p, POINTER(Operation)],
    "mooncake_store_remove": [c_void_p, c_char_p, POINTER(Operation)],
    "mooncake_store_list": [c_void_p, c_char_p, POINTER(Operation), POINTER(c_void_p)],
    "mooncake_store_stat": [c_void_p, c_char_p, POINTER(Operation), POINTER(c_void_p)],
    "mooncake_store_read": [
        c_void_p, c_char_p, c_uint64, c_void_p, c_uint64, POINTER(Operation)],
    "mooncake_store_write": [
        c_void_p, c_char_p, c_uint64, c_void_p, c_uint64, POINTER(Operation)],
    "mooncake_store_watch_create": [
        c_void_p, c_char_p, POINTER(c_void_p), WatchCallback, c_void_p],
    "mooncake_store_watch_destroy": [c_void_p],
}.items():
    getattr(library, _name).argtypes = _arguments
    getattr(library, _name).restype = c_int32


class Memory:
    """Bytes that differ."""

    def __init__(self, count):
        self.bytes = ctypes.create_string_buffer(bytes(index * 7 % 251 for index in range(count)))
        self.address = ctypes.addressof(self.bytes)
        self.count = count
        self.buffer = Buffer(self.address, count)


class Cancellation:
    def __init__(self):
        self.handle = c_void_p()
        check(library.mooncake_cancellation_create(byref(self.handle)))

    def cancel(self):
        check(library.mooncake_cancellation_cancel(self.handle))

    def end(self):
        check(library.mooncake_cancellation_destroy(self.handle))


def message():
    return library.mooncake_error_message().decode(errors="replace")


def check(code):
    if code != 0:
        raise AssertionError(f"{code}: {message()}")


def engine_options(uri, name, default_timeout):
    options = mooncake_lib.EngineOptions()
    library.mooncake_engine_options_init(byref(options), ctypes.sizeof(options))
    options.metadata_uri = uri.encode()
    options.name = name.encode()
    options.default_timeout_ms = default_timeout
    return options


def create_engine(uri, name, default_timeout, engine):
    options = engine_options(uri, name, default_timeout)
    return library.mooncake_engine_create(byref(options), byref(engine))


def engine(uri, name, default_timeout):
    handle = c_void_p()
    check(create_engine(uri, name, default_timeout, handle))
    return handle


def store(engine):
    handle = c_void_p()
    options = StoreOptions(ctypes.sizeof(StoreOptions), 0, None, 200)
    check(library.mooncake_store_create(engine, None, byref(options), byref(handle)))
    return handle


def _finish(code, result):
    if code == 0:
        library.mooncake_store_result_free(result)
    return code


def register(store, name, memory, operation=None, writable=False, create_only=False):
    options = RegisterOptions(
        ctypes.sizeof(RegisterOptions), int(create_only), 0, None, int(writable), 0)
    return library.mooncake_store_register(
        store, name, byref(memory.buffer), 1, byref(options), operation, None)


def unregister(store, name, operation=None):
    return library.mooncake_store_unregister(store, name, operation)


def get(store, name, memory, operation=None, receive_only=False):
    options = GetOptions(ctypes.sizeof(GetOptions), 0, None, None, int(receive_only), 0)
    result = c_void_p()
    buffer = byref(memory.buffer) if memory else None
    code = library.mooncake_store_get(
        store, name, buffer, 1 if memory else 0, byref(options), operation, byref(result))
    return _finish(code, result)


def delete(store, name, operation=None):
    return library.mooncake_store_delete_replica(store, name, operation)


def remove(store, name, operation=None):
    return library.mooncake_store_remove(store, name, operation)


def list_all(store, operation=None):
    result = c_void_p()
    return _finish(library.mooncake_store_list(store, b"", operation, byref(result)), result)


def stat(store, name, operation=None):
    result = c_void_p()
    return _finish(library.mooncake_store_stat(store, name, operation, byref(result)), result)


def read(store, name, memory, operation=None):
    return library.mooncake_store_read(store, name, 10, memory.address, 1000, operation)


def write(store, name, memory, operation=None):
    return library.mooncake_store_write(store, name, 10, memory.address, 1000, operation)


def memory_register(engine, memory):
    return library.mooncake_memory_register(
        engine, memory.address, memory.count, None, ACCESS_REMOTE)


def memory_unregister(engine, memory):
    return library.mooncake_memory_unregister(engine, memory.address)


@WatchCallback
def _ignore(kind, payload, context):
    pass


def watch(store, handle):
    return library.mooncake_store_watch_create(store, b"", byref(handle), _ignore, None)
