"""Tell what the log holds, with paired intervals: python table.py log.jsonl > table.md."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plan
from inputs import concept

Array = npt.NDArray[np.float64]
# Heading → (set, which value of an item).
COLUMNS = {
    "concepts R@1": ("report-concepts-retrieval", 1),
    "concepts R@10": ("report-concepts-retrieval", 10),
    "concepts acc1": ("report-concepts-classes", 0),
    "drawings R@1": ("report-drawings-retrieval", 1),
    "drawings R@10": ("report-drawings-retrieval", 10),
    "drawings acc1": ("report-drawings-classes", 0),
}
DRAWS = 4000
# An interval over fewer seeds says little of how another seed would do.
SEEDS_FOR_BOLD = 3
# Presets among which ours is chosen.
OURS = ("instance", "cid", "cluster", "cid+intra", "cid+fd", "fd+cluster")


@dataclasses.dataclass(frozen=True)
class Results:
    """What the log holds.

    Attributes:
        entries: Its last line of each run.
    """

    entries: Mapping[str, Mapping[str, Any]]

    def seeds(self, setting: str) -> list[int]:
        """Return the seeds a setting was trained with."""
        return sorted(entry["seed"] for entry in self.entries.values() if entry["setting"] == setting)

    def entry(self, setting: str, seed: int) -> Mapping[str, Any]:
        """Return a run's entry."""
        return self.entries["teacher" if setting == "teacher" else f"{setting}-s{seed}"]

    def values(self, setting: str, seed: int, column: str) -> Array:
        """Return a run's value for each item of the report split, in [0, 1]."""
        dataset, k = COLUMNS[column]
        items = self.entry(setting, seed)["items"][dataset]
        if "right" in items:
            return np.array([mark == "1" for mark in items["right"]], dtype=np.float64)
        ranks = np.array([items["image_ranks"], items["text_ranks"]])
        return (ranks < k).mean(axis=0)

    def concepts(self, column: str) -> npt.NDArray[np.int64]:
        """Number each item's concept: its drawings are not independent."""
        keys = self.entries["teacher"]["keys"][COLUMNS[column][0]]
        return np.unique([concept(key) for key in keys], return_inverse=True)[1]

    def mean(self, setting: str, column: str) -> float:
        """Return the mean over seeds and items."""
        return float(np.mean([self.values(setting, seed, column) for seed in self.seeds(setting)]))

    def probe(self, setting: str) -> dict[int, float]:
        """Return the probe's accuracy by seed."""
        found = {}
        for seed in self.seeds(setting):
            value = self.entries["teacher" if setting == "teacher" else f"{setting}-s{seed}"]["metrics"].get(
                "report concepts probe"
            )
            if value is not None:
                found[seed] = value
        return found

    def difference(self, setting: str, other: str, column: str) -> tuple[Array, int]:
        """Return per-seed, per-concept differences [s, c], weighted so that their mean is that over items, and s."""
        seeds = [seed for seed in self.seeds(setting) if seed in self.seeds(other)]
        numbers = self.concepts(column)
        counts = np.bincount(numbers)
        rows = []
        for seed in seeds:
            gap = self.values(setting, seed, column) - self.values(other, seed, column)
            rows.append(np.bincount(numbers, weights=gap) * len(counts) / len(numbers))
        return np.array(rows), len(seeds)


def interval(differences: Array) -> tuple[float, float, float]:
    """Return the mean of [s, c] and its 95 % interval, seeds and concepts drawn anew together."""
    seeds, concepts = differences.shape
    draw = np.random.default_rng(0)
    by_seed = draw.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS) / seeds
    by_concept = draw.multinomial(concepts, [1 / concepts] * concepts, size=DRAWS) / concepts
    means = np.einsum("ns,sc,nc->n", by_seed, differences, by_concept, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def means(results: Results, settings: list[str]) -> list[str]:
    """Return the lines of a table of means."""
    lines = [f"| setting | seeds | {' | '.join(COLUMNS)} | probe |", f"|---|---|{'---|' * (len(COLUMNS) + 1)}"]
    for setting in settings:
        if results.seeds(setting):
            probe = results.probe(setting)
            cells = [setting, str(len(results.seeds(setting)))]
            cells += [f"{100 * results.mean(setting, column):.1f}" for column in COLUMNS]
            cells.append(f"{100 * np.mean(list(probe.values())):.1f}" if probe else "")
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def gains(results: Results, settings: list[str], against: str) -> list[str]:
    """Return the lines of a table of paired differences from `against`."""
    lines = [f"| setting | seeds | {' | '.join(COLUMNS)} | probe |", f"|---|---|{'---|' * (len(COLUMNS) + 1)}"]
    for setting in settings:
        shared = [seed for seed in results.seeds(setting) if seed in results.seeds(against)]
        if shared and setting != against:
            cells = [setting, str(len(shared))]
            cells += [signed(results, setting, against, column) for column in COLUMNS]
            cells.append(probe_gain(results.probe(setting), results.probe(against)))
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def probe_gain(probe: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Write the mean difference over shared seeds, with the smallest and the largest."""
    shared = [100 * (probe[seed] - other[seed]) for seed in probe if seed in other]
    return f"{np.mean(shared):+.1f} ({min(shared):+.1f}…{max(shared):+.1f})" if shared else ""


def signed(results: Results, setting: str, other: str, column: str) -> str:
    """Write a paired difference; nothing where no seed is shared."""
    differences, seeds = results.difference(setting, other, column)
    if not seeds:
        return ""
    return points(differences)


def points(differences: Array) -> str:
    """Write the mean of [s, c] in points with its interval; bold where that leaves out 0 and enough seeds were drawn."""
    seeds = len(differences)
    if seeds == 1:
        return f"{100 * differences.mean():+.1f} (one seed)"
    mean, low, high = (100 * value for value in interval(differences))
    text = f"{mean:+.1f} ({low:+.1f}…{high:+.1f})"
    return f"**{text}**" if seeds >= SEEDS_FOR_BOLD and (low > 0 or high < 0) else text


def tuning(results: Results) -> list[str]:
    """Return the table of trials on the tuning split."""
    lines = ["| preset | ×1/3 | ×1 | ×3 | chosen |", "|---|---|---|---|---|"]
    for name in plan.PRESETS:
        cells = []
        for factor in sorted(plan.FACTORS):
            entry = results.entries.get(plan.Run(plan.preset(name, factor), plan.SEEDS[0]).name)
            cells.append("" if entry is None else f"{100 * plan.tuning_score(entry):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} | ×{plan.best_factor(name, results.entries):.2g} |")
    return [*lines, ""]


def best_of_ours(results: Results) -> str:
    """Return our best preset by the tuning split."""
    entries, first = results.entries, plan.SEEDS[0]
    trained = [name for name in OURS if results.seeds(plan.tuned(name, entries).name)]
    return max(trained, key=lambda name: plan.tuning_score(entries[plan.Run(plan.tuned(name, entries), first).name]))


def goals(results: Results, best: str) -> list[str]:
    """Return how far a preset reaches the goals."""
    names = {name: plan.tuned(name, results.entries).name for name in ("clip", "clip-kd", best)}
    lines = [
        f"| metric | clip | clip-kd | {best} | {best} − clip-kd | gain − 1.5 × clip-kd's gain | gap to the teacher closed |",
        f"|{'---|' * 7}",
    ]
    for column in COLUMNS:
        level = {name: results.mean(setting, column) for name, setting in names.items()}
        gain, _ = results.difference(names[best], names["clip"], column)
        rival, _ = results.difference(names["clip-kd"], names["clip"], column)
        shared = min(len(gain), len(rival))
        closed = (level[best] - level["clip"]) / (results.mean("teacher", column) - level["clip"])
        lines.append(
            f"| {column} | {' | '.join(f'{100 * level[name]:.1f}' for name in names)} "
            f"| {signed(results, names[best], names['clip-kd'], column)} "
            f"| {points(gain[:shared] - 1.5 * rival[:shared])} | {closed:.0%} |"
        )
    return [*lines, ""]


def main() -> None:
    """Print all tables."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    results = Results({entry["run"]: entry for entry in map(json.loads, lines)})
    last = list(results.entries.values())[-1]
    presets = [plan.tuned(name, results.entries).name for name in plan.PRESETS]
    cid = plan.tuned("cid", results.entries).name
    factor = plan.best_factor("cid", results.entries)
    variants = [setting.name for setting in plan.cid_variants(factor)]
    commits = sorted({entry["commit"] for entry in results.entries.values()})
    out = [
        f"{len(results.entries) - 1} students of {last['steps']:,} steps of {last['batch_size']};"
        f" commit {', '.join(commits)}; {last['machine']}.",
        "Percent; Δ in points, paired by seed, with 95 % intervals over seeds and concepts (probe: smallest … largest of"
        " the seeds); bold where 0 is outside and there are three seeds.",
        "",
        "## Trials, on the tuning split: mean of R@1, R@10 and acc1 of concepts and drawings, seed 0",
        "",
        *tuning(results),
        "## Presets at their chosen weights, on the report split",
        "",
        *means(results, ["teacher", *presets]),
        "## Gains over `clip`",
        "",
        *gains(results, presets, presets[0]),
        "## Gains over `clip-kd`",
        "",
        *gains(results, presets[1:], presets[1]),
        "## The goals, by our best preset on the tuning split, and by `cid`",
        "",
        *goals(results, best_of_ours(results)),
        *goals(results, "cid"),
        "## `cid`, one thing changed at a time",
        "",
        *means(results, [cid, *variants]),
        "## The same, against `cid`",
        "",
        *gains(results, variants, cid),
        "## The cluster term: against the same student without it",
        "",
        *gains(results, [cid, *variants], plan.without_cluster(factor).name),
    ]
    print("\n".join(out))


if __name__ == "__main__":
    main()
