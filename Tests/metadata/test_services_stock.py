"""Processes of Mooncake and ours find each other through the same services."""

import json
import unittest

import lab
import services

MIB = 1 << 20


class Meeting(unittest.TestCase):
    """Both directions, both our interfaces, every service that Mooncake's build supports."""

    def move(self, actor, target, what):
        for operation in ("write", "read"):
            answer = actor.ask(
                "transfer", peer=target.segment, operation=operation,
                pieces=[[0, target.address, MIB]], timeout=10.0,
            )
            self.assertEqual(answer["code"], 0, f"{what}: {operation}: {answer}\n"
                             f"{actor.log_tail()}\n{target.log_tail()}")

    def check(self, service, version, api, resolve=None):
        name = f"{version}-{api}"
        stock = services.start_stock(version, service.uri, f"stock-{name}")
        self.addCleanup(stock.kill)
        ours = services.start_peer(service.uri, f"ours-{name}", api)
        self.addCleanup(ours.kill)
        stock.ask("fill", offset=0, length=MIB, seed=name)
        self.move(ours, stock, f"{service.uri}: {api} to {version}")
        self.move(stock, ours, f"{service.uri}: {version} to {api}")
        if api == "native":
            answer = ours.ask("notify", peer=stock.segment, name="n", message="m")
            self.assertEqual(answer["code"], 0, answer)
            found = stock.ask("notifications")["notifications"]
            self.assertEqual(found, [["n", "m"]])
        stock.quit()
        ours.quit()

    def check_service(self, service, pairs):
        self.addCleanup(service.end)
        for version, api in pairs:
            with self.subTest(version=version, api=api, service=type(service).__name__):
                self.check(service, version, api)

    def test_etcd(self):
        self.check_service(services.Etcd(), [(v, "native") for v in lab.releases()]
                           + [(lab.releases()[-1], "dropin")])

    def test_our_server(self):
        self.check_service(services.Ours(), [(v, "native") for v in lab.releases()]
                           + [(lab.releases()[-1], "dropin")])

    def test_stock_server(self):
        self.check_service(services.StockHTTP(), [(lab.releases()[-1], api) for api in lab.APIS])

    def test_redis(self):
        """Mooncake's released builds lack Redis: its keys and texts are copied there unchanged."""
        redis, http = services.Redis(), services.Ours()
        self.addCleanup(redis.end)
        self.addCleanup(http.end)
        stock = services.start_stock(lab.releases()[-1], http.uri, "stock")
        self.addCleanup(stock.kill)
        ours = services.start_peer(redis.uri, "ours")
        self.addCleanup(ours.kill)

        def carry(source, sink):
            copied = services.command("list", source, "--values", "--json").splitlines()
            self.assertEqual(len(copied), 2, copied)
            for line in copied:
                entry = json.loads(line)
                services.command("put", sink, entry["key"], "-", text=entry["value"])

        carry(http.uri, redis.uri)
        self.move(ours, stock, "ours to stock through Redis")
        services.command("delete", redis.uri, "mooncake/ram/stock")
        services.command("delete", redis.uri, "mooncake/rpc_meta/stock")
        carry(redis.uri, http.uri)
        self.move(stock, ours, "stock to ours through Redis")

    def test_news_are_noticed(self):
        """The first release that orders what it finds by metadata_version."""
        for kind in (services.Ours, services.Etcd):
            service = kind()
            self.addCleanup(service.end)
            stock = services.start_stock(
                lab.NEWEST, service.uri, "stock", MC_TE_METADATA_REFRESH_INTERVAL_SECONDS="1")
            self.addCleanup(stock.kill)
            for life in range(2):
                # It comes back while its keys stand: the original gives up names that vanished.
                ours = services.start_peer(service.uri, "ours", MC_METADATA_TTL="60")
                self.addCleanup(ours.kill)
                for key in ("mooncake/ram/ours", "mooncake/rpc_meta/ours"):
                    text = json.loads(services.command("get", service.uri, key))
                    self.assertGreater(text["metadata_version"], 1_700_000_000_000_000)

                def seen(address):
                    return lambda: stock.ask("first_buffer", peer="ours")["address"] == address

                self.assertTrue(lab.wait_until(seen(ours.address), 10, pause=0.2), f"life {life}")
                self.move(stock, ours, f"life {life}")
                for change, address in (("unregister", None), ("register", ours.address)):
                    self.assertEqual(ours.ask(change)["code"], 0)
                    if address:
                        self.assertTrue(lab.wait_until(seen(address), 10, pause=0.2), change)
                self.move(stock, ours, f"life {life}, again")
                ours.kill()
            log = stock.log_tail(10_000)
            self.assertNotIn("Rejecting", log)
            self.assertIn("metadata version: 1", log)
            # And what it publishes counts as new here.
            ours = services.start_peer(service.uri, "other")
            self.addCleanup(ours.kill)
            for change, code in (("unregister", False), ("register", True)) * 2:
                stock.ask(change)
                self.assertEqual(ours.ask("reopen", peer="stock")["code"], 0)
                answer = ours.ask("transfer", peer="stock", operation="read",
                                  pieces=[[0, stock.address, MIB]], timeout=5.0)
                self.assertEqual(answer["code"] == 0, code, f"{change}: {answer}")
            stock.kill()
            ours.quit()

    def test_stock_restarts_under_its_name(self):
        """Our server accepts it, and a peer with the old descriptor still works."""
        service = services.Ours()
        self.addCleanup(service.end)
        ours = services.start_peer(service.uri, "ours")
        self.addCleanup(ours.kill)
        for life in range(2):
            stock = services.start_stock(lab.releases()[-1], service.uri, "stock")
            self.addCleanup(stock.kill)
            self.move(ours, stock, f"life {life}")
            stock.kill()


if __name__ == "__main__":
    unittest.main()
