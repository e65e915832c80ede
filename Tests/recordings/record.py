#!/usr/bin/env python3
"""Records the messages between stores of a build and their entries in a metadata service.

    Tests/recordings/record.py BUILD NAME

BUILD is a folder with libmooncake.so and mooncake-cli, such as .build/debug of any commit since the
first release of the store; the recording is written to NAME.json beside this program.
"""

import base64
import ctypes
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import threading

HERE = pathlib.Path(__file__).resolve().parent
BUILD = pathlib.Path(sys.argv[1]).resolve()
os.environ["MOONCAKE_LIBRARY"] = str(BUILD / "libmooncake.so")
os.environ["MOONCAKE_CLI"] = str(BUILD / "mooncake-cli")
for name in [name for name in os.environ if name.startswith("MC_")]:
    del os.environ[name]
# The relay changes records, and they must not be put again while a question is being recorded.
os.environ["MC_METADATA_TTL"] = "60"
sys.path[:0] = [str(HERE.parent / folder) for folder in ("metadata", "interop")]

import lab
import services
import store_lib as lib

SIZE = 200_000
SHARD_BYTES = 64 << 10
FILES = {"config.json": b"{}\n", "empty": b"", "weights/part-1": bytes(range(256)) * 4}
SERVICE, METADATA = 64, 1
SECONDS = 20


def receive(connection, count):
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def receive_message(connection):
    """Type and text."""
    (length,) = struct.unpack("<Q", receive(connection, 8))
    body = receive(connection, length)
    return body[0], body[1:].decode()


def ask(rpc, kind, text):
    """One question to the RPC port; returns the text of the answer."""
    host, port = rpc.rsplit(":", 1)
    with socket.create_connection((host.strip("[]"), int(port)), SECONDS) as connection:
        body = text.encode()
        connection.sendall(struct.pack("<QB", len(body) + 1, kind) + body)
        return receive_message(connection)[1]


def read_memory(rpc, address, length):
    """Bytes of a process, through its data port."""
    descriptor = json.loads(ask(rpc, METADATA, "{}"))
    place = (descriptor["tcp_data_host"], descriptor["tcp_data_port"])
    with socket.create_connection(place, SECONDS) as connection:
        connection.sendall(struct.pack("<QQB7x", length, address, 0))
        return receive(connection, length)


class Relay(services.Listener):
    """Relays a holder's RPC port and records questions and answers."""

    def __init__(self, target):
        self.target = target
        self.exchanges = []
        self.lock = threading.Lock()
        super().__init__()

    def serve(self, one):
        while True:
            try:
                kind, text = receive_message(one)
            except EOFError:
                return
            answer = ask(self.target, kind, text)
            if kind == SERVICE:
                with self.lock:
                    self.exchanges.append({"question": text, "answer": answer})
            body = answer.encode()
            one.sendall(struct.pack("<QB", len(body) + 1, kind) + body)
            if '"keep":true' not in text.replace(" ", ""):
                return

    def take(self):
        with self.lock:
            taken, self.exchanges = self.exchanges, []
        return taken


class Records:
    """The part of a metadata server that the store needs."""

    def __init__(self, uri):
        self.raw = services.Raw(uri)

    def all(self):
        status, text = self.raw.ask("GET", {"prefix": "mooncake/store/"})
        assert status == 200, text
        return {entry["key"]: entry["value"] for entry in json.loads(text)["entries"]}

    def one(self, part):
        (found,) = [value for key, value in self.all().items() if part in key]
        return found

    def lead(self, old, new):
        """Clients that look for a holder find the relay's address."""
        for key, value in self.all().items():
            if old in value:
                status, text = self.raw.ask("PUT", {"key": key}, value.replace(old, new).encode())
                assert status == 200, text


def open_answer(record):
    """What a holder answers to the first question about its payload."""
    holder = json.loads(record)["holder"]
    question = json.dumps(
        {"service": "store", "op": "open", "holding": holder["holding"]}, separators=(",", ":"))
    return holder["rpc"], json.loads(ask(holder["rpc"], SERVICE, question))


def manifest(record):
    rpc, answer = open_answer(record)
    data = read_memory(rpc, answer["manifest_address"], answer["manifest_bytes"])
    return base64.b64encode(data).decode()


def register(store, memory):
    options = lib.RegisterOptions(ctypes.sizeof(lib.RegisterOptions), 0, SHARD_BYTES)
    lib.check(lib.library.mooncake_store_register(
        store, b"m", memory.buffer, 1, options, None, None))


def record_memory(uri, records):
    """A payload in memory: fetched, read in part, and removed."""
    stores = [lib.store(lib.engine(uri, name, 5000)) for name in ("origin", "receiver")]
    origin, receiver = stores
    memory, copy = lib.Memory(SIZE), lib.Memory(SIZE)
    ctypes.memset(copy.address, 0, SIZE)
    register(origin, memory)
    found = {"head": records.one("store/object/m"), "origin": records.one("store/holder/m/")}
    holder = json.loads(found["origin"])["holder"]
    recording = {"manifest": manifest(found["origin"])}
    relay = Relay(holder["rpc"])
    records.lead(holder["rpc"], f"127.0.0.1:{relay.port}")
    lib.check(lib.get(receiver, b"m", copy))
    assert copy.bytes.raw == memory.bytes.raw
    # The goodbye is sent without waiting for an answer.
    assert lab.wait_until(
        lambda: any('"limit":0' in each["question"] for each in relay.exchanges), SECONDS)
    recording["get"] = relay.take()
    replica, = [value for key, value in records.all().items()
                if "store/holder/m/" in key and '"segment":"receiver"' in value]
    found["replica"] = replica
    lib.check(lib.delete(receiver, b"m"))
    lib.check(lib.read(receiver, b"m", copy))
    recording["read"] = relay.take()
    lib.check(lib.remove(receiver, b"m"))
    found["removed"] = records.one("store/removed/m")
    question = recording["get"][0]["question"]
    gone = lab.wait_until(lambda: '"version"' not in ask(holder["rpc"], SERVICE, question), SECONDS)
    assert gone, "the origin does not withdraw"
    recording["gone"] = {"question": question, "answer": ask(holder["rpc"], SERVICE, question)}
    relay.end()
    for store in stores:
        lib.library.mooncake_store_destroy(store)
    return recording | {"records": found}


def record_files(uri, records, folder):
    """A published directory."""
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (folder / "config.json").chmod(0o755)
    process = subprocess.Popen(
        [services.cli(), "store", "publish", str(folder), "--name", "f", "--metadata", uri],
        stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        return {"manifest": manifest(records.one("store/holder/f/"))}
    finally:
        lab.end_process(process)
        process.stdout.close()


def main():
    server = services.Ours()
    try:
        records = Records(server.uri)
        recording = {"memory": record_memory(server.uri, records)}
        with tempfile.TemporaryDirectory() as folder:
            recording["files"] = record_files(server.uri, records, pathlib.Path(folder))
    finally:
        server.end()
    path = HERE / f"{sys.argv[2]}.json"
    path.write_text(json.dumps(recording, indent=1) + "\n")
    print(path)


main()
