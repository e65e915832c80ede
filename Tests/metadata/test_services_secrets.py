"""No password, token or key is ever printed: not in an error, a log line, a report or a name.

Secrets are planted in URIs, well-formed and not, in the environment and in files. Then commands and
calls run, and everything that they and the servers print is searched. Each must also say what it is
about, because one that printed nothing would prove nothing.
"""

import concurrent.futures
import ctypes
import os
import pathlib
import re
import subprocess
import tempfile
import time
import unittest

import lab
import secrets_planted as planted
import services
import store_lib as lib
from secrets_planted import QUOTED, REACHING, SECRET, SPECIAL, SPECIAL_VARIABLES, VARIABLES, uris

SECONDS = 60
PROJECT = pathlib.Path(__file__).resolve().parents[2]

COMMANDS = (
    ("metadata", "list"), ("metadata", "get", "mooncake/key"),
    ("metadata", "put", "mooncake/key", "value"), ("metadata", "delete", "mooncake/key"),
    ("metadata", "watch"), ("store", "list"), ("store", "stat", "name"),
    ("store", "get", "name", "--to", "/no/such/folder"),
    ("store", "publish", "/etc/hostname", "--name", "name"), ("store", "watch"),
    ("store", "rm", "name"), ("doctor",), ("doctor", "--json"),
    ("bench", "target", "--buffer-size", "1MiB"),
    ("bench", "initiator", "--segment", "127.0.0.1:1"),
    ("bench", "initiator", "--segment", "name", "--duration", "100ms"),
)


class Echo(services.Listener):
    """Answers a request with an error that quotes all of it, as proxies do."""

    def serve(self, one):
        one.settimeout(10)
        request = one.recv(65536)
        if request.startswith(b"*"):
            quoted = b" ".join(request.split(b"\r\n"))
            one.sendall(b"-ERR unknown command " + quoted[:4000] + b"\r\n")
            return
        one.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(request))
        one.sendall(request)


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    return dict(kept, MC_LOG_LEVEL="DEBUG", **more)


class Secrets(unittest.TestCase):
    def setUp(self):
        self.echo = Echo()
        self.addCleanup(self.echo.end)
        self.closed = lab.free_ports(1)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def faults(self, what, text, needed):
        """What is wrong with a text: it has a secret, or does not mention its subject."""
        line = planted.found_in(text)
        if line:
            return [f"{what} tells a secret:\n    {line}"]
        return [f"{what} does not say {part!r}:\n    {text[:600]!r}"
                for part in needed if part not in text]

    def no_faults(self, faults):
        self.assertEqual(faults, [], "\n" + "\n".join(faults))

    # Commands

    def run_program(self, words, variables, needed):
        """The output of a command. One that keeps running is ended some time after it has printed
        what is needed."""
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [services.cli(), *words], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=environment(**variables))

            def text():
                size = os.fstat(output.fileno()).st_size
                return os.pread(output.fileno(), size, 0).decode(errors="replace")

            def has_said():
                return process.poll() is not None or all(part in text() for part in needed)

            lab.wait_until(has_said, SECONDS / 3)
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                lab.end_process(process, SECONDS)
            return text()

    def search(self, rows):
        """A row: words, variables, and what its output must contain."""
        def check(row):
            words, variables, needed = row
            return self.faults(
                f"{words} with {variables}", self.run_program(words, variables, needed), needed)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            self.no_faults([fault for faults in pool.map(check, rows) for fault in faults])

    def test_uris_given_to_the_program(self):
        rows = []
        for index, (uri, shown) in enumerate(uris(self.closed) + uris(self.echo.port)):
            for words in (("metadata", "list"), ("store", "list")):
                if index % 2:
                    rows.append(((*words, "--metadata", uri), {}, [shown]))
                else:
                    rows.append((words, {"MC_METADATA_SERVER": uri}, [shown]))
        self.search(rows)

    def test_every_command(self):
        rows = []
        for index in REACHING:
            uri, shown = uris(self.echo.port)[index]
            for words in COMMANDS:
                variables = {"MC_METADATA_SERVER": uri}
                if words[0] in ("doctor", "bench"):
                    words = (*words, "--metadata", uri)
                rows.append((words, variables, [shown]))
        self.search(rows)

    def test_slips_at_the_command_line(self):
        uri, shown = uris(self.closed)[0]
        other = {"MC_METADATA_SERVER": "etcd://127.0.0.1:1"}
        rows = [(words, other, [needed]) for words, needed in (
            (("metadata", "list", uri, uri), shown),
            (("metadata", "list", f"--metdata={uri}"), "--metdata"),
            (("store", "list", "--metdata", uri), "--metdata"),
            (("doctor", uri), "A peer is the name"),
            ((uri,), shown), (("metadata", uri), shown),
            (("metadata", "serve", "--token", SECRET), "--token"),
            (("metadata", "serve", f"--token={SECRET}"), "--token"),
            (("bench", "target", "--metadata", uri, "--buffer-size", uri), "--buffer-size"))]
        self.search(rows)

    def test_variables(self):
        rows = []
        for planted_here in (VARIABLES, SPECIAL_VARIABLES):
            for port in (self.closed, self.echo.port):
                for uri in (f"etcd://127.0.0.1:{port}", f"redis://127.0.0.1:{port}",
                            f"http://127.0.0.1:{port}/metadata"):
                    for words in (("metadata", "list"), ("store", "stat", "name")):
                        words = (*words, "--metadata", uri)
                        rows.append((words, planted_here, [uri]))
                    for words in (("doctor",), ("doctor", "--json")):
                        words = (*words, "--metadata", uri)
                        needed = ["MC_METADATA_PASSWORD", "MC_METADATA_PASSWRD", "MC_API_KEY"]
                        rows.append((words, planted_here, needed))
        bad = dict(VARIABLES, MC_METADATA_HTTP_TOKEN=f"{SECRET}\u00e9")
        rows.append((("metadata", "serve", "--port", "0"), bad, ["MC_METADATA_HTTP_TOKEN"]))
        rows.append((("metadata", "serve", "--port", "0"), VARIABLES, ["http://127.0.0.1:"]))
        self.search(rows)

    def test_files(self):
        """Files that hold a secret and are invalid."""
        key = self.folder / "client.key"
        key.write_text(f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n")
        rows = []
        for scheme in ("etcd", "https"):
            query = f"ca={key}&cert={key}&key={key}"
            uri = f"{scheme}://127.0.0.1:{self.echo.port}?{query}"
            rows.append((("metadata", "list", "--metadata", uri), {}, [str(self.echo.port)]))
        for index, text in enumerate((f"{SECRET}\u00e9", f"{SPECIAL}", f"{SECRET}\n{SECRET}")):
            file = self.folder / f"token-{index}"
            file.write_text(text)
            rows.append((("metadata", "serve", "--port", "0", "--token-file", str(file)), {},
                         ["metadata server: the token"]))
        self.search(rows)

    # Real services

    def test_services_that_refuse(self):
        """The messages of real services about wrong and right secrets, and those of our server."""
        redis = services.Redis(SECRET + "right")
        etcd = services.Etcd()
        file = self.folder / "token"
        ours = [services.OursWithToken(SECRET + "right", MC_LOG_LEVEL="DEBUG"),
                services.OursWithToken(SECRET + "right", file, MC_LOG_LEVEL="DEBUG")]
        for service in (redis, etcd, *ours):
            self.addCleanup(service.end)
        etcd.with_users(SECRET + "right")
        rows = []
        for words in (("metadata", "list"), ("store", "list"), ("doctor",)):
            for wrong in (SECRET, QUOTED, SECRET + "right"):
                for scheme, user, service in (("redis", "", redis), ("etcd", "mooncake", etcd)):
                    host = f"127.0.0.1:{service.port}"
                    rows.append(((*words, "--metadata", f"{scheme}://{user}:{wrong}@{host}"), {},
                                 [host] if "right" not in wrong or words[0] == "doctor" else []))
                for service in ours:
                    host = f"127.0.0.1:{service.port}"
                    token = {} if wrong == QUOTED else {"MC_METADATA_HTTP_TOKEN": wrong}
                    rows.append(((*words, "--metadata", service.uri), token,
                                 [host] if "right" not in wrong or words[0] == "doctor" else []))
        self.search(rows)
        for service in ours:
            # By now all of them have asked it.
            self.no_faults(self.faults("our server", service.log_text(), [service.uri]))

    # Names of processes

    def names(self, pid):
        """What everybody can read about a process."""
        found = []
        base = pathlib.Path(f"/proc/{pid}")
        for file in (base / "cmdline", base / "comm", base / "status", *base.glob("task/*/comm")):
            try:
                found.append(file.read_text(errors="replace").replace("\0", " "))
            except OSError:
                pass
        return "\n".join(found)

    def test_names_of_processes(self):
        server = services.OursWithToken(SECRET, MC_LOG_LEVEL="DEBUG")
        by_file = services.OursWithToken(SECRET, self.folder / "token")
        plain = services.Ours()
        for service in (server, by_file, plain):
            self.addCleanup(service.end)
            self.no_faults(self.faults(
                "a server", self.names(service.process.pid), ["metadata serve"]))
        uri = plain.uri.replace("http://", f"http://user:{SECRET}@")
        shown = plain.uri.replace("http://", "")
        for words in (("metadata", "watch"), ("store", "watch"),
                      ("bench", "target", "--buffer-size", "1MiB"),
                      ("store", "publish", "/etc/hostname", "--name", "name")):
            forms = [((*words, f"--metadata={uri}"), {}), ((*words, "--metadata", uri), {}),
                     ((*words, "--metadata", plain.uri), VARIABLES)]
            if words[0] != "bench":
                forms.append((words, {"MC_METADATA_SERVER": uri}))
            for arguments, variables in forms:
                process = subprocess.Popen(
                    [services.cli(), *arguments], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env=environment(**variables))
                self.addCleanup(lab.end_process, process)
                # The program overwrites an argument as soon as it has read it.
                needed = [words[0], words[1]] + ([shown] if not variables else [])
                lab.wait_until(
                    lambda: not self.faults("it", self.names(process.pid), needed), 10)
                self.no_faults(self.faults(
                    f"{arguments} with {variables}", self.names(process.pid), needed))
                self.assertIsNone(process.poll(), arguments)
                lab.end_process(process)

    def test_examples_of_the_documentation(self):
        """No secret shows among the arguments of a command."""
        count = 0
        for path in PROJECT.glob("**/*.md"):
            if ".build" in path.parts:
                continue
            for line in path.read_text().splitlines():
                if re.search(r"(^|\s)mooncake (metadata|store|bench|doctor)", line):
                    count += 1
                    self.assertNotRegex(line, r"://[^/\s]*:[^/\s@]+@", f"{path}: {line}")
        self.assertGreater(count, 10)

    # Calls

    def test_calls_of_the_library(self):
        said = []
        logger = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)

        @logger
        def log(level, line, context):
            said.append(("the log", line.decode(errors="replace"), []))

        library = lib.library
        library.mooncake_log_set_callback.argtypes = [logger, ctypes.c_void_p]
        library.mooncake_log_set_callback(log, None)
        library.mooncake_log_set_level(0)
        saved = dict(os.environ)
        try:
            for variables in ({}, VARIABLES, SPECIAL_VARIABLES):
                os.environ.update(variables)
                for uri, shown in uris(self.closed) + uris(self.echo.port):
                    self.call(uri, shown, said)
                with_token = services.OursWithToken(SECRET)
                self.addCleanup(with_token.end)
                os.environ["MC_METADATA_HTTP_TOKEN"] = SECRET
                self.describe(with_token.uri, said)
        finally:
            os.environ.clear()
            os.environ.update(saved)
            library.mooncake_log_set_callback(logger(), None)
        self.assertTrue(any(what == "the log" for what, _, _ in said))
        self.no_faults([fault for row in said for fault in self.faults(*row)])

    def call(self, uri, shown, said):
        library = lib.library
        if len(uri) > 4096:
            shown = "options.metadata_uri is longer than 4096 bytes"
        engine = ctypes.c_void_p()
        code = lib.create_engine(uri, "name", 1500, engine)
        said.append((f"engine_create {uri!r}", lib.message(), [shown] if code else []))
        if code == 0:
            library.mooncake_engine_destroy(engine)
        store = ctypes.c_void_p()
        options = lib.StoreOptions(ctypes.sizeof(lib.StoreOptions), 0, uri.encode(), 0)
        code = library.mooncake_store_create(None, None, options, ctypes.byref(store))
        said.append((f"store_create {uri!r}", lib.message(), [shown] if code else []))
        if code == 0:
            code = lib.list_all(store, lib.Operation.within(1000))
            said.append((f"store_list {uri!r}", lib.message(), [shown]))
            self.assertNotEqual(code, 0)
            lib.stat(store, b"name", lib.Operation.within(1000))
            said.append((f"store_stat {uri!r}", lib.message(), [shown]))
            handle = ctypes.c_void_p()
            library.mooncake_store_engine(store, ctypes.byref(handle))
            said.append((f"metrics {uri!r}", self.metrics(handle), ["mooncake_read_bytes_total"]))
            said.append(("names of threads", self.names(os.getpid()), ["mc-"]))
            library.mooncake_store_destroy(store)

    def metrics(self, engine):
        text = ctypes.create_string_buffer(1 << 16)
        lib.library.mooncake_engine_metrics(engine, text, len(text), None)
        return text.value.decode(errors="replace")

    def describe(self, uri, said):
        """What an engine accepted by a service reports about itself and a peer."""
        library = lib.library
        engines = [lib.engine(uri, name, 3000) for name in ("secret-a", "secret-b")]
        text = ctypes.create_string_buffer(1 << 16)
        length, segment = ctypes.c_uint64(), ctypes.c_int32()
        lib.check(library.mooncake_segment_open(
            engines[0], b"secret-b", ctypes.c_uint64(3000), ctypes.byref(segment)))
        for each, name in ((ctypes.c_int32(0), "secret-a"), (segment, "secret-b")):
            lib.check(library.mooncake_segment_describe(
                engines[0], each, text, ctypes.c_uint64(len(text)), ctypes.byref(length)))
            said.append(("segment_describe", text.value.decode(), [name, "tcp_data_port"]))
        said.append(("metrics", self.metrics(engines[0]), ["secret-a"]))
        code = library.mooncake_segment_open(
            engines[0], b"nobody", ctypes.c_uint64(1000), ctypes.byref(segment))
        self.assertNotEqual(code, 0)
        said.append(("segment_open", lib.message(), ["nobody"]))
        for engine in engines:
            library.mooncake_engine_destroy(engine)
