"""Turns benchmarks/store.json into store.md and plots/store.svg; called by benchmarks/store-lab."""

import statistics

import plots

ORIGIN, STORE = "origin alone", "store"
plots.COLORS.update({STORE: plots.COLORS["libmooncake"], ORIGIN: plots.COLORS["Mooncake"],
                     "one receiver": plots.COLORS["plain sockets"]})


def spread(values, digits=2):
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def by_count(runs, way, quantity):
    """Values by number of receivers."""
    found = {}
    for run in runs:
        if run["way"] == way:
            found.setdefault(run["receivers"], []).append(quantity(run))
    return dict(sorted(found.items()))


def swarm_tables(part):
    runs, size = part["runs"], part["size_bytes"]
    seconds = {way: by_count(runs, way, lambda run: run["wall_s"]) for way in (STORE, ORIGIN)}
    copies = {way: by_count(runs, way, lambda run: run["origin_sent_bytes"] / size)
              for way in (STORE, ORIGIN)}
    granted = by_count(runs, STORE, lambda run: run["origin_granted_bytes"] / size)
    busy = by_count(runs, STORE, lambda run: run["processors_busy"])
    one = statistics.median(seconds[STORE].get(1, [float("nan")]))
    wire = size / (part["megabits"] * 1e6 / 8)
    yield (f"Object of {size >> 20} MiB, links of {part['megabits']} Mbit/s both ways: one copy "
           f"takes a link {wire:.2f} s without any header. Time from the start of the first "
           "receiver's process until the last one has the whole, verified.")
    titles = ("receivers", "store, s", "in units of one", "origin alone, s",
              "origin sent, copies", "payload of it", "origin alone, copies", "processors busy")
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for count, values in seconds[STORE].items():
        alone = seconds[ORIGIN].get(count, [])
        cells = (count, spread(values), f"{statistics.median(values) / one:.2f}",
                 spread(alone) if alone else "", spread(copies[STORE][count]),
                 spread(granted[count]), spread(copies[ORIGIN][count]) if alone else "",
                 f"{spread(busy[count])} of {part['processors']}")
        rows.append(f"| {' | '.join(map(str, cells))} |")
    yield "\n".join(rows)


def goal_rows(results):
    if "swarm" in results:
        part = results["swarm"]
        walls = by_count(part["runs"], STORE, lambda run: run["wall_s"])
        copies = by_count(part["runs"], STORE,
                          lambda run: run["origin_sent_bytes"] / part["size_bytes"])
        if 1 in walls and 8 in walls:
            ratio = statistics.median(walls[8]) / statistics.median(walls[1])
            yield "time of 8 receivers in units of one", "at most 1.25", f"{ratio:.2f}"
            yield "copies that leave the origin for 8", "at most 1.5", spread(copies[8])
    for name, title in (("SIGKILL", "killed"), ("SIGSTOP", "frozen")):
        gaps = [run["gap_s"] for run in results.get("faults", {}).get("runs", [])
                if run["signal"] == name]
        if gaps:
            yield (f"seconds without data when two of three holders are {title}", "at most 1",
                   spread(gaps, 3))
    runs = results.get("loopback", {}).get("runs", [])
    if runs:
        ratios = [run["get_bytes_per_second"] / run["read_bytes_per_second"] for run in runs]
        yield "verified get in units of the engine's bulk read", "at least 0.85", spread(ratios)
    runs = results.get("watch", {}).get("runs", [])
    if runs:
        yield ("milliseconds until watch tells, etcd", "at most 100",
               spread([1e3 * run["seconds"] for run in runs], 1))


def loopback_table(part):
    runs = part["runs"]
    yield (f"One receiver on loopback TCP (`MC_FORCE_TCP=1`), {part['size_bytes'] >> 20} MiB into "
           "fresh memory, interleaved with `mooncake bench` reading as much in 8 MiB blocks: over "
           "and over into the same memory, and once into fresh memory. GB/s:")
    lines = ["| what | GB/s | get in units of it |", "|---|---|---|"]
    for key, title in (("get_bytes_per_second", "`store serve`, digests checked"),
                       ("read_bytes_per_second", "bulk read, repeated"),
                       ("first_read_bytes_per_second", "bulk read, once")):
        ratios = [run["get_bytes_per_second"] / run[key] for run in runs]
        lines.append(f"| {title} | {spread([run[key] / 1e9 for run in runs])} | {spread(ratios)} |")
    yield "\n".join(lines)


def draw(part, path):
    """Time and copies by number of receivers."""
    runs, size = part["runs"], part["size_bytes"]
    counts = sorted({run["receivers"] for run in runs if run["way"] == STORE})
    drawing = plots.Drawing(940, 380)
    titles = (("time of the last receiver", "s", lambda run: run["wall_s"]),
              ("what the origin sends", "copies", lambda run: run["origin_sent_bytes"] / size))
    for place, (title, unit, quantity) in enumerate(titles):
        panel = plots.Panel(drawing, 66 + 460 * place, 50, 400, 250, title)
        series = {way: by_count(runs, way, quantity) for way in (STORE, ORIGIN)}
        peak = max(max(values) for found in series.values() for values in found.values())
        step = plots.step_of(peak)
        ticks = [step * index for index in range(int(peak / step) + 2)]
        panel.scale(0, ticks[-1], ticks, unit)
        panel.places([str(count) for count in counts])
        drawing.text(66 + 460 * place + 200, 342, "receivers at once", size=11)
        for way, found in series.items():
            points = [(counts.index(count), values) for count, values in found.items()
                      if count in counts]
            panel.series(way, points, dashed=way == ORIGIN)
    drawing.legend(330, 368, [(STORE, False), (ORIGIN, True)])
    drawing.write(path)


def write(results, folder):
    first = next(iter(results.values()))
    parts = [
        "# The store",
        "A virtual machine with "
        f"{first['processors']} cores of an {first['processor']}, Linux {first['kernel']}, nothing "
        "else running. Medians, with the lowest and highest of the repetitions. "
        "`benchmarks/store-lab` measures; raw values with commit are in [store.json](store.json).",
        "\n".join(["| | goal | reached |", "|---|---|---|"]
                  + [f"| {' | '.join(row)} |" for row in goal_rows(results)]),
    ]
    if "swarm" in results:
        parts += ["## One origin, N receivers", *swarm_tables(results["swarm"])]
        (folder / "plots").mkdir(exist_ok=True)
        draw(results["swarm"], folder / "plots/store.svg")
        parts += ["![time and copies over the number of receivers](plots/store.svg)",
                  "Each node is a network namespace behind HTB both ways; bytes are those of the "
                  "origin's interface, headers included, \"payload of it\" is what the receivers "
                  "say they have read from it. \"Origin alone\" is `mooncake bench initiator` in "
                  "every node, reading the whole from one target."]
    if "loopback" in results:
        parts += ["## One receiver, no shaping", *loopback_table(results["loopback"])]
    if "faults" in results:
        parts += ["## Holders lost",
                  "64 MiB over the same links, one origin and two complete replicas; when a third "
                  "has arrived, the origin and one replica are killed or frozen. Counted is the "
                  "longest time in which the receiver's interface gets less than a tenth of its "
                  "rate, sampled each 10 ms."]
    if "watch" in results:
        parts += ["## Watch",
                  "From before a record is sent to etcd until `store watch --json` has written "
                  f"its line, {len(results['watch']['runs'])} records one after the other."]
    parts += ["## Again",
              "```\nmake all\nbenchmarks/store-lab                                   # everything, "
              "15 minutes\nbenchmarks/store-lab --receivers 8 --repetitions 1 swarm\n"
              "benchmarks/store-lab --repetitions 7 loopback\n```"]
    (folder / "store.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
