"""The tables of figures that the documents show, each made from a log by a function of its name."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "ablation"))
sys.path.append(str(Path(__file__).resolve().parent / "claim"))
import claim_table
import plan
import table
import worlds_table

RECIPES = Path(__file__).resolve().parent
ABLATION, CLAIM = RECIPES / "ablation", RECIPES / "claim"
RECALL, ACCURACY = "drawings R@1", "photographs acc1"
PLANTED, PAPER = claim_table.PLANTED, claim_table.PAPER
# Settings of the ablation's photographs, and of the claim's subsets, as the documents name them.
SUBSETS = {
    "all": "all",
    "single": f"single-{PLANTED}",
    "star": f"star-{PLANTED}",
    "SemDeDup": f"semdedup-{PLANTED}",
    "random": f"random-{PLANTED}",
    "single, 0.563": f"single-{PAPER}",
    "star, 0.563": f"star-{PAPER}",
    "SemDeDup, 0.563": f"semdedup-{PAPER}",
    "random, 0.563": f"random-{PAPER}",
}


@functools.cache
def logged(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the last line of each run in a log."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {entry["run"]: entry for entry in map(json.loads, lines)}


@functools.cache
def of_drawings() -> table.Results:
    """Return the ablation's students of drawings."""
    return table.Results(logged(ABLATION / "log.jsonl"))


@functools.cache
def of_photographs() -> table.Results:
    """Return the ablation's students of photographs."""
    return table.Results(logged(ABLATION / "photographs.jsonl"))


@functools.cache
def of_subsets() -> table.Results:
    """Return the students of pairs that repeat."""
    return claim_table.split(logged(CLAIM / "log.jsonl"))


@functools.cache
def of_photograph_subsets() -> table.Results:
    """Return the same of photographs."""
    return claim_table.split(logged(CLAIM / "photographs.jsonl"))


def ablation_file() -> list[str]:
    """Return recipes/ablation/table.md."""
    return [*table.head(of_drawings()), *table.of_drawings(of_drawings())]


def photographs_file() -> list[str]:
    """Return recipes/ablation/photographs.md."""
    return [*table.head(of_photographs()), *table.of_photographs(of_photographs(), of_drawings().entries)]


def claim_file() -> list[str]:
    """Return recipes/claim/table.md."""
    return claim_table.tabulate(logged(CLAIM / "log.jsonl"))


def worlds_file() -> list[str]:
    """Return recipes/ablation/worlds.md."""
    return worlds_table.tabulate(logged(ABLATION / "worlds.jsonl"))


def presets() -> list[str]:
    """Return the README's table of presets: each one's level, and its distance from `clip`."""
    clip, default, ours, cid = (tuned(name) for name in ("clip", "clip-kd", "fd-instance", "cid"))
    no_teacher = photographed("clip")

    def on_photographs(setting: str) -> str:
        return beside(of_photographs(), setting, no_teacher, ACCURACY)

    def on_drawings(setting: str) -> str:
        return beside(of_drawings(), setting, clip, RECALL)

    default_there, cid_there = (on_photographs(repaired(name)) for name in ("clip-kd", "cid"))
    alone, teacher = (level(of_photographs(), name, ACCURACY) for name in (no_teacher, "teacher"))
    with_clip, with_clip_there = f"{ours}/with clip", on_photographs(f"{repaired('fd-instance')}/with clip")
    less_clip = on_photographs(repaired("fd-instance", 1))
    # The teacher that pairs badly is repaired, and pairs well then.
    rows = [
        [
            "`clip-kd` (default)",
            default_there,
            default_there,
            on_drawings(default),
            on_drawings(tuned("clip-kd+extras")),
        ],
        [
            "`fd-instance`",
            with_clip_there,
            with_clip_there,
            on_drawings(f"{with_clip}/no extras"),
            on_drawings(with_clip),
        ],
        ["… `--loss clip=0.1`", less_clip, less_clip, on_drawings(f"{ours}/no extras"), on_drawings(ours)],
        ["`cid` (after the paper)", cid_there, cid_there, on_drawings(cid), ""],
        ["`clip` (no teacher)", alone, alone, level(of_drawings(), clip, RECALL), ""],
        ["the teacher itself", "", teacher, level(of_drawings(), "teacher", RECALL), ""],
    ]
    photographs = ("photographs, teacher pairs well", "photographs, teacher pairs badly")
    return lines(("preset", *photographs, "drawings", "drawings, with views and texts"), rows)


def ablation_recipes() -> list[str]:
    """Return the main recipes on drawings and concepts."""
    columns = (RECALL, "drawings R@10", "drawings acc1", "concepts R@1", "concepts acc1")
    names = {
        "`fd-instance`": "fd-instance",
        "`clip-kd`, also with views, variants and texts": "clip-kd+extras",
        "`clip-kd`": "clip-kd",
        "`clip-rd`": "clip-rd",
        "`clip-kd`, AdamW": "clip-kd, adamw",
        "`cid`": "cid",
        "`clip`": "clip",
    }
    settings = {label: tuned(name) for label, name in names.items()} | {"the teacher": "teacher"}
    rows = []
    for label, setting in settings.items():
        probe = list(of_drawings().probe(setting).values())
        seeds = "" if setting == "teacher" else str(len(of_drawings().seeds(setting)))
        cells = [level(of_drawings(), setting, column) for column in columns]
        rows.append([label, seeds, *cells, f"{100 * sum(probe) / len(probe):.1f}"])
    rows.sort(key=lambda row: (row[0] == "the teacher", -float(row[2])))
    return lines(("recipe", "seeds", RECALL, "R@10", "acc1", "concepts R@1", "acc1", "probe"), rows)


def ablation_taken_away() -> list[str]:
    """Return what `fd-instance` loses without each of its parts."""
    ours = tuned("fd-instance")
    names = {
        "`fd`": "no fd",
        "five sixths of the learning rate": "lr 0.001",
        "views, variants and texts": "no extras",
        "mixed views": "no mix",
        "texts": "no texts",
        "strong views (no longer offered)": "no strong",
        "variants in the place of two captions in three (no longer offered)": "no variants",
        "`instance`": "no instance",
    }
    rows = [[label, distance(of_drawings(), ours, f"{ours}/{name}", RECALL)] for label, name in names.items()]
    return lines(("taken away", "points of R@1 on drawings lost"), rows)


def ablation_single_losses() -> list[str]:
    """Return what each loss alone adds to `clip`."""
    names = ("fd", "clip-td", "mfd", "cluster", "icl", "instance", "crd", "afd", "gd", "dr")
    shown = {"clip-td": "td", "dr": "affinity"}
    clip = tuned("clip")
    rows = [
        [f"`{shown.get(name, name)}`"]
        + [distance(of_drawings(), tuned(name), clip, column) for column in (RECALL, "drawings acc1", "concepts acc1")]
        for name in names
    ]
    return lines(("loss", RECALL, "drawings acc1", "concepts acc1"), rows)


def ablation_exchanged() -> list[str]:
    """Return how the main recipes do with exchanged captions, one seed each."""
    names = ("clip", "cid", "clip-kd", "fd-instance")
    rows = []
    for share in plan.NOISE:
        settings = [plan.noisy(name, share, of_drawings().entries).name for name in names]
        settings.append(plan.exchanged(plan.with_clip_alone(of_drawings().entries), share).name)
        cells = [level(of_drawings(), name, RECALL) if of_drawings().seeds(name) else "" for name in settings]
        rows.append([f"{100 * share:.0f} %", *cells])
    heads = ("`clip`", "`cid`", "`clip-kd` (default)", "`fd-instance`, `clip=0.1`", "`fd-instance`")
    return lines(("captions exchanged", *heads), rows)


def ablation_photographs() -> list[str]:
    """Return the main recipes on photographs, with the teacher as it is and repaired."""
    ours = photographed("fd-instance")
    rows = [
        ["`clip`", photographed("clip"), ""],
        ["`clip-kd`", photographed("clip-kd"), repaired("clip-kd")],
        ["`cid`", photographed("cid"), repaired("cid")],
        ["`fd-instance` with views, variants and texts", ours, ""],
        ["`fd-instance`", f"{ours}/no extras", repaired("fd-instance", 0.13)],
        ["the teacher", "teacher", ""],
    ]
    shown = []
    for label, plain, mended in rows:
        probe = list(of_photographs().probe(plain).values())
        shown.append(
            [
                label,
                level(of_photographs(), plain, ACCURACY),
                f"{100 * sum(probe) / len(probe):.1f}" if probe else "",
                level(of_photographs(), mended, ACCURACY) if mended else "",
            ]
        )
    return lines(("losses", "the teacher as it is", "probe", "repaired"), shown)


def ablation_rates() -> list[str]:
    """Return R@1 on what is tuned on and on what is reported at each multiple of the rate that the batch alone gives."""
    entries = logged(ABLATION / "rates.jsonl").values()
    factors = sorted({entry["factor"] for entry in entries})
    reached = {(entry["width"], entry["batch_size"], entry["factor"]): entry["R@1"] for entry in entries}
    rows = []
    for width, batch_size in sorted({(entry["width"], entry["batch_size"]) for entry in entries}):
        found = [reached.get((width, batch_size, factor)) for factor in factors]
        cells = ["" if r is None else f"{100 * r['tuning']:.1f} / {100 * r['reported']:.1f}" for r in found]
        rows.append([str(width), f"{batch_size:,}", *cells])
    return lines(("width", "batch", *(f"{factor:g} ×" for factor in factors)), rows)


def claim_costs() -> list[str]:
    """Return what subsets cost, averaged over the losses."""
    columns = (RECALL, "drawings R@10", "head R@1", "tail R@1", "concepts R@10")
    rows = [
        [
            label,
            *(signed(claim_table.average_gap(of_subsets(), name, "all", column)) for column in columns),
        ]
        for label, name in SUBSETS.items()
        if name != "all"
    ]
    return lines(("subset", RECALL, "R@10", "R@1, head", "R@1, tail", "concepts R@10"), rows)


def claim_recall() -> list[str]:
    """Return R@1 of the drawings for each subset and loss."""
    subsets = dict(list(SUBSETS.items())[:4]) | {"best-caption": f"best-caption-{PLANTED}"}
    subsets |= dict(list(SUBSETS.items())[4:])
    subsets |= {f"{name}, equal epochs": f"{name}-{PLANTED}/equal epochs" for name in ("single", "random")}
    rows = []
    for label, subset in subsets.items():
        names = [f"{loss}/{subset}" for loss in claim_table.LOSSES]
        rows.append([label, *(level(of_subsets(), name, RECALL) if of_subsets().seeds(name) else "" for name in names)])
    return lines(("subset", *(f"`{loss}`" for loss in claim_table.LOSSES)), rows)


def claim_subsets() -> list[str]:
    """Return what is kept of the drawings."""
    return claim_table.subset_table(logged(CLAIM / "log.jsonl")["data"]["subsets"])[:-1]


def claim_photographs() -> list[str]:
    """Return what is kept of the photographs, and how students of it do."""
    figures = logged(CLAIM / "photographs.jsonl")["data"]["subsets"]
    rows = []
    for label, subset in SUBSETS.items():
        kept = figures[subset]
        shares = [f"{100 * kept[name]:.1f}" if name in kept else "" for name in ("left", "repeats", "right", "purity")]
        cells = []
        for loss in ("fd-instance", "clip"):
            name, everything = f"{loss}/{subset}", f"{loss}/all"
            if not of_photograph_subsets().seeds(name):
                cells.append("")
            elif subset == "all":
                cells.append(level(of_photograph_subsets(), name, ACCURACY))
            else:
                cells.append(beside(of_photograph_subsets(), name, everything, ACCURACY))
        rows.append([label, f"{kept['kept']:,}", *shares, *cells])
    heads = ("subset", "pairs", "pictures left", "repeats", "right", "purity", "accuracy, `fd-instance`", "`clip`")
    return lines(heads, rows)


def balance_helps() -> list[str]:
    """Return the table of docs/balance.md: what `balance` keeps, and how students of it do."""
    names = {
        "all": "all",
        "`--keep 0.67`": f"single-{PLANTED}",
        "`--keep 0.67 --linkage star`": f"star-{PLANTED}",
        "SemDeDup's rule": f"semdedup-{PLANTED}",
        "at random": f"random-{PLANTED}",
        "`--keep 0.563`": f"single-{PAPER}",
    }
    subsets = logged(CLAIM / "log.jsonl")["data"]["subsets"]
    rows = []
    for label, name in names.items():
        purity = f"{100 * subsets[name]['purity']:.1f}" if "purity" in subsets[name] else ""
        setting = f"fd-instance/{name}"
        recall = (
            level(of_subsets(), setting, RECALL)
            if name == "all"
            else beside(of_subsets(), setting, "fd-instance/all", RECALL)
        )
        rows.append([label, f"{100 * subsets[name]['left']:.1f}", purity, recall])
    return lines(("kept", "distinct pictures left", "purity of the sets", "R@1 of 500 drawings"), rows)


def tuned(name: str) -> str:
    """Return the setting of a recipe at its best trial."""
    return plan.tuned(name, of_drawings().entries).name


def photographed(name: str) -> str:
    """Return the setting of a recipe at its best rate on photographs."""
    trials = plan.photograph_students(name, of_drawings().entries)
    return plan.best(trials, of_photographs().entries).name


def repaired(name: str, trust: float | None = None) -> str:
    """Return the setting of a recipe on photographs with the teacher repaired, and how far it is trusted."""
    return f"{photographed(name)}/repaired" + ("" if trust is None else f"/trust {trust:g}")


def level(results: table.Results, setting: str, column: str) -> str:
    """Write a setting's mean; one run is marked."""
    mean = f"{100 * results.mean(setting, column):.1f}"
    is_single = setting != "teacher" and len(results.seeds(setting)) == 1
    return f"{mean} (one seed)" if is_single else mean


def distance(results: table.Results, setting: str, other: str, column: str) -> str:
    """Write in points by how much a setting is above another."""
    differences, _ = results.difference(setting, other, column)
    return signed(table.gap_of(differences))


def beside(results: table.Results, setting: str, other: str, column: str) -> str:
    """Write a setting's mean, and in brackets its distance from another."""
    return f"{100 * results.mean(setting, column):.1f} [{distance(results, setting, other, column)}]"


def signed(gap: table.Gap) -> str:
    """Write a difference and its interval as the documents do."""
    if gap.seeds == 1:
        return f"{100 * gap.mean:+.1f} (one seed)".replace("-", "−")
    low, high = (100 * end for end in gap.interval)
    return f"{100 * gap.mean:+.1f} ({low:.1f}…{high:.1f})".replace("-", "−")


def lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines."""
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


TABLES: dict[str, Callable[[], list[str]]] = {
    make.__name__: make
    for make in (
        presets, ablation_recipes, ablation_taken_away, ablation_single_losses, ablation_exchanged, ablation_photographs,
        ablation_rates,
        claim_costs, claim_recall, claim_subsets, claim_photographs, balance_helps,
    )
}  # fmt: skip
FILES: dict[str, Callable[[], list[str]]] = {
    "recipes/ablation/table.md": ablation_file,
    "recipes/ablation/photographs.md": photographs_file,
    "recipes/ablation/worlds.md": worlds_file,
    "recipes/claim/table.md": claim_file,
}
