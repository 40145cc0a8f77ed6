"""The tables of what claim.py's log holds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "ablation"))
import plan
import table

# The paper's share, and the share of first copies among the pairs, which is known here.
PAPER, PLANTED = "0.563", "planted"
METHODS = ("single", "star", "semdedup", "random")
LOSSES = ("fd-instance", "clip", "cid")
DRAWINGS = "report-drawings-retrieval"


def split(entries: Mapping[str, Mapping[str, Any]]) -> table.Results:
    """Return the log with retrieval of drawings also for the third of them whose concepts are seen most, and least."""
    keys = entries["teacher"]["keys"].get(DRAWINGS)
    if keys is None:
        return table.Results({run: entry for run, entry in entries.items() if run != "data"})
    counts = entries["data"]["frequency"]
    seen = np.array([counts.get(plan.concept(key), 0) for key in keys])
    order = np.argsort(seen, kind="stable")
    third = len(keys) // 3
    parts = {"head": np.sort(order[-third:]), "tail": np.sort(order[:third])}
    found = {}
    for run, entry in entries.items():
        if run == "data":
            continue
        items, of = dict(entry["items"]), dict(entry.get("keys", {}))
        for name, rows in parts.items():
            dataset = f"report-{name}-retrieval"
            items[dataset] = {
                side: np.array(items[DRAWINGS][side])[rows].tolist() for side in ("image_ranks", "text_ranks")
            }
            of[dataset] = [keys[row] for row in rows]
        found[run] = {**entry, "items": items, "keys": of}
    return table.Results(found)


def tabulate(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return all tables."""
    results = split(entries)
    data = entries["data"]
    lines = [*table.head(results), f"## What is kept of {data['pairs']:,} pairs", "", *subset_table(data["subsets"])]
    trained = list(dict.fromkeys(entry["setting"] for entry in results.entries.values()))
    if all(f"{loss}/random-{PAPER}" in trained for loss in LOSSES):
        lines += ["## Averaged over the losses: what differs from all pairs", "", *averaged(results, "all")]
        lines += ["## Averaged over the losses: what differs from as many at random", ""]
        lines += averaged(results, "random-{share}")
    for loss in LOSSES:
        names = [name for name in trained if name.startswith(f"{loss}/")]
        if f"{loss}/all" in names:
            lines += [f"## `{loss}`: means, and in points what differs from all pairs", ""]
            lines += compared(results, names, f"{loss}/all")
        by_chance = f"{loss}/random-{PLANTED}"
        if by_chance in names:
            lines += [f"## `{loss}`: what differs from as many pairs at random", ""]
            lines += compared(results, [name for name in names if name.endswith(PLANTED)], by_chance)
    return lines


def subset_table(subsets: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a line for each subset."""
    names = {
        "left": "pictures left",
        "repeats": "repeats",
        "wrong": "wrong captions",
        "right": "right",
        "purity": "purity",
    }
    lines = [f"| subset | pairs | {' | '.join(names.values())} |", f"|{'---|' * (len(names) + 2)}"]
    for subset, figures in subsets.items():
        cells = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in names]
        lines.append(f"| {subset} | {figures['kept']:,} | {' | '.join(cells)} |")
    return [*lines, ""]


def compared(results: table.Results, names: Iterable[str], against: str) -> list[str]:
    """Return a line for each setting: its means, their differences, and when it was as good as the other at its end."""
    heads = ("setting", "seeds", "steps", *results.columns, f"steps to {goal_of(results)} of `{against}`")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    goal = np.mean([list(results.entry(against, seed)["curve"].values())[-1] for seed in results.seeds(against)])
    rows: list[list[table.Gap | str]] = []
    for name in names:
        entries = [results.entry(name, seed) for seed in results.seeds(name)]
        cells: list[table.Gap | str] = [name, str(len(entries)), f"{entries[0]['steps']:,}"]
        for column in results.columns:
            mean = f"{100 * results.mean(name, column):.1f}"
            gap = mean if name == against else table.signed(results, name, against, column)
            cells.append(gap if isinstance(gap, str) else dataclasses.replace(gap, before=f"{mean}: "))
        rows.append([*cells, reached(entries, float(goal))])
    return [*lines, *table.written(rows), ""]


def averaged(results: table.Results, against: str) -> list[str]:
    """Return a line for each subset: its differences from another one of the same losses, averaged over these."""
    lines = [f"| subset | {' | '.join(results.columns)} |", f"|{'---|' * (len(results.columns) + 1)}"]
    rows: list[list[table.Gap | str]] = []
    for share in (PLANTED, PAPER):
        other = against.format(share=share)
        for name in (f"{method}-{share}" for method in METHODS):
            if name != other:
                rows.append([name, *(average_gap(results, name, other, column) for column in results.columns)])
    return [*lines, *table.written(rows), ""]


def average_gap(results: table.Results, name: str, other: str, column: str) -> table.Gap:
    """Return what a subset differs from another of the same losses, averaged over these."""
    rows = [results.difference(f"{loss}/{name}", f"{loss}/{other}", column)[0] for loss in LOSSES]
    return table.gap_of(np.mean(rows, axis=0))


def goal_of(results: table.Results) -> str:
    """Name what students are measured on while they learn."""
    return "R@1" if DRAWINGS in results.entries["teacher"]["items"] else "acc1"


def reached(entries: list[Mapping[str, Any]], goal: float) -> str:
    """Return at which step the mean curve of some runs first is at a goal, interpolated, or that it never is."""
    steps = [0, *map(int, entries[0]["curve"])]
    recalls = [0.0, *np.mean([list(entry["curve"].values()) for entry in entries], axis=0).tolist()]
    for number in range(1, len(steps)):
        if recalls[number] >= goal:
            part = (goal - recalls[number - 1]) / (recalls[number] - recalls[number - 1])
            return f"{steps[number - 1] + part * (steps[number] - steps[number - 1]):,.0f}"
    return "not reached"
