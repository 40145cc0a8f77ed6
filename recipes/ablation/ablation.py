"""Train and measure what `plan.py` lists: python ablation.py --work DIRECTORY [--quick | --photographs …] (see run.sh).

Every run is a `clipcid distill`. Finished ones are in the log, with what each held-out image gave, and are not done
again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import inputs
import photographs
import plan
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
# Linear probes are fitted after each phase from this one on: by then rates and weights are chosen.
PROBED_FROM = 2
QUICK_STEPS = 40
# Students measured by one process: starting it costs as much as measuring three of them.
GROUP = 4


class Log:
    """The log: a JSON line for each finished run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.entries: dict[str, dict[str, Any]] = {entry["run"]: entry for entry in map(json.loads, lines)}

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; one of the same run is replaced when the log is read."""
        self.entries[entry["run"]] = entry
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


class Ablation:
    """The whole of it in one work directory.

    Attributes:
        phases: Returns the lists of runs, as the log stands when each is asked for.
    """

    def __init__(
        self,
        made: inputs.Inputs,
        log: Log,
        phases: Callable[[], Iterator[list[plan.Run]]],
        jobs: int,
        *,
        is_quick: bool,
    ) -> None:
        self.inputs, self.work, self.log, self.phases = made, made.work, log, phases
        self.jobs, self.is_quick = jobs, is_quick
        self.about = {"commit": commit(), "machine": machine()}

    def run(self) -> None:
        """Do all runs that are not in the log, phase by phase."""
        self.inputs.prepare()
        self.measure_teacher()
        for number, phase in enumerate(self.phases(), 1):
            left = self.left(phase)
            say(f"phase {number}: {len(phase)} runs, {len(left)} left")
            for group in chunks(left, GROUP):
                self.do(group)
                say(self.estimate())
            if number >= PROBED_FROM:
                self.probe()

    def left(self, runs: Iterable[plan.Run]) -> list[plan.Run]:
        """Return the runs that are not in the log, each once."""
        return list({run.name: run for run in runs if run.name not in self.log.entries}.values())

    def estimate(self) -> str:
        """Say how much is left of the whole plan, if the trials that are best now stay so."""
        left = self.left(run for phase in self.phases() for run in phase)
        spent = [(entry["samples"], entry["took"]) for entry in self.log.entries.values() if "took" in entry]
        samples, seconds = (sum(column) for column in zip(*spent, strict=True))
        # A student of the larger kind takes longer; how much is seen when the first is trained.
        hours = sum(self.samples(run.setting) for run in left) * seconds / samples / self.jobs / 3600
        return f"{len(left)} runs left in all, about {hours:.1f} h"

    def steps(self, setting: plan.Setting) -> int:
        """Return the steps of a setting's runs."""
        return QUICK_STEPS if self.is_quick else setting.steps

    def samples(self, setting: plan.Setting) -> int:
        """Return how many samples a run shows."""
        return self.steps(setting) * setting.batch_size

    def do(self, group: list[plan.Run]) -> None:
        """Train and measure some runs."""
        # Clusters and embeddings are shared: made before the runs that read them start side by side.
        for setting in {run.setting.name: run.setting for run in group}.values():
            if setting.clusters is not None:
                self.inputs.clusters(setting)
            self.inputs.embeddings_of(setting)
        with ThreadPoolExecutor(self.jobs) as pool:
            trained = dict(zip([run.name for run in group], pool.map(self.train, group), strict=True))
            parts = [part for part in (group[start :: self.jobs] for start in range(self.jobs)) if part]
            for part, measured in zip(parts, pool.map(self.measure, parts), strict=True):
                for run in part:
                    self.log.add(describe(run) | trained[run.name] | measured[run.name] | self.about)

    def train(self, run: plan.Run) -> dict[str, Any]:
        """Train one student."""
        setting, steps, started = run.setting, self.steps(run.setting), time.monotonic()
        arguments: list[object] = [
            self.inputs.pairs_of(setting), "--student", HERE / f"{setting.student}.json", "--preset", "clip", "--keep-list",
            self.inputs.keep_list(setting.keep), "--optimizer", setting.optimizer,
            "--lr", setting.lr, "--steps", steps, "--batch-size", setting.batch_size,
            "--val-fraction", 0, "--checkpoint-every", steps, "--seed", run.seed, "--work", self.work,
            "--name", folder_name(run), *setting.flags,
        ]  # fmt: skip
        for name, weight in {"clip": 0.0, **setting.weights}.items():
            arguments += ["--loss", f"{name}={weight:.6g}"]
        if setting.is_taught:
            arguments += ["--teacher", self.inputs.teacher, "--embeddings", self.inputs.embeddings_of(setting)]
            arguments += ["--repair", setting.repair]
            arguments += ["--extra-texts", setting.batch_size if "texts" in setting.extras else 0]
        if setting.clusters is not None:
            arguments += ["--clusters", self.inputs.clusters(setting)]
        result = inputs.clipcid("distill", *arguments)
        say(f"{run.name}: {result['samples_per_second']:.0f} samples/s, losses {result['losses']}")
        return {
            "repair": result.get("repair"),
            "losses": result["losses"],
            "steps": steps,
            "batch_size": setting.batch_size,
            "samples": self.samples(setting),
            "took": round(time.monotonic() - started, 1),
            "seconds": result["seconds"],
            "samples_per_second": result["samples_per_second"],
        }

    def measure(self, runs: list[plan.Run]) -> dict[str, dict[str, Any]]:
        """Measure students of several runs in one process."""
        models = [self.work / "distill" / folder_name(run) / "student" for run in runs]
        found = self.evaluate(models, folder_name(runs[0]))
        for entry in found:
            for items in entry["items"].values():
                # The teacher's line has them.
                del items["keys"]
        for run, entry in zip(runs, found, strict=True):
            metrics = entry["metrics"]
            say(f"{run.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        return {run.name: entry for run, entry in zip(runs, found, strict=True)}

    def measure_teacher(self) -> None:
        """Measure the teacher once."""
        if "teacher" not in self.log.entries:
            found = self.evaluate([self.inputs.teacher], "teacher")[0]
            found["keys"] = {name: items.pop("keys") for name, items in found["items"].items()}
            self.log.add({"run": "teacher", "setting": "teacher", "seed": 0} | found | self.about)

    def evaluate(self, models: list[Path], name: str) -> list[dict[str, Any]]:
        """Return for each model its metrics, and what each image gave, on every set."""
        flags = [flag for model in models for flag in ("--model", model)]
        sets = [self.work / "sets" / name for name in self.inputs.sets]
        work = self.work / "evaluated" / name
        # The first positional is the model, so the first model is given there.
        answer = inputs.clipcid(
            "eval-zeroshot", models[0], *sets, *flags[2:], "--bootstrap", 0, "--predictions", "--work", work
        )
        results = iter(answer.get("results", [answer]))  # one alone is the whole answer
        found = []
        for _ in models:
            entry: dict[str, Any] = {"metrics": {}, "items": {}}
            for dataset in self.inputs.sets:
                result = next(results)
                side, what, _ = dataset.split("-")
                entry["metrics"] |= {
                    f"{side} {what} {name}": value for name, value in named_metrics(result["metrics"]).items()
                }
                if side != "tune":
                    entry["items"][dataset] = read_items(Path(result["files"]["predictions"]))
            found.append(entry)
        return found

    def probe(self) -> None:
        """Fit linear probes on the students of the tuned presets, and on the teacher's features."""
        settings = self.inputs.probed(self.log.entries)
        names = [plan.Run(setting, seed).name for seed in plan.SEEDS for setting in settings]
        wanted = [name for name in dict.fromkeys(["teacher", *names]) if name in self.log.entries]
        left = [name for name in wanted if self.inputs.probe_name not in self.log.entries[name]["metrics"]]
        gone = [name for name in left if not self.model(name).is_dir()]
        if gone:
            say(
                f"no probe for {', '.join(gone)}: trained in another work directory; to train again, take out of the log"
            )
        left = [name for name in left if name not in gone]
        with ThreadPoolExecutor(self.jobs) as pool:
            for name, value in zip(left, pool.map(self.fit_probe, left), strict=True):
                entry = self.log.entries[name]
                self.log.add(entry | {"metrics": entry["metrics"] | {self.inputs.probe_name: value}})

    def model(self, name: str) -> Path:
        """Return the folder of a run's student, or of the teacher."""
        return self.inputs.teacher if name == "teacher" else self.work / "distill" / as_folder(name) / "student"

    def fit_probe(self, name: str) -> float:
        """Return the accuracy of a linear probe on the report split's images."""
        result = inputs.clipcid(
            "eval-linear", self.model(name), "--train", self.inputs.probe_train, "--test", self.inputs.probe_test,
            "--work", self.work / "probed" / as_folder(name),
        )  # fmt: skip
        value = float(result["metrics"]["lp_acc1"])
        say(f"{name}: probe {value:.3f}")
        return value


def folder_name(run: plan.Run) -> str:
    """Return the run's name as one folder's."""
    return as_folder(run.name)


def as_folder(name: str) -> str:
    """Return a name without what folders cannot have in theirs."""
    return name.replace("/", "-").replace(" ", "-")


def describe(run: plan.Run) -> dict[str, Any]:
    """Return what a run is, as JSON values."""
    setting = run.setting
    return {
        "run": run.name,
        "setting": setting.name,
        "seed": run.seed,
        "weights": {name: round(weight, 4) for name, weight in setting.weights.items()},
        "optimizer": setting.optimizer,
        "lr": setting.lr,
        "extras": list(setting.extras),
        "stored": setting.stored,
        "student": setting.student,
        "keep": setting.keep,
        "clusters": setting.clusters,
        "noise": setting.noise,
        "flags": list(setting.flags),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def named_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that are reported, under short names; retrieval is the mean of both directions."""
    if "acc1" in metrics:
        return {"acc1": metrics["acc1"]}
    return {
        f"R@{k}": (metrics[f"image_retrieval_recall@{k}"] + metrics[f"text_retrieval_recall@{k}"]) / 2 for k in (1, 10)
    }


def read_items(path: Path) -> dict[str, Any]:
    """Return keys, and for each its ranks (retrieval) or whether the first class was right (classification)."""
    table = pq.read_table(path).sort_by("key")
    keys = table["key"].to_pylist()
    if "text_rank" in table.column_names:
        ranks = [ranks[0] for ranks in table["image_ranks"].to_pylist()]
        return {"keys": keys, "image_ranks": ranks, "text_ranks": table["text_rank"].to_pylist()}
    right = zip(table["label"].to_pylist(), table["predicted"].to_pylist(), strict=True)
    return {"keys": keys, "right": "".join("1" if label == predicted else "0" for label, predicted in right)}


def chunks(runs: list[plan.Run], size: int) -> Iterator[list[plan.Run]]:
    """Cut a list into lists of at most `size`."""
    for start in range(0, len(runs), size):
        yield runs[start : start + size]


def commit() -> str:
    """Return the commit this runs from, marked when files of the package differ from it."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", ":/clipcid_cli"], capture_output=True, text=True).stdout
    return f"{head}+changes" if changed.strip() else head


def machine() -> str:
    """Name the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{os.cpu_count()} cores of {name}, one thread a run"


def say(text: str) -> None:
    """Print at once, with the time."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=HERE / "log.jsonl")
    parser.add_argument("--quick", action="store_true", help="few runs of few steps, to prove that it works")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--photographs",
        type=Path,
        nargs=3,
        metavar=("TRAIN", "TUNE", "TEST"),
        help="folders of classes instead of drawings",
    )
    given = parser.parse_args()
    log = Log(given.log)
    made, phases = inputs.Inputs(given.work), partial(plan.phases, log.entries)
    if given.photographs:
        drawings = Log(HERE / "log.jsonl").entries
        made = photographs.Photographs(given.work, *given.photographs, drawings)
        phases = partial(plan.photographs, log.entries, drawings)
    elif given.quick:
        phases = partial(plan.quick)
    ablation = Ablation(made, log, phases, given.jobs, is_quick=given.quick)
    ablation.run()
    ablation.probe()


if __name__ == "__main__":
    main()
