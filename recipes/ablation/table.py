"""Tell what a log holds, with paired intervals: python table.py log.jsonl [DRAWINGS.jsonl] > table.md.

With two logs the first is of students of photographs, and the second of those of drawings, which decided their weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plan
from scipy.special import ndtr, ndtri, stdtr

from clipcid_cli.algorithms.metrics import intervals

Array = npt.NDArray[np.float64]
# As many as the tool draws by default.
DRAWS = 1000
SIGNIFICANCE = 0.05
# Points at which the normal part of an error is taken.
QUANTILES = 200


@dataclasses.dataclass(frozen=True, eq=False)
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

    @functools.cache  # noqa: B019 - a log is read once in a process
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
        grouped = keys if column.startswith("photographs") else [plan.concept(key) for key in keys]
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


@dataclasses.dataclass(frozen=True)
class Gap:
    """A paired difference: its mean, and for several seeds its 95 % interval and p-value.

    Attributes:
        before: What a table's cell has before it.
    """

    seeds: int
    mean: float
    interval: tuple[float, float] = (math.nan, math.nan)
    p_value: float = math.nan
    before: str = ""

    def text(self, *, is_bold: bool = False) -> str:
        """Return a table's cell."""
        low, high = (100 * end for end in self.interval)
        note = "one seed" if self.seeds == 1 else f"{low:+.1f}…{high:+.1f}"
        mark = "**" if is_bold else ""
        return f"{self.before}{mark}{100 * self.mean:+.1f} ({note}){mark}"

    @property
    def has_verdict(self) -> bool:
        """Whether there are seeds enough to call it a difference or not."""
        return self.seeds >= intervals.MIN_SEEDS


def gap_of(differences: Array) -> Gap:
    """Return the mean of [s, c] with the interval of `clipcid eval-zeroshot --compare`: t over seeds, concepts drawn."""
    seeds, concepts = differences.shape
    by_concept, by_seed = differences.mean(axis=0), differences.mean(axis=1)
    mean = float(by_seed.mean())
    if seeds == 1:
        return Gap(seeds, mean)
    means = drawn(concepts) @ by_concept + intervals.errors_of_mean(by_seed, DRAWS, 0)
    error_of_concepts = by_concept.std() / math.sqrt(concepts)
    error_of_seeds = by_seed.std(ddof=1) / math.sqrt(seeds)
    return Gap(seeds, mean, intervals.interval(means), p_value(mean, error_of_concepts, error_of_seeds, seeds))


@functools.cache
def drawn(concepts: int) -> Array:
    """Return how often each of so many concepts is drawn, as its share of a draw, [n, c]."""
    counts = np.random.default_rng(0).multinomial(concepts, [1 / concepts] * concepts, size=DRAWS)
    return counts / concepts


def p_value(mean: float, error_of_concepts: float, error_of_seeds: float, seeds: int) -> float:
    """Return how probable a mean at least as far from 0 is, if a normal error and one of Student's t add up."""
    if error_of_seeds == 0:
        return float(2 * ndtr(-abs(mean) / error_of_concepts))
    normal = error_of_concepts * ndtri((np.arange(QUANTILES) + 0.5) / QUANTILES)
    return float(2 * stdtr(seeds - 1, -(abs(mean) + normal) / error_of_seeds).mean())


def written(rows: list[list[Gap | str]]) -> list[str]:
    """Write the rows of a table; bold is what differs from 0 after Holm's correction for all cells of the table."""
    family = sorted(gap.p_value for row in rows for gap in row if isinstance(gap, Gap) and gap.has_verdict)
    firm = 0
    while firm < len(family) and family[firm] * (len(family) - firm) < SIGNIFICANCE:
        firm += 1
    largest = family[firm - 1] if firm else -1.0
    lines = []
    for row in rows:
        cells = [
            cell if isinstance(cell, str) else cell.text(is_bold=cell.has_verdict and cell.p_value <= largest)
            for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
    rows: list[list[Gap | str]] = []
    for setting in settings:
        shared = [seed for seed in results.seeds(setting) if seed in results.seeds(against)]
        if shared and setting != against:
            cells: list[Gap | str] = [setting, str(len(shared))]
            cells += [signed(results, setting, against, column) for column in results.columns]
            cells.append(probe_gain(results.probe(setting), results.probe(against)))
            rows.append(cells)
    return [*heading(results), *written(rows), ""]


def probe_gain(probe: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Write the mean difference over shared seeds, with the smallest and the largest."""
    shared = [100 * (probe[seed] - other[seed]) for seed in probe if seed in other]
    return f"{np.mean(shared):+.1f} ({min(shared):+.1f}…{max(shared):+.1f})" if shared else ""


def signed(results: Results, setting: str, other: str, column: str) -> Gap | str:
    """Return a paired difference; nothing where no seed is shared."""
    differences, seeds = results.difference(setting, other, column)
    return gap_of(differences) if seeds else ""


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


def goals(results: Results, ours: str, clip: str, rival: str, change: str = "") -> list[str]:
    """Return how far a recipe, or it with one thing changed, reaches the goals, beside a rival and `clip`."""
    names = {name: plan.tuned(name, results.entries).name for name in (clip, rival, ours)}
    names[ours] += change
    if not all(results.seeds(name) for name in names.values()):
        return []
    lines = [
        f"| metric | {clip} | {rival} | {ours} | {ours} − {rival} | gain by {rival}'s gain "
        f"| gain − 1.2 × {rival}'s gain | gain − 1.5 × {rival}'s gain | gap to the teacher closed |",
        f"|{'---|' * 9}",
    ]
    rows: list[list[Gap | str]] = []
    for column in results.columns:
        level = {name: results.mean(setting, column) for name, setting in names.items()}
        gain, _ = results.difference(names[ours], names[clip], column)
        theirs, _ = results.difference(names[rival], names[clip], column)
        shared = min(len(gain), len(theirs))
        ratio = f"{gain[:shared].mean() / theirs[:shared].mean():.2f}" if theirs[:shared].mean() > 0 else ""
        closed = (level[ours] - level[clip]) / (results.mean("teacher", column) - level[clip])
        beyond = [gap_of(gain[:shared] - factor * theirs[:shared]) for factor in (1.2, 1.5)]
        rows.append(
            [
                column,
                *(f"{100 * level[name]:.1f}" for name in names),
                signed(results, names[ours], names[rival], column),
                ratio,
                *beyond,
                f"{closed:.0%}",
            ]
        )
    return [*lines, *written(rows), ""]


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
        "Percent; Δ in points, paired by seed, with the 95 % intervals of `clipcid eval-zeroshot --compare`: Student's t"
        " over seeds, concepts or photographs drawn with replacement (probe: smallest … largest of the seeds). Bold: at"
        " least three seeds, and not 0 after Holm's correction for all cells of a table.",
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
        "## The same, beside `fd-instance` that trusts it wholly",
        "",
        *gains(results, [*chosen, *repaired], next(name for name in repaired if name.endswith("trust 1"))),
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
    # The log's students of all extras had strong views too: these have as many, all mixed.
    all_mixed = plan.with_stored(plan.tuned("fd-instance", log), plan.STORED)
    stored = [*plan.worth_storing(log), all_mixed]
    changes = [*plan.left_out(log), *plan.no_longer_offered(log), *closer, *plan.further_changes(log)]
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
        "All on the pairs alone (`fd-instance` without its views, variants and texts):",
        "",
        *goals(results, "fd-instance", "clip", "clip-kd", "/no extras"),
        *goals(results, "fd-instance", "clip, adamw", "clip-kd, adamw"),
        *goals(results, "cid", "clip", "clip-kd"),
        "## `fd-instance`, one thing changed at a time",
        "",
        *compared(results, [setting.name for setting in changes], ours),
        "## What is worth storing",
        "",
        *compared(results, [setting.name for setting in stored], ours),
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
