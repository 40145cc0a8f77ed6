"""Puts faults into every step and counts what is lost: ``python tests/faults/harness/harness.py [--all] [--write]``.

Without ``--all`` a seeded sample is run, as in the everyday suite; with ``--minutes`` as many cases as they allow, each
fault its share. ``--write`` puts the counts into tests/faults/RESULTS.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a command; under pytest it is there already

from fault_cases import FAULTS, Fault
from fault_child import import_everything
from fault_place import STEPS, Site, Step
from fault_tables import read_commit, read_rows, write_table

_PROGRAM = "tests/faults/harness/harness.py"


@dataclasses.dataclass
class Row:
    """What the cases of a fault gave.

    Attributes:
        cases: By step, the number of those that the fault reached.
        unreached: The number of the others.
        codes: How often a disturbed run ended with an exit code.
        losses: What broke the rules, by case.
        possible: The number of all cases there are.
    """

    cases: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    losses: list[str] = dataclasses.field(default_factory=list)
    unreached: int = 0
    possible: int = 0
    seconds: float = 0.0


def run_faults(
    faults: list[Fault], seed: int, cases: int | None, everything: bool, jobs: int, minutes: float = math.inf
) -> dict[str, Row]:
    """Run the cases of faults, in several processes where asked.

    Args:
        cases: How many of each fault that it reaches; None: as many as on every day.
        everything: Run all cases.
        minutes: Time after which no further case is begun.

    Returns:
        What they gave, by the name of the fault.
    """
    import_everything()
    rows = {fault.name: Row() for fault in faults}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        workers = []
        for number in range(jobs):
            child = os.fork()
            if child == 0:
                try:
                    _work(Path(name, str(number)), faults, seed, cases, everything, number, jobs, minutes)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            workers.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in workers]
        assert not any(codes), f"workers ended with {codes}"
        for number in range(jobs):
            for fault, found in json.loads(Path(name, f"{number}.json").read_text()).items():
                rows[fault].cases.update(found["cases"])
                rows[fault].codes.update(found["codes"])
                rows[fault].losses += found["losses"]
                rows[fault].unreached += found["unreached"]
                rows[fault].possible = found["possible"]
                rows[fault].seconds += found["seconds"]
    return rows


def _work(
    root: Path,
    faults: list[Fault],
    seed: int,
    cases: int | None,
    everything: bool,
    number: int,
    jobs: int,
    minutes: float,
) -> None:
    began = time.monotonic()
    site = Site(root)
    site.prepare()
    in_order = everything and minutes == math.inf
    drawn = {fault.name: draw_cases(site, fault, seed, in_order) for fault in faults}
    rows = {fault.name: Row(possible=len(drawn[fault.name])) for fault in faults}
    # Those of few cases go first: what they do not need of their share is for the others.
    for place, fault in enumerate(sorted(faults, key=lambda fault: len(drawn[fault.name]))):
        row, fault_began = rows[fault.name], time.monotonic()
        share = (60 * minutes - (fault_began - began)) / (len(faults) - place)
        mine = drawn[fault.name][number::jobs]
        count = len(mine) if everything else len(range(number, fault.everyday if cases is None else cases, jobs))
        for step, case in mine:
            if row.cases.total() == count or time.monotonic() - fault_began > share:
                break
            site.reset(step)
            code, problems, reached = fault.run_case(site, step, case)
            row.cases[step.name] += reached
            row.unreached += not reached
            row.codes[str(code)] += reached
            if problems:
                row.losses.append(f"{fault.name}, {step.name}, {case}: " + "; ".join(problems))
                print(row.losses[-1], file=sys.stderr, flush=True)
        row.seconds = time.monotonic() - fault_began
        print(f"{fault.name}: {row.cases.total()} cases by process {number}", file=sys.stderr, flush=True)
    root.with_suffix(".json").write_text(json.dumps({name: vars(row) for name, row in rows.items()}))
    shutil.rmtree(root)


def draw_cases(site: Site, fault: Fault, seed: int, in_order: bool) -> list[tuple[Step, Any]]:
    """Return the cases of a fault: in the order of the steps, or shuffled such that they go round the steps."""
    chance = random.Random(seed + zlib.crc32(fault.name.encode()))
    by_step = {step: fault.list_cases(site, step, chance) for step in STEPS}
    if in_order:
        return [(step, case) for step, cases in by_step.items() for case in cases]
    for cases in by_step.values():
        chance.shuffle(cases)
    steps = chance.sample(STEPS, len(STEPS))
    rounds = itertools.zip_longest(*([(step, case) for case in by_step[step]] for step in steps))
    return [drawn for found in rounds for drawn in found if drawn is not None]


def write_counts(rows: dict[str, Row], seed: int) -> None:
    """Put the counts into tests/faults/RESULTS.md; faults that were not run keep their lines."""
    lines, commit = read_rows(_PROGRAM), read_commit()
    for name, row in rows.items():
        counts = [f"{row.cases[step.name] or '–'}" for step in STEPS]
        codes = ", ".join(f"{code} ({count:,})" for code, count in sorted(row.codes.items()) if count)
        numbers = (row.cases.total(), row.unreached, row.possible, len(row.losses))
        measured = [*(f"{number:,}" for number in numbers), str(seed), commit]
        lines[name] = f"| {' | '.join([name, codes, *counts, *measured, f'{row.seconds:,.0f}'])} |"
    measured_names = ["cases", "not reached", "of all", "losses", "seed", "commit", "seconds"]
    heading = ["fault", "exit (runs)", *(step.name for step in STEPS), *measured_names]
    results = [f"- **{fault.name}**: {fault.result}" for fault in FAULTS]
    write_table(_PROGRAM, heading, [lines[fault.name] for fault in FAULTS if fault.name in lines], results)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, metavar="N", help="cases of each fault in the sample that it reaches")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="begin no further case after M minutes"
    )
    parser.add_argument("--all", action="store_true", help="run every case, not a sample")
    parser.add_argument("--only", action="append", metavar="FAULT", help="run this fault alone; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases that run at a time")
    parser.add_argument("--write", action="store_true", help="put the counts into tests/faults/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = parse_arguments()
    names = chosen.only or [fault.name for fault in FAULTS]
    given = run_faults(
        [fault for fault in FAULTS if fault.name in names],
        chosen.seed,
        chosen.cases,
        chosen.all,
        chosen.jobs,
        chosen.minutes,
    )
    if chosen.json:
        print(json.dumps({name: vars(row) for name, row in given.items()}))
    for name, row in {} if chosen.json else given.items():
        print(
            f"{name}: {row.cases.total()} cases, {row.unreached} not reached, {len(row.losses)} losses, "
            f"{dict(row.codes)}, {row.seconds:.0f} s"
        )
    if chosen.write:
        write_counts(given, chosen.seed)
    sys.exit(any(row.losses for row in given.values()))
