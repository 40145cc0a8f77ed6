"""Which losses and which rate, before a long run: each tried for a twentieth of its steps, on its own data.

    python recipes/pilot/pilot.py --steps 100000 --student ViT-B-32 --batch-size 4096
    python recipes/pilot/pilot.py --launch 'torchrun --nproc-per-node 8 -m clipcid_cli' --steps 100000 --student ViT-B-32

What it does not know itself goes to `clipcid distill` (data, teacher, work directory, ...). Presets `fd-instance` (the
default), `cid` and `clip` at half the default rate, at it and at twice that; the last line is the command to go on with.
Stop it when you like: the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import subprocess
import sys

FRACTION = 0.05
FACTORS = (1.0, 0.5, 2.0)  # the default first, which tells its rate
MEASURED = 5_000  # held-out pairs that distill looks at, if there are as many
PRESETS = ("fd-instance", "cid", "clip")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trial that has ended.

    Attributes:
        factor: Of the default rate.
        recall: Recall@1 on the held-out samples, mean of image and text.
        images: How many are held out.
    """

    preset: str
    factor: float
    lr: float
    recall: float
    images: int
    samples_per_second: float

    @property
    def error(self) -> float:
        """Standard error of the recall, as of that many independent answers."""
        return math.sqrt(self.recall * (1 - self.recall) / self.images)


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
    arguments, further = parser.parse_known_args()
    steps = max(1, round(arguments.fraction * arguments.steps))
    distill = [*shlex.split(arguments.launch), "distill", *further]
    runs: list[Run] = []
    for preset in arguments.presets:
        trial = [*distill, "--preset", preset, "--steps", str(steps)]
        default = try_out(trial, preset)
        if default is not None:
            others = [try_out(trial, preset, factor, default.lr) for factor in arguments.factors if factor != 1]
            runs += [default, *(run for run in others if run is not None)]
    if not runs:
        raise SystemExit("No trial succeeded; their errors are above.")
    runs.sort(key=lambda run: -run.recall)
    show(runs, steps)
    print(warn(runs), end="")
    best = runs[0]
    command = [*distill, "--preset", best.preset, "--lr", f"{best.lr:g}", "--steps", str(arguments.steps)]
    print(f"Go on with: {shlex.join(command)}")


def try_out(trial: list[str], preset: str, factor: float = 1.0, default: float | None = None) -> Run | None:
    """Train one student, or read what was trained; None where `distill` fails, which says why."""
    rate = [] if default is None else ["--lr", f"{factor * default:g}"]
    command = [*trial, *rate, "--name", f"pilot-{preset}-x{factor:g}", "--json"]
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    answer = json.loads(done.stdout)
    with open(answer["files"]["sidecar"], encoding="utf-8") as file:
        sidecar = json.load(file)
    if not answer["metrics"]:
        raise SystemExit("distill held out too few pairs to compare students by: raise --val-fraction.")
    recalls = [answer["metrics"][f"{kind}_retrieval_recall@1"] for kind in ("image", "text")]
    images = min(sidecar["counts"]["held_out"], MEASURED)
    return Run(preset, factor, sidecar["settings"]["lr"], sum(recalls) / 2, images, answer["samples_per_second"])


def show(runs: list[Run], steps: int) -> None:
    """Print the table, the best first."""
    print(f"\n{steps:,} steps each; R@1 in % on {runs[0].images:,} held-out pairs, mean of image and text\n")
    print("| preset | rate | R@1 | samples/s |\n|---|---|---|---|")
    for run in runs:
        recall = f"{100 * run.recall:.2f} ± {196 * run.error:.2f}"
        print(f"| {run.preset} | {run.lr:g} (× {run.factor:g}) | {recall} | {run.samples_per_second:,.0f} |")
    print()


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
    near = {run.preset for run in runs if best.recall - run.recall < 1.96 * math.hypot(best.error, run.error)}
    if rivals := sorted(near - {best.preset}):
        told += f"{best.images:,} pairs cannot tell {best.preset} from {', '.join(rivals)}: see --val-fraction.\n"
    return told


if __name__ == "__main__":
    main()
