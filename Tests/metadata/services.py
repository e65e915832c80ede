"""Real metadata services for the tests, each on its own loopback ports.

A service has uri, start(), kill(), stop() and resume() (SIGSTOP, SIGCONT), restart(empty), end().
"""

import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse

import lab

TTL = 2
VARIABLES = {"MC_METADATA_TTL": str(TTL), "MC_LOG_LEVEL": "INFO", "MOONCAKE_PEER_BYTES": "8388608"}


LOOPBACK = "127.0.0.1"


def port_is_open(port, host=LOOPBACK):
    with socket.socket() as any_socket:
        any_socket.settimeout(0.5)
        return any_socket.connect_ex((host, port)) == 0


class Service:
    """One process, or several, with their own folder."""

    def __init__(self, host=LOOPBACK):
        self.host = host
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="metadata-"))
        self.log = open(self.folder / "log", "ab")
        self.process = None

    def launch(self, command, port, variables=None):
        process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, env=variables,
            cwd=self.folder,
        )

        def is_over():
            return port_is_open(port, self.host) or process.poll() is not None

        if not lab.wait_until(is_over, 20):
            raise RuntimeError(f"{command[0]} does not listen: {self.text()}")
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended: {self.text()}")
        return process

    def log_text(self):
        return (self.folder / "log").read_text(errors="replace")

    def text(self):
        return self.log_text()[-2000:]

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        """Returns once it has stopped: a thread may still answer for a moment after the signal."""
        self.process.send_signal(signal.SIGSTOP)
        lab.wait_until(self.is_stopped, 5, pause=0.001)

    def is_stopped(self):
        states = set()
        for file in pathlib.Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
            try:
                states.add(file.read_text().rpartition(")")[2].split()[0])
            except OSError:
                continue
        return states <= {"T", "Z", "X"}

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def restart(self, empty):
        self.kill()
        if empty:
            self.forget()
        self.start()

    def end(self):
        if self.process:
            lab.end_process(self.process)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Etcd(Service):
    """A single etcd member; with tls, certificates are made and required."""

    has_leases = True

    def __init__(self, tls=False, *flags, host=LOOPBACK, certificate="server"):
        super().__init__(host)
        self.port = lab.free_ports(2)
        self.scheme = "http"
        self.flags = list(flags)
        self.uri = f"etcd://{host}:{self.port}"
        if tls:
            self.scheme = "https"
            make_certificates(self.folder)
            for name, end in (("cert", "pem"), ("key", "key")):
                self.flags += [f"--{name}-file", str(self.folder / f"{certificate}.{end}")]
            self.flags += ["--trusted-ca-file", str(self.folder / "ca.pem"), "--client-cert-auth"]
            self.uri += f"?ca={self.folder}/ca.pem&cert={self.folder}/client.pem" + (
                f"&key={self.folder}/client.key"
            )
        self.start()

    def start(self):
        client = f"{self.scheme}://{self.host}:{self.port}"
        peer = f"http://127.0.0.1:{self.port + 1}"
        self.process = self.launch(
            ["etcd", "--data-dir", str(self.folder / "data"), "--listen-client-urls", client,
             "--advertise-client-urls", client, "--listen-peer-urls", peer,
             "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
             "--unsafe-no-fsync", *self.flags],
            self.port,
        )

    def forget(self):
        shutil.rmtree(self.folder / "data")

    def with_users(self, password="secret"):
        """Makes root, and mooncake with rights to the keys; both have the password."""
        for words in (("user", "add", f"root:{password}"), ("role", "add", "root"),
                      ("user", "grant-role", "root", "root"),
                      ("user", "add", f"mooncake:{password}"),
                      ("role", "add", "keys"),
                      ("role", "grant-permission", "keys", "--prefix=true", "readwrite",
                       "mooncake/"),
                      ("user", "grant-role", "mooncake", "keys"), ("auth", "enable")):
            self.control(*words)

    def control(self, *words):
        """Runs etcdctl."""
        files = []
        if self.scheme == "https":
            files = ["--cacert", "ca.pem", "--cert", "nameless.pem", "--key", "nameless.key"]
        done = subprocess.run(
            ["etcdctl", "--endpoints", f"{self.scheme}://{self.host}:{self.port}", *files, *words],
            cwd=self.folder,
            env=dict(os.environ, ETCDCTL_API="3"), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=20,
        )
        if done.returncode != 0:
            raise RuntimeError(f"etcdctl {words}: {done.stdout}")
        return done.stdout


class EtcdCluster(Service):
    """Three members."""

    has_leases = True

    def __init__(self):
        super().__init__()
        first = lab.free_ports(6)
        self.ports = [first, first + 2, first + 4]
        self.uri = "etcd://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)
        cluster = ",".join(f"m{port}=http://127.0.0.1:{port + 1}" for port in self.ports)
        self.members = []
        for port in self.ports:
            self.members.append(
                subprocess.Popen(
                    ["etcd", "--name", f"m{port}", "--data-dir", str(self.folder / f"m{port}"),
                     "--listen-client-urls", f"http://127.0.0.1:{port}",
                     "--advertise-client-urls", f"http://127.0.0.1:{port}",
                     "--listen-peer-urls", f"http://127.0.0.1:{port + 1}",
                     "--initial-advertise-peer-urls", f"http://127.0.0.1:{port + 1}",
                     "--initial-cluster", cluster],
                    stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
                )
            )
        for port in self.ports:
            if not lab.wait_until(lambda: port_is_open(port), 30):
                raise RuntimeError(self.text())

    def end(self):
        for member in self.members:
            lab.end_process(member)
        super().end()


class Redis(Service):
    has_leases = True

    def __init__(self, password=None, *flags, host=LOOPBACK):
        super().__init__(host)
        self.port = lab.free_ports(1)
        self.password = password
        self.flags = flags
        userinfo = f":{password}@" if password else ""
        self.uri = f"redis://{userinfo}{host}:{self.port}/1"
        self.start()

    def start(self):
        words = ["redis-server", "--bind", self.host, "--port", str(self.port), "--save", "",
                 "--protected-mode", "no", "--dir", str(self.folder), "--appendonly", "yes",
                 "--appendfsync", "always"]
        if self.password:
            words += ["--requirepass", self.password]
        self.process = self.launch(words + list(self.flags), self.port)

    def control(self, *words):
        """Runs redis-cli in database 1, as its first user."""
        done = subprocess.run(
            ["redis-cli", "-h", self.host, "-p", str(self.port), "-n", "1", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20,
        )
        return done.stdout

    def forget(self):
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)


class Ours(Service):
    """mooncake metadata serve."""

    has_leases = True

    def __init__(self, directory=False, *flags, host=LOOPBACK):
        super().__init__(host)
        self.port = lab.free_ports(1)
        self.uri = f"http://{host}:{self.port}/metadata"
        self.flags = ["--host", host, *flags]
        self.variables = None
        if directory:
            self.flags += ["--directory", str(self.folder / "data")]
        self.start()

    def start(self):
        self.process = self.launch(
            [cli(), "metadata", "serve", "--port", str(self.port), *self.flags], self.port,
            self.variables,
        )

    def forget(self):
        shutil.rmtree(self.folder / "data", ignore_errors=True)


class OursWithToken(Ours):
    """mooncake metadata serve that requires a token, from a file if given."""

    TOKEN = "open-s3same"

    def __init__(self, token=TOKEN, file=None, **variables):
        self.extra = dict(variables)
        flags = []
        if file is None:
            self.extra["MC_METADATA_HTTP_TOKEN"] = token
        else:
            file.write_text(token + "\n")
            flags = ["--token-file", str(file)]
        super().__init__(False, *flags)

    def start(self):
        self.variables = dict(os.environ, **self.extra)
        super().start()


class StockHTTPWithToken(Service):
    """Mooncake's HTTP metadata server in Python, from the first release that requires a token."""

    TOKEN = "open-s3same"

    def __init__(self):
        lab.need_newest()
        super().__init__()
        self.port = lab.free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}/metadata"
        python = lab.stock_environment(lab.NEWEST) / "bin" / "python"
        self.process = self.launch(
            [str(python), "-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--port",
             str(self.port)],
            self.port, lab.stock_variables(MC_METADATA_HTTP_TOKEN=self.TOKEN),
        )


class StockHTTP(Service):
    """The HTTP metadata server inside Mooncake's master: no leases, no listing."""

    has_leases = False

    def __init__(self):
        super().__init__()
        self.port = lab.free_ports(3)
        self.uri = f"http://127.0.0.1:{self.port}/metadata"
        self.start()

    def start(self):
        (program,) = lab.stock_environment(lab.RELEASES[-1]).glob(
            "lib/python3*/site-packages/mooncake/mooncake_master"
        )
        program.chmod(0o755)
        self.process = self.launch(
            [str(program), "-enable_http_metadata_server=true",
             "-http_metadata_server_host=127.0.0.1", f"-http_metadata_server_port={self.port}",
             f"-rpc_port={self.port + 1}", f"-metrics_port={self.port + 2}"],
            self.port, lab.stock_variables(),
        )

    def forget(self):
        pass


def make_certificates(folder):
    """ca, server, one for another host, client, one without a common name, and an unknown client
    and authority."""

    def openssl(*words):
        subprocess.run(
            ["openssl", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=30,
        )

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    (folder / "names").write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    (folder / "elsewhere.names").write_text(
        "subjectAltName=IP:127.0.0.9,DNS:elsewhere.invalid\n"
    )
    for authority in ("ca", "other"):
        openssl("req", "-x509", *curve, "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
                "-subj", f"/CN={authority}", "-days", "2")
    for name, authority in (("server", "ca"), ("client", "ca"), ("foreign", "other"),
                            ("nameless", "ca"), ("elsewhere", "ca")):
        subject = "/O=nobody" if name == "nameless" else f"/CN={name}"
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem",
                "-CAkey", f"{authority}.key", "-CAcreateserial", "-out", f"{name}.pem",
                "-days", "2", "-extfile", f"{name}.names" if name == "elsewhere" else "names")


def cli():
    path = os.environ.get("MOONCAKE_CLI")
    if not path:
        raise RuntimeError("MOONCAKE_CLI is not set; run scripts/test-metadata")
    return path


def command(*words, variables=None, status=0, seconds=30, text=None):
    """Runs `mooncake metadata VERB` on the service of a URI; returns its output."""
    verb, uri, *more = words
    done = subprocess.run(
        [cli(), "metadata", verb, "--metadata", uri, *more], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        timeout=seconds, env=dict(os.environ, **(variables or {})), input=text,
    )
    if status is not None and done.returncode != status:
        raise AssertionError(f"mooncake metadata {words} gave {done.returncode}:\n{done.stdout}")
    return done.stdout


def keys(uri, prefix="mooncake/"):
    return command("list", uri, prefix).split()


def start_peer(uri, name, api="native", **variables):
    named = dict(MOONCAKE_PEER_METADATA=uri, MOONCAKE_PEER_NAME=name)
    return lab.start_ours(api, **dict(VARIABLES, **named, **variables))


def start_stock(version, uri, name, **variables):
    if version == lab.NEWEST:
        lab.need_newest()
    return lab.start_stock(
        version, MOONCAKE_PEER_METADATA=uri, MOONCAKE_PEER_NAME=name,
        MOONCAKE_PEER_BYTES=VARIABLES["MOONCAKE_PEER_BYTES"], **variables,
    )


def doctor(uri, **variables):
    """The doctor's findings about a service, by name: (level, all text)."""
    done = subprocess.run(
        [cli(), "doctor", "--json", "--metadata", uri], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=60, env=dict(os.environ, **variables))
    report = json.loads(done.stdout)
    (group,) = [g for g in report["groups"] if g["group"] == "Metadata service"]
    return {
        finding["subject"]: (finding["level"], json.dumps(finding)) for finding in group["findings"]
    }


class Listener:
    """A server on loopback with a thread per connection."""

    def __init__(self):
        self.listener = socket.create_server((LOOPBACK, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                one, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve_and_close, args=(one,), daemon=True).start()

    def serve_and_close(self, one):
        try:
            with one:
                self.serve(one)
        except OSError:
            pass

    def end(self):
        self.listener.close()


class Proxy(Listener):
    """Forwards bytes after a delay."""

    def __init__(self, target, delay):
        self.target = target
        self.delay = delay
        super().__init__()

    def serve(self, one):
        with socket.create_connection((LOOPBACK, self.target), 5) as other:
            back = threading.Thread(target=self.pump, args=(other, one, 0), daemon=True)
            back.start()
            self.pump(one, other, self.delay)
            back.join()

    @staticmethod
    def pump(source, sink, delay):
        try:
            while data := source.recv(65536):
                time.sleep(delay)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class Impostor(Listener):
    """A server that answers any request with the same bytes, or never."""

    def __init__(self, answer):
        self.answer = answer
        super().__init__()

    def serve(self, one):
        while one.recv(65536):
            if self.answer is None:
                continue
            if callable(self.answer):
                self.answer(one)
                return
            one.sendall(self.answer)


class Raw:
    """Plain requests to an HTTP metadata server over one connection."""

    def __init__(self, uri):
        self.base = urllib.parse.urlsplit(uri)
        self.connection = http.client.HTTPConnection(self.base.hostname, self.base.port, timeout=20)

    def ask(self, method, query, body=None, path=None):
        encoded = urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
        target = f"{path or self.base.path}?{encoded}"
        self.connection.request(method, target, body)
        response = self.connection.getresponse()
        return response.status, response.read()

    def close(self):
        self.connection.close()


def plant(uri, key, value):
    """Puts bytes that no engine would write."""
    service = urllib.parse.urlsplit(uri)
    if service.scheme == "http":
        raw = Raw(uri)
        status, text = raw.ask("PUT", {"key": key}, value)
        raw.close()
        assert status == 200, text
        return
    command("put", uri, key, "-", text=value.decode())


def descriptor(name, port=1):
    """What an engine without memory publishes."""
    return json.dumps(
        {"name": name, "protocol": "tcp", "tcp_data_host": "127.0.0.1", "tcp_data_port": port,
         "tcp_proto_version": 2, "buffers": [{"name": name, "addr": 4096, "length": 4096}]}
    )
