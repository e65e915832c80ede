"""Turns the figures of a run into Markdown."""

import re
import statistics

from goals import judge
from plan import NAMES, SECTIONS

MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
ORDER = list(NAMES)

# Notes to go with the tables.
REMARKS = {
    "bulk": """Blocks in order through 256 MiB of touched memory on both sides; the columns "one
address" and UCX use one block again and again, which stays in the caches up to a few MiB. Plain
sockets: two connections, 256 KiB chunks, 512 KiB socket buffers, no blocks. Mooncake's program
never touches its memory, so its reads send the shared zero page; "tuned" is MC_TCP_SLICE_SIZE = 1
MiB.""",
    "small": """Plain sockets answer one request of headers with frames and scattered blocks on one
connection, both ends spinning. UCX has as many operations under way, all at one address.""",
    "polled": """Blocks in order through 256 MiB of touched memory with 4 KiB pages. A program on
the drop-in header submits and asks for the status in a tight loop, as those written for Mooncake
do, or sleeps between two polls; beside it, native waiting with such memory at the target, and
Mooncake's Python interface.""",
    "latency": """Plain sockets: one request, one answer of 4 KiB, both ends spinning. Mooncake,
NIXL and one of ours are called from Python, which costs each call some microseconds.""",
    "engine": """Copies of memory that the engine has allocated, in order through 256 MiB; up to 1
MiB by one thread, above by two, as are the non-temporal copies beside them. NIXL and UCX use one
thread, UCX one address.""",
    "ordinary": """Copies by the kernel, in order through 256 MiB; up to 1 MiB by one thread, above
by two, on both sides of the comparison.""",
    "each": """Ours and NIXL in order through 256 MiB; UCX one address; NIXL from Python.""",
    "cpu": """Both ends together, user and system. Plain sockets without touching memory; UCX and
Mooncake's program with the little that starting them takes.""",
    "idle": """The busier end. Of ours the engine's threads; waiting: all of a process that waits
for a read of 256 MiB from a target that is stopped.""",
}


def spread(values, scale, digits):
    low, middle, high = (f(values) * scale for f in (min, statistics.median, max))
    text = f"{middle:.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:.{digits}f}–{high:.{digits}f})"


def table(titles, rows, align=True):
    bar = " ---: |" if align else " --- |"
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + bar * (len(titles) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def columns(rows, quantity):
    """Contenders with that quantity in any of the rows, in the order of NAMES."""
    found = set()
    for row in rows:
        found |= {label for label, values in row["contenders"].items() if quantity in values}
        found |= set(row["failures"])
    return [label for label in ORDER if label in found]


def cell(row, label, quantity, scale, digits):
    values = row["contenders"].get(label, {}).get(quantity)
    if values:
        return spread(values, scale, digits)
    return "failed" if label in row["failures"] else "–"


def matrix(rows, quantity, scale, digits, first="work"):
    labels = columns(rows, quantity)
    body = [
        [row["title"], *(cell(row, label, quantity, scale, digits) for label in labels)]
        for row in rows
    ]
    return table([first, *(NAMES[label] for label in labels)], body)


def turned(row, quantities):
    """A row with contenders downwards and (title, quantity, scale, digits) across."""
    labels = [label for label in ORDER if label in row["contenders"] or label in row["failures"]]
    body = [
        [NAMES[label], *(cell(row, label, *quantity[1:]) for quantity in quantities)]
        for label in labels
    ]
    return table([row["title"], *(quantity[0] for quantity in quantities)], body)


def section_text(name, rows):
    title, (quantity, scale, unit, digits) = SECTIONS[name]
    if name == "latency":
        ranks = [(f"{n}, µs", f"{k}_us", 1, 1) for n, k in (
            ("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p99.9", "p999"))]  # fmt: skip
        body = turned(rows[0], ranks)
    elif name == "each":
        body = turned(rows[0], [
            ("thousand a second", "operations_per_second", 1e-3, 0),
            ("p50, µs", "p50_us", 1, 2), ("p99, µs", "p99_us", 1, 2),
        ])  # fmt: skip
    elif name == "idle":
        body = turned(rows[0], [("% of a core", "percent", 1, 3)])
    else:
        body = matrix(rows, quantity, scale, digits)
        title += f", {unit}"
    return "\n\n".join(part for part in (f"## {title}", REMARKS.get(name), body) if part)


def goals_table(lines, names_rows=True):
    marks = {True: "yes", False: "**no**", None: "–"}
    body = []
    for line in lines:
        met = marks[line["met"]]
        if line["met"] is False and line["met_rows"]:
            met += f", {line['met_rows']} of {line['rows']}"
        reached = line["reached"]
        if names_rows and line.get("worst_row"):
            reached += f"; worst: {line['worst_row']}"
        body.append([line["work"], line["wanted"], reached, met])
    return table(["work", "goal", "reached", "met"], body, align=False)


def machine_text(result):
    facts = result["machine"]
    lines = [
        f"- Machine: {facts['cpu']}, {facts['cores']} cores,"
        f" {facts['memory_bytes'] / 2**30:.0f} GiB, Linux {facts['kernel']},"
        f" load {facts['load_at_start']:.2f} at the start",
        f"- Date: {facts['date']}, {result['minutes']:.0f} minutes",
        "- " + "; ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    lines += [f"- Could not run: {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)


def failures_text(rows):
    lines = [
        f"- {row['title']} ({SECTIONS[row['section']][0]}), {NAMES[label]}: {why}"
        for row in rows
        for label, why in row["failures"].items()
    ]
    return "\n".join(["## What failed", "", *lines]) if lines else ""


def full(result):
    rows = result["rows"]
    parts = [
        "# Speed of libmooncake and of its peers, one machine, one run",
        f"Written by `{result['command']}`; raw values in `results.json`. Medians of"
        f" {result['repetitions']} interleaved repetitions of {result['seconds']} s, the lowest and"
        " the highest in parentheses. GB = 1e9 bytes. One submitting thread, loopback."
        " [README.md](README.md) says how it is measured and what to beware of.",
        machine_text(result),
        "## Goals\n\nRatios of medians, from the worst row that counts to the best.",
        goals_table(judge(rows)),
    ]
    for name in SECTIONS:
        mine = [row for row in rows if row["section"] == name and row["contenders"]]
        if mine:
            parts.append(section_text(name, mine))
        if name == "bulk" and mine:
            parts.append("## Processor seconds per GB, TCP, bulk\n\n" + REMARKS["cpu"])
            parts.append(matrix(mine, "cpu_seconds_per_gb", 1, 2))
    parts.append(failures_text(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def short(result, plots):
    """For the project's README."""
    images = "\n".join(f"![{alt}](benchmarks/plots/{name}.svg)" for name, alt in plots)
    facts = result["machine"]
    return "\n\n".join([
        f"One run of `make bench` on {facts['cores']} virtual cores ({facts['cpu']}), loopback, one"
        " submitting thread; ratios of medians, worst to best of the rows that count."
        " [Every figure with its spread](benchmarks/results.md).",
        goals_table(judge(result["rows"]), names_rows=False),
        images,
    ])  # fmt: skip


def replace_marked(text, inner):
    """The text with everything between the marks replaced."""
    pattern = re.compile(re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1]), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no {MARKS[0]} … {MARKS[1]} in README.md")
    return pattern.sub(lambda _: f"{MARKS[0]}\n{inner}\n{MARKS[1]}", text, count=1)
