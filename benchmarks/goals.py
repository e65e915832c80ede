"""What the library should reach, and whether a run has reached it."""

import dataclasses
import statistics

STOCK = ("stock", "stock python", "stock tuned")
UCX = ("ucx 1.22", "ucx 1.13")
RATE, CPU = "bytes_per_second", "cpu_seconds_per_gb"


@dataclasses.dataclass
class Goal:
    """Ours against the best of some others, in every row with the goal's key."""

    work: str
    wanted: str
    key: str
    ours: str
    others: tuple  # empty: judges the figure itself
    factor: float
    quantity: str = RATE
    # Rate: ours / other, gain: other / ours, both at least the factor. Cost: ours / other, at most
    # the factor.
    sense: str = "rate"

    def compare(self, sides):
        """The ratio of medians in one row, None where a side is missing."""
        mine = median(sides, self.ours, self.quantity)
        if not self.others or mine is None:
            return mine
        found = [median(sides, other, self.quantity) for other in self.others]
        found = [value for value in found if value is not None]
        if not found:
            return None
        other = max(found) if self.quantity in (RATE, "operations_per_second") else min(found)
        return other / mine if self.sense == "gain" else mine / other

    def met(self, value):
        return value <= self.factor if self.sense == "cost" else value >= self.factor

    def shown(self, value):
        if self.quantity == "percent":
            return f"{value:.3f} %"
        return f"{value / 1e6:.3g} million a second" if not self.others else f"{value:.2f}"


def median(sides, label, quantity):
    values = sides.get(label, {}).get(quantity)
    return statistics.median(values) if values else None


def latency(quantity):
    work = f"TCP, one 4 KiB read, {quantity[:3]}"
    return (
        Goal(work, "at most 1.25 of a spinning round trip of plain sockets", "latency", "ours",
             ("raw",), 1.25, quantity, "cost"),
        Goal(work, "4 times better than Mooncake", "latency", "ours",
             ("stock python",), 4, quantity, "gain"),
    )  # fmt: skip


POLLED = "TCP, 16 MiB, drop-in header and polling"
BULK, SMALL = "TCP, bulk, 1 to 64 MiB", "TCP, 4 KiB x 128"
ENGINE = "same host, engine-owned memory, 1 MiB and up"
EACH, OPERATIONS = "same host, one 4 KiB read at a time", "operations_per_second"
GOALS = (
    Goal(BULK, "0.9 of plain sockets", "bulk", "ours", ("raw",), 0.9),
    Goal(BULK, "2.5 times Mooncake", "bulk", "ours", STOCK, 2.5),
    Goal(BULK, "1.0 of UCX 1.22, one address", "bulk", "ours fixed", ("ucx 1.22",), 1),
    Goal(SMALL, "10 times Mooncake", "4 KiB", "ours", STOCK, 10),
    Goal(SMALL, "2.5 times UCX 1.22", "4 KiB", "ours", ("ucx 1.22",), 2.5),
    Goal(SMALL, "0.7 of plain sockets, gathered", "4 KiB", "ours", ("raw",), 0.7),
    Goal("TCP, 64 KiB x 128", "0.85 of plain sockets, bulk", "64 KiB", "ours", ("raw bulk",), 0.85),
    Goal(POLLED, "0.85 of waiting", "polled", "ours polled", ("ours ordinary",), 0.85),
    Goal(POLLED, "2.5 times Mooncake", "polled", "ours polled", ("stock python",), 2.5),
    *latency("p50_us"),
    *latency("p99_us"),
    Goal(ENGINE, "0.9 of a non-temporal copy by as many threads", "engine", "ours",
         ("stream", "stream 2"), 0.9),
    Goal(ENGINE, "3 times NIXL", "engine", "ours", ("nixl",), 3),
    Goal(ENGINE, "1.5 times UCX 1.22, one address", "engine", "ours fixed", ("ucx 1.22",), 1.5),
    Goal(ENGINE, "1.5 times UCX 1.13, one address", "engine", "ours fixed", ("ucx 1.13",), 1.5),
    Goal("same host, ordinary memory, 1 MiB and up", "0.95 of process_vm_readv by as many threads",
         "ordinary", "ours kernel", ("readv", "readv 2"), 0.95),
    Goal(EACH, "1 million a second, mapped", "each", "ours", (), 1e6, OPERATIONS),
    Goal(EACH, "0.4 million a second, kernel copy", "each", "ours kernel", (), 4e5, OPERATIONS),
    Goal(EACH, "4 times NIXL", "each", "ours", ("nixl",), 4, OPERATIONS),
    Goal("processor seconds per GB, TCP, bulk", "at most 1.15 of plain sockets", "bulk", "ours",
         ("raw",), 1.15, CPU, "cost"),
    Goal("idle", "0 % of a core", "idle", "ours", (), 0.05, "percent", "cost"),
    Goal("a waiter whose peer stands still", "no core", "idle", "waiting", (), 1, "percent",
         "cost"),
    Goal("256 peers", "0.9 of one peer", "peers", "many", ("one",), 0.9),
)  # fmt: skip


def judge(rows):
    """For each goal the ratios reached, worst row first, and whether all rows met it."""
    lines = []
    run = {row["goal"] for row in rows}
    for goal in (goal for goal in GOALS if goal.key in run):
        found = [
            (value, row["title"])
            for row in rows
            if row["goal"] == goal.key and (value := goal.compare(row["contenders"])) is not None
        ]
        line = {"work": goal.work, "wanted": goal.wanted, "reached": "not measured", "met": None}
        if found:
            worst, best = min(found), max(found)
            if goal.sense == "cost":
                worst, best = best, worst
            ends = [worst, best] if len(found) > 1 else [worst]
            line.update(
                reached=" to ".join(goal.shown(value) for value, _ in ends),
                worst_row=worst[1] if len(found) > 1 else "",
                met=goal.met(worst[0]),
                met_rows=sum(goal.met(value) for value, _ in found),
                rows=len(found),
            )
        lines.append(line)
    return lines
