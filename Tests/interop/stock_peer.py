"""A peer with Mooncake's engine inside; runs in the virtual environment of scripts/stock-env.

Environment: MOONCAKE_PEER_METADATA, the URI of a metadata service, and MOONCAKE_PEER_NAME.
"""

import os
import sys

import peer_commands


class StockEngine:
    def __init__(self):
        from mooncake import engine

        self.module = engine
        self.engine = engine.TransferEngine()
        service = os.environ.get("MOONCAKE_PEER_METADATA", "P2PHANDSHAKE")
        name = os.environ.get("MOONCAKE_PEER_NAME")
        # get_rpc_port() of an engine that failed to initialize ends the process.
        if self.engine.initialize(name or "127.0.0.1", service, "tcp", "") != 0:
            sys.exit("Mooncake's engine did not initialize")
        self.segment = name or f"127.0.0.1:{self.engine.get_rpc_port()}"

    def register(self, address, length):
        return self.engine.register_memory(address, length)

    def unregister(self, address):
        return self.engine.unregister_memory(address)

    def transfer(self, peer, operation, pieces, timeout, notify):
        opcode = getattr(self.module.TransferOpcode, {"read": "Read", "write": "Write"}[operation])
        if notify:
            message = self.module.TransferNotify(*notify)
            ((source, target, length),) = pieces
            code = self.engine.transfer_sync(peer, source, target, length, opcode, message)
        elif len(pieces) == 1:
            one = getattr(self.engine, f"transfer_sync_{operation}")
            code = one(peer, *pieces[0])
        else:
            many = getattr(self.engine, f"batch_transfer_sync_{operation}")
            code = many(peer, *(list(column) for column in zip(*pieces)))
        return code, "" if code == 0 else "Mooncake's engine gives no reason"

    def notify(self, peer, name, message):
        return -1, "Mooncake's Python interface notifies only with a transfer"

    def notifications(self):
        return [(each.name, each.msg) for each in self.engine.get_notifies()]

    def probe(self, peer):
        if not hasattr(self.engine, "send_probe"):
            return -1, "this release has no probe"
        code = self.engine.send_probe(peer)
        return code, "" if code == 0 else "no answer"

    def first_buffer(self, peer):
        return self.engine.get_first_buffer_address(peer)

    def reopen(self, peer):
        return -1, "Mooncake's Python interface cannot reopen"

    def close(self):
        pass


if __name__ == "__main__":
    peer_commands.serve(StockEngine)
    # Skips the end of Mooncake's threads at interpreter exit, which is not tested here.
    sys.stderr.flush()
    os._exit(0)
