"""Plots as SVG, with their own light background so that they can be read on a dark page."""

import math
import statistics

from goals import STOCK, median
from plan import MIB, size_name

COLORS = {
    "libmooncake": "#0060a8",
    "libmooncake, kernel copy": "#58a6dd",
    "plain sockets": "#555555",
    "Mooncake": "#d95f02",
    "UCX 1.22": "#1b8a5a",
    "NIXL": "#b0479a",
}
FONT = 'font-family="Helvetica, Arial, sans-serif"'
INK, FAINT = "#222222", "#dddddd"


class Drawing:
    def __init__(self, width, height):
        self.width, self.height = width, height
        self.parts = []

    def text(self, x, y, words, anchor="middle", size=12, color=INK, weight="normal"):
        words = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{color}" font-weight="{weight}">{words}</text>'
        )

    def line(self, x1, y1, x2, y2, color=FAINT, width=1.0):
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{color}" stroke-width="{width}"/>'
        )

    def curve(self, points, color, dashed=False):
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.2"{dash}/>'
        )
        for x, y in points:
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>')

    def band(self, points, color):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{path}" fill="{color}" fill-opacity="0.14"/>')

    def box(self, x, y, width, height, color):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{color}"/>'
        )

    def legend(self, x, y, names):
        for name, dashed in names:
            self.curve([(x, y - 4), (x + 26, y - 4)], COLORS[name], dashed)
            self.text(x + 34, y, name, "start")
            x += 62 + 6.6 * len(name)

    def write(self, path):
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" {FONT}>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="#ffffff"/>\n'
            f"{body}\n</svg>\n",
            encoding="utf-8",
        )


class Panel:
    """Axes within a drawing."""

    def __init__(self, drawing, left, top, width, height, title):
        self.drawing = drawing
        self.left, self.top, self.width, self.height = left, top, width, height
        drawing.text(left + width / 2, top - 14, title, size=14, weight="bold")

    def scale(self, low, high, ticks, unit, logarithmic=False):
        """The vertical axis."""
        shape = math.log10 if logarithmic else float
        low, high = shape(low), shape(high)
        self.y = lambda v: self.top + self.height * (1 - (shape(v) - low) / (high - low))
        for tick in ticks:
            self.drawing.line(self.left, self.y(tick), self.left + self.width, self.y(tick))
            self.drawing.text(self.left - 8, self.y(tick) + 4, f"{tick:g}", "end")
        self.drawing.text(self.left - 8, self.top - 14, unit, "end")

    def places(self, names):
        """The horizontal axis: evenly spaced, with names."""
        step = self.width / len(names)
        self.x = lambda index: self.left + step * (index + 0.5)
        for index, name in enumerate(names):
            self.drawing.text(self.x(index), self.top + self.height + 20, name, size=11)

    def series(self, name, points, dashed=False):
        """points: (index, values)"""
        xy = [(self.x(index), self.y(statistics.median(values))) for index, values in points]
        upper = [(self.x(index), self.y(max(values))) for index, values in points]
        lower = [(self.x(index), self.y(min(values))) for index, values in reversed(points)]
        self.drawing.band(upper + lower, COLORS[name])
        self.drawing.curve(xy, COLORS[name], dashed)


def step_of(high):
    return next(step for step in (0.25, 0.5, 1, 2, 5, 10, 20, 50) if high / step <= 8)


def best(sides, labels, quantity):
    """The values of the contender with the highest median."""
    found = [label for label in labels if median(sides, label, quantity) is not None]
    if not found:
        return None
    return sides[max(found, key=lambda label: median(sides, label, quantity))][quantity]


def throughput(rows, path):
    """Read and write side by side; for Mooncake its best figure."""
    # Blocks of 1 MiB are measured twice; the larger batch belongs to the row of equal bytes.
    rows = [
        row
        for row in rows
        if row["section"] in ("bulk", "small") and not row["title"].endswith("1 MiB x 1")
    ]
    blocks = sorted({row["block_bytes"] for row in rows})
    series = {
        "plain sockets": ("raw",),
        "libmooncake": ("ours",),
        "UCX 1.22": ("ucx 1.22",),
        "Mooncake": STOCK,
    }
    data = {}  # operation -> name -> [(index, values)]
    for row in sorted(rows, key=lambda row: row["block_bytes"]):
        for name, labels in series.items():
            values = best(row["contenders"], labels, "bytes_per_second")
            if values:
                points = data.setdefault(row["operation"], {}).setdefault(name, [])
                points.append((blocks.index(row["block_bytes"]), [v / 1e9 for v in values]))
    if not data:
        return False
    drawing = Drawing(940, 380)
    peak = max(max(v) for names in data.values() for p in names.values() for _, v in p)
    step = step_of(peak)
    ticks = [step * index for index in range(math.ceil(peak / step) + 1)]
    for place, operation in enumerate(("read", "write")):
        panel = Panel(drawing, 56 + 460 * place, 50, 410, 250, f"TCP {operation}")
        panel.scale(0, ticks[-1], ticks, "GB/s")
        panel.places([size_name(block).replace("iB", "") for block in blocks])
        drawing.text(56 + 460 * place + 205, 342, "block size, bytes (UCX: one address)", size=11)
        for name, points in data.get(operation, {}).items():
            panel.series(name, points, dashed=name == "plain sockets")
    drawing.legend(210, 368, [(name, name == "plain sockets") for name in series])
    drawing.write(path)
    return True


def latency(rows, path):
    """Percentiles over TCP and within the host."""
    ranks = {"p50_us": "p50", "p90_us": "p90", "p99_us": "p99", "p999_us": "p99.9"}
    panels = (
        ("latency", "TCP", {
            "plain sockets": "raw", "libmooncake": "ours", "Mooncake": "stock python",
            "UCX 1.22": "ucx 1.22", "NIXL": "nixl",
        }),
        ("each", "same host", {
            "libmooncake": "ours", "libmooncake, kernel copy": "ours kernel",
            "UCX 1.22": "ucx 1.22", "NIXL": "nixl",
        }),
    )  # fmt: skip
    found = {row["section"]: row["contenders"] for row in rows}
    if not all(section in found for section, _, _ in panels):
        return False
    drawing = Drawing(940, 380)
    names = {}
    for place, (section, title, series) in enumerate(panels):
        data = {}
        for name, label in series.items():
            sides = found[section].get(label, {})
            points = [(i, sides[rank]) for i, rank in enumerate(ranks) if sides.get(rank)]
            # UCX reports two percentiles, which are not adjacent here.
            if points:
                data[name] = points
                names[name] = name == "plain sockets"
        values = [v for points in data.values() for _, each in points for v in each if v > 0]
        if not values:
            return False
        low = 10 ** math.floor(math.log10(min(values)))
        high = 10 ** math.ceil(math.log10(max(values)))
        panel = Panel(drawing, 66 + 460 * place, 50, 400, 250, f"4 KiB read, {title}")
        ticks = [10**e for e in range(round(math.log10(low)), round(math.log10(high)) + 1)]
        panel.scale(low, high, ticks, "µs", logarithmic=True)
        panel.places(list(ranks.values()))
        for name, points in data.items():
            panel.series(name, points, dashed=names[name])
    drawing.legend(60, 356, names.items())
    drawing.write(path)
    return True


def processor(rows, path):
    """Bars of processor seconds per GB."""
    series = {
        "plain sockets": "raw",
        "libmooncake": "ours",
        "UCX 1.22": "ucx 1.22",
        "Mooncake": "stock tuned",
        "NIXL": "nixl",
    }
    bars = []
    for row in rows:
        if row["section"] == "bulk" and row["block_bytes"] == 16 * MIB:
            for name, label in series.items():
                value = median(row["contenders"], label, "cpu_seconds_per_gb")
                if value is not None:
                    bars.append((row["operation"], name, value))
    if not bars:
        return False
    drawing = Drawing(940, 76 + 22 * len(bars))
    drawing.text(470, 30, "Processor seconds per GB, both ends, TCP, 16 MiB blocks", size=14,
                 weight="bold")  # fmt: skip
    # Cut off a bar that is far longer than the others.
    limit = min(max(v for _, _, v in bars), 4 * statistics.median(v for _, _, v in bars))
    y, last = 44, None
    for operation, name, value in bars:
        if operation != last:
            y += 8
            drawing.text(20, y + 15, operation, "start", weight="bold")
            last = operation
        drawing.text(190, y + 15, name, "end")
        drawing.box(200, y + 3, 640 * min(value, limit) / limit, 16, COLORS[name])
        cut = " (bar cut)" if value > limit else ""
        drawing.text(206 + 640 * min(value, limit) / limit, y + 15, f"{value:.2f}{cut}", "start")
        y += 22
    drawing.write(path)
    return True


def draw(rows, folder):
    """Writes the plots for which there are rows; names and descriptions."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (
        ("throughput", "throughput over block size", throughput),
        ("latency", "latency percentiles of a 4 KiB read", latency),
        ("processor", "processor seconds per GB", processor),
    )
    return [(name, alt) for name, alt, plot in wanted if plot(rows, folder / f"{name}.svg")]
