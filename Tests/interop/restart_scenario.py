"""A Mooncake engine restarts under the same name while a peer holds its old descriptor.

Arguments: VERSION API. It runs in its own process because it moves to an empty network namespace,
where it can keep closed connections from blocking the port of the restarted engine for a minute. If
that is not permitted, it waits for that minute.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
import time

import lab
from peer_commands import digest, pattern

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
LINGER_SECONDS = 62
SIZE = 1 << 20


def isolate():
    """Moves to a network namespace whose loopback forgets closed connections at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0 and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
    try:
        with open("/proc/sys/net/ipv4/tcp_max_tw_buckets", "w", encoding="ascii") as setting:
            setting.write("0")
    except OSError:
        return False
    return True


def start_named(version, port, neighbor):
    """Starts Mooncake at the port. Its two ports are random, so this may take several attempts."""
    for _ in range(30):
        stock = lab.start_stock(version, **lab.port_range(min(port, neighbor), max(port, neighbor)))
        if stock.segment == f"127.0.0.1:{port}":
            return stock
        stock.kill()
    sys.exit(f"Mooncake did not come up at port {port}")


def check(ours, stock, seed, what):
    """One write and one read, at the first attempt."""
    ours.ask("fill", offset=0, length=SIZE, seed=seed)
    stock.ask("fill", offset=SIZE, length=SIZE, seed=seed + " back")
    for operation, local, remote in (("write", 0, 0), ("read", SIZE, SIZE)):
        answer = ours.ask(
            "transfer",
            peer=stock.segment,
            operation=operation,
            pieces=[[local, stock.address + remote, SIZE]],
            timeout=10.0,
        )
        if answer["code"] != 0:
            sys.exit(f"{what}: {operation} gave {answer}\n{ours.log_tail()}")
    arrived = lab.wait_until(
        lambda: stock.ask("digest", offset=0, length=SIZE)["digest"] == digest(pattern(seed, SIZE)),
        5,
    )
    back = ours.ask("digest", offset=SIZE, length=SIZE)["digest"]
    if not arrived or back != digest(pattern(seed + " back", SIZE)):
        sys.exit(f"{what}: the bytes are wrong")
    print(f"{what}: moved", flush=True)


def run(version, api):
    # The environment must be made before the network is gone.
    lab.stock_environment(version)
    if api == "stock":
        lab.stock_environment(lab.SELF_CHECK_RELEASE)
    isolated = isolate()
    port = lab.free_ports(5) + 2
    # Mooncake finds a restarted peer again only if it caches nothing.
    ours = lab.start_ours(api, **({"MC_DISABLE_METACACHE": "1"} if api == "stock" else {}))
    # A different neighbor each time, so that the data port differs too.
    for life, neighbor in enumerate((port - 1, port + 1, port - 1)):
        stock = start_named(version, port, neighbor)
        check(ours, stock, f"life {life}", ("first life", "second life", "third life")[life])
        stock.kill()
        if life == 1:
            # This time the death is noticed before the peer comes back.
            answer = ours.ask(
                "transfer",
                peer=stock.segment,
                operation="read",
                pieces=[[0, stock.address, 4096]],
                timeout=3.0,
            )
            if answer["code"] == 0 or answer["seconds"] > 8:
                sys.exit(f"a dead peer gave {answer}")
        if not isolated and life < 2:
            print(f"waiting {LINGER_SECONDS} s for the port", flush=True)
            time.sleep(LINGER_SECONDS)
    ours.quit()


if __name__ == "__main__":
    run(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
