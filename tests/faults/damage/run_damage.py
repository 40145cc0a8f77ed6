"""Damages every kind of file and counts what is lost: ``python tests/faults/damage/run_damage.py [--cases N] [--write]``.

``--write`` puts the counts into tests/faults/RESULTS.md, each kind of file as soon as it is done; ``--only`` continues a
stopped run. With ``--minutes`` as many cases are run as they allow, each kind of file its share.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import random
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a command; under pytest it is there already

from damage import TARGETS, damage, make_place
from fault_tables import read_commit, read_rows, write_table
from one_process import OneProcess

SEED = 13
EVERYDAY, MANY = 4, 144
"""Cases of each kind of file, every day and in the slow suite."""
_PROGRAM = "tests/faults/damage/run_damage.py"


@dataclasses.dataclass
class Counts:
    """What the cases of one kind of file gave.

    Attributes:
        codes: How often a command ended with an exit code.
        losses: What broke the rules, by case.
    """

    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    losses: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def run_cases(
    clipcid: OneProcess, whole: Path, scratch: Path, name: str, numbers: range, seconds: float = math.inf
) -> Counts:
    """Run cases of one kind of file.

    Args:
        whole: What `make_place` made.
        scratch: Where there is room for a copy of it.
        seconds: Time after which no further case is begun.
    """
    target, counts, began = TARGETS[name], Counts(), time.monotonic()
    for number in numbers:
        if time.monotonic() - began > seconds:
            break
        chance = random.Random(SEED + number * 1_000_003 + zlib.crc32(name.encode()))
        place = scratch / "place"
        shutil.copytree(whole, place, copy_function=os.link, symlinks=True)
        done = damage(place, target, chance)
        found = clipcid(*target.command, cwd=place)
        problems = found.problems()
        problems += [f"left {path.name}" for path in place.rglob("*.partial")]
        if problems:
            counts.losses.append(f"{name}, case {number}: {done}: {', '.join(problems)}{found!r}")
        counts.codes[str(found.code)] += 1
        shutil.rmtree(place)
    counts.seconds = time.monotonic() - began
    return counts


def write_counts(name: str, counts: Counts) -> None:
    """Put the counts of one kind of file into tests/faults/RESULTS.md."""
    lines, codes = read_rows(_PROGRAM), ", ".join(f"{code} ({n:,})" for code, n in sorted(counts.codes.items()))
    step = next(word for word in TARGETS[name].command if not word.startswith("-"))
    cells = [
        name, f"`{TARGETS[name].file}`", step, codes, f"{counts.codes.total():,}", str(len(counts.losses)), str(SEED),
        read_commit(), f"{counts.seconds:,.0f}",
    ]  # fmt: skip
    lines[name] = f"| {' | '.join(cells)} |"
    heading = ["kind of file", "file", "step", "exit (runs)", "cases", "losses", "seed", "commit", "seconds"]
    write_table(_PROGRAM, heading, [lines[kind] for kind in TARGETS if kind in lines], [])


def main() -> int:
    """Run as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=EVERYDAY + MANY, metavar="N", help="cases of each kind of file")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="begin no further case after M minutes"
    )
    parser.add_argument("--patience", type=float, default=30, metavar="S", help="seconds after which a command hangs")
    parser.add_argument("--only", action="append", metavar="KIND", help="damage this kind alone; may be repeated")
    parser.add_argument("--write", action="store_true", help="put the counts into tests/faults/RESULTS.md")
    chosen = parser.parse_args()
    clipcid, losses, began = OneProcess(chosen.patience), 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        whole = Path(name, "whole")
        whole.mkdir()
        make_place(clipcid, whole)
        kinds = list(chosen.only or TARGETS)
        for place, kind in enumerate(kinds):
            share = (60 * chosen.minutes - (time.monotonic() - began)) / (len(kinds) - place)
            counts = run_cases(clipcid, whole, Path(name), kind, range(chosen.cases), share)
            losses += len(counts.losses)
            print(f"{kind}: {dict(counts.codes)}, {len(counts.losses)} losses, {counts.seconds:.0f} s", flush=True)
            print(*counts.losses, sep="\n", end="", file=sys.stderr, flush=True)
            if chosen.write:
                write_counts(kind, counts)
    clipcid.close()
    return bool(losses)


if __name__ == "__main__":
    sys.exit(main())
