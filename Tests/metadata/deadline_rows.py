"""The calls of both headers that test_services_deadlines.py times, and those it need not time."""

import ctypes
import dataclasses
from ctypes import POINTER, byref, c_int32, c_uint64, c_void_p
from typing import Callable, Optional

import mooncake_lib
import store_lib as lib

# Milliseconds: for calls with a timeout, and for calls of the engine without one.
TIMEOUT, DEFAULT = 400, 600
# So long that only a cancel ends a call.
PATIENCE = 10_000
LATENESS, CANCEL_LATENESS, DESTROY_LIMIT = 0.1, 0.2, 5.0
TEXT = 1 << 16


def nothing(bench):
    pass


@dataclasses.dataclass
class Row:
    """One call: preparation before the freeze, the call, and what undoes it after the thaw.

    The name is the function's, followed by the special case. A call takes a bench, and an operation
    if it can be canceled. It returns a code, which must be `code`, or `canceled` after a cancel.
    """

    name: str
    call: Callable
    code: int
    before: Callable = nothing
    after: Callable = nothing
    # Seconds that it may take.
    limit: float = TIMEOUT / 1000 + LATENESS
    # None: it takes no operation.
    canceled: Optional[int] = None
    # The phase of the call in which the service freezes; None: before the call.
    phase: Optional[int] = None
    # At the last byte of the phase instead of at its start.
    is_done: bool = False
    # It may end before the cancel comes: what it does then does not ask the service.
    ends_first: bool = False
    # The services that support it; None: all.
    kinds: Optional[tuple] = None

    @property
    def function(self):
        return self.name.split(",")[0]


# These inherently wait for nobody: not the metadata service, a peer or another call.
NEVER_WAIT = {
    "a constant of the library": (
        "mooncake_version", "mooncake_version_number", "mooncake_error_name"),
    "a text of the calling thread": ("mooncake_error_message",),
    "they write defaults into the caller's struct": (
        "mooncake_engine_options_init", "mooncake_metadata_server_options_init",
        "mooncake_store_options_init", "mooncake_store_operation_init",
        "mooncake_store_register_options_init", "mooncake_store_get_options_init"),
    "settings of the process; the callback that is waited for is the caller's": (
        "mooncake_log_set_callback", "mooncake_log_set_level"),
    "they read what has been there since the object was made": (
        "mooncake_engine_name", "mooncake_store_engine", "mooncake_metadata_server_uri",
        "mooncake_metadata_server_port", "mooncake_store_result_read"),
    "they free memory of the library": (
        "mooncake_notification_free", "mooncake_store_result_free"),
    "a descriptor of this process; cancel only signals it, and is timed by what it ends": (
        "mooncake_cancellation_create", "mooncake_cancellation_cancel",
        "mooncake_cancellation_destroy"),
}


# ---- The store ---------------------------------------------------------------------------------

def register(bench, operation=None, **options):
    return lib.register(bench.store, b"mine", bench.mine, operation, **options)


def drop(bench):
    lib.unregister(bench.store, b"mine")


def forget(bench):
    lib.delete(bench.store, b"there")


def operation_rows():
    rows = []

    def add(name, call, code, canceled, **more):
        rows.append(Row("mooncake_store_" + name, call, code, canceled=canceled, **more))

    def both(name, call, **more):
        add(name, call, lib.TIMEOUT, lib.CANCELED, **more)

    both("register", register, after=drop)
    both("register, frozen while hashing", register, after=drop, phase=lib.PHASE_HASHING)
    both("register, frozen while publishing", register, after=drop, phase=lib.PHASE_PUBLISHING)
    both("register, create only", lambda b, op: register(b, op, create_only=True), after=drop)
    both("register, create only, frozen while publishing",
         lambda b, op: register(b, op, create_only=True), after=drop, phase=lib.PHASE_PUBLISHING)
    both("register, writable", lambda b, op: register(b, op, writable=True), after=drop)
    both("register, writable, frozen while publishing",
         lambda b, op: register(b, op, writable=True), after=drop, phase=lib.PHASE_PUBLISHING)
    both("register, a new version", register, after=drop,
         before=lambda b: lib.check(lib.register(b.store, b"mine", b.other)))
    # They withdraw in any case and tell the service later.
    add("unregister", lambda b, op: lib.unregister(b.store, b"mine", op), lib.OK, lib.OK,
        before=lambda b: lib.check(register(b)))
    add("delete_replica", lambda b, op: lib.delete(b.store, b"there", op), lib.OK, lib.OK,
        before=lambda b: lib.check(lib.get(b.store, b"there", b.fetched)))
    both("get", lambda b, op: lib.get(b.store, b"there", b.fetched, op), after=forget)
    both("get, allocated", lambda b, op: lib.get(b.store, b"there", None, op), after=forget)
    both("get, receive only",
         lambda b, op: lib.get(b.store, b"there", b.fetched, op, receive_only=True), after=forget)
    # The holder's segment is not open yet.
    both("get, frozen before bytes arrive",
         lambda b, op: lib.get(b.store, b"there", b.fetched, op), after=forget,
         phase=lib.PHASE_TRANSFERRING)
    # The holding is published later.
    add("get, frozen when all bytes are there",
        lambda b, op: lib.get(b.store, b"there", b.fetched, op), lib.OK, lib.OK, after=forget,
        phase=lib.PHASE_TRANSFERRING, is_done=True)
    add("get, receive only, frozen when all bytes are there",
        lambda b, op: lib.get(b.store, b"there", b.fetched, op, receive_only=True), lib.OK, lib.OK,
        after=forget, phase=lib.PHASE_TRANSFERRING, is_done=True, ends_first=True)
    # Only etcd holds documents of Mooncake's Go store.
    both("get, without digests", lambda b, op: lib.get(b.store, b"foreign", b.fetched, op),
         after=lambda b: lib.delete(b.store, b"foreign"), kinds=("Etcd",))
    both("get, without digests, frozen before bytes arrive",
         lambda b, op: lib.get(b.store, b"foreign", b.fetched, op),
         after=lambda b: lib.delete(b.store, b"foreign"), kinds=("Etcd",),
         phase=lib.PHASE_TRANSFERRING)
    both("remove", lambda b, op: lib.remove(b.store, b"victim", op),
         before=lambda b: lib.check(lib.register(b.peer, b"victim", b.part)),
         after=lambda b: lib.unregister(b.peer, b"victim"))
    both("list", lambda b, op: lib.list_all(b.store, op))
    both("stat", lambda b, op: lib.stat(b.store, b"there", op))
    both("read", lambda b, op: lib.read(b.store, b"there", b.part, op))
    both("write", lambda b, op: lib.write(b.store, b"open", b.part, op))
    return rows


def create_store(bench):
    """A store with its own engine."""
    store = c_void_p()
    options = lib.engine_options(bench.service.uri, "own", DEFAULT)
    code = lib.library.mooncake_store_create(None, byref(options), None, byref(store))
    if code == 0:
        lib.library.mooncake_store_destroy(store)
    return code


# ---- The engine --------------------------------------------------------------------------------

def create_engine(bench):
    engine = c_void_p()
    code = lib.create_engine(bench.service.uri, "third", DEFAULT, engine)
    if code == 0:
        lib.library.mooncake_engine_destroy(engine)
    return code


def register_batch(bench):
    return lib.library.mooncake_memory_register_batch(
        bench.engine, bench.pair, 2, None, lib.ACCESS_REMOTE)


def unregister_batch(bench):
    addresses = (c_void_p * 2)(*[buffer.address for buffer in bench.pair])
    return lib.library.mooncake_memory_unregister_batch(bench.engine, addresses, 2)


def allocate(bench):
    return lib.library.mooncake_memory_allocate(
        bench.engine, bench.mine.count, None, lib.ACCESS_REMOTE, byref(bench.allocated))


def free(bench):
    return lib.library.mooncake_memory_free(bench.engine, bench.allocated)


def open_segment(bench, name=b"peer"):
    return lib.library.mooncake_segment_open(bench.engine, name, TIMEOUT, byref(bench.segment))


def close_segment(bench):
    return lib.library.mooncake_segment_close(bench.engine, bench.segment)


def opened(bench):
    lib.check(open_segment(bench))


def send(bench):
    return lib.library.mooncake_notification_send(
        bench.engine, bench.segment, b"name", b"text", TIMEOUT)


def transfer(bench, is_known):
    return lib.library.mooncake_transfer_sync(
        bench.engine, byref(bench.request(is_known)), 1, TIMEOUT)


# ---- Batches -----------------------------------------------------------------------------------

def batched(bench):
    """A batch without requests, on an open segment."""
    opened(bench)
    lib.check(lib.library.mooncake_batch_create(bench.engine, 4, byref(bench.batch)))


def end_batch(bench):
    library = lib.library
    library.mooncake_batch_cancel(bench.engine, bench.batch)
    library.mooncake_batch_wait(bench.engine, bench.batch, 0, None)
    library.mooncake_batch_free(bench.engine, bench.batch)
    close_segment(bench)


def submit(bench, is_known=False, timeout=TIMEOUT, notify=False):
    """Reads from registered or unregistered memory of the peer; the latter makes it ask."""
    library, request = lib.library, byref(bench.request(is_known))
    if notify:
        return library.mooncake_batch_submit_notify(
            bench.engine, bench.batch, request, 1, timeout, b"name", b"text")
    return library.mooncake_batch_submit(bench.engine, bench.batch, request, 1, timeout)


def wait(bench, timeout=0):
    """The code of the wait, or of what was waited for."""
    status = mooncake_lib.BatchStatus()
    code = lib.library.mooncake_batch_wait(bench.engine, bench.batch, timeout, byref(status))
    return code or status.error


def submit_and_wait(bench, **arguments):
    return submit(bench, **arguments) or wait(bench)


def cancel_and_wait(bench):
    return lib.library.mooncake_batch_cancel(bench.engine, bench.batch) or wait(bench)


def running(bench):
    """Before the freeze: the row's call begins with the submit."""
    batched(bench)


def engine_rows():
    default = DEFAULT / 1000 + LATENESS
    closed_twice = lambda b: (close_segment(b), close_segment(b))
    return [
        Row("mooncake_engine_create", create_engine, lib.TIMEOUT, limit=default),
        Row("mooncake_store_create, with its own engine", create_store, lib.TIMEOUT,
            limit=default),
        Row("mooncake_memory_register", lambda b: lib.memory_register(b.engine, b.mine), lib.OK,
            after=lambda b: lib.memory_unregister(b.engine, b.mine), limit=default),
        Row("mooncake_memory_unregister", lambda b: lib.memory_unregister(b.engine, b.mine),
            lib.OK, before=lambda b: lib.check(lib.memory_register(b.engine, b.mine)),
            limit=default),
        Row("mooncake_memory_register_batch", register_batch, lib.OK, after=unregister_batch,
            limit=default),
        Row("mooncake_memory_unregister_batch", unregister_batch, lib.OK,
            before=lambda b: lib.check(register_batch(b)), limit=default),
        Row("mooncake_memory_allocate", allocate, lib.OK, after=free, limit=default),
        Row("mooncake_memory_free", free, lib.OK, before=lambda b: lib.check(allocate(b)),
            limit=default),
        Row("mooncake_segment_open", open_segment, lib.TIMEOUT),
        # Its peer is asked in the second half of the time.
        Row("mooncake_segment_open, known", open_segment, lib.OK, before=opened,
            after=closed_twice),
        Row("mooncake_segment_open, nobody's", lambda b: open_segment(b, b"nobody"), lib.TIMEOUT),
        Row("mooncake_peer_probe",
            lambda b: lib.library.mooncake_peer_probe(b.engine, b"peer", TIMEOUT), lib.TIMEOUT),
        Row("mooncake_notification_send", send, lib.TIMEOUT, before=opened, after=close_segment),
        Row("mooncake_transfer_sync", lambda b: transfer(b, True), lib.OK, before=opened,
            after=close_segment),
        Row("mooncake_transfer_sync, what the peer has not", lambda b: transfer(b, False),
            lib.NOT_REGISTERED, before=opened, after=close_segment),
        Row("mooncake_batch_wait", submit_and_wait, lib.NOT_REGISTERED, before=running,
            after=end_batch),
        Row("mooncake_batch_wait, bounded",
            lambda b: submit(b, timeout=PATIENCE) or wait(b, TIMEOUT), lib.TIMEOUT,
            before=running, after=end_batch),
        # The peer's address is looked up to notify it.
        Row("mooncake_batch_wait, with a notification",
            lambda b: submit_and_wait(b, is_known=True, notify=True), lib.TIMEOUT, before=running,
            after=end_batch),
        Row("mooncake_batch_cancel",
            lambda b: submit(b, timeout=PATIENCE) or cancel_and_wait(b), lib.CANCELED,
            before=running, after=end_batch, limit=CANCEL_LATENESS),
    ]


# ---- Calls that do not wait, though other calls on their objects do ------------------------------

def text_of(function, *arguments):
    length = c_uint64()
    return function(*arguments, ctypes.create_string_buffer(TEXT), TEXT, byref(length))


def start_server(bench):
    options = lib.MetadataServerOptions(ctypes.sizeof(lib.MetadataServerOptions))
    return lib.library.mooncake_metadata_server_start(byref(options), byref(bench.server))


def create_second_store(bench):
    return lib.library.mooncake_store_create(bench.engine, None, None, byref(bench.second))


def buffers(bench):
    found = lib.Buffers()
    code = lib.library.mooncake_segment_buffers(
        bench.engine, bench.segment, found.list, len(found.list),
        ctypes.cast(byref(found, lib.Buffers.count.offset), POINTER(c_uint64)))
    return code


def receive(bench):
    found = POINTER(mooncake_lib.Notification)()
    return lib.library.mooncake_notification_receive(bench.engine, byref(found))


@lib.BatchCallback
def ignore(batch, status, context):
    pass


def quick_rows():
    """In the order of the calls; the service is frozen throughout."""
    library = lib.library
    status, one, number = mooncake_lib.BatchStatus(), lib.RequestStatus(), c_int32()
    rows = [
        Row("mooncake_engine_metrics",
            lambda b: text_of(library.mooncake_engine_metrics, b.engine), lib.OK),
        Row("mooncake_engine_event_fd",
            lambda b: library.mooncake_engine_event_fd(b.engine, byref(number)), lib.OK),
        Row("mooncake_segment_buffers", buffers, lib.OK),
        Row("mooncake_segment_describe",
            lambda b: text_of(library.mooncake_segment_describe, b.engine, b.segment), lib.OK),
        Row("mooncake_notification_receive", receive, lib.OK),
        Row("mooncake_batch_create",
            lambda b: library.mooncake_batch_create(b.engine, 4, byref(b.batch)), lib.OK),
        Row("mooncake_batch_set_callback",
            lambda b: library.mooncake_batch_set_callback(b.engine, b.batch, ignore, None),
            lib.OK),
        Row("mooncake_batch_event_fd",
            lambda b: library.mooncake_batch_event_fd(b.engine, b.batch, byref(number)), lib.OK),
        Row("mooncake_batch_submit", lambda b: submit(b, timeout=PATIENCE), lib.OK),
        Row("mooncake_batch_submit_notify",
            lambda b: submit(b, timeout=PATIENCE, notify=True), lib.OK),
        Row("mooncake_batch_poll",
            lambda b: library.mooncake_batch_poll(b.engine, b.batch, byref(status)), lib.OK),
        Row("mooncake_batch_poll_request",
            lambda b: library.mooncake_batch_poll_request(b.engine, b.batch, 0, byref(one)),
            lib.OK),
        Row("mooncake_batch_free, running",
            lambda b: library.mooncake_batch_free(b.engine, b.batch), lib.BUSY),
        Row("mooncake_batch_free, canceled",
            lambda b: cancel_and_wait(b) and library.mooncake_batch_free(b.engine, b.batch),
            lib.OK, limit=CANCEL_LATENESS),
        Row("mooncake_segment_close", close_segment, lib.OK),
        Row("mooncake_metadata_server_start", start_server, lib.OK),
        Row("mooncake_metadata_server_stop",
            lambda b: library.mooncake_metadata_server_stop(b.server), lib.OK),
        Row("mooncake_store_create, on an engine", create_second_store, lib.OK),
        Row("mooncake_store_watch_create", lambda b: lib.watch(b.second, b.watch), lib.OK),
        Row("mooncake_store_watch_destroy, at once",
            lambda b: library.mooncake_store_watch_destroy(b.watch), lib.OK),
        Row("mooncake_store_watch_create, again", lambda b: lib.watch(b.second, b.watch), lib.OK),
        # By now it is asking the service.
        Row("mooncake_store_watch_destroy", lambda b: (
            b.pause(), library.mooncake_store_watch_destroy(b.watch))[1], lib.OK,
            limit=0.2 + LATENESS),
        Row("mooncake_store_destroy, without payloads",
            lambda b: library.mooncake_store_destroy(b.second), lib.OK, limit=0.5 + LATENESS),
    ]
    for row in rows:
        if row.limit == Row.limit:
            row.limit = LATENESS
    return rows


def holding(bench):
    """Registers something to withdraw."""
    lib.check(register(bench))
    lib.check(lib.get(bench.store, b"there", bench.fetched))


def last_rows():
    """Ends the objects that the others use."""
    library = lib.library
    return [
        Row("mooncake_store_destroy", lambda b: library.mooncake_store_destroy(b.store), lib.OK,
            limit=DESTROY_LIMIT),
        Row("mooncake_engine_destroy", lambda b: library.mooncake_engine_destroy(b.engine), lib.OK,
            limit=DESTROY_LIMIT),
    ]
