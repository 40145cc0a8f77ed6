"""Which losses and which rate, before a long run: each tried for a twentieth of its steps, on its own data.

    python recipes/pilot/pilot.py --steps 100000 --student ViT-B-32 --batch-size 4096
    python recipes/pilot/pilot.py --launch 'torchrun --nproc-per-node 8 -m clipcid_cli' --steps 100000 --student ViT-B-32

What it does not know itself goes to `clipcid distill` (data, teacher, ...). Presets `clip-kd` (the default), `fd-instance`,
`cid` and `clip` at half the default rate, at it and at twice that; all are compared with the best on the held-out pairs, and
the last line is the command to go on with. Stop it when you like: the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from typing import Any

FRACTION = 0.05
FACTORS = (1.0, 0.5, 2.0)  # the default first, which tells its rate
PRESETS = ("clip-kd", "fd-instance", "cid", "clip")
RECALLS = ("image_retrieval_recall@1", "text_retrieval_recall@1")


@dataclasses.dataclass
class Run:
    """A trial that has ended.

    Attributes:
        factor: Of the default rate.
        measured: What `eval-zeroshot` says of the student on the held-out pairs, or `distill` where it cannot read them.
        behind: What `eval-zeroshot --compare` says of it beside the best one, by metric; empty for that one itself.
    """

    preset: str
    factor: float
    lr: float
    student: str
    samples_per_second: float
    measured: dict[str, Any]
    behind: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def recall(self) -> float:
        """Recall@1 on the held-out pairs, mean of image and text."""
        return sum(float(self.measured["metrics"][name]) for name in RECALLS) / 2


def main() -> None:
    """Run what is left to run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True, help="of the long run")
    parser.add_argument("--fraction", type=float, default=FRACTION, help="of these, for each trial")
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument(
        "--factors", type=float, nargs="+", default=FACTORS, help="of the default rate; 1 is always tried"
    )
    parser.add_argument("--launch", default="clipcid", help="how clipcid is started")
    parser.add_argument("--work", help="work directory")
    arguments, further = parser.parse_known_args()
    steps = max(1, round(arguments.fraction * arguments.steps))
    work = [] if arguments.work is None else ["--work", arguments.work]
    distill = [*shlex.split(arguments.launch), "distill", *further, *work]
    runs: list[Run] = []
    for preset in arguments.presets:
        trial = [*distill, "--preset", preset, "--steps", str(steps)]
        default = try_out(trial, preset)
        if default is not None:
            others = [try_out(trial, preset, factor, default.lr) for factor in arguments.factors if factor != 1]
            runs += [default, *(run for run in others if run is not None)]
    if not runs:
        raise SystemExit("No trial succeeded; their errors are above.")
    compare(runs, [*shlex.split(arguments.launch), "eval-zeroshot", *work])
    show(runs, steps)
    print(warn(runs), end="")
    best = runs[0]
    command = [*distill, "--preset", best.preset, "--lr", f"{best.lr:g}", "--steps", str(arguments.steps)]
    print(f"Go on with: {shlex.join(command)}")


def try_out(trial: list[str], preset: str, factor: float = 1.0, default: float | None = None) -> Run | None:
    """Train one student, or read what was trained; None where `distill` fails, which says why."""
    rate = [] if default is None else ["--lr", f"{factor * default:g}"]
    answer = ask([*trial, *rate, "--name", f"pilot-{preset}-x{factor:g}"])
    if answer is None:
        return None
    with open(answer["files"]["sidecar"], encoding="utf-8") as file:
        sidecar = json.load(file)
    if not answer["metrics"]:
        raise SystemExit("distill held out too few pairs to compare students by: raise --val-fraction.")
    measured = {"metrics": answer["metrics"]}
    return Run(preset, factor, sidecar["settings"]["lr"], answer["student"], answer["samples_per_second"], measured)


def compare(runs: list[Run], evaluate: list[str]) -> None:
    """Measure all students on what their runs held out, sort them, and compare each with the best."""
    models = [word for run in runs for word in ("--model", run.student)]
    answer = ask([*evaluate, *models, "--predictions"])
    if answer is not None:
        for run, measured in zip(runs, answer.get("results", [answer]), strict=True):
            run.measured = measured
    runs.sort(key=lambda run: -run.recall)
    if answer is None:  # of data that only a flag of `distill` opens
        print(
            "The students are compared by what distill measured, without intervals; the error is above.",
            file=sys.stderr,
        )
        return
    best, *others = runs
    for run in others:
        files = [one.measured["files"]["metrics"] for one in (best, run)]
        compared = ask([*evaluate, "--compare", *files])
        if compared is None:
            raise SystemExit("The students could not be compared; the error is above.")
        run.behind = compared["differences"]


def ask(command: list[str]) -> dict[str, Any] | None:
    """Run a command and return its answer; None where it fails, which it has said why."""
    command = [*command, "--json"]
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    answer: dict[str, Any] | None = None if done.returncode else json.loads(done.stdout)
    return answer


def show(runs: list[Run], steps: int) -> None:
    """Print the table, the best first."""
    images = runs[0].measured.get("images")
    pairs = "held-out pairs" if images is None else f"{images:,} held-out pairs"
    print(f"\n{steps:,} steps each; R@1 in % on {pairs}, and how far it is from the best trial's")
    print("(95 % interval over the pairs, by eval-zeroshot --compare)\n")
    print("| preset | rate | image R@1 | from the best | text R@1 | from the best | samples/s |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        cells = [run.preset, f"{run.lr:g} (× {run.factor:g})"]
        for name in RECALLS:
            cells += [f"{100 * run.measured['metrics'][name]:.2f}", describe(run.behind.get(name))]
        print(f"| {' | '.join([*cells, f'{run.samples_per_second:,.0f}'])} |")
    print()


def describe(judged: dict[str, Any] | None) -> str:
    """Write a difference with its interval, in points; of the best trial itself there is none."""
    if judged is None:
        return "–"
    low, high = judged["interval"]
    return f"{100 * judged['difference']:+.2f} ({100 * low:+.2f} … {100 * high:+.2f})"


def warn(runs: list[Run]) -> str:
    """Say what the trials leave open."""
    best = runs[0]
    told = ""
    factors = [run.factor for run in runs if run.preset == best.preset]
    if len(factors) > 1 and best.factor in (min(factors), max(factors)):
        beyond = best.factor * (0.5 if best.factor == min(factors) else 2.0)
        told += (
            f"No rate beyond {best.lr:g} was tried: add --presets {best.preset} --factors {best.factor:g} {beyond:g}\n"
        )
    compared = [run for run in runs if run.behind]
    near = {run.preset for run in compared if not any(run.behind[name]["real"] for name in RECALLS)}
    if rivals := sorted(near - {best.preset}):
        pairs = best.measured["images"]
        told += f"{pairs:,} pairs cannot tell {best.preset} from {', '.join(rivals)}: see --val-fraction.\n"
    return told + "Each trial is one seed: this compares checkpoints, and another seed may order near ones otherwise.\n"


if __name__ == "__main__":
    main()
