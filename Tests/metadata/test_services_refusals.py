"""Services that answer but refuse: who learns of it, when, and whether the text says what to do."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unittest

import lab
import services
from services import TTL

JWT = ("--auth-token", "jwt,pub-key=jwt.pub,priv-key=jwt.key,sign-method=RS256,ttl=1h")


class RefusalTest(unittest.TestCase):
    def start(self, kind, *arguments, **named):
        service = kind(*arguments, **named)
        self.addCleanup(service.end)
        return service

    def peer(self, uri, name="target", **variables):
        peer = services.start_peer(uri, name, **variables)
        self.addCleanup(peer.kill)
        return peer

    def refused(self, uri, *words, **variables):
        """The engine is not created, and says why."""
        with self.assertRaises(lab.PeerError) as raised:
            services.start_peer(uri, "target", **variables).kill()
        for word in words:
            self.assertIn(word, str(raised.exception))
        return str(raised.exception)

    def warned(self, uri, *words, **variables):
        """The doctor finds a problem and names it."""
        findings = services.doctor(uri, **variables).values()
        text = "\n".join(text for level, text in findings if level == "problem")
        for word in words:
            self.assertIn(word, text)
        return text


class Tokens(RefusalTest):
    """Bearer tokens of HTTP servers, ours and Mooncake's, with clients of both kinds."""

    KINDS = (services.OursWithToken, services.StockHTTPWithToken)

    def test_clients_without_it(self):
        for kind in self.KINDS:
            service = self.start(kind)
            secret = "never-shown"
            for variables in ({}, {"MC_METADATA_HTTP_TOKEN": secret},
                              {"MC_METADATA_USERNAME": "u", "MC_METADATA_PASSWORD": secret}):
                with self.subTest(service=kind.__name__, variables=variables):
                    text = self.refused(service.uri, "MC_METADATA_HTTP_TOKEN", **variables)
                    text += self.warned(service.uri, "MC_METADATA_HTTP_TOKEN", **variables)
                    text += services.command(
                        "get", service.uri, "mooncake/x", status=1, variables=variables)
                    self.assertNotIn(secret, text)
                    self.assertNotIn(service.TOKEN, text)
            self.assertNotIn(service.TOKEN, service.text())

    def test_clients_with_it(self):
        for kind in self.KINDS:
            with self.subTest(service=kind.__name__):
                service = self.start(kind)
                token = {"MC_METADATA_HTTP_TOKEN": service.TOKEN}
                ours = self.peer(service.uri, "ours", **token)
                stock = services.start_stock(lab.NEWEST, service.uri, "stock", **token)
                self.addCleanup(stock.kill)
                for actor, target in ((ours, stock), (stock, ours)):
                    answer = actor.ask(
                        "transfer", peer=target.segment, operation="write",
                        pieces=[[0, target.address, 4096]], timeout=10.0)
                    self.assertEqual(answer["code"], 0, f"{answer}\n{actor.log_tail()}")
                ours.quit()
                stock.quit()
                self.assertNotIn(service.TOKEN, ours.log_tail(200))

    def test_token_from_a_file(self):
        service = self.start(services.Ours)
        file = service.folder / "token"
        file.write_text("a token\n")
        other = self.start(services.Ours, False, "--token-file", str(file))
        good = {"MC_METADATA_HTTP_TOKEN": "a token"}
        services.command("put", other.uri, "k", "v", variables=good)
        services.command("put", other.uri, "k", "v", status=1)
        raw = services.Raw(other.uri)
        self.addCleanup(raw.close)
        self.assertEqual(raw.ask("GET", {}, path="/health")[0], 200)
        services.command("put", other.uri, "k", "v", status=1,
                         variables={"MC_METADATA_HTTP_TOKEN": "two\nlines"})


class Sizes(RefusalTest):
    def run_many(self, uri):
        script = os.path.join(os.path.dirname(__file__), "register_many.py")
        process = lab.Program([sys.executable, "-B", script, lab.library(), uri])
        self.addCleanup(process.end)

        def answers(count):
            found = lab.wait_until(lambda: [
                json.loads(line) for line in process.text().splitlines() if line.startswith("{")
            ][count - 1 :], 40)
            self.assertTrue(found, process.text())
            return found[0]

        return process, answers

    def test_more_than_one_request_of_etcd(self):
        service = self.start(services.Etcd)
        _, answers = self.run_many(service.uri)
        many, few = answers(1), answers(2)
        self.assertEqual(many["code"], -7, many)
        for word in ("30000", "1.5 MiB", "--max-request-bytes"):
            self.assertIn(word, many["text"])
        self.assertLess(many["seconds"], 5)
        self.assertEqual(many["seen"], 0)
        self.assertEqual((few["code"], few["seen"]), (0, 100), few)
        self.assertEqual(few["refused"], ["0"])

    def test_more_than_a_message_of_peers(self):
        _, answers = self.run_many("P2PHANDSHAKE")
        many = answers(1)
        self.assertEqual(many["code"], -7, many)
        self.assertIn("MC_HANDSHAKE_MAX_LENGTH", many["text"])

    def test_etcd_at_its_quota(self):
        service = self.start(services.Etcd, False, "--quota-backend-bytes", str(16 << 20))
        process, answers = self.run_many(service.uri)
        self.assertEqual(answers(2)["code"], 0)
        for index in range(40):
            with contextlib.suppress(RuntimeError):
                service.control("put", f"filler{index}", "x" * 100_000)
            if index % 10 == 9 and "NOSPACE" in service.control("alarm", "list"):
                break
        else:
            for index in range(200):
                try:
                    service.control("put", f"more{index}", "x" * 100_000)
                except RuntimeError:
                    break
        self.assertIn("NOSPACE", service.control("alarm", "list"))
        process.process.stdin.write(b"again\n")
        process.process.stdin.flush()
        answer = answers(3)
        self.assertEqual(answer["code"], -7, answer)
        self.assertIn("quota", answer["text"])
        self.assertEqual(answer["seen"], 100)


class Etcd(RefusalTest):
    def test_users_change_under_tokens(self):
        service = self.start(JWTEtcd)
        service.with_users()
        peer = self.peer(service.uri)
        root = ("--user", "root:secret")
        for change in (("user", "add", "other:secret"), ("role", "add", "another"),
                       ("user", "delete", "other")):
            service.control(*root, *change)
            self.assertEqual(peer.ask("unregister")["code"], 0)
            answer = peer.ask("register")
            self.assertEqual(answer["code"], 0, f"{change}: {answer}\n{peer.log_tail()}")
            answer = peer.ask("reopen", peer="nobody")
            self.assertEqual(answer["code"], -13, f"{change}: {answer}")
        time.sleep(TTL + 1)
        self.assertIn("mooncake/ram/target", services.keys(service.uri))
        self.assertNotIn("auth store", peer.log_tail(100))
        peer.quit()

    def test_certificate_with_a_common_name(self):
        service = self.start(services.Etcd, True)
        service.with_users()
        words = ("common name", "gateway")
        uri = service.uri.replace("etcd://", "etcd://mooncake:secret@")
        for with_name in (service.uri, uri):
            text = self.refused(with_name, *words) + self.warned(with_name, *words)
            self.assertNotIn("3.4 or newer", text)
        peer = self.peer(uri.replace("client.", "nameless."))
        peer.quit()

    def test_gateway_switched_off(self):
        service = self.start(services.Etcd, False, "--enable-grpc-gateway=false")
        self.refused(service.uri, "--enable-grpc-gateway", "404")
        self.warned(service.uri, "--enable-grpc-gateway")

    def test_watch_leaves_a_frozen_member(self):
        cluster = self.start(services.EtcdCluster)
        watch = lab.Program(
            [services.cli(), "metadata", "watch", "--metadata", cluster.uri, "mooncake/"])
        self.addCleanup(watch.end)
        _, second, third = (f"etcd://127.0.0.1:{port}" for port in cluster.ports)
        services.command("put", second, "mooncake/one", "1")
        watch.find("mooncake/one")
        cluster.members[0].send_signal(signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 20
            lab.wait_until(lambda: put(third, "mooncake/two"), 20, pause=0.5)
            watch.find("mooncake/two", max(1, deadline - time.monotonic()))
        finally:
            cluster.members[0].send_signal(signal.SIGCONT)

    def test_watch_of_large_values(self):
        service = self.start(services.Etcd)
        watch = lab.Program(
            [services.cli(), "metadata", "watch", "--metadata", service.uri, "mooncake/"])
        self.addCleanup(watch.end)
        services.command("put", service.uri, "mooncake/first", "1")
        watch.find("mooncake/first")
        errors = []

        def put_large(index):
            try:
                services.command(
                    "put", service.uri, f"mooncake/large{index:02}", "-", "--timeout", "25s",
                    text="x" * 1_000_000)
            except Exception as error:  # Otherwise the thread would end silently.
                errors.append(error)

        threads = [threading.Thread(target=put_large, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        self.assertEqual(errors, [])
        for index in range(12):
            watch.find(f"mooncake/large{index:02}", 20)


def put(uri, key):
    """Whether it is there; a cluster that has just lost its leader may need some seconds."""
    try:
        services.command("put", uri, key, "2", seconds=20)
    except AssertionError:
        return False
    return True


class JWTEtcd(services.Etcd):
    """With tokens that contain the revision of the users."""

    def __init__(self):
        super().__init__(False, *JWT)

    def start(self):
        for words in (("genrsa", "-out", "jwt.key", "2048"),
                      ("rsa", "-in", "jwt.key", "-pubout", "-out", "jwt.pub")):
            subprocess.run(["openssl", *words], cwd=self.folder, check=True,
                           stderr=subprocess.DEVNULL, timeout=60)
        super().start()

    def with_users(self):
        super().with_users()
        self.uri = self.uri.replace("etcd://", "etcd://mooncake:secret@")


class Redis(RefusalTest):
    def test_failover_behind_one_address(self):
        old, new = self.start(services.Redis), self.start(services.Redis)
        # Existing connections stay where they are.
        forwarder = services.Proxy(old.port, 0)
        self.addCleanup(forwarder.end)
        uri = f"redis://127.0.0.1:{forwarder.port}/1"
        peer = self.peer(uri)
        self.assertIn("mooncake/ram/target", services.keys(old.uri))
        old.control("replicaof", "127.0.0.1", str(new.port))
        forwarder.target = new.port
        begin = time.monotonic()
        self.assertTrue(lab.wait_until(
            lambda: len(services.keys(new.uri)) == 2, TTL + 3, pause=0.1), peer.log_tail())
        self.assertEqual(peer.ask("unregister")["code"], 0)
        self.assertEqual(peer.ask("register")["code"], 0, peer.log_tail())
        self.assertLess(time.monotonic() - begin, TTL + 5)
        time.sleep(TTL + 1)
        self.assertEqual(len(services.keys(new.uri)), 2)
        peer.quit()

    def test_registration_while_there_is_no_master(self):
        service = self.start(services.Redis)
        peer = self.peer(service.uri)
        service.control("replicaof", "127.0.0.1", "1")
        self.assertEqual(peer.ask("unregister")["code"], 0)
        self.assertEqual(peer.ask("register")["code"], 0, peer.log_tail())
        service.control("replicaof", "no", "one")
        self.assertTrue(lab.wait_until(
            lambda: len(services.keys(service.uri)) == 2, TTL + 3, pause=0.1), peer.log_tail())
        peer.quit()

    def limited(self, service, *rights):
        done = service.control("acl", "setuser", "limited", "on", ">secret", "~mooncake/*", *rights)
        self.assertIn("OK", done)
        return service.uri.replace("redis://", "redis://limited:secret@")

    def test_user_who_may_not_renew(self):
        service = self.start(services.Redis)
        for rights in (("+@read", "+@write", "+@connection"),
                       ("+@read", "+@write", "+@connection", "+eval", "-pexpire")):
            with self.subTest(rights=rights):
                uri = self.limited(service, "-@all", *rights)
                self.refused(uri, "+eval", "+pexpire")
                self.warned(uri, "+eval")
                self.assertTrue(lab.wait_until(
                    lambda: services.keys(service.uri) == [], TTL + 3, pause=0.2))

    def test_documented_rights_are_enough(self):
        service = self.start(services.Redis)
        rights = "+get +set +del +mget +scan +eval +pexpire +select".split()
        uri = self.limited(service, "-@all", *rights)
        peer = self.peer(uri)
        time.sleep(TTL + 1)
        self.assertEqual(len(services.keys(uri)), 2)
        findings = services.doctor(uri)
        self.assertEqual(findings["renewal"][0], "ok", findings)
        peer.quit()
        self.assertEqual(services.keys(uri), [])

    def test_cluster_mode(self):
        service = self.start(services.Redis, None, "--cluster-enabled", "yes")
        uri = service.uri.removesuffix("/1")
        for each in (uri, service.uri):
            self.refused(each, "cluster mode is not supported")
            self.warned(each, "cluster mode is not supported")

    def test_sentinel(self):
        service = self.start(services.Redis)
        file = service.folder / "sentinel.conf"
        port = lab.free_ports(1)
        file.write_text(f"port {port}\nbind 127.0.0.1\n"
                        f"sentinel monitor m 127.0.0.1 {service.port} 1\n")
        sentinel = service.launch(["redis-server", str(file), "--sentinel"], port)
        self.addCleanup(lab.end_process, sentinel)
        self.refused(f"redis://127.0.0.1:{port}", "sentinel")


class Passing(unittest.TestCase):
    """Connections that break are not taken for a refusal."""

    def failure(self, end):
        """The error of a get if the service closes the connection after the client's hello."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            def serve():
                server.settimeout(20)
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = server.accept()
                        connection.recv(1)
                        end(connection)
                        connection.close()

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            port = server.getsockname()[1]
            return services.command(
                "get", f"https://127.0.0.1:{port}/metadata", "mooncake/x", status=1)

    def test_handshakes_that_break(self):
        def reset(connection):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def end_of_file(connection):
            connection.recv(4096)

        for end in (reset, end_of_file):
            with self.subTest(end=end.__name__):
                self.assertNotIn("certificate files", self.failure(end))

    def test_what_is_no_tls(self):
        text = self.failure(lambda connection: connection.sendall(b"HTTP/1.0 400 Bad\r\n\r\n"))
        self.assertIn("both speak TLS", text)


class Advice(RefusalTest):
    def test_what_the_doctor_prints_can_be_run(self):
        service = self.start(services.Ours)
        keys = ["mooncake/ram/odd", "mooncake/ram/it's $(odd)", "mooncake/rpc_meta/gone",
                "mooncake/ram/gone"]
        for key in keys:
            services.command("put", service.uri, key, "no descriptor")
        advice = [json.loads(text).get("advice") or ""
                  for _, text in services.doctor(service.uri).values()]
        commands = []
        for text in advice:
            if "mooncake metadata delete" in text:
                text = text.removeprefix("if its process is gone: ")
                commands += [part for part in text.split("; ") if part.startswith("mooncake ")]
        self.assertGreaterEqual(len(commands), len(keys))
        for command in commands:
            done = subprocess.run(
                ["sh", "-c", 'mooncake() { "$CLI" "$@"; }; ' + command], timeout=30,
                env=dict(os.environ, CLI=services.cli()), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True)
            # Two findings may name the same key.
            self.assertIn(done.returncode, (0, 1), f"{command}: {done.stdout}")
        self.assertEqual(services.keys(service.uri), [])


class Interfaces(unittest.TestCase):
    """The address that peers are told when listening on every interface."""

    LINE = "listening on every interface"
    SCRIPT = """
        set -e
        ip link set lo up
        ip link add docker0 type veth peer name d0 && ip link add eth0 type veth peer name e0
        ip address add 172.17.0.1/16 dev docker0 && ip address add 10.1.2.3/24 dev eth0
        for device in docker0 d0 eth0 e0; do ip link set $device up; done
        {route}
        exec timeout 5 {cli} bench target --bind {bind} --buffer-size 1MiB </dev/null
    """

    def run_target(self, route, bind="0.0.0.0"):
        script = self.SCRIPT.format(route=route, cli=services.cli(), bind=bind)
        done = subprocess.run(
            ["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=30,
            env={name: text for name, text in os.environ.items() if name != "MC_LOG_LEVEL"})
        if "Operation not permitted" in done.stdout:
            self.skipTest("no network namespaces here")
        return done.stdout

    def test_default_route(self):
        text = self.run_target("ip route add default via 10.1.2.1 dev eth0")
        self.assertIn("10.1.2.3:", text)
        self.assertNotIn("172.17.0.1:", text)
        self.assertIn(self.LINE, text)
        self.assertIn("172.17.0.1 (docker0)", text)

    def test_without_default_route(self):
        self.assertIn("172.17.0.1:", self.run_target(":"))

    def test_nothing_is_said_without_a_choice(self):
        for route, bind in ((":", "0.0.0.0 --advertise 10.1.2.3"), (":", "10.1.2.3"),
                            ("ip address del 172.17.0.1/16 dev docker0", "0.0.0.0")):
            with self.subTest(route=route, bind=bind):
                text = self.run_target(route, bind)
                self.assertIn("10.1.2.3:", text)
                self.assertNotIn(self.LINE, text)


if __name__ == "__main__":
    unittest.main()
