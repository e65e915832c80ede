"""Our server with slow clients, out of descriptors, and started on files that it cannot use."""

import http.client
import os
import resource
import socket
import subprocess
import threading
import time
import unittest

import lab
import services

SLOW_CLIENTS = 2100
# The mark in a journal after each commit.
MARK = 38


def processor_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lowest_free_descriptor(pid):
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(used) + 1) if number not in used)


def open_sockets(pid):
    """How many sockets a process has; those that close meanwhile do not count."""
    count = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            count += os.readlink(entry.path).startswith("socket:")
        except OSError:
            continue
    return count


class SlowClients:
    """Connections that send a byte now and then, and reconnect when closed."""

    def __init__(self, port, count):
        self.port = port
        self.is_over = False
        self.sockets = []
        self.came_again = 0
        for _ in range(count):
            self.sockets.append(self.connect())
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def connect(self):
        one = socket.create_connection(("127.0.0.1", self.port), 20)
        one.setblocking(False)
        one.send(b"P")
        return one

    def run(self):
        while not self.is_over:
            for index, one in enumerate(self.sockets):
                if self.is_over:
                    return
                try:
                    one.send(b"U")
                except OSError:
                    one.close()
                    try:
                        self.sockets[index] = self.connect()
                        self.came_again += 1
                    except OSError:
                        pass
            time.sleep(0.5)

    def end(self):
        self.is_over = True
        self.thread.join(20)
        for one in self.sockets:
            one.close()


class Overload(unittest.TestCase):
    def setUp(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(limits[1], 4096)),
                                                    limits[1]))
        self.service = services.Ours()
        self.addCleanup(self.service.end)

    def request(self, method, target, body=b"", host="127.0.0.1"):
        """One request on a new connection; returns the status and how long it took."""
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.service.port), 10, (host, 0)) as one:
            one.sendall(b"%s %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (
                method, target, len(body), body))
            answer = one.recv(4096)
        return int(answer.split()[1]), time.monotonic() - begin

    def ask_again(self, client):
        """As HTTP clients do: a connection that was closed while idle is not an error."""
        try:
            return client.ask("GET", {"key": "kept"})
        except (http.client.RemoteDisconnected, ConnectionError):
            client.close()
            return client.ask("GET", {"key": "kept"})

    def test_slow_clients(self):
        kept = services.Raw(self.service.uri)
        self.addCleanup(kept.close)
        self.assertEqual(kept.ask("PUT", {"key": "kept"}, b"v")[0], 200)
        slow = SlowClients(self.service.port, SLOW_CLIENTS)
        self.addCleanup(slow.end)
        worst = 0
        for _ in range(20):
            for host in ("127.0.0.1", "127.0.0.2"):
                for words in ((b"GET", b"/health"), (b"PUT", b"/metadata?key=k", b"value")):
                    status, seconds = self.request(*words, host=host)
                    self.assertEqual(status, 200)
                    worst = max(worst, seconds)
            # A client that was served before is served again.
            begin = time.monotonic()
            self.assertEqual(self.ask_again(kept), (200, b"v"))
            worst = max(worst, time.monotonic() - begin)
            time.sleep(0.1)
        self.assertLess(worst, 1)
        self.assertGreater(slow.came_again, 0)
        self.assertIn("closing the one that is silent longest", self.service.text())

    def test_out_of_descriptors(self):
        """No descriptor is left, and no connection could give up its own."""
        pid = self.service.process.pid
        self.assertEqual(self.request(b"GET", b"/health")[0], 200)
        # Those that have been answered give their descriptors back.
        self.assertTrue(lab.wait_until(lambda: open_sockets(pid) == 1, 10))
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(pid), hard))
        waiting = [socket.create_connection(("127.0.0.1", self.service.port), 10)
                   for _ in range(20)]
        for one in waiting:
            self.addCleanup(one.close)
            one.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
        before = processor_seconds(pid)
        time.sleep(3)
        self.assertLess(processor_seconds(pid) - before, 0.3)
        text = self.service.text()
        self.assertIn("it accepts no connections for the moment: ", text)
        self.assertIn("Too many open files", text)
        self.assertLess(text.count("accepts no connections"), 15)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4096, hard))
        begin = time.monotonic()
        for one in waiting:
            one.settimeout(5)
            self.assertIn(b"200 OK", one.recv(4096))
        self.assertLess(time.monotonic() - begin, 2)

    def test_fewer_descriptors_than_connections(self):
        """Slow clients that hold every descriptor give them up to others."""
        pid = self.service.process.pid
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(
            pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(pid) + 100, hard))
        slow = SlowClients(self.service.port, 200)
        self.addCleanup(slow.end)
        for _ in range(20):
            status, seconds = self.request(b"PUT", b"/metadata?key=k", b"value")
            self.assertEqual(status, 200)
            self.assertLess(seconds, 1)
            time.sleep(0.05)


class Start(unittest.TestCase):
    def setUp(self):
        self.service = services.Ours(True)
        self.addCleanup(self.service.end)
        self.journal = self.service.folder / "data" / "journal"

    def refused(self, *flags):
        done = subprocess.run(
            [services.cli(), "metadata", "serve", "--port", "0", *self.service.flags, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)
        self.assertEqual(done.returncode, 1, done.stdout)
        return done.stdout

    def put(self, count, length):
        raw = services.Raw(self.service.uri)
        for index in range(count):
            status, _ = raw.ask("PUT", {"key": f"mooncake/k{index}"}, b"v" * length)
            self.assertEqual(status, 200)
        raw.close()

    def test_less_memory(self):
        self.put(20, 100_000)
        self.service.kill()
        text = self.refused("--memory", "1MiB")
        self.assertIn("--memory 2MiB or more", text)
        self.service.start()
        self.assertEqual(len(services.keys(self.service.uri)), 20)

    def test_damage(self):
        self.put(20, 100)
        self.service.kill()
        whole = self.journal.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 4
        self.journal.write_bytes(damaged)
        text = self.refused()
        for word in (str(self.journal), f"of {len(whole)}", "checksum", "move the file away"):
            self.assertIn(word, text)
        self.assertEqual(self.journal.read_bytes(), bytes(damaged))
        # Without a mark after it, the last put may be the remains of a power loss.
        unmarked = bytearray(whole[:-MARK])
        unmarked[-50] ^= 4
        for left in (whole[:-MARK - 1], bytes(unmarked)):
            self.journal.write_bytes(left)
            self.service.start()
            self.assertEqual(len(services.keys(self.service.uri)), 19)
            self.assertIn("cut off", self.service.text())
            # It ends with the mark of the previous commit.
            kept = self.journal.stat().st_size
            self.assertIn(
                f"the last {len(left) - kept} bytes, from byte {kept} on,", self.service.text())
            self.service.kill()
        self.service.start()

    def test_crash_while_it_is_made(self):
        self.service.kill()
        for beginning in (b"", b"moonc"):
            self.journal.write_bytes(beginning)
            self.service.start()
            self.put(1, 10)
            self.service.restart(empty=False)
            self.assertEqual(len(services.keys(self.service.uri)), 1)
            self.service.kill()
        self.assertIn("made anew", self.service.text())
        self.service.start()


class Warnings(unittest.TestCase):
    def test_certificates_without_tls(self):
        service = services.Ours()
        self.addCleanup(service.end)
        files = {"MC_METADATA_CA_FILE": "/etc/ssl/ca.pem"}
        text = services.command("put", service.uri, "mooncake/x", "v", variables=files)
        for word in (service.uri, "unencrypted", "https://"):
            self.assertIn(word, text)
        self.assertEqual(services.command("list", service.uri), "mooncake/x\n")

    def test_open_to_everybody(self):
        service = services.Ours(False, "--host", "0.0.0.0")
        self.addCleanup(service.end)
        for word in ("asks for no token", "MC_METADATA_HTTP_TOKEN", "127.0.0.1"):
            self.assertIn(word, service.text())


if __name__ == "__main__":
    unittest.main()
