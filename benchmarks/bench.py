#!/usr/bin/env python3
"""Measures the library, all peers and the machine's limits, interleaved in one run.

Writes benchmarks/results.{md,json}, benchmarks/plots/ and the marked part of README.md; with
--quick the same files under .build/bench/quick, and the tables to stdout. Installs what it needs in
.build/bench and .stock, and lists what it could not run. benchmarks/README.md explains the results.
"""

import argparse
import json
import pathlib
import shutil
import signal
import sys
import time

sys.dont_write_bytecode = True

import scratch  # noqa: E402
from scratch import PROJECT, SCRATCH, Unavailable, say  # noqa: E402
import plan  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import lab  # noqa: E402


class Results:
    """row -> contender -> quantity -> a value for each repetition; and why there is none."""

    ATTEMPTS = 2  # of a contender that fails, in each row

    def __init__(self, rows):
        self.rows = rows
        self.values = [{} for _ in rows]
        self.failures = [{} for _ in rows]
        self.attempts = [{} for _ in rows]

    def measure(self, index, label, seconds):
        failed = self.attempts[index].get(label, 0)
        if failed >= self.ATTEMPTS:
            return
        try:
            values = self.rows[index].entries[label](seconds)
        except (Unavailable, OSError, ValueError, KeyError) as error:
            self.attempts[index][label] = failed + 1
            self.failures[index][label] = " ".join(str(error).split())[:300]
            say(f"  {self.rows[index].title}, {plan.NAMES[label]}: {error}")
            return
        sides = self.values[index].setdefault(label, {})
        for quantity, value in values.items():
            if isinstance(value, (int, float)):
                sides.setdefault(quantity, []).append(value)

    def json(self):
        return [
            {
                "section": row.section,
                "title": row.title,
                "goal": row.goal,
                "operation": row.operation,
                "block_bytes": row.block,
                "contenders": self.values[index],
                # Failures are not reported if it worked before or afterwards.
                "failures": {
                    label: why
                    for label, why in self.failures[index].items()
                    if label not in self.values[index]
                },
            }
            for index, row in enumerate(self.rows)
        ]


def measure(rows, repetitions, seconds):
    results = Results(rows)
    for repetition in range(repetitions):
        for index, row in enumerate(rows):
            say(f"{repetition + 1} of {repetitions}: {plan.SECTIONS[row.section][0]}: {row.title}")
            # So that the same contender does not always come first.
            labels = list(row.entries)
            for label in labels if repetition % 2 == 0 else reversed(labels):
                results.measure(index, label, seconds)
    return results


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    build = PROJECT / ".build" / "release"
    parser.add_argument("--quick", action="store_true", help="fewer rows, shorter, two minutes")
    parser.add_argument("--repetitions", type=int, help="of every measurement (5; quick: 2)")
    parser.add_argument("--seconds", type=float, help="of one measurement (0.6; quick: 0.3)")
    parser.add_argument("--only", action="append", choices=plan.SECTIONS, help="sections to run")
    parser.add_argument("--program", type=pathlib.Path, default=build / "mooncake")
    parser.add_argument("--library", type=pathlib.Path, default=build / "libmooncake.so")
    parser.add_argument("--stock-version", default=lab.RELEASES[-1])
    parser.add_argument("--output", type=pathlib.Path, help="another folder for the results")
    arguments = parser.parse_args()
    arguments.repetitions = arguments.repetitions or (2 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (0.3 if arguments.quick else 0.6)
    # Only a complete run may replace the published results.
    arguments.is_whole = not (arguments.quick or arguments.only or arguments.output)
    if not arguments.output:
        scratch_name = "quick" if arguments.quick else "part"
        results = PROJECT / "benchmarks"
        arguments.output = results if arguments.is_whole else SCRATCH / scratch_name
    name = "make bench-quick" if arguments.quick else "make bench"
    arguments.command = "benchmarks/bench.py --only" if arguments.only else name
    for path in (arguments.program, arguments.library):
        if not path.is_file():
            parser.error(f"{path} does not exist; build it first")
    arguments.program, arguments.library = (
        path.resolve() for path in (arguments.program, arguments.library)
    )
    return arguments


def write(arguments, result):
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    text = report.full(result)
    (folder / "results.md").write_text(text, encoding="utf-8")
    raw = json.dumps(result, indent=1) + "\n"
    (folder / "results.json").write_text(raw, encoding="utf-8")
    drawn = plots.draw(result["rows"], folder / "plots")
    if arguments.is_whole:
        readme = PROJECT / "README.md"
        short = report.replace_marked(
            readme.read_text(encoding="utf-8"), report.short(result, drawn)
        )
        readme.write_text(short, encoding="utf-8")
    else:
        print(text)
    say(f"written to {folder}")


def main():
    arguments = parse()
    # Ends as on Ctrl-C, with every process that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not shutil.which("setpriv"):
        sys.exit("bench: setpriv not found; install util-linux")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    facts = scratch.machine()
    contenders = plan.Lab(arguments.program, arguments.library, arguments.stock_version)
    begin = time.monotonic()
    try:
        rows = plan.Plan(contenders, arguments.quick).rows
        rows = [row for row in rows if not arguments.only or row.section in arguments.only]
        results = measure(rows, arguments.repetitions, arguments.seconds)
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
    finally:
        contenders.close()
    write(arguments, {
        "command": arguments.command,
        "machine": facts,
        "versions": contenders.versions(),
        "missing": contenders.missing,
        "repetitions": arguments.repetitions,
        "seconds": arguments.seconds,
        "minutes": (time.monotonic() - begin) / 60,
        "rows": results.json(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
