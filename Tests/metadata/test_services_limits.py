"""Many segments, hostile contents, hostile addresses."""

import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import unittest
import urllib.parse

import lab
import services

SEGMENTS = 10_000
HOSTILE = (
    b"", b"{", b"null", b"[]", b"0", b'"text"', b"{}", b'{"name":1}', b"\x00", b"\xff\xfe\xfd",
    b'{"name":"x","protocol":"tcp","buffers":[{"name":"x","addr":-1,"length":5}]}',
    b'{"name":"x","protocol":"tcp","buffers":[{"name":"x","addr":18446744073709551615,'
    b'"length":18446744073709551615}]}',
    b'{"name":"x","protocol":"tcp","tcp_data_port":99999999999999999999}',
    b'{"ip_or_host_name":5,"rpc_port":"x"}', b'{"ip_or_host_name":"h","rpc_port":65536}',
    b"[" * 100_000, b'{"a":' * 50_000, b'"' + b"x" * 100_000, b'{"name":"\\ud800"}',
    b'{"name":"x","protocol":["tcp",{}],"buffers":{}}',
)


class EternalLeases(http.server.BaseHTTPRequestHandler):
    """A server that grants every lease for half an eternity."""

    protocol_version = "HTTP/1.1"
    values = {}

    def log_message(self, *_):
        pass

    def answer(self):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = b'{"revision":1,"entries":[],"keys":1,"lease":"1","ttl_ms":%d}' % (2**64 - 1)
        status = 200
        key = query.get("key")
        if self.command == "PUT":
            self.values[key] = body
        elif self.command == "DELETE":
            self.values.pop(key, None)
        elif key is not None:
            text = self.values.get(key, b"")
            status = 200 if key in self.values else 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST = do_DELETE = answer


class Leases(unittest.TestCase):
    def test_leases_for_half_an_eternity(self):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EternalLeases)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        level, text = services.doctor(f"http://127.0.0.1:{server.server_port}/metadata")["leases"]
        self.assertEqual(level, "problem", text)
        self.assertIn(f"grants {2**64 - 1} ms", text)


class Contents(unittest.TestCase):
    def setUp(self):
        self.service = services.Ours()
        self.addCleanup(self.service.end)
        self.peer = services.start_peer(self.service.uri, "actor")
        self.addCleanup(self.peer.kill)

    def test_malformed_under_every_key(self):
        for value in HOSTILE:
            for key in ("mooncake/ram/bad", "mooncake/rpc_meta/bad", "mooncake/with/slash"):
                services.plant(self.service.uri, key, value)
            for name in ("bad", "with/slash"):
                answer = self.peer.ask("reopen", peer=name)
                self.assertNotEqual(answer["code"], 0, value[:60])
                for word in (self.service.uri, name):
                    self.assertIn(word, answer["text"], value[:60])
            answer = self.peer.ask("probe", peer="bad")
            self.assertNotEqual(answer["code"], 0, value[:60])
            self.assertIn("mooncake/rpc_meta/bad", answer["text"])
        report = json.loads(subprocess.run(
            [services.cli(), "doctor", "--json", "--metadata", self.service.uri],
            stdout=subprocess.PIPE, timeout=60).stdout)
        (group,) = [g for g in report["groups"] if g["group"] == "Metadata service"]
        advised = " ".join(finding.get("advice", "") for finding in group["findings"])
        self.assertIn("mooncake/ram/bad", advised)
        self.peer.quit()

    def test_malformed_in_etcd_and_redis(self):
        for kind in (services.Etcd, services.Redis):
            service = kind()
            self.addCleanup(service.end)
            peer = services.start_peer(service.uri, "actor")
            self.addCleanup(peer.kill)
            for value in (b"{", b"[]", b'{"name":1}', b"[" * 50_000):
                services.plant(service.uri, "mooncake/ram/bad", value)
                answer = peer.ask("reopen", peer="bad")
                self.assertEqual(answer["code"], -12, answer)
                self.assertIn("mooncake/ram/bad", answer["text"])
            peer.quit()

    def test_ten_thousand_segments(self):
        raw = services.Raw(self.service.uri)
        self.addCleanup(raw.close)
        for index in range(SEGMENTS):
            name = f"segment-{index:05}"
            status, _ = raw.ask("PUT", {"key": f"mooncake/ram/{name}"}, services.descriptor(name))
            self.assertEqual(status, 200)
        self.assertEqual(len(services.keys(self.service.uri, "mooncake/ram/segment-")), SEGMENTS)
        for index in range(0, SEGMENTS, 10):
            answer = self.peer.ask("reopen", peer=f"segment-{index:05}")
            self.assertEqual(answer["code"], 0, answer)
        self.assertLess(resident_mebibytes(self.service.process.pid), 64)
        self.peer.quit()


def resident_mebibytes(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


class Addresses(unittest.TestCase):
    """Every bad address gives an error that names it, within the deadline."""

    def check(self, uri, *words, named=None, seconds=4):
        begin = time.monotonic()
        text = services.command("get", uri, "mooncake/x", "--timeout", "1500ms", status=1)
        self.assertLess(time.monotonic() - begin, seconds, uri)
        for word in (named or uri, *words):
            self.assertIn(word, text)

    def test_malformed(self):
        for uri, word in (
            ("ftp://host", "scheme"), ("etcd://", "empty"), ("redis://", "empty"),
            ("http://", "empty"), ("etcd://a,,b", "empty"), ("etcd://host:0", "port 0"),
            ("etcd://host:99999", "port"), ("http://a,b/metadata", "several"),
            ("redis://host/x", "database"), ("redis://host/256", "database"),
            ("etcd://host/path", "path"), ("http://[::1/metadata", "bracket"), ("http://h#x", "#"),
            ("://", "scheme"), (";", "empty"),
        ):
            self.check(uri, word)
        self.check("http://a b/", "space", named="a b")
        # The text may contain a secret.
        self.check("etcd://%zz@h", "percent", named="etcd://***@h")
        self.check("etcd://host?bad=1", "unknown", named="etcd://host?bad=***")
        self.check("etcd://" + "x" * 5000, "longer", named="etcd://x")
        self.assertNotIn("secret", services.command("get", "ftp://u:secret@h", "x", status=1))

    def test_unreachable(self):
        for scheme in ("etcd", "redis", "http"):
            self.check(f"{scheme}://no-such-host.invalid:1", "resolve", seconds=6)
            self.check(f"{scheme}://127.0.0.1:1", "connect")
            silent = services.Impostor(None)
            self.addCleanup(silent.end)
            self.check(f"{scheme}://127.0.0.1:{silent.port}", "deadline")

    def test_impostors(self):
        def flood(one):
            while True:
                one.sendall(b"x" * 65536)

        def trickle(one):
            one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while True:
                one.sendall(b"$")
                time.sleep(0.1)

        answers = (
            b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\xff\xfe\xfd",
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", b"$-2\r\n", b"*99999999\r\n",
            b"-ERR x\r\n", b"$99999999999\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000,
            flood, trickle,
        )
        for answer in answers:
            impostor = services.Impostor(answer)
            self.addCleanup(impostor.end)
            for scheme in ("etcd", "redis", "http"):
                uri = f"{scheme}://127.0.0.1:{impostor.port}"
                begin = time.monotonic()
                text = services.command("get", uri, "mooncake/x", "--timeout", "1500ms", status=1)
                self.assertLess(time.monotonic() - begin, 5, (scheme, answer))
                self.assertIn(uri, text)

    def test_lists_that_announce_more_than_they_hold(self):
        """No room is made for what is only announced: giving it back would outlast the call."""
        for answer in (b"*99999999\r\n", b"*1\r\n*99999999\r\n"):
            impostor = services.Impostor(answer)
            self.addCleanup(impostor.end)
            self.check(f"redis://127.0.0.1:{impostor.port}", "not an answer of Redis")

    def test_engine_is_not_created(self):
        """The same through an engine, which leaks nothing."""
        script = os.path.join(os.path.dirname(__file__), "engine_failures.py")
        done = subprocess.run(
            [sys.executable, "-B", script, lab.library()],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout)


class Full(unittest.TestCase):
    def test_refused_news_leave_the_old(self):
        """A service without room for changes keeps the lease on what it has."""
        service = services.Ours(False, "--memory", "1MiB")
        self.addCleanup(service.end)
        raw = services.Raw(service.uri)
        self.addCleanup(raw.close)
        peer = services.start_peer(service.uri, "target")
        self.addCleanup(peer.kill)
        key = {"key": "mooncake/ram/target"}
        whole = raw.ask("GET", key)[1]
        self.assertEqual(peer.ask("unregister")["code"], 0)
        low, high = 0, 1 << 20
        while high - low > 1:
            middle = (low + high) // 2
            if raw.ask("PUT", {"key": "filler"}, b"x" * middle)[0] == 200:
                low = middle
            else:
                high = middle
        for _ in range(2):
            self.assertEqual(peer.ask("register")["code"], -7)
            self.assertIn("status 507", peer.log_tail())
        time.sleep(services.TTL + 1)
        status, text = raw.ask("GET", key)
        self.assertEqual(status, 200)
        self.assertLess(len(text), len(whole))
        raw.ask("DELETE", {"key": "filler"})
        self.assertEqual(peer.ask("register")["code"], 0)
        self.assertEqual(len(raw.ask("GET", key)[1]), len(whole))
        peer.quit()


    def test_failing_publications_take_one_lease(self):
        """A client that is refused again and again does not use up other clients' leases."""
        service = services.Ours(False, "--memory", "1MiB")
        self.addCleanup(service.end)
        raw = services.Raw(service.uri)
        self.addCleanup(raw.close)
        peer = services.start_peer(service.uri, "target")
        self.addCleanup(peer.kill)
        keys = [{"key": f"mooncake/{kind}/target"} for kind in ("rpc_meta", "ram")]
        count = 0

        def fill():
            nonlocal count
            while raw.ask("PUT", {"key": f"filler{count}"}, b"")[0] == 200:
                count += 1

        def leases():
            return json.loads(raw.ask("GET", {}, path="/health")[1])["leases"]

        fill()
        while any(raw.ask("GET", key)[0] == 200 for key in keys):
            # Each publication that still finds room takes one, too: those before have ended first.
            self.assertTrue(lab.wait_until(lambda: leases() == 1, services.TTL + 2))
            for key in keys:
                raw.ask("DELETE", key)
            fill()
        most = 0
        end = time.monotonic() + 2 * services.TTL
        while time.monotonic() < end:
            most = max(most, leases())
            time.sleep(0.05)
        # The previous one may not have ended yet.
        self.assertIn(most, (1, 2))
        self.assertIn("status 507", peer.log_tail())
        peer.quit()


class Server(unittest.TestCase):
    """How our server handles requests that it should not get."""

    def setUp(self):
        self.service = services.Ours(False, "--memory", "40MiB")
        self.addCleanup(self.service.end)
        self.raw = services.Raw(self.service.uri)
        self.addCleanup(self.raw.close)

    def ask(self, *arguments, **named):
        try:
            return self.raw.ask(*arguments, **named)
        except (http.client.HTTPException, OSError):
            self.raw.close()
            return 0, b""

    def test_rules(self):
        ask = self.ask
        self.assertEqual(ask("GET", {"key": "a"})[0], 404)
        self.assertEqual(ask("DELETE", {"key": "a"})[0], 404)
        self.assertEqual(ask("PUT", {"key": "rpc_meta/a"}, b"one")[0], 200)
        self.assertEqual(ask("PUT", {"key": "rpc_meta/a"}, b"two")[0], 200)
        self.assertEqual(ask("GET", {"key": "rpc_meta/a"}), (200, b"two"))
        self.assertEqual(ask("PUT", {"key": "rpc_meta/a", "absent": "1"}, b"x")[0], 409)
        self.assertEqual(ask("PUT", {"key": "b", "lease": "5"}, b"x")[0], 412)
        self.assertEqual(ask("DELETE", {"key": "rpc_meta/a"})[0], 200)
        self.assertEqual(ask("PUT", {"key": "b"}, b"\x00\xff")[0], 200)
        self.assertEqual(ask("GET", {"key": "b"}), (200, b"\x00\xff"))
        self.assertIn(b"AP8=", ask("GET", {"prefix": ""})[1])
        for method, query, status in (
            ("GET", {}, 400), ("GET", {"key": ""}, 400), ("PUT", {"key": b"\xff"}, 400),
            ("GET", {"key": b"a\x00b"}, 400), ("POST", {"key": "a"}, 405),
            ("HEAD", {"key": "a"}, 405), ("GET", {"prefix": "", "since": "x"}, 400),
            ("GET", {"prefix": "", "since": "5"}, 410), ("GET", {"prefix": "", "limit": "0"}, 400),
            ("PUT", {"key": "a", "lease": "-1"}, 400),
        ):
            self.assertEqual(ask(method, query)[0], status, (method, query))
        for ttl in (1, 99, 3_600_001, 2**63, 2**64 - 1, 2**64):
            status, _ = ask("POST", {"ttl_ms": str(ttl)}, path="/metadata/lease")
            self.assertEqual(status, 400, ttl)
        self.assertEqual(ask("POST", {"id": "7"}, path="/metadata/lease")[0], 404)
        self.assertEqual(ask("GET", {}, path="/elsewhere")[0], 404)
        self.assertEqual(json.loads(ask("GET", {}, path="/health")[1])["status"], "ok")

    def test_sizes(self):
        self.assertEqual(self.ask("PUT", {"key": "k" * 2049}, b"x")[0], 413)
        self.assertIn(self.ask("PUT", {"key": "k" * 100_000}, b"x")[0], (0, 413, 414, 431))
        self.assertEqual(self.ask("PUT", {"key": "a"}, b"x" * ((16 << 20) + 1))[0], 413)
        self.assertEqual(self.ask("PUT", {"key": "a"}, b"x" * (16 << 20))[0], 200)
        self.assertEqual(self.ask("PUT", {"key": "b"}, b"x" * (16 << 20))[0], 200)
        self.assertEqual(self.ask("PUT", {"key": "c"}, b"x" * (16 << 20))[0], 507)
        self.assertEqual(self.ask("DELETE", {"key": "a"})[0], 200)
        self.assertEqual(self.ask("PUT", {"key": "c"}, b"x" * (16 << 20))[0], 200)
        # UTF-8 of several bytes, each of them encoded.
        self.assertEqual(self.ask("PUT", {"key": "\u20ac" * 600}, b"y")[0], 200)
        self.assertEqual(self.ask("GET", {"key": "\u20ac" * 600}), (200, b"y"))

    def test_noise(self):
        for noise in (b"\x00" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"A" * 100_000,
                      b"PUT /metadata?key=a HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                      b"PUT /metadata?key=a HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\nx",
                      b"PUT /metadata?key=%zz%&&==&key HTTP/1.1\r\nHost: h\r\n"
                      b"Content-Length: 0\r\n\r\n",
                      b"PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked"
                      b"\r\n\r\nzz\r\n",
                      b"\x16\x03\x01\x02\x00\x01\x00" + b"\x01" * 200):
            with socket.create_connection(("127.0.0.1", self.service.port), 5) as one:
                one.settimeout(2)
                try:
                    one.sendall(noise)
                    one.shutdown(socket.SHUT_WR)
                    while one.recv(4096):
                        pass
                except OSError:
                    pass  # Reset: refused as it should be.
        self.assertEqual(self.ask("GET", {}, path="/health")[0], 200)
        self.assertIsNone(self.service.process.poll())

    def test_thousand_connections(self):
        idle = []
        for _ in range(1000):
            idle.append(socket.create_connection(("127.0.0.1", self.service.port), 10))
        for one in idle:
            one.sendall(b"GET /metadata?prefix=x&since=0&wait_ms=1 HTTP/1.1\r\nHost: h\r\n\r\n")
        for one in idle:
            one.settimeout(10)
            self.assertIn(b"410", one.recv(4096))
        self.assertEqual(self.ask("GET", {}, path="/health")[0], 200)
        self.assertLess(resident_mebibytes(self.service.process.pid), 64)
        for one in idle:
            one.close()

    def test_watchers_wake(self):
        _, text = self.ask("GET", {"prefix": "w/"})
        since = json.loads(text)["revision"]
        answers = []

        def watch():
            raw = services.Raw(self.service.uri)
            answers.append(raw.ask(
                "GET", {"prefix": "w/", "since": str(since), "wait_ms": "10000"}))
            raw.close()

        threads = [threading.Thread(target=watch) for _ in range(50)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        self.ask("PUT", {"key": "other"}, b"1")
        time.sleep(0.2)
        self.assertEqual(answers, [])
        self.ask("PUT", {"key": "w/a"}, b"1")
        for thread in threads:
            thread.join(5)
        self.assertEqual(len(answers), 50)
        for status, text in answers:
            self.assertEqual(status, 200)
            self.assertEqual([c["key"] for c in json.loads(text)["changes"]], ["w/a"])


if __name__ == "__main__":
    unittest.main()
