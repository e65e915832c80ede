"""No password, token or key is ever printed: not in an error, a log line, a report or a name.

Secrets are planted in URIs, well-formed and not, and in the environment; then commands and calls
run, and everything that they say is searched.
"""

import concurrent.futures
import ctypes
import os
import socket
import subprocess
import threading
import unittest

import lab
import services
import store_lib as lib

# Neither half may appear either.
LEFT, RIGHT = "Wq8zK4", "vT5nR2"
SECRET = LEFT + RIGHT
SECONDS = 60


def uris(port):
    """Forms of URIs with secrets, whose service, if there is one, is at a port."""
    host = f"127.0.0.1:{port}"
    return [
        f"etcd://user:{SECRET}@{host}",
        f"etcd://user:{SECRET}@{host}?ca=/no/such&cert=/no/such&key=/no/such",
        f"redis://:{SECRET}@{host}/1",
        f"redis://user:{SECRET}@{host}",
        f"http://user:{SECRET}@{host}/metadata",
        f"https://user:{SECRET}@{host}/metadata",
        # Malformed.
        f"user:{SECRET}@{host}",
        f"etcd://user:{SECRET}",
        f"etcd://user:{SECRET}@",
        f"etcd://user:{SECRET}@{host}/path",
        f"etcd://user:{LEFT}/{RIGHT}@{host}",
        f"etcd://user:{LEFT}@{RIGHT}@{host}",
        f"etcd://user:{LEFT}:{RIGHT}@{host}",
        f"etcd://user:{LEFT} {RIGHT}@{host}",
        f"etcd://user:{LEFT}\n{RIGHT}@{host}",
        f"etcd://user:{LEFT}%ZZ{RIGHT}@{host}",
        f"etcd://user:{LEFT}?{RIGHT}@{host}",
        f"etcd://user:{LEFT}#{RIGHT}@{host}",
        f"etcd://{host},user:{SECRET}@{host}",
        f"etcd://user:{SECRET}@{host}?password={SECRET}",
        f"etcd://{host}?password={SECRET}",
        f"etcd://{host}?{SECRET}",
        f"redis://:{SECRET}@127.0.0.1:99999",
        f"redis://:{SECRET}@{host}/abc",
        f"redis://:{SECRET}",
        f"rediss://:{SECRET}@{host}",
        f"redis+tls://:{SECRET}@{host}",
        f"http://{host}/metadata?token={SECRET}",
        f"http://{host}/metadata?token",
        f"http://{host}/metadata?{SECRET}",
        f"http://user:{SECRET}@{host}/metadata?token={SECRET}",
        f"http://user:{SECRET}@{host},user:{SECRET}@{host}",
        f"HTTP://user:{SECRET}@{host}/metadata" + "x" * 5000,
    ]


PLANTED = {name: SECRET for name in (
    "MC_METADATA_PASSWORD", "MC_REDIS_PASSWORD", "MC_METADATA_HTTP_TOKEN",
    # Misspelled, or of other programs.
    "MC_METADATA_PASSWRD", "MC_HTTP_TOKEN_VALUE", "MC_API_KEY")}
PLANTED["MC_METADATA_USERNAME"] = "user"

COMMANDS = (
    ("metadata", "list"), ("metadata", "get", "mooncake/key"),
    ("metadata", "put", "mooncake/key", "value"), ("metadata", "delete", "mooncake/key"),
    ("metadata", "watch"), ("store", "list"), ("store", "stat", "name"),
    ("store", "get", "name", "--to", "/no/such/folder"), ("store", "put", "name", "/etc/hostname"),
    ("store", "rm", "name"), ("doctor",), ("doctor", "--json"),
    ("bench", "target", "--buffer-size", "1MiB"),
)


class Echo:
    """A server that answers a request with an error that quotes all of it, as proxies do."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                one, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(one,), daemon=True).start()

    @staticmethod
    def serve(one):
        try:
            with one:
                one.settimeout(10)
                request = one.recv(65536)
                if request.startswith(b"*"):
                    quoted = b" ".join(request.split(b"\r\n"))
                    one.sendall(b"-ERR unknown command " + quoted[:4000] + b"\r\n")
                    return
                one.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(request))
                one.sendall(request)
        except OSError:
            pass

    def end(self):
        self.listener.close()


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    return dict(kept, MC_LOG_LEVEL="DEBUG", **more)


class Secrets(unittest.TestCase):
    def setUp(self):
        self.echo = Echo()
        self.addCleanup(self.echo.end)
        self.closed = lab.free_ports(1)

    def clean(self, what, text):
        for part in (LEFT, RIGHT):
            if part in text:
                line = next(line for line in text.splitlines() if part in line)
                return [f"{what}:\n    {line[:600]}"]
        return []

    def run_program(self, words, variables):
        """All that a command says; one that goes on is ended."""
        process = subprocess.Popen(
            [services.cli(), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment(**variables))
        try:
            text, _ = process.communicate(timeout=3)
        except subprocess.TimeoutExpired:
            process.terminate()
            text, _ = process.communicate(timeout=SECONDS)
        return text.decode(errors="replace")

    def search(self, runs):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = pool.map(
                lambda run: self.clean(f"{run[0]} with {run[1]}", self.run_program(*run)), runs)
            failures = [failure for each in found for failure in each]
        self.assertEqual(failures, [], "\n" + "\n".join(failures))

    def test_uris_given_to_the_program(self):
        runs = []
        for index, uri in enumerate(uris(self.closed) + uris(self.echo.port)):
            for words in (("metadata", "list"), ("store", "list")):
                if index % 2:
                    runs.append(((*words, "--metadata", uri), {}))
                else:
                    runs.append((words, {"MC_METADATA_SERVER": uri}))
        self.search(runs)

    def test_every_command(self):
        runs = []
        for form in (0, 2, 4, 9, 27):
            uri = uris(self.echo.port)[form]
            for words in COMMANDS:
                if words[0] == "bench" and form > 2:
                    continue
                if words[0] in ("doctor", "bench"):
                    runs.append(((*words, "--metadata", uri), {"MC_METADATA_SERVER": uri}))
                else:
                    runs.append((words, {"MC_METADATA_SERVER": uri}))
        # Slips at the command line.
        uri = uris(self.closed)[0]
        for words in (("metadata", "list", uri, uri), ("metadata", "list", f"--metdata={uri}"),
                      ("store", "list", "--metdata", uri), ("doctor", uri), (uri,),
                      ("metadata", uri), ("metadata", "serve", "--token", SECRET),
                      ("metadata", "serve", f"--token={SECRET}"),
                      ("bench", "target", "--metadata", uri, "--buffer-size", uri)):
            runs.append((words, {}))
        self.search(runs)

    def test_variables(self):
        runs = []
        for port in (self.closed, self.echo.port):
            for uri in (f"etcd://127.0.0.1:{port}", f"redis://127.0.0.1:{port}",
                        f"http://127.0.0.1:{port}/metadata"):
                for words in (("metadata", "list"), ("store", "stat", "name"), ("doctor",),
                              ("doctor", "--json")):
                    words = (*words, "--metadata", uri)
                    runs.append((words, PLANTED))
        bad = dict(PLANTED, MC_METADATA_HTTP_TOKEN=f"{SECRET}\u00e9")
        runs.append((("metadata", "serve", "--port", "0"), bad))
        runs.append((("metadata", "serve", "--port", "0"), PLANTED))
        self.search(runs)

    def test_services_that_refuse(self):
        """The words of real services, about wrong and right secrets."""
        redis = services.Redis("right" + SECRET)
        self.addCleanup(redis.end)
        ours = services.OursWithToken()
        self.addCleanup(ours.end)
        host = f"127.0.0.1:{redis.port}"
        runs = []
        for words in (("metadata", "list"), ("store", "list"), ("doctor",)):
            for uri in (f"redis://:{SECRET}@{host}", redis.uri):
                runs.append(((*words, "--metadata", uri), {}))
            runs.append(((*words, "--metadata", ours.uri), {"MC_METADATA_HTTP_TOKEN": SECRET}))
        self.search(runs)

    def test_calls_of_the_library(self):
        said = []
        logger = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)

        @logger
        def log(level, line, context):
            said.append(("log", line.decode(errors="replace")))

        library = lib.library
        library.mooncake_log_set_callback.argtypes = [logger, ctypes.c_void_p]
        library.mooncake_log_set_callback(log, None)
        library.mooncake_log_set_level(0)
        saved = dict(os.environ)
        try:
            for variables in ({}, PLANTED):
                os.environ.update(variables)
                for uri in uris(self.closed) + uris(self.echo.port):
                    self.call(uri, said)
        finally:
            os.environ.clear()
            os.environ.update(saved)
            library.mooncake_log_set_callback(logger(), None)
        failures = [failure for what, text in said for failure in self.clean(what, text)]
        self.assertEqual(failures, [], "\n" + "\n".join(failures))

    def call(self, uri, said):
        library = lib.library
        engine = ctypes.c_void_p()
        lib.create_engine(uri, "name", 1500, engine)
        said.append((f"engine_create {uri!r}", lib.message()))
        store = ctypes.c_void_p()
        options = lib.StoreOptions(ctypes.sizeof(lib.StoreOptions), 0, uri.encode(), 0)
        code = library.mooncake_store_create(None, None, options, ctypes.byref(store))
        said.append((f"store_create {uri!r}", lib.message()))
        if code == 0:
            lib.list_all(store, lib.Operation.within(1000))
            said.append((f"store_list {uri!r}", lib.message()))
            lib.stat(store, b"name", lib.Operation.within(1000))
            said.append((f"store_stat {uri!r}", lib.message()))
            handle = ctypes.c_void_p()
            library.mooncake_store_engine(store, ctypes.byref(handle))
            text = ctypes.create_string_buffer(1 << 16)
            library.mooncake_engine_metrics(handle, text, len(text), None)
            said.append((f"metrics {uri!r}", text.value.decode(errors="replace")))
            for task in os.listdir("/proc/self/task"):
                try:
                    with open(f"/proc/self/task/{task}/comm") as file:
                        said.append(("name of a thread", file.read()))
                except OSError:
                    pass
            library.mooncake_store_destroy(store)
