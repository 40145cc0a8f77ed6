"""Tell how far each preset is from the best one in each world: python worlds_table.py > worlds.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plan
import table

HERE = Path(__file__).resolve().parent
# By their names in the logs: what they are called here.
CONTENDERS = {
    "clip": "`clip`",
    "clip-kd, repair auto": "`clip-kd` (default)",
    "clip-kd": "`clip-kd`, `--repair none`",
    "cid": "`cid`, `--repair none`",
    "default without trust": "`fd-instance`",
    "fd-instance, clip=1": "`fd-instance`, `--repair none`",
    "default": "`fd-instance`, by trust",
    "fd-instance": "`fd-instance`, `fd` near chance too",
    "default, crd=1": "`fd-instance`, `--loss crd=1`",
    "default, text tower kept": "`fd-instance`, `--text-tower teacher`",
}
DEFAULT, BEFORE = "clip-kd, repair auto", "default without trust"
# What was changed in the default before for a trial, by its name in the log.
IDEAS = {
    "default, icl=1": "`--loss icl=1`",
    "default, instance=0": "`--loss instance=0`",
    "default, instance=1": "`--loss instance=1`",
    "default, crd=1": "`--loss crd=1`",
    "clip-kd, repair auto": "`--preset clip-kd`",
    "default, td=1": "`--loss td=1`",
    "default, td=1, averaged": "`--loss td=1 --ema 0.99`, the averaged weights",
}
# Share of wrong captions.
_EXCHANGED = 0.5
# In a world with a smaller span there is nothing to share.
_SMALLEST_SPAN = 0.01
# What would be the same run as another: no repair is taken, or the teacher is near chance.
_SAME_RUN = {
    "good teacher": {BEFORE: "fd-instance, clip=1", DEFAULT: "clip-kd"},
    "teacher of drawings": {BEFORE: "default", DEFAULT: BEFORE},
}
# What is compared in a world of these data: recall at so many, the mean of both directions, or 0 for accuracy.
RECALL_AT = {"flickr": 5, "clothes": 0, "drawings": 1}
NOTES = (
    "Regret: points below the preset that is best in that world, paired by seed; 95 % intervals as in table.md; an"
    " interval needs three seeds. Share: regret divided by the span, which is the best preset minus `clip`.",
    "What this does not show: a real CLIP as teacher, a student of usual size, training of more than a few epochs, or the"
    " order of presets whose intervals overlap. Largest regrets compare only where the number of worlds is the same. The"
    " best preset is chosen by the same figures, so regrets are a little too large. Rates are the presets' defaults, not"
    " tuned to a world; in the worlds of the ablation each preset has its best of three or five rates, found on other"
    " items. `fd-instance` was the default before, and where it was run as that it is without `fd` near chance; by trust is"
    " the default before that: `clip` at 0.1 and, after a repair, `fd` at a weight that its gain gave. Where no repair is"
    " taken, or the teacher is near chance, the default's figures are those of the run that is the same.",
)


@dataclasses.dataclass(frozen=True)
class World:
    """What each contender reached, for each seed and item."""

    name: str
    metric: str
    values: Mapping[str, Mapping[int, table.Array]]

    def level(self, contender: str) -> float:
        """Return a contender's mean."""
        return float(np.mean([values.mean() for values in self.values[contender].values()]))

    @property
    def best(self) -> str:
        """The contender with the highest mean."""
        return max((contender for contender in CONTENDERS if contender in self.values), key=self.level)

    @property
    def span(self) -> float:
        """How far the best contender is above `clip`."""
        return self.level(self.best) - self.level("clip")

    def regret(self, contender: str) -> table.Gap:
        """Return how far a contender is below the best, over the seeds of both; the same runs by 0 without an error."""
        if self.values[contender] is self.values[self.best]:
            return table.Gap(len(self.values[contender]), 0.0, (0.0, 0.0))
        best, ours = self.values[self.best], self.values[contender]
        seeds = [seed for seed in best if seed in ours]
        return table.gap_of(np.array([best[seed] - ours[seed] for seed in seeds]))


def trained_worlds(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[World]:
    """Yield the worlds of worlds.py; students that no teacher taught are the same in all worlds of their data."""
    for name in names_of_worlds(entries):
        values = {label: by_seed for label, by_seed in students(entries, name).items() if label in CONTENDERS}
        at = RECALL_AT[name.split(",")[0]]
        if len(values) > 1 and "clip" in values:
            yield World(name, f"R@{at}" if at else "acc1", values)


def names_of_worlds(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the worlds in a log."""
    return list(dict.fromkeys(entry["world"] for entry in entries.values()))


def students(
    entries: Mapping[str, Mapping[str, Any]], world: str, *, tuning: bool = False
) -> dict[str, dict[int, table.Array]]:
    """Return by contender and seed what each item of a world gave: of those reported, or of those to tune on."""
    data = world.split(",")[0]
    values: dict[str, dict[int, table.Array]] = {}
    for entry in entries.values():
        contender = entry.get("contender")
        measured = entry.get("tuning") if tuning else entry
        if contender and measured and entry["world"] == (data if contender == "clip" else world):
            values.setdefault(contender, {})[entry["seed"]] = item_values(measured["items"], RECALL_AT[data])
    for contender, other in _SAME_RUN.get(world.partition(", ")[2], {}).items():
        if other in values:
            values[contender] = values[other] | values[contender] if contender in values else values[other]
    return values


def item_values(items: str, at: int) -> table.Array:
    """Return the value of each item in [0, 1]; worlds.py says how items are written."""
    if not at:
        return np.array([mark == "1" for mark in items], dtype=np.float64)

    def hit(rank: str) -> bool:
        return rank != "-" and int(rank) < at

    return np.array([(hit(item[0]) + np.mean([hit(rank) for rank in item[1:]])) / 2 for item in items.split()])


def ablation_worlds() -> Iterator[World]:
    """Yield the worlds of the ablation, on the pairs alone."""
    drawings, photographs = (table.read(HERE / name) for name in ("log.jsonl", "photographs.jsonl"))
    ours = plan.tuned("fd-instance", drawings.entries).name
    alone = plan.with_clip_alone(drawings.entries)
    both = {BEFORE: alone, "default, crd=1": plan.with_crd(alone)}
    tuned = {name: plan.tuned(name, drawings.entries).name for name in ("clip", "clip-kd", "cid")}
    tuned |= {"default": f"{ours}/no extras"} | {name: setting.name for name, setting in both.items()}
    # On drawings no repair is taken.
    tuned[DEFAULT] = tuned["clip-kd"]
    yield from_results("drawings (ablation)", drawings, "drawings R@1", tuned)
    mixed_up = {name: plan.noisy(name, _EXCHANGED, drawings.entries).name for name in ("clip", "clip-kd", "cid")}
    mixed_up |= {name: plan.exchanged(setting, _EXCHANGED).name for name, setting in both.items()}
    mixed_up[DEFAULT] = mixed_up["clip-kd"]
    yield from_results("drawings, half of the captions exchanged (ablation)", drawings, "drawings R@1", mixed_up)
    best = {
        name: plan.best(plan.photograph_students(name, drawings.entries), photographs.entries).name
        for name in plan.SCALED
    }
    column = "photographs acc1"
    taught = {name: f"{best[name]}/repaired" for name in ("clip-kd", "cid")}
    repaired = f"{best['fd-instance']}/repaired"
    plain = {name: best[name] for name in ("clip", "clip-kd", "cid")} | {"default": f"{repaired}/trust 0.13"}
    auto = {BEFORE: f"{repaired}/with clip", "default, crd=1": f"{repaired}/with clip/with crd"}
    auto[DEFAULT] = taught["clip-kd"]
    plain |= auto
    yield from_results("clothes (ablation)", photographs, column, plain)
    good = {"clip": best["clip"], **taught, "default": f"{repaired}/trust 1"} | auto
    yield from_results("clothes, good teacher (ablation)", photographs, column, good)


def from_results(name: str, results: table.Results, column: str, settings: Mapping[str, str]) -> World:
    """Return a world of the ablation."""
    by_setting = {
        setting: {seed: results.values(setting, seed, column) for seed in results.seeds(setting)}
        for setting in settings.values()
        if results.seeds(setting)
    }
    values = {contender: by_setting[setting] for contender, setting in settings.items() if setting in by_setting}
    return World(name, column.split()[-1], values)


def levels(worlds: Sequence[World]) -> list[str]:
    """Return what each contender reached."""
    rows = []
    for world in worlds:
        cells = [f"{world.name}, {world.metric}"]
        for contender in CONTENDERS:
            seeds = len(world.values.get(contender, {}))
            note = " (one seed)" if seeds == 1 else f" ({seeds} seeds)"
            cells.append(f"{100 * world.level(contender):.1f}{note}" if seeds else "")
        rows.append(cells)
    return as_table(("world", *CONTENDERS.values()), rows)


def regrets(worlds: Sequence[World]) -> list[str]:
    """Return each contender's regret."""
    rows = []
    for world in worlds:
        cells = [world.name, CONTENDERS[world.best], f"{100 * world.span:.1f}"]
        cells += [regret_cell(world, contender) for contender in CONTENDERS if contender != "clip"]
        rows.append(cells)
    labels = [label for name, label in CONTENDERS.items() if name != "clip"]
    return as_table(("world", "best", "span", *labels), rows)


def regret_cell(world: World, contender: str) -> str:
    """Write a contender's regret in points, with its interval, and as a share of the span."""
    if contender not in world.values:
        return ""
    if world.values[contender] is world.values[world.best]:
        return "best"
    regret = world.regret(contender)
    share = f", {regret.mean / world.span:.0%}" if world.span > _SMALLEST_SPAN else ""
    return f"{100 * regret.mean:.1f} ({note_of(regret)}){share}"


def ideas(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return how far each trial is above the default before."""
    rows = []
    for world in names_of_worlds(entries):
        reported, tuned = students(entries, world), students(entries, world, tuning=True)
        rows += [
            [world, label, gain_cell(tuned, idea), gain_cell(reported, idea)]
            for idea, label in IDEAS.items()
            if idea in tuned and reported[idea] is not reported.get(BEFORE)  # near chance it is the same run
        ]
    return as_table(("world", "`fd-instance` with", "above it, on what is tuned on", "on what is reported"), rows)


def gain_cell(values: Mapping[str, Mapping[int, table.Array]], idea: str) -> str:
    """Write how many points a trial is above the default before, over the seeds of both."""
    ours, theirs = values.get(BEFORE, {}), values.get(idea, {})
    seeds = [seed for seed in theirs if seed in ours]
    if not seeds:
        return ""
    gap = table.gap_of(np.array([theirs[seed] - ours[seed] for seed in seeds]))
    return f"{100 * gap.mean:+.1f} ({note_of(gap)})"


def note_of(gap: table.Gap) -> str:
    """Write a difference's interval, or that there are too few seeds for one."""
    low, high = (100 * end for end in gap.interval)
    return f"{low:.1f}…{high:.1f}" if gap.has_verdict else "one seed" if gap.seeds == 1 else "two seeds"


def largest(worlds: Sequence[World]) -> list[str]:
    """Return each contender's largest regret over the worlds where it was trained."""
    rows = []
    for contender in (name for name in CONTENDERS if any(name in world.values for world in worlds)):
        there = [world for world in worlds if contender in world.values]
        worst = max(there, key=lambda world: world.regret(contender).mean)
        regret = worst.regret(contender)
        upper = f"{100 * regret.interval[1]:.1f}" if regret.has_verdict else ""
        shares = [world.regret(contender).mean / world.span for world in there if world.span > _SMALLEST_SPAN]
        share = f"{max(shares):.0%}" if shares else ""
        rows.append([CONTENDERS[contender], str(len(there)), f"{100 * regret.mean:.1f}", upper, worst.name, share])
    heads = ("preset", "worlds", "largest regret", "upper end", "in", "largest share of a span")
    return as_table(heads, sorted(rows, key=lambda row: (-int(row[1]), float(row[2]))))


def as_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines."""
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def seconds(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how long a student took."""
    took = [entry["took"] for entry in entries.values() if "contender" in entry]
    return (
        f"{len(took)} students; median {np.median(took):.0f} s each, with measuring, on a busy machine." if took else ""
    )


def tabulate(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the tables."""
    worlds = [*trained_worlds(entries), *ablation_worlds()]
    return [
        seconds(entries),
        "",
        *(line for note in NOTES for line in (note, "")),
        "## Levels",
        "",
        *levels(worlds),
        "## Regrets",
        "",
        *regrets(worlds),
        "## Largest regrets",
        "",
        *largest(worlds),
        "## Changes of `fd-instance` that were tried",
        "",
        *ideas(entries),
    ]


def main() -> None:
    """Print the tables of worlds.jsonl."""
    lines = (HERE / "worlds.jsonl").read_text(encoding="utf-8").splitlines()
    print("\n".join(tabulate({entry["run"]: entry for entry in map(json.loads, lines)})))


if __name__ == "__main__":
    main()
