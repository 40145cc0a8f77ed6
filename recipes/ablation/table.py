"""Tell what a log holds, with paired intervals: python table.py log.jsonl [DRAWINGS.jsonl] > table.md.

With two logs the first is of students of photographs, and the second of those of drawings, which decided their weights.
"""

from __future__ import annotations

import dataclasses
import functools
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
DRAWS = 4000
# An interval over fewer seeds says little of how another seed would do.
SEEDS_FOR_BOLD = 3


@dataclasses.dataclass(frozen=True)
class Results:
    """What the log holds.

    Attributes:
        entries: Its last line of each run.
    """

    entries: Mapping[str, Mapping[str, Any]]

    @functools.cached_property
    def columns(self) -> Mapping[str, tuple[str, int]]:
        """Heading → set and which value of an item: that many first ranks, or 0 for whether the first class was right."""
        found = {}
        for dataset in self.entries["teacher"]["items"]:
            _, what, task = dataset.split("-")
            measured = {"R@1": 1, "R@10": 10} if task == "retrieval" else {"acc1": 0}
            found |= {f"{what} {metric}": (dataset, k) for metric, k in measured.items()}
        return found

    def seeds(self, setting: str) -> list[int]:
        """Return the seeds a setting was trained with."""
        return sorted(entry["seed"] for entry in self.entries.values() if entry["setting"] == setting)

    def entry(self, setting: str, seed: int) -> Mapping[str, Any]:
        """Return a run's entry."""
        return self.entries["teacher" if setting == "teacher" else f"{setting}-s{seed}"]

    def values(self, setting: str, seed: int, column: str) -> Array:
        """Return a run's value for each item of the report split, in [0, 1]."""
        dataset, k = self.columns[column]
        items = self.entry(setting, seed)["items"][dataset]
        if "right" in items:
            return np.array([mark == "1" for mark in items["right"]], dtype=np.float64)
        ranks = np.array([items["image_ranks"], items["text_ranks"]])
        return (ranks < k).mean(axis=0)

    def concepts(self, column: str) -> npt.NDArray[np.int64]:
        """Number each item's concept: its drawings are not independent."""
        keys = self.entries["teacher"]["keys"][self.columns[column][0]]
        grouped = keys if column.startswith("photographs") else [concept(key) for key in keys]
        return np.unique(grouped, return_inverse=True)[1]

    def mean(self, setting: str, column: str) -> float:
        """Return the mean over seeds and items."""
        return float(np.mean([self.values(setting, seed, column) for seed in self.seeds(setting)]))

    def probe(self, setting: str) -> dict[int, float]:
        """Return the probe's accuracy by seed."""
        found = {}
        for seed in self.seeds(setting):
            probes = (value for name, value in self.entry(setting, seed)["metrics"].items() if name.endswith("probe"))
            if (value := next(probes, None)) is not None:
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


def heading(results: Results) -> list[str]:
    """Return a table's first lines."""
    names = ("setting", "seeds", *results.columns, "probe")
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def means(results: Results, settings: list[str]) -> list[str]:
    """Return the lines of a table of means."""
    lines = heading(results)
    for setting in settings:
        if results.seeds(setting):
            probe = results.probe(setting)
            cells = [setting, str(len(results.seeds(setting)))]
            cells += [f"{100 * results.mean(setting, column):.1f}" for column in results.columns]
            cells.append(f"{100 * np.mean(list(probe.values())):.1f}" if probe else "")
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def gains(results: Results, settings: list[str], against: str) -> list[str]:
    """Return the lines of a table of paired differences from `against`."""
    lines = heading(results)
    for setting in settings:
        shared = [seed for seed in results.seeds(setting) if seed in results.seeds(against)]
        if shared and setting != against:
            cells = [setting, str(len(shared))]
            cells += [signed(results, setting, against, column) for column in results.columns]
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
    """Return the table of trials on the tuning split: each learning rate at its best weights, and what was chosen."""
    rates = sorted({setting.lr for name in plan.RECIPES for setting in plan.trials(name, results.entries)})
    lines = [
        f"| recipe | trials | {' | '.join(f'lr {rate:g}' for rate in rates)} | chosen |",
        f"|{'---|' * (len(rates) + 3)}",
    ]
    for name in plan.RECIPES:
        found: dict[float, float] = {}
        trials = [
            (setting, results.entries.get(plan.Run(setting, plan.SEEDS[0]).name))
            for setting in plan.trials(name, results.entries)
        ]
        tried = [(setting.lr, plan.tuning_score(entry)) for setting, entry in trials if entry is not None]
        for rate, score in tried:
            found[rate] = max(score, found.get(rate, 0.0))
        if tried:
            cells = [f"{100 * found[rate]:.1f}" if rate in found else "" for rate in rates]
            chosen = plan.tuned(name, results.entries).name.removeprefix(f"{name}/")
            lines.append(f"| {name} | {len(tried)} | {' | '.join(cells)} | {chosen} |")
    return [*lines, ""]


def goals(results: Results, ours: str, clip: str, rival: str) -> list[str]:
    """Return how far a recipe reaches the goals, beside a rival and `clip`."""
    names = {name: plan.tuned(name, results.entries).name for name in (clip, rival, ours)}
    if not all(results.seeds(name) for name in names.values()):
        return []
    lines = [
        f"| metric | {clip} | {rival} | {ours} | {ours} − {rival} | gain by {rival}'s gain "
        f"| gain − 1.2 × {rival}'s gain | gain − 1.5 × {rival}'s gain | gap to the teacher closed |",
        f"|{'---|' * 9}",
    ]
    for column in results.columns:
        level = {name: results.mean(setting, column) for name, setting in names.items()}
        gain, _ = results.difference(names[ours], names[clip], column)
        theirs, _ = results.difference(names[rival], names[clip], column)
        shared = min(len(gain), len(theirs))
        ratio = f"{gain[:shared].mean() / theirs[:shared].mean():.2f}" if theirs[:shared].mean() > 0 else ""
        closed = (level[ours] - level[clip]) / (results.mean("teacher", column) - level[clip])
        lines.append(
            f"| {column} | {' | '.join(f'{100 * level[name]:.1f}' for name in names)} "
            f"| {signed(results, names[ours], names[rival], column)} | {ratio} "
            f"| {points(gain[:shared] - 1.2 * theirs[:shared])} | {points(gain[:shared] - 1.5 * theirs[:shared])} "
            f"| {closed:.0%} |"
        )
    return [*lines, ""]


def compared(results: Results, settings: list[str], against: str) -> list[str]:
    """Return a table of means and one of paired differences from `against`; nothing where none is trained."""
    if not any(results.seeds(setting) for setting in settings):
        return []
    return [*means(results, [against, *settings]), f"Against `{against}`:", "", *gains(results, settings, against)]


def noise(results: Results) -> list[str]:
    """Return for each share of exchanged captions the means of the main recipes and their gains over `fd-instance`."""
    lines = []
    for share in plan.NOISE:
        clip, rival, ours, cid = (plan.noisy(name, share, results.entries).name for name in plan.SCALED)
        lines += [f"### {share:.0%}", "", *compared(results, [clip, rival, cid], ours)]
    return lines


def scaled(results: Results) -> list[str]:
    """Return the tables of the longer run, the larger student and the larger batch, each against `clip` there."""
    log = results.entries
    parts = {
        f"{plan.LONG:,} steps": [plan.longer(name, log).name for name in plan.SCALED],
        "Student of 3.8 M parameters, 48 px, at the best rate": [
            plan.best(plan.large_students(name, log), log).name for name in plan.SCALED
        ],
    }
    lines = []
    for title, names in parts.items():
        lines += [f"### {title}", "", *compared(results, names[1:], names[0])]
    return lines


def rates(results: Results) -> list[str]:
    """Return the trials of learning rates that the rule of `--lr` is checked by, on the tuning split, with seed 0."""
    kinds = (("large student", plan.large_students), ("batches of 256", plan.large_batches))
    return rate_table(
        {(kind, name): make(name, results.entries) for kind, make in kinds for name in plan.SCALED}, results.entries
    )


def rate_table(trials: Mapping[tuple[str, str], list[plan.Setting]], log: plan.Log) -> list[str]:
    """Return the tuning scores of trials that differ in their rate, by what they are of and recipe."""
    found = list[str]()
    for (kind, name), settings in trials.items():
        tried = [(setting, log.get(plan.Run(setting, plan.SEEDS[0]).name)) for setting in settings]
        cells = [
            f"{100 * plan.tuning_score(entry):.1f} at {setting.lr:g}"
            for setting, entry in sorted(tried, key=lambda pair: pair[0].lr)
            if entry is not None
        ]
        if cells:
            found.append(f"| {kind} | {name} | {', '.join(cells)} |")
    return ["| what | recipe | score at rate |", "|---|---|---|", *found, ""] if found else []


def main() -> None:
    """Print all tables."""
    results, *drawings = (read(Path(path)) for path in sys.argv[1:])
    tables = of_photographs(results, drawings[0].entries) if drawings else of_drawings(results)
    print("\n".join([*head(results), *tables]))


def read(path: Path) -> Results:
    """Read a log."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return Results({entry["run"]: entry for entry in map(json.loads, lines)})


def head(results: Results) -> list[str]:
    """Return what the tables are of and how they are to be read."""
    commits, machines = (sorted({entry[name] for entry in results.entries.values()}) for name in ("commit", "machine"))
    students = [entry for entry in results.entries.values() if entry["run"] != "teacher"]
    return [
        f"{len(students)} students; commit {', '.join(commits)}; {'; '.join(machines)}.",
        "Percent; Δ in points, paired by seed, with 95 % intervals over seeds and concepts or photographs (probe: smallest …"
        " largest of the seeds); bold where 0 is outside and there are three seeds.",
        "",
    ]


def of_photographs(results: Results, drawings: plan.Log) -> list[str]:
    """Return the tables of the students of photographs."""
    log = results.entries
    tried = {name: plan.photograph_students(name, drawings) for name in plan.SCALED}
    chosen = [plan.best(settings, log).name for settings in tried.values()]
    clip, rival, ours, _ = chosen
    repaired = [setting.name for setting in plan.repaired(log, drawings)]
    return [
        "## Trials of the learning rate, on the tuning split, seed 0",
        "",
        *rate_table({("photographs", name): settings for name, settings in tried.items()}, log),
        "## On the test split",
        "",
        *means(results, ["teacher", *chosen, *repaired]),
        "## Gains over `clip`",
        "",
        *gains(results, [*chosen, *repaired], clip),
        "## Gains over `clip-kd`",
        "",
        *gains(results, [*chosen, *repaired], rival),
        "## `fd-instance` with the teacher repaired, and the others beside it",
        "",
        *gains(results, [*chosen, *repaired], next(name for name in repaired if name.startswith("fd-instance"))),
        "## `fd-instance`, one thing changed at a time",
        "",
        *compared(results, [setting.name for setting in plan.photograph_changes(log, drawings)], ours),
    ]


def of_drawings(results: Results) -> list[str]:
    """Return the tables of the students of drawings."""
    log = results.entries
    presets = [plan.tuned(name, log).name for name in plan.RECIPES]
    clip, rival, ours, cid = (plan.tuned(name, log).name for name in ("clip", "clip-kd", "fd-instance", "cid"))
    all_nearest, *fewer = (setting.name for setting in plan.nearest_alone(log))
    closer = plan.nearer_to_captions(plan.tuned("fd-instance", log))
    changes = [*plan.left_out(log), *closer, *plan.further_changes(log)]
    return [
        "## Trials, on the tuning split: mean of R@1, R@10 and acc1 of concepts and drawings, seed 0",
        "",
        "At each rate the best of the weights tried; `-x0.33` and `-x3` in a name are the factor on them.",
        "",
        *tuning(results),
        "## Recipes at their chosen rate and weights, on the report split",
        "",
        *means(results, ["teacher", *presets]),
        "## Gains over `clip`",
        "",
        *gains(results, presets, clip),
        "## Gains over `clip-kd`",
        "",
        *gains(results, presets, rival),
        "## The goals, by `fd-instance` and by `cid`",
        "",
        *goals(results, "fd-instance", "clip", "clip-kd"),
        *goals(results, "fd-instance", "clip, adamw", "clip-kd, adamw"),
        *goals(results, "cid", "clip", "clip-kd"),
        "## `fd-instance`, one thing changed at a time",
        "",
        *compared(results, [setting.name for setting in changes], ours),
        "## What is worth storing",
        "",
        *compared(results, [setting.name for setting in plan.worth_storing(log)], ours),
        "## Exchanged captions, on the pairs alone",
        "",
        *noise(results),
        "## Longer, and larger",
        "",
        *scaled(results),
        "## Learning rates of other students and batches",
        "",
        *rates(results),
        "## `cid`, one thing changed at a time",
        "",
        *compared(results, [setting.name for setting in plan.cid_variants(log)], cid),
        "## `cid`, taught by fewer of a sample's nearest centroids",
        "",
        *compared(results, fewer, all_nearest),
    ]


if __name__ == "__main__":
    main()
