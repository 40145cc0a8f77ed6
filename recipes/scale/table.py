"""Print what a chain took, and from two sizes what a row costs.

    python recipes/scale/table.py /tmp/clipcid-scale/log.jsonl          all runs in a log, and the slopes of the latest ones

Memory is private anonymous memory (RssAnon), the largest seen; a process's libraries take about 500 MB of it and some 1,000
maps whatever the data. The slope between the two largest sizes is what a row adds. Times are those of the machine that
ran it, extrapolated in proportion to N (the search among all pairs: to N²).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# What DESIGN allows: bytes a row and process, caches of a fixed size apart; first rank, and the others.
LIMITS = {"index": (8, 8), "embed": (8, 8), "balance": (128, 64), "cluster": (24, 24), "distill": (8, 8)}
MANY = 400_000_000

COLUMNS = (
    ("step", 19),
    ("procs", 5),
    ("pairs", 11),
    ("wall s", 7),
    ("cpu s", 7),
    ("MB first", 8),
    ("others", 6),
    ("worker", 6),
    ("files", 5),
    ("maps", 6),
    ("of data", 7),
    ("MB mapped", 9),
    ("MB disk", 7),
)
ROLES = ("first", "others", "workers")

Run = dict[str, Any]


def main() -> None:
    """Print the table of a log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    runs = [json.loads(line) for line in parser.parse_args().log.read_text().splitlines()]
    for run in runs:
        print_run(run)
    print_slopes(runs)


_printed_header = False


def print_run(run: Run) -> None:
    """Print one step's line, under the header where it is the first."""
    global _printed_header
    if not _printed_header:
        print(" ".join(f"{name:>{width}}" for name, width in COLUMNS), " seconds by phase")
        _printed_header = True
    peaks = run["peaks"]

    def most(name: str) -> int:
        return max((peak[name] for peak in peaks.values()), default=0)

    anonymous = [f"{peaks[role]['anonymous'] / 1e6:.0f}" if role in peaks else "" for role in ROLES]
    values = [
        run["step"],
        str(run["processes"]),
        f"{run['pairs']:,}",
        f"{run['wall']:.1f}",
        f"{run['cpu']:.1f}",
        *anonymous,
        str(most("files")),
        f"{most('maps'):,}",
        f"{most('data_maps'):,}",
        f"{most('mapped') / 1e6:,.0f}",
        f"{run['disk'] / 1e6:,.0f}",
    ]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in run["seconds"].items())
    end = phases if run["exit"] == 0 else f"exit {run['exit']}: {error_line(run['error'])}"
    cells = (f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS, strict=True))
    print(" ".join(cells), "", end, flush=True)


def error_line(text: str) -> str:
    """Return the error of a command without its fix and without what torchrun adds."""
    lines = text.splitlines() or [""]
    return next((line for line in lines if line.startswith("Error")), lines[-1])


def print_slopes(runs: list[Run]) -> None:
    """Print, for each step that ran at two sizes, what a row adds and what 400 million rows would take."""
    latest = {(run["step"], run["processes"], run["pairs"]): run for run in runs if run["exit"] == 0}
    pairs_of: dict[tuple[str, int], list[int]] = {}
    for step, processes, pairs in latest:
        pairs_of.setdefault((step, processes), []).append(pairs)
    slopes = {key: sorted(sizes)[-2:] for key, sizes in pairs_of.items() if len(sizes) > 1}
    if not slopes:
        return
    print(
        "\nA row adds (bytes of private memory a process: allowed in brackets; µs by phase), and 400 million rows take.\n"
        "No cache is subtracted; those of a fixed size (balance: 1 GiB of panels, cluster: 2 GiB of rows) count until full."
    )
    for (step, processes), (few, many) in slopes.items():
        print_slope(step, processes, latest[step, processes, few], latest[step, processes, many])


def print_slope(step: str, processes: int, small: Run, large: Run) -> None:
    """Print the slope of one step between two sizes."""
    rows, further = large["pairs"] - small["pairs"], MANY - large["pairs"]
    limits = LIMITS[step.split()[0]]
    memory, whole = [], []
    for role in ROLES:
        if role in small["peaks"] and role in large["peaks"]:
            before, after = (run["peaks"][role]["anonymous"] for run in (small, large))
            slope, allowed = (after - before) / rows, limits[0 if role == "first" else 1]
            memory.append(f"{role} {slope:.0f} B [{allowed}]{' OVER' if slope > allowed else ''}")
            whole.append(f"{role} {(after + max(0.0, slope) * further) / 1e9:.1f} GB")
    disk = (large["disk"] - small["disk"]) / rows
    times = []
    for phase, after in ({"wall": large["wall"], "cpu": large["cpu"]} | large["seconds"]).items():
        before = small[phase] if phase in ("wall", "cpu") else small["seconds"].get(phase, 0.0)
        slope = max(0.0, (after - before) / rows)
        seconds = after + slope * further
        if step == "balance exact" and phase in ("wall", "cpu", "search"):
            times.append(f"{phase} N²: {after * (MANY / large['pairs']) ** 2 / 3600:,.0f} h")
        else:
            times.append(f"{phase} {slope * 1e6:.2f} µs, {seconds / 3600:.2f} h")
    indent = " " * 21
    print(f"{step:>19} {processes}  memory: {'; '.join(memory)}; at 400M {', '.join(whole)}")
    print(f"{indent}  disk: {disk:.0f} B, {disk * MANY / 1e9:.0f} GB; time: {'; '.join(times)}")


if __name__ == "__main__":
    main()
