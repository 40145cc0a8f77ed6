"""Which students are trained, and in which order: what matters most comes first, so that a run cut short is of use."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Each preset is tried with its weights times these, on the tuning split; the best factor goes to the report split.
FACTORS = (1.0, 1 / 3, 3.0)
SEEDS = (0, 1, 2, 3, 4)
# Settings of the cluster term have these seeds before any has more.
FIRST_SEEDS = SEEDS[:3]
WIDTH = 96
# `fd` sums over the width; CLIP-KD's 2000 is for a mean over it.
FD = 2000 / WIDTH
# The last three are not presets of clipcid: `cid` and the cluster term with what pulls the student to the teacher's own
# features.
RIVALS = ("clip", "clip-kd", "instance", "cid", "cid+intra", "cid+fd", "fd+cluster")
PARTS = ("fd", "icl", "crd", "cluster")
REST = (*PARTS, "dr", "clip-rd")
PRESETS = RIVALS + REST
# Weights at factor 1. `clip` has none to try: its trials are of the learning rate.
WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "clip": {},
    "fd": {"fd": FD},
    "icl": {"icl": 1.0},
    "crd": {"crd": 1.0},
    "clip-kd": {"fd": FD, "icl": 1.0, "crd": 1.0},
    "clip-rd": {"fd": FD, "icl": 1.0, "crd": 1.0, "vrd": 1.0, "xrd": 1.0},
    "dr": {"clip": 0.25, "affinity": 0.75},
    "instance": {"instance": 1.0},
    "cluster": {"cluster": 1.0},
    "cid": {"instance": 1.0, "cluster": 0.25},
    "cid+intra": {"instance": 1.0, "instance-intra": 1.0, "cluster": 0.25},
    "cid+fd": {"instance": 1.0, "fd": FD, "cluster": 0.25},
    "fd+cluster": {"fd": FD, "cluster": 1.0},
}
LEARNING_RATE = 1e-3
CLUSTERS = "joint-256"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a student is trained, but for the seed.

    Attributes:
        name: Its name in log and table.
        weights: Weights given as ``--loss``, over the preset `clip`.
        lr: Peak learning rate.
        keep: Keep list: ``all``, ``single``, ``star`` or ``random``.
        clusters: Which clusters, ``FEATURES-K`` or ``FEATURES-K-pPERPLEXITY``; None where no loss asks.
        flags: Further flags of ``distill``.
    """

    name: str
    weights: Mapping[str, float]
    lr: float = LEARNING_RATE
    keep: str = "all"
    clusters: str | None = None
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.clusters is not None) != ("cluster" in self.weights):
            raise ValueError(f"{self.name}: clusters and the cluster loss go together")


@dataclasses.dataclass(frozen=True)
class Run:
    """A setting with a seed."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return f"{self.setting.name}-s{self.seed}"


def preset(name: str, factor: float) -> Setting:
    """Return a preset with its weights times `factor` (clip's own stays; `clip` alone: the learning rate)."""
    label = name if factor == 1 else f"{name}-x{factor:.2g}"
    if name == "clip":
        return Setting(label, {}, lr=LEARNING_RATE * factor)
    weights = {loss: weight if loss == "clip" else weight * factor for loss, weight in WEIGHTS[name].items()}
    if "cluster" not in weights:
        return Setting(label, weights)
    return Setting(label, weights, clusters=CLUSTERS, flags=("--cluster-towers", "both"))


def without_cluster(factor: float) -> Setting:
    """Return `cid` at λ_clu = 0: `instance` at the same weight."""
    return preset("instance", factor)


def cid_variants(factor: float) -> list[Setting]:
    """Return `cid` at its tuned weights with one thing changed at a time, the most asked-for first."""
    base = preset("cid", factor)

    def changed(name: str, **changes: Any) -> Setting:
        return dataclasses.replace(base, name=f"cid/{name}", **changes)

    def cluster_weight(value: float) -> Setting:
        weights = {**base.weights, "cluster": value * base.weights["instance"]}
        return changed(f"lambda-{value:g}", weights=weights)

    alone = without_cluster(factor)
    # The batch's own centroids and a tenth of the others, instead of all.
    few = ("--candidate-ratio", "0.1", "--min-candidates", "1")
    return [
        alone,
        cluster_weight(1.0),
        cluster_weight(0.1),
        changed("image-towers", flags=("--cluster-towers", "image")),
        changed("image-features", clusters="image-256"),
        changed("image-features-and-towers", clusters="image-256", flags=("--cluster-towers", "image")),
        changed("project", flags=(*base.flags, "--teacher-space", "project")),
        changed("keep-single", keep="single"),
        changed("keep-star", keep="star"),
        changed("keep-random", keep="random"),
        changed("k-32", clusters="joint-32"),
        changed("k-512", clusters="joint-512"),
        changed("alpha-0", flags=(*base.flags, "--label-share", "0")),
        changed("alpha-1", flags=(*base.flags, "--label-share", "1")),
        changed("perplexity-1.5", clusters=f"{CLUSTERS}-p1.5"),
        changed("perplexity-8", clusters=f"{CLUSTERS}-p8"),
        changed("k-512-ratio-0.1", clusters="joint-512", flags=(*base.flags, *few)),
        changed(
            "k-512-ratio-0.1-uncorrected", clusters="joint-512", flags=(*base.flags, *few, "--no-candidate-correction")
        ),
        cluster_weight(0.5),
        cluster_weight(0.05),
        changed("k-128", clusters="joint-128"),
        dataclasses.replace(alone, name=f"{alone.name}/project", flags=("--teacher-space", "project")),
    ]


def tuning_score(entry: Mapping[str, Any]) -> float:
    """Return what factors are chosen by: the mean of R@1, R@10 and acc1 on the tuning splits of concepts and drawings."""
    names = [f"tune {what} {metric}" for what in ("concepts", "drawings") for metric in ("R@1", "R@10", "acc1")]
    return float(statistics.mean(entry["metrics"][name] for name in names))


def best_factor(name: str, log: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the best of the factors tried with seed 0 so far; 1 where none is logged."""
    tried = {factor: log.get(Run(preset(name, factor), SEEDS[0]).name) for factor in FACTORS}
    scores = {factor: tuning_score(entry) for factor, entry in tried.items() if entry is not None}
    return max(scores, key=lambda factor: scores[factor], default=1.0)


def phases(log: Mapping[str, Mapping[str, Any]]) -> Iterator[list[Run]]:
    """Yield lists of runs; each is made only when those before are in `log`, which tells the tuned factors."""
    yield [Run(preset(name, factor), SEEDS[0]) for factor in FACTORS for name in PRESETS]
    yield _seeds((tuned(name, log) for name in RIVALS), SEEDS)
    yield _seeds((tuned(name, log) for name in PARTS), FIRST_SEEDS)
    yield _seeds(cid_variants(best_factor("cid", log)), FIRST_SEEDS)
    yield _seeds((tuned(name, log) for name in REST), SEEDS)
    yield _seeds(cid_variants(best_factor("cid", log)), SEEDS)


def quick() -> Iterator[list[Run]]:
    """Yield a few runs of every kind, to prove that the recipe works."""
    yield [Run(preset(name, 1.0), 0) for name in ("clip", "clip-kd", "cid")]
    variants = {setting.name: setting for setting in cid_variants(1.0)}
    yield [Run(variants[name], 0) for name in ("instance", "cid/keep-random", "cid/perplexity-8")]


def tuned(name: str, log: Mapping[str, Mapping[str, Any]]) -> Setting:
    """Return a preset at its best factor so far."""
    return preset(name, best_factor(name, log))


def _seeds(settings: Iterable[Setting], seeds: Iterable[int]) -> list[Run]:
    chosen = list(settings)
    return [Run(setting, seed) for seed in seeds for setting in chosen]
