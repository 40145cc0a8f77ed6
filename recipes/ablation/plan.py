"""Which students are trained, and in which order: what matters most comes first, so that a run cut short is of use."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

Log = Mapping[str, Mapping[str, Any]]

# Every sum of losses has as many trials on the tuning split, with seed 0: three rates, and at the best of them two factors
# on the weights of all losses but the first. The optimizers hardly notice a factor on all of them, so a loss alone has no
# weight to try: it has two more rates.
RATES = {"muon": (6e-3, 3e-3, 1.2e-2), "adamw": (3e-3, 6e-3, 1e-3)}
FACTORS = (1 / 3, 3.0)
FURTHER_RATES = {"muon": (4.2e-3, 1.5e-3), "adamw": (2e-3, 5e-4)}
SEEDS = (0, 1, 2, 3, 4)
# What is not a contender has these seeds.
FIRST_SEEDS = SEEDS[:3]
STEPS, LONG = 2_000, 8_000
BATCH_SIZE, LARGE_BATCH = 64, 256
# Students: 0.13 M parameters beside the token table at 32 px, and 3.8 M at 48 px.
STUDENT, LARGE_STUDENT = "../quickstart/student", "student-large"
# A step of the larger student takes 20 times as long.
LARGE_STEPS = 500
LARGE_RATES = (6e-3, 3e-3, 1.5e-3)
# On photographs: 7.8 M parameters at 64 px, of which 6.3 M are token embeddings; eight epochs of 3,068.
PHOTOGRAPH_STUDENT, PHOTOGRAPH_STEPS = "../foreign-teacher/student", 400
PHOTOGRAPH_RATES = (3e-3, 6e-3, 1.5e-3)
WIDTHS = {STUDENT: 96, LARGE_STUDENT: 192, PHOTOGRAPH_STUDENT: 128}
CLUSTERS = "joint-256"
BOTH_TOWERS = ("--cluster-towers", "both")
# The batch's own centroids and a tenth of the others, instead of all.
FEW = ("--candidate-ratio", "0.1", "--min-candidates", "1")
# How many of a sample's nearest centroids teach it; 16 are stored.
NEAREST = (16, 4, 2, 1)
# What a run may read beside images and their captions; `inputs.py` makes it. Stored views of mixed images; texts without
# images, which are variants of captions. The log's students of all extras had more, which runs without it showed to be
# worth nothing and clipcid no longer makes: half of their views were strong crops, and variants stood in the place of two
# captions in three.
EXTRAS = ("mix", "texts")
# Stored views of an image, and as many texts.
STORED = 8
# Fewer of both, which are tried.
FEWER_STORED = (2, 4)
# How far a repaired teacher is trusted: what its figures say on photographs, half of it, and wholly.
TRUST = (0.13, 0.06, 1.0)
# Shares of the pairs whose captions are exchanged with one another.
NOISE = (0.2, 0.5, 0.8)


def concept(key: str) -> str:
    """Return the emoji that a key (vendor and code points) is a drawing of."""
    return key.split("-", 1)[1]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A sum of losses and what it reads.

    Attributes:
        weights: Weights at factor 1 for a student 96 wide; the first has it in all trials. `fd` and `mfd` sum over the
            width: CLIP-KD's 2000 is for a mean.
        extras: Names of `EXTRAS`.
    """

    weights: Mapping[str, float]
    extras: tuple[str, ...] = ()
    optimizer: str = "muon"


FD = 2000 / WIDTHS[STUDENT]
_CLIP_KD = {"clip": 1.0, "fd": FD, "icl": 1.0, "crd": 1.0}
RECIPES: Mapping[str, Recipe] = {
    "clip": Recipe({"clip": 1.0}),
    "clip-kd": Recipe(_CLIP_KD),
    "fd-instance": Recipe({"fd": FD, "instance": 1 / 3, "clip": 0.1}, EXTRAS),
    "cid": Recipe({"clip": 1.0, "instance": 1.0, "cluster": 0.5}),
    # What `fd-instance` reads beside the pairs could serve a rival too.
    "clip-kd+extras": Recipe(_CLIP_KD, EXTRAS),
    # As CLIP and CLIP-KD were trained.
    "clip, adamw": Recipe({"clip": 1.0}, optimizer="adamw"),
    "clip-kd, adamw": Recipe(_CLIP_KD, optimizer="adamw"),
    "clip-rd": Recipe({**_CLIP_KD, "vrd": 1.0, "xrd": 1.0}),
    "fd": Recipe({"clip": 1.0, "fd": FD}),
    "instance": Recipe({"clip": 1.0, "instance": 1.0}),
    "cluster": Recipe({"clip": 1.0, "cluster": 1.0}),
    "icl": Recipe({"clip": 1.0, "icl": 1.0}),
    "crd": Recipe({"clip": 1.0, "crd": 1.0}),
    "mfd": Recipe({"clip": 1.0, "mfd": FD}),
    # At 0.01 and above all features became one.
    "gd": Recipe({"clip": 1.0, "gd": 0.001}),
    "afd": Recipe({"clip": 1.0, "afd": 1.0}),
    "clip-td": Recipe({"clip": 1.0, "td": 1.0}),
    "dr": Recipe({"clip": 0.25, "affinity": 0.75}),
}
CONTENDERS = ("clip", "clip-kd", "fd-instance", "cid", "clip-rd")
MAIN = (*CONTENDERS, "clip, adamw", "clip-kd, adamw", "clip-kd+extras")
REST = tuple(name for name in RECIPES if name not in MAIN)
# Losses that the round before did not have.
NEW = ("mfd", "gd", "afd", "clip-td")
# The larger student, the longer run and the larger batch are tried with these.
SCALED = ("clip", "clip-kd", "fd-instance", "cid")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a student is trained, but for the seed.

    Attributes:
        name: Its name in log and table.
        weights: Weights of all losses, for `student`.
        lr: Peak learning rate.
        extras: Names of `EXTRAS`.
        stored: How many views of an image are stored, and how many texts, where `extras` has them.
        optimizer: ``muon`` or ``adamw``.
        student: The name of its file, without suffix.
        keep: Keep list: ``all``, ``single``, ``star`` or ``random``.
        clusters: Which clusters, ``FEATURES-K``, with ``-pPERPLEXITY`` or ``-mNEAREST`` where that is changed; None where no
            loss asks.
        repair: ``--repair`` of ``distill`` and ``cluster``. On drawings the teacher is left as it is either way.
        noise: Share of the pairs whose captions are exchanged with one another.
        flags: Further flags of ``distill``.
    """

    name: str
    weights: Mapping[str, float]
    lr: float
    extras: tuple[str, ...] = ()
    stored: int = STORED
    optimizer: str = "muon"
    student: str = STUDENT
    steps: int = STEPS
    batch_size: int = BATCH_SIZE
    keep: str = "all"
    clusters: str | None = None
    repair: str = "none"
    noise: float = 0.0
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.clusters is not None) != ("cluster" in self.weights):
            raise ValueError(f"{self.name}: clusters and the cluster loss go together")

    @property
    def is_taught(self) -> bool:
        """Whether any loss needs the teacher."""
        return set(self.weights) != {"clip"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A setting with a seed."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return f"{self.setting.name}-s{self.seed}"


def recipe(name: str, lr: float, factor: float) -> Setting:
    """Return a recipe at a learning rate, with its weights but the first times a factor."""
    (first, held), *others = RECIPES[name].weights.items()
    weights = {first: held, **{loss: weight * factor for loss, weight in others}}
    label = f"{name}/lr{lr:g}" + ("" if factor == 1 else f"-x{factor:.2g}")
    clusters: dict[str, Any] = {"clusters": CLUSTERS, "flags": BOTH_TOWERS} if "cluster" in weights else {}
    extras, optimizer = RECIPES[name].extras, RECIPES[name].optimizer
    return Setting(label, weights, lr, extras, optimizer=optimizer, **clusters)


def rates_tried(name: str) -> list[Setting]:
    """Return a recipe's first trials, of the learning rate."""
    return [recipe(name, lr, 1.0) for lr in RATES[RECIPES[name].optimizer]]


def trials(name: str, log: Log) -> list[Setting]:
    """Return a recipe's trials, as many for each: of the rate, and of the weights at the best rate so far."""
    first = rates_tried(name)
    if len(RECIPES[name].weights) == 1:
        return first + [recipe(name, lr, 1.0) for lr in FURTHER_RATES[RECIPES[name].optimizer]]
    return first + [recipe(name, best(first, log).lr, factor) for factor in FACTORS]


def tuning_score(entry: Mapping[str, Any]) -> float:
    """Return what trials are chosen by: the mean of all metrics (R@1, R@10, acc1) of all tuning splits."""
    return float(statistics.mean(value for name, value in entry["metrics"].items() if name.startswith("tune ")))


def best(settings: list[Setting], log: Log) -> Setting:
    """Return the best of some settings with the first seed so far; the first of them where none is logged."""
    entries = [(setting, log.get(Run(setting, SEEDS[0]).name)) for setting in settings]
    tried = [(tuning_score(entry), setting) for setting, entry in entries if entry is not None]
    return max(tried, key=lambda pair: pair[0])[1] if tried else settings[0]


def tuned(name: str, log: Log) -> Setting:
    """Return a recipe at its best trial so far."""
    return best(trials(name, log), log)


def left_out(log: Log) -> list[Setting]:
    """Return `fd-instance` at its best trial with one ingredient taken away or added at a time."""
    base = tuned("fd-instance", log)
    slow = base.lr / 6
    found = [_changed(base, "no extras", extras=())]
    found += [
        _changed(base, f"no {extra}", extras=tuple(other for other in EXTRAS if other != extra)) for extra in EXTRAS
    ]
    found += [_without(base, loss) for loss in ("fd", "instance")]
    found.append(_changed(base, "with cluster", **_clustered(base)))
    found.append(_changed(base, f"lr {slow:g}", lr=slow))
    return found


def nearer_to_captions(base: Setting) -> list[Setting]:
    """Return a setting of `fd-instance` with more of the captions: `clip`, `cid` but for its clusters, all of `cid`."""
    cid = RECIPES["cid"].weights
    without_clusters = {loss: weight for loss, weight in cid.items() if loss != "cluster"}
    return [
        _changed(base, "with clip", weights={**base.weights, "clip": 1.0}),
        _changed(base, "with clip, instance", weights={**base.weights, **without_clusters}),
        _changed(base, "with cid", weights={**base.weights, **cid}, clusters=CLUSTERS, flags=BOTH_TOWERS),
    ]


def with_clip_alone(log: Log) -> Setting:
    """Return `fd-instance` with `clip` at weight 1, as the preset has it, on the pairs alone."""
    with_clip = nearer_to_captions(tuned("fd-instance", log))[0]
    return _changed(with_clip, "no extras", extras=())


def with_crd(base: Setting) -> Setting:
    """Return a setting with `crd` as well."""
    return _changed(base, "with crd", weights={**base.weights, "crd": 1.0})


def further_changes(log: Log) -> list[Setting]:
    """Return `fd-instance` at its best trial with further things changed."""
    base = tuned("fd-instance", log)
    # Instance discrimination beyond the batch: against the teacher's rows of all images, the nearest of them and a draw.
    bank = _clustered(base) | {"clusters": "image-all", "flags": (*BOTH_TOWERS, *FEW)}
    return [
        _without(base, "clip"),
        _changed(base, "with bank", **bank),
        *(_changed(base, f"adamw lr {lr:g}", optimizer="adamw", lr=lr) for lr in RATES["adamw"][:2]),
    ]


def _changed(base: Setting, name: str, **changes: Any) -> Setting:
    return dataclasses.replace(base, name=f"{base.name}/{name}", **changes)


def _without(base: Setting, loss: str) -> Setting:
    weights = {other: weight for other, weight in base.weights.items() if other != loss}
    # Texts without images are for `fd` alone.
    extras = tuple(extra for extra in base.extras if extra != "texts") if loss == "fd" else base.extras
    return _changed(base, f"no {loss}", weights=weights, extras=extras)


def _clustered(base: Setting) -> dict[str, Any]:
    """Return what adds the cluster loss to `fd-instance`, at half the weight of the instance loss as in `cid`."""
    weights = {**base.weights, "cluster": base.weights["instance"] / 2}
    return {"weights": weights, "clusters": CLUSTERS, "flags": BOTH_TOWERS}


def longer(name: str, log: Log) -> Setting:
    """Return a recipe at its best trial, trained four times as long."""
    base = tuned(name, log)
    return dataclasses.replace(base, name=f"{base.name}/{LONG} steps", steps=LONG)


def large_students(name: str, log: Log) -> list[Setting]:
    """Return a recipe at its best weights with the larger student, at each rate: trials of the rule of `--lr` too."""
    return _at_rates(tuned(name, log), "large", LARGE_STUDENT, LARGE_STEPS, LARGE_RATES)


def photograph_students(name: str, log: Log) -> list[Setting]:
    """Return a recipe at the weights that are best on drawings, for photographs, at each rate."""
    return _at_rates(tuned(name, log), "photographs", PHOTOGRAPH_STUDENT, PHOTOGRAPH_STEPS, PHOTOGRAPH_RATES)


def _at_rates(base: Setting, label: str, student: str, steps: int, rates: Iterable[float]) -> list[Setting]:
    narrower = WIDTHS[STUDENT] / WIDTHS[student]
    weights = {loss: weight * (narrower if loss in ("fd", "mfd") else 1.0) for loss, weight in base.weights.items()}
    changed = dataclasses.replace(base, weights=weights, student=student, steps=steps)
    return [dataclasses.replace(changed, name=f"{base.name}/{label}-lr{lr:g}", lr=lr) for lr in rates]


def no_longer_offered(log: Log) -> list[Setting]:
    """Return `fd-instance` without an input that only the log's students had: strong views, or variants as captions."""
    base = tuned("fd-instance", log)
    return [_changed(base, "no strong"), _changed(base, "no variants")]


def photograph_changes(log: Log, drawings: Log) -> list[Setting]:
    """Return `fd-instance` at its best rate on photographs on the pairs alone, and with more of what the captions say."""
    base = best(photograph_students("fd-instance", drawings), log)
    return [_changed(base, "no extras", extras=()), *nearer_to_captions(base)]


def repaired(log: Log, drawings: Log) -> list[Setting]:
    """Return the taught recipes at their best rate on photographs and on the pairs alone, with the teacher repaired."""
    found = []
    for name in SCALED:
        base = best(photograph_students(name, drawings), log)
        alone = _changed(base, "repaired", repair="auto", extras=())
        if name == "fd-instance":
            ours = [trusted(alone, trust) for trust in TRUST]
            with_clip = nearer_to_captions(alone)[0]
            found += [*ours, with_clip, with_crd(with_clip), with_stored(ours[0], FEWER_STORED[0])]
        elif alone.is_taught:
            found.append(alone)
    return found


def trusted(base: Setting, trust: float) -> Setting:
    """Return `fd-instance` with the weights that the default had where a repaired teacher was trusted so far."""
    fd, instance, clip = (base.weights[loss] for loss in ("fd", "instance", "clip"))
    weights = {"fd": fd * trust, "instance": 1 - (1 - instance) * trust, "clip": 1 - (1 - clip) * trust}
    return _changed(base, f"trust {trust:g}", weights=weights)


def with_stored(base: Setting, stored: int) -> Setting:
    """Return a setting that reads this many mixed views and texts."""
    return _changed(base, f"{stored} mixed views, {stored} texts", extras=EXTRAS, stored=stored)


def worth_storing(log: Log) -> list[Setting]:
    """Return `fd-instance` at its best trial with less stored for each pair."""
    base = tuned("fd-instance", log)
    fewest = _changed(base, f"{FEWER_STORED[0]} mixed views", extras=("mix",), stored=FEWER_STORED[0])
    return [*(with_stored(base, stored) for stored in FEWER_STORED), fewest]


def noisy(name: str, share: float, log: Log) -> Setting:
    """Return a recipe at its best trial on the pairs alone, with some captions exchanged."""
    return exchanged(dataclasses.replace(tuned(name, log), extras=()), share)


def exchanged(base: Setting, share: float) -> Setting:
    """Return a setting with some captions exchanged."""
    return _changed(base, f"{share:.0%} exchanged", noise=share, repair="auto")


def large_batches(name: str, log: Log) -> list[Setting]:
    """Return a recipe at its best weights in batches of 256, for as many samples, at each rate and twice the highest."""
    base = dataclasses.replace(tuned(name, log), batch_size=LARGE_BATCH, steps=STEPS * BATCH_SIZE // LARGE_BATCH)
    return [
        dataclasses.replace(base, name=f"{base.name}/batch{LARGE_BATCH}-lr{lr:g}", lr=lr)
        for lr in (*RATES[base.optimizer], 2 * max(RATES[base.optimizer]))
    ]


def cid_variants(log: Log) -> list[Setting]:
    """Return `cid` at its best trial with one thing changed at a time, the most asked-for first."""
    base = tuned("cid", log)
    changed = partial(_changed, base)

    def cluster_weight(value: float) -> Setting:
        weights = {**base.weights, "cluster": value * base.weights["instance"]}
        return changed(f"lambda-{value:g}", weights=weights)

    alone = {loss: weight for loss, weight in base.weights.items() if loss != "cluster"}
    few = (*base.flags, *FEW)
    return [
        changed("no cluster", weights=alone, clusters=None, flags=()),
        cluster_weight(1.0),
        cluster_weight(0.1),
        changed("image-towers", flags=("--cluster-towers", "image")),
        changed("image-features", clusters="image-256"),
        changed("project", flags=(*base.flags, "--teacher-space", "project")),
        changed("keep-single", keep="single"),
        changed("keep-star", keep="star"),
        changed("keep-random", keep="random"),
        changed("k-32", clusters="joint-32"),
        changed("k-512", clusters="joint-512"),
        changed("bank", clusters="image-all", flags=few),
        changed("alpha-0", flags=(*base.flags, "--label-share", "0")),
        changed("alpha-1", flags=(*base.flags, "--label-share", "1")),
        changed("perplexity-1.5", clusters=f"{CLUSTERS}-p1.5"),
        changed("perplexity-8", clusters=f"{CLUSTERS}-p8"),
        changed("k-512-ratio-0.1", clusters="joint-512", flags=few),
        changed("k-512-ratio-0.1-uncorrected", clusters="joint-512", flags=(*few, "--no-candidate-correction")),
    ]


def nearest_alone(log: Log) -> list[Setting]:
    """Return `cid` at its best trial, taught by all stored nearest centroids of a sample, then by fewer of them."""
    base = tuned("cid", log)
    return [_changed(base, f"nearest-{nearest}", clusters=f"{CLUSTERS}-m{nearest}") for nearest in NEAREST]


def phases(log: Log) -> Iterator[list[Run]]:
    """Yield lists of runs; each is made only when those before are in `log`, which tells the best trials."""
    yield from _tried(MAIN, log)
    yield _seeds((tuned(name, log) for name in CONTENDERS), SEEDS)
    yield _seeds((tuned(name, log) for name in MAIN), FIRST_SEEDS)
    yield _seeds(left_out(log), FIRST_SEEDS)
    yield _seeds([*nearer_to_captions(tuned("fd-instance", log)), with_clip_alone(log)], FIRST_SEEDS)
    yield _seeds((setting for name in SCALED for setting in large_batches(name, log)), SEEDS[:1])
    yield _seeds((longer(name, log) for name in SCALED), SEEDS[:1])
    yield from _tried(NEW, log)
    yield _seeds((tuned(name, log) for name in NEW), FIRST_SEEDS)
    # The first rate of each, then the second; the third can wait.
    *first, last = zip(*(large_students(name, log) for name in SCALED), strict=True)
    yield _seeds((setting for of_each in first for setting in of_each), SEEDS[:1])
    yield from _tried(REST, log)
    yield _seeds((tuned(name, log) for name in REST), FIRST_SEEDS)
    yield _seeds(further_changes(log), FIRST_SEEDS)
    yield _seeds(last, SEEDS[:1])
    yield _seeds((longer(name, log) for name in SCALED), FIRST_SEEDS)
    yield _seeds((best(large_students(name, log), log) for name in SCALED), FIRST_SEEDS)
    yield _seeds(cid_variants(log), FIRST_SEEDS)
    yield _seeds(nearest_alone(log), FIRST_SEEDS)
    yield _seeds(worth_storing(log), FIRST_SEEDS)
    yield _seeds((noisy(name, share, log) for share in NOISE for name in SCALED), SEEDS[:1])
    yield _seeds((exchanged(with_clip_alone(log), share) for share in NOISE), SEEDS[:1])
    tried = with_crd(with_clip_alone(log))
    yield _seeds([tried], FIRST_SEEDS)
    yield _seeds((exchanged(tried, share) for share in NOISE), SEEDS[:1])


def photographs(log: Log, drawings: Log) -> Iterator[list[Run]]:
    """Yield the runs on photographs: trials of the rates, and the best with each of the first seeds."""
    settings = {name: photograph_students(name, drawings) for name in SCALED}
    yield _seeds((setting for of in settings.values() for setting in of), SEEDS[:1])
    yield _seeds((best(of, log) for of in settings.values()), FIRST_SEEDS)
    yield _seeds(repaired(log, drawings), FIRST_SEEDS)
    yield _seeds(photograph_changes(log, drawings), FIRST_SEEDS)


def quick() -> Iterator[list[Run]]:
    """Yield a few runs of every kind, to prove that the recipe works."""
    names = ("clip", "clip-kd", "fd-instance", "cid", "mfd", "gd", "afd", "clip-td")
    yield _seeds((rates_tried(name)[0] for name in names), SEEDS[:1])
    chosen = ("no mix", "with cluster", "no cluster", "keep-random", "perplexity-8", "bank")
    variants = [*left_out({}), *further_changes({}), *cid_variants({})]
    yield _seeds((setting for setting in variants if setting.name.rsplit("/", 1)[1] in chosen), SEEDS[:1])
    yield _seeds((large_students("cid", {})[0], large_batches("clip-kd", {})[0], longer("clip", {})), SEEDS[:1])


def _tried(names: Iterable[str], log: Log) -> Iterator[list[Run]]:
    """Yield the trials of some recipes, first those of the rate; the first of each recipe, then the second, and so on."""
    chosen = tuple(names)
    for settings in (map(rates_tried, chosen), (trials(name, log) for name in chosen)):
        yield [Run(setting, SEEDS[0]) for of_each in zip(*settings, strict=True) for setting in of_each]


def _seeds(settings: Iterable[Setting], seeds: Iterable[int]) -> list[Run]:
    chosen = list(settings)
    return [Run(setting, seed) for seed in seeds for setting in chosen]
