"""Train on all pairs and on fewer, and tell what that costs: python claim.py --work DIRECTORY [--quick] (see run.sh).

Runs and log are those of the ablation; here are the data and the subsets of it, in claim_table.py the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).resolve().parent.parent / "ablation"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablation
import inputs
import plan
import purity
from claim_table import DRAWINGS, METHODS, PAPER, PLANTED, tabulate

HERE = Path(__file__).resolve().parent
ABLATION = HERE.parent / "ablation"
FOREIGN = HERE.parent / "foreign-teacher"
PAIRS, QUICK_PAIRS, STEPS = 20_000, 2_000, 600
PHOTOGRAPH_PAIRS, PHOTOGRAPH_SIZE = 4_500, 224
SEEDS = (0, 1, 2)
# What is within this distance of an image that students are measured on is never trained on.
AGAINST = 0.3
CURVE_POINTS = 6


class Web(inputs.Inputs):
    """Pairs that repeat, and which of them each method keeps.

    Attributes:
        watched: The evaluation set that students are measured on while they learn.
    """

    watched = DRAWINGS
    sets = tuple(f"report-{what}-{task}" for what in ("concepts", "drawings") for task in ("retrieval", "classes"))

    def __init__(self, work: Path, num_pairs: int = PAIRS) -> None:
        super().__init__(work)
        self.num_pairs = num_pairs
        self.pairs = work / "web"
        self.references = [work / "sets" / each / "test" for each in self.sets]

    def make(self) -> None:
        """Make the pairs."""
        inputs.cut_sets(self.work)
        self.repeat(self.work / "pairs")

    def repeat(self, sources: Path, *flags: str) -> None:
        """Make pairs of some sources, unless that is done."""
        if not self.pairs.exists():
            command = [sys.executable, HERE / "make.py", sources, self.pairs, "--pairs", str(self.num_pairs)]
            subprocess.run([*command, *flags], check=True)

    def prepare(self) -> None:
        """Make the pairs, embed them, and choose the subsets of those that are not near an evaluation set."""
        self.make()
        inputs.clipcid("embed", self.pairs, "--model", self.teacher, "--work", self.work)
        self.choose("all", "single", 1.0)
        for share in (PLANTED, PAPER):
            for method in METHODS:
                self.choose(f"{method}-{share}", method, self.share(share))
        self.choose(f"best-caption-{PLANTED}", "single", self.share(PLANTED), "--select", "similarity")

    def choose(self, name: str, method: str, share: float, *flags: str) -> None:
        """Choose a subset by a method, unless that is done."""
        if Path(self.keep_list(name)).exists():
            return
        if method in ("single", "star"):
            self.balance(name, share, "--linkage", method, *flags)
        else:
            self.apply(name, purity.semdedup if method == "semdedup" else purity.remove_randomly, share)

    def balance(self, name: str, share: float, *flags: str) -> None:
        """Run `clipcid balance`."""
        references = [flag for reference in self.references for flag in ("--against", reference)]
        inputs.clipcid(
            "balance", "--embeddings", self.embeddings, "--keep", f"{share:.6f}", *references,
            "--against-threshold", AGAINST, *flags, "--work", self.work / "kept" / name,
        )  # fmt: skip

    def apply(self, name: str, rule: Callable[[np.ndarray, int, int], np.ndarray], share: float) -> None:
        """Write the keep list of a rule, which returns for each row the kept row that stands for it."""
        keys, rows = purity.read_embeddings(self.embeddings)
        keep = pd.read_parquet(self.keep_list("all"), columns=["key", "kept"]).set_index("key").loc[keys].reset_index()
        far = np.flatnonzero(keep["kept"])
        stands_for = far[rule(rows[far], round(share * len(far)), 0)]
        keep["kept"] = np.isin(np.arange(len(keep)), stands_for)
        keep.loc[far, "representative"] = keep["key"].to_numpy()[stands_for]
        path = Path(self.keep_list(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        keep.to_parquet(path)

    def keep_list(self, name: str) -> str:
        """Return where a subset's keep list is."""
        return str(self.work / "kept" / name / "balance" / "keep.parquet")

    def truth(self) -> pd.DataFrame:
        """Return the truth about the pairs that are not near an evaluation set, by key."""
        truth = pd.read_parquet(self.pairs.with_suffix(".parquet")).set_index("key")
        keep = pd.read_parquet(self.keep_list("all"))
        return truth.loc[keep["key"][keep["kept"]]]

    def share(self, name: str) -> float:
        """Return the share that a name stands for."""
        if name != PLANTED:
            return float(name)
        truth = self.truth()
        return truth["picture"].nunique() / len(truth)

    def describe(self) -> dict[str, Any]:
        """Return what the pairs and the subsets are, and how many pairs show each concept."""
        truth = self.truth()
        counts = Counter(concept.lower() for concepts in truth["concepts"] for concept in set(concepts))
        subsets = {name: judged(pd.read_parquet(self.keep_list(name)), truth) for name in subset_names()}
        return {"pairs": len(truth), "frequency": dict(counts), "subsets": subsets}


class Photographs(Web):
    """The same of photographs, with the teacher of recipes/foreign-teacher."""

    watched = "report-photographs-classes"
    sets = (watched,)

    def __init__(self, work: Path, train: Path, test: Path) -> None:
        """Take two folders of one folder per class."""
        super().__init__(work, PHOTOGRAPH_PAIRS)
        self.teacher = FOREIGN / "teacher"
        self.train, self.references = train, [test.resolve()]

    def make(self) -> None:
        """Build the teacher, link the set under its name, and make the pairs."""
        subprocess.run(["bash", FOREIGN / "teacher.sh"], check=True)
        link = self.work / "sets" / self.watched
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(self.references[0])
        self.repeat(self.train, "--size", str(PHOTOGRAPH_SIZE))


class Claim(ablation.Ablation):
    """The runs, with R@1 or accuracy on the way."""

    def train(self, run: plan.Run) -> dict[str, Any]:
        """Train one student, and read how it improved."""
        trained = super().train(run)
        lines = (self.work / "distill" / ablation.folder_name(run) / "results.jsonl").read_text().splitlines()
        curve = {}
        for point in map(json.loads, lines):
            values = [value for name, value in point.items() if name.endswith(("retrieval_recall@1", "/acc1"))]
            curve[point["step"]] = float(np.mean(values))
        return trained | {"curve": curve}


def subset_names() -> list[str]:
    """Return the names of all subsets."""
    return [
        "all",
        *(f"{method}-{share}" for share in (PLANTED, PAPER) for method in METHODS),
        f"best-caption-{PLANTED}",
    ]


def judged(keep: pd.DataFrame, truth: pd.DataFrame) -> dict[str, float]:
    """Return what a keep list keeps, beside the planted truth."""
    keep = keep[keep["key"].isin(truth.index)]
    picture = truth["picture"].loc[keep["key"]].to_numpy()
    kept = keep["kept"].to_numpy()
    figures = {
        "kept": int(kept.sum()),
        "left": len(set(picture[kept])) / truth["picture"].nunique(),
        "repeats": 1 - len(set(picture[kept])) / int(kept.sum()),
        "wrong": float(truth["is_wrong"].loc[keep["key"]].to_numpy()[kept].mean()),
    }
    if not kept.all():
        instead = truth["picture"].loc[keep["representative"]].to_numpy()
        sets = pd.DataFrame({"set": keep["representative"].to_numpy(), "picture": picture}).groupby("set")["picture"]
        sizes = sets.size()
        most = sets.agg(lambda pictures: pictures.value_counts().iloc[0])
        figures["right"] = float((instead == picture)[~kept].mean())
        figures["purity"] = float(most[sizes > 1].sum() / sizes[sizes > 1].sum())
    return figures


def settings(log: plan.Log, web: Web) -> Iterator[list[plan.Setting]]:
    """Yield settings, the most telling first, at the rates and weights that were best in the ablation."""

    def on(loss: str, keep: str, steps: int = STEPS) -> plan.Setting:
        base = dataclasses.replace(plan.tuned(loss, log), extras=())
        name = f"{loss}/{keep}" + ("" if steps == STEPS else "/equal epochs")
        return watched(dataclasses.replace(base, name=name, keep=keep, steps=steps), web, STEPS)

    def planted(loss: str, *methods: str, steps: int = STEPS) -> list[plan.Setting]:
        return [on(loss, f"{method}-{PLANTED}", steps) for method in methods]

    def paper(loss: str, *methods: str) -> list[plan.Setting]:
        return [on(loss, f"{method}-{PAPER}") for method in methods]

    equal_epochs = round(STEPS * web.share(PLANTED))
    yield [on("fd-instance", "all"), *planted("fd-instance", *METHODS)]
    yield [on("clip", "all"), *planted("clip", "single", "random")]
    yield planted("fd-instance", "single", steps=equal_epochs)
    yield paper("fd-instance", "single")
    yield planted("fd-instance", "random", steps=equal_epochs)
    yield [on("cid", "all"), *planted("cid", "single", "random")]
    yield planted("clip", "star", "semdedup", "best-caption")
    yield planted("clip", "single", "random", steps=equal_epochs)
    yield paper("fd-instance", "star", "semdedup", "random")
    yield paper("clip", *METHODS)
    yield planted("cid", "star", "semdedup")
    yield paper("cid", *METHODS)


def photograph_settings(drawings: plan.Log, log: plan.Log, web: Web) -> Iterator[list[plan.Setting]]:
    """Yield settings of students of photographs, at the rates and weights that were best in the ablation."""
    ours = next(each for each in plan.repaired(log, drawings) if {"fd", "instance"} <= each.weights.keys())
    clip = plan.best(plan.photograph_students("clip", drawings), log)

    def on(base: plan.Setting, keep: str) -> plan.Setting:
        loss = "fd-instance" if base is ours else "clip"
        return watched(dataclasses.replace(base, name=f"{loss}/{keep}", keep=keep), web, base.steps)

    yield [on(ours, "all"), *(on(ours, f"{method}-{PLANTED}") for method in METHODS)]
    yield [on(clip, "all"), on(clip, f"single-{PLANTED}"), on(clip, f"random-{PLANTED}")]


def watched(setting: plan.Setting, web: Web, steps: int) -> plan.Setting:
    """Return a setting whose students are measured on their way through so many steps."""
    flags = ("--eval-data", str(web.work / "sets" / web.watched), "--eval-every", str(steps // CURVE_POINTS))
    return dataclasses.replace(setting, flags=(*setting.flags, *flags))


def runs(settings: Iterable[list[plan.Setting]], *, is_quick: bool) -> Iterator[list[plan.Run]]:
    """Yield all runs as one phase: all seeds of some settings, then of the next; two settings of each where it is quick."""
    groups = list(settings)
    if is_quick:
        yield [plan.Run(setting, SEEDS[0]) for group in groups for setting in group[:2]]
    else:
        yield [plan.Run(setting, seed) for group in groups for seed in SEEDS for setting in group]


def main() -> None:
    """Do the runs that the log lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="default: log.jsonl, photographs.jsonl, here")
    parser.add_argument("--quick", action="store_true", help="few pairs and steps, to prove that it works")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--tables", action="store_true", help="only print the tables of what the log holds")
    parser.add_argument(
        "--photographs",
        type=Path,
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="folders of classes instead of drawings",
    )
    given = parser.parse_args()
    log = ablation.Log(given.log or HERE / ("photographs.jsonl" if given.photographs else "log.jsonl"))
    if not given.tables:
        drawings = ablation.Log(ABLATION / "log.jsonl").entries
        web: Web
        if given.photographs:
            web = Photographs(given.work, *given.photographs)
            photographs = ablation.Log(ABLATION / "photographs.jsonl").entries
            choose = partial(photograph_settings, drawings, photographs, web)
        else:
            web = Web(given.work, QUICK_PAIRS if given.quick else PAIRS)
            choose = partial(settings, drawings, web)
        web.prepare()
        data = {"run": "data", "setting": "data", "seed": 0} | web.describe()
        if log.entries.get("data") != data:
            log.add(data)
        Claim(web, log, lambda: runs(choose(), is_quick=given.quick), given.jobs, is_quick=given.quick).run()
    print("\n".join(tabulate(log.entries)))


if __name__ == "__main__":
    main()
