"""Peers and services that die, freeze and come back."""

import resource
import subprocess
import sys
import time
import unittest

import lab
import services
from services import TTL

MIB = 1 << 20
KINDS = (services.Etcd, services.Redis, services.Ours)


class FaultTest(unittest.TestCase):
    def start(self, kind, *arguments, **named):
        service = kind(*arguments, **named)
        self.addCleanup(service.end)
        return service

    def peer(self, service, name, **variables):
        peer = services.start_peer(service.uri, name, **variables)
        self.addCleanup(peer.kill)
        return peer

    def transfer(self, actor, target, timeout=5.0, operation="write"):
        return actor.ask(
            "transfer", peer=target.segment, operation=operation,
            pieces=[[0, target.address, MIB]], timeout=timeout,
        )

    def moves(self, actor, target, timeout=5.0):
        answer = self.transfer(actor, target, timeout)
        self.assertEqual(answer["code"], 0, f"{answer}\n{actor.log_tail()}")
        return answer

    def names(self, service):
        return sorted(key.rpartition("/")[2] for key in services.keys(service.uri))

    def appear(self, service, name, seconds):
        self.assertTrue(
            lab.wait_until(lambda: self.names(service).count(name) == 2, seconds, pause=0.1),
            f"{name} is not published again: {services.keys(service.uri)}\n{service.text()}",
        )


class Peers(FaultTest):
    def test_killed_and_restarted(self):
        for kind in KINDS:
            with self.subTest(service=kind.__name__):
                self.check(kind)

    def check(self, kind):
        service = self.start(kind)
        actor = self.peer(service, "actor")
        target = self.peer(service, "target")
        self.moves(actor, target)
        # Comes back at once, while the records of its predecessor are still there.
        target.kill()
        target = self.peer(service, "target")
        begin = time.monotonic()
        self.moves(actor, target)
        self.assertLess(time.monotonic() - begin, 2)
        # Longer than its predecessor's lease, which must not take anything with it.
        time.sleep(TTL + 0.5)
        self.assertEqual(self.names(service).count("target"), 2)
        target.kill()
        killed = time.monotonic()
        gone = lab.wait_until(lambda: "target" not in self.names(service), TTL + 1, pause=0.05)
        self.assertTrue(gone, f"keys stay after {time.monotonic() - killed} s")
        answer = self.transfer(actor, target, 3.0)
        self.assertNotEqual(answer["code"], 0)
        # Comes back after all its records are gone.
        target = self.peer(service, "target")
        self.moves(actor, target)
        target.quit()
        self.assertEqual(self.names(service), ["actor", "actor"])
        actor.quit()
        self.assertEqual(self.names(service), [])

    def test_frozen_beyond_its_lease(self):
        service = self.start(services.Ours)
        actor, target = self.peer(service, "actor"), self.peer(service, "target")
        target.stop()
        self.assertTrue(
            lab.wait_until(lambda: "target" not in self.names(service), TTL + 1, pause=0.05))
        target.resume()
        self.appear(service, "target", TTL + 1)
        self.moves(actor, target)

    def test_superseded_while_frozen(self):
        """A process that resumes after another has taken its name leaves that alone, and gets the
        name back later."""
        service = self.start(services.Etcd)
        actor, old = self.peer(service, "actor"), self.peer(service, "target")
        old.stop()
        new = self.peer(service, "target")
        old.resume()
        self.assertTrue(lab.wait_until(lambda: "another process" in old.log_tail(), TTL + 2))
        time.sleep(TTL)
        self.moves(actor, new)
        new.kill()

        def is_back():
            actor.ask("reopen", peer="target")
            return self.transfer(actor, old)["code"] == 0

        self.assertTrue(lab.wait_until(is_back, 3 * TTL + 2, pause=0.2), old.log_tail())

    def test_what_another_puts_stays(self):
        for kind in KINDS:
            with self.subTest(service=kind.__name__):
                service = self.start(kind)
                peer = self.peer(service, "target")
                services.command("put", service.uri, "mooncake/ram/target", "another's")
                time.sleep(2 * TTL + 1)
                found = services.command("get", service.uri, "mooncake/ram/target")
                self.assertEqual(found, "another's\n", peer.log_tail())

    def test_names_that_look_alike(self):
        for kind in KINDS:
            service = self.start(kind)
            names = ["mooncake/e\u0301", "mooncake/\u00e9"]
            for name in names:
                services.command("put", service.uri, name, "value")
            self.assertEqual(services.keys(service.uri), names, kind.__name__)
        actor = self.peer(service, "actor")
        for target in [self.peer(service, name) for name in ("e\u0301", "\u00e9")]:
            self.moves(actor, target)

    def test_lost_lease(self):
        service = self.start(services.Etcd)
        peer = self.peer(service, "target")
        leases = [word for word in service.control("lease", "list").split()
                  if len(word) > 12 and word.isalnum()]
        # Else it may be back before anybody has looked.
        peer.stop()
        for lease in leases:
            service.control("lease", "revoke", lease)
        self.assertEqual(self.names(service), [])
        peer.resume()
        self.appear(service, "target", TTL)

    def test_changes_without_a_pause(self):
        """What is put under a lease does not renew it, and does not keep it from being renewed."""
        found = [(service, self.peer(service, "target")) for service in map(self.start, KINDS)]
        end = time.monotonic() + 2 * TTL
        while time.monotonic() < end:
            for _, peer in found:
                for change in ("unregister", "register"):
                    self.assertEqual(peer.ask(change)["code"], 0, peer.log_tail())
        for service, peer in found:
            self.assertEqual(self.names(service), ["target", "target"], peer.log_tail())
            self.assertNotIn("is published again", peer.log_tail(1000))

    def test_deleted_keys(self):
        for kind in KINDS:
            service = self.start(kind)
            self.peer(service, "target")
            services.command("delete", service.uri, "mooncake/ram/target")
            self.appear(service, "target", TTL)


class Services(FaultTest):
    def check_outage(self, service, interrupt, restore, seconds=1.5 * TTL):
        """Transfers between known peers never fail; publishing is retried."""
        actor = self.peer(service, "actor")
        target = self.peer(service, "target")
        self.moves(actor, target)
        actor.send("flood", peer="target", operation="write", remote=target.address,
                   length=MIB, count=4, seconds=seconds + 1, timeout=5.0)
        interrupt()
        answer = actor.receive(60)
        self.assertEqual(answer["code"], 0, f"{answer}\n{actor.log_tail()}")
        # Registrations do not wait for a service known to be away, and peers that know each other
        # notice them without it.
        begin = time.monotonic()
        self.assertEqual(target.ask("unregister")["code"], 0)
        self.assertLess(time.monotonic() - begin, 5)
        self.assertNotEqual(self.transfer(actor, target)["code"], 0)
        self.assertEqual(actor.ask("reopen", peer="target")["code"], 0)
        self.assertEqual(target.ask("register")["code"], 0)
        self.moves(actor, target, 8.0)
        restore()
        self.appear(service, "actor", TTL + 3)
        self.appear(service, "target", TTL + 3)
        self.moves(actor, target)
        late = self.peer(service, "late")
        self.moves(late, target)
        for peer in (actor, target, late):
            peer.quit()
        self.assertEqual(self.names(service), [])

    def test_frozen(self):
        for kind in KINDS:
            with self.subTest(service=kind.__name__):
                service = self.start(kind)
                self.check_outage(service, service.stop, service.resume)

    def test_restarted_empty(self):
        for kind in (*KINDS, services.StockHTTP):
            with self.subTest(service=kind.__name__):
                service = self.start(kind)
                if service.has_leases:
                    self.check_outage(service, service.kill, lambda: (service.forget(),
                                                                      service.start()))
                else:
                    self.check_plain(service)

    def check_plain(self, service):
        target = self.peer(service, "target")
        service.restart(empty=True)
        self.assertTrue(lab.wait_until(lambda: services.command(
            "get", service.uri, "mooncake/ram/target", status=None).startswith("{"), TTL + 2))
        target.kill()
        # Without leases a killed process's records stay, and its successor replaces them.
        target = self.peer(service, "target")
        self.moves(self.peer(service, "actor"), target)
        target.quit()
        services.command("get", service.uri, "mooncake/ram/target", status=1)

    def test_restarted_with_data(self):
        durable = ((services.Etcd, ()), (services.Redis, ()), (services.Ours, (True,)))
        for kind, arguments in durable:
            with self.subTest(service=kind.__name__):
                service = self.start(kind, *arguments)
                services.command("put", service.uri, "mooncake/kept", "value")
                target = self.peer(service, "target")
                service.restart(empty=False)
                self.assertEqual(services.command("get", service.uri, "mooncake/kept"), "value\n")
                self.appear(service, "target", 1)
                time.sleep(TTL + 1)
                self.appear(service, "target", 1)
                target.quit()
                self.assertEqual(services.keys(service.uri), ["mooncake/kept"])

    def test_journal_that_cannot_be_written(self):
        service = self.start(services.Ours, True)
        raw = services.Raw(service.uri)
        self.addCleanup(raw.close)
        put = lambda key: raw.ask("PUT", {"key": key}, b"value")
        self.assertEqual(put("mooncake/before")[0], 200)
        limit = resource.RLIMIT_FSIZE
        journal = service.folder / "data" / "journal"
        size, number = journal.stat().st_size, journal.stat().st_ino
        limits = resource.prlimit(service.process.pid, limit, (size + 10, resource.RLIM_INFINITY))
        status, text = put("mooncake/full")
        self.assertEqual(status, 507, text)
        self.assertIn(b"the journal cannot be written: File too large", text)
        self.assertEqual(put("mooncake/still-full")[0], 507)
        # What was refused meanwhile is in memory, so the next record that is written keeps it.
        resource.prlimit(service.process.pid, limit, limits)
        self.assertEqual(put("mooncake/after")[0], 200)
        # It was appended to the file, which did not have to be rewritten.
        self.assertEqual(journal.stat().st_ino, number)
        service.restart(empty=False)
        self.assertEqual(services.keys(service.uri), [
            f"mooncake/{name}" for name in ("after", "before", "full", "still-full")])

    def test_journal_in_a_directory_that_moves(self):
        service = self.start(services.Ours, True)
        raw = services.Raw(service.uri)
        self.addCleanup(raw.close)
        number = (service.folder / "data" / "journal").stat().st_ino
        (service.folder / "data").rename(service.folder / "moved")
        # Mostly history, so that it is rewritten.
        for _ in range(8):
            self.assertEqual(raw.ask("PUT", {"key": "mooncake/k"}, b"v" * (1 << 20))[0], 200)
        journal = service.folder / "moved" / "journal"
        self.assertTrue(lab.wait_until(lambda: journal.stat().st_ino != number, 5))
        (service.folder / "moved").rename(service.folder / "data")
        service.restart(empty=False)
        self.assertEqual(services.keys(service.uri), ["mooncake/k"])

    def test_cluster_loses_a_member(self):
        service = self.start(services.EtcdCluster)
        actor = self.peer(service, "actor")
        target = self.peer(service, "target")
        self.moves(actor, target)
        service.members[0].kill()
        service.members[0].wait(10)
        late = self.peer(service, "late")
        self.moves(late, target)
        time.sleep(TTL + 1)
        self.assertEqual(len(self.names(service)), 6)
        # Without a majority, only the service is unavailable; nothing is lost.
        service.members[1].kill()
        service.members[1].wait(10)
        self.moves(actor, target)
        error = services.command("get", service.uri, "mooncake/x", "--timeout", "2000ms", status=1)
        self.assertIn(service.uri, error)
        actor.quit()

    def test_dead_and_frozen_first_endpoint(self):
        service = self.start(services.Etcd)
        silent = services.Impostor(None)
        self.addCleanup(silent.end)
        for first in (1, silent.port):
            uri = f"etcd://127.0.0.1:{first},127.0.0.1:{service.port}"
            peer = services.start_peer(uri, "target")
            self.addCleanup(peer.kill)
            self.appear(service, "target", 1)
            time.sleep(TTL)
            self.appear(service, "target", 1)
            peer.quit()

    def test_slow_answers(self):
        service = self.start(services.Etcd)
        proxy = services.Proxy(service.port, 0.2)
        self.addCleanup(proxy.end)
        slow = services.start_peer(f"etcd://127.0.0.1:{proxy.port}", "slow")
        self.addCleanup(slow.kill)
        actor = self.peer(service, "actor")
        time.sleep(TTL + 1)
        self.moves(actor, slow)
        self.moves(slow, actor)
        slow.quit()
        proxy.delay = 5
        begin = time.monotonic()
        error = services.command("get", f"etcd://127.0.0.1:{proxy.port}", "mooncake/x",
                                 "--timeout", "700ms", status=1)
        self.assertLess(time.monotonic() - begin, 3)
        self.assertIn("deadline", error)

    def test_two_clusters_in_one_store(self):
        service = self.start(services.Etcd)
        red = self.peer(service, "same", MC_METADATA_CLUSTER_ID="red")
        blue = self.peer(service, "same", MC_METADATA_CLUSTER_ID="blue/")
        self.assertEqual(
            services.keys(service.uri),
            ["mooncake/blue/ram/same", "mooncake/blue/rpc_meta/same", "mooncake/red/ram/same",
             "mooncake/red/rpc_meta/same"])
        actor = self.peer(service, "actor", MC_METADATA_CLUSTER_ID="blue")
        self.moves(actor, blue)
        red.quit()
        blue.quit()
        self.assertEqual(self.names(service), ["actor", "actor"])


class Access(FaultTest):
    def refused(self, uri, *words):
        begin = time.monotonic()
        text = services.command("get", uri, "mooncake/x", "--timeout", "3000ms", status=1)
        self.assertLess(time.monotonic() - begin, 6)
        for word in words:
            self.assertIn(word, text)
        self.assertNotIn("wrong", text)

    def test_redis_password(self):
        service = self.start(services.Redis, "right")
        self.peer(service, "target")
        self.refused(service.uri.replace("right", "wrong"), "WRONGPASS", "password")
        self.refused(service.uri.replace(":right@", ""), "NOAUTH", "MC_REDIS_PASSWORD")
        plain = service.uri.replace(":right@", "")
        services.command("list", plain, variables={"MC_REDIS_PASSWORD": "right"})

    def test_etcd_password(self):
        service = self.start(services.Etcd)
        for words in (("user", "add", "root:root"), ("user", "grant-role", "root", "root"),
                      ("role", "add", "mooncake"),
                      ("role", "grant-permission", "--prefix=true", "mooncake", "readwrite",
                       "mooncake/"), ("user", "add", "user:right"),
                      ("user", "grant-role", "user", "mooncake"), ("auth", "enable")):
            service.control(*words)
        address = f"127.0.0.1:{service.port}"
        peer = services.start_peer(f"etcd://user:right@{address}", "target")
        self.addCleanup(peer.kill)
        self.refused(f"etcd://user:wrong@{address}", "authentication failed", "password")
        self.refused(f"etcd://{address}", "password")
        text = services.command("get", f"etcd://user:right@{address}", "foreign", status=1)
        self.assertIn("permission denied", text)
        time.sleep(TTL + 1)
        # A restarted service has forgotten the tokens.
        service.restart(empty=False)
        time.sleep(TTL + 1)
        found = services.command("list", f"etcd://user:right@{address}").split()
        self.assertEqual(len(found), 2, found)
        peer.quit()

    def test_certificates(self):
        service = self.start(services.Etcd, True)
        folder = service.folder
        self.peer(service, "target")
        self.assertEqual(len(services.keys(service.uri)), 2)
        address = f"etcd://127.0.0.1:{service.port}"
        self.refused(f"{address}?ca={folder}/other.pem&cert={folder}/client.pem"
                     f"&key={folder}/client.key", address, "certificate")
        # With TLS 1.3 the service refuses a client only after the client has started to send.
        self.refused(f"{address}?ca={folder}/ca.pem&cert={folder}/foreign.pem"
                     f"&key={folder}/foreign.key", address)
        self.refused(f"{address}?ca={folder}/ca.pem", address)
        self.refused(f"{address}?ca={folder}/absent.pem", address, "certificate")
        self.refused(address, address)
        services.command("list", address, variables={
            "MC_METADATA_CA_FILE": f"{folder}/ca.pem",
            "MC_METADATA_CERT_FILE": f"{folder}/client.pem",
            "MC_METADATA_KEY_FILE": f"{folder}/client.key"})


    def test_certificate_of_another_host(self):
        service = self.start(services.Etcd, True, certificate="elsewhere")
        address = f"127.0.0.1:{service.port}"
        self.refused(service.uri, address, "certificate")
        # The name checked is the one in the URI.
        self.refused(service.uri.replace("127.0.0.1", "localhost"), "certificate")

    def test_tls_connections_that_the_service_has_closed(self):
        """A host that does not ignore SIGPIPE survives; libcurl from 7.87 on raises none itself."""
        service = self.start(services.Etcd, True)
        script = (
            "import ctypes, signal, sys\n"
            "import store_lib as lib\n"
            "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
            "engine = lib.engine(sys.argv[1], 'target', 10_000)\n"
            "segment = ctypes.c_int32()\n"
            "for line in sys.stdin:\n"
            "    code = lib.library.mooncake_segment_open(\n"
            "        engine, b'nobody', ctypes.c_uint64(5000), ctypes.byref(segment))\n"
            "    print(code, flush=True)\n"
            "lib.library.mooncake_engine_destroy(engine)\n"
        )
        caller = subprocess.Popen(
            [sys.executable, "-B", "-c", script, service.uri], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(caller.wait)
        self.addCleanup(caller.kill)

        def ask():
            caller.stdin.write("go\n")
            caller.stdin.flush()
            return caller.stdout.readline()

        self.assertEqual(ask(), "-13\n")
        for _ in range(2):
            service.restart(empty=False)
            # An etcd that listens may still be electing itself.
            self.assertTrue(lab.wait_until(lambda: ask() == "-13\n", 30, pause=0.2))
        caller.communicate(timeout=20)
        self.assertEqual(caller.returncode, 0)


if __name__ == "__main__":
    unittest.main()
