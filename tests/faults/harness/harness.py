"""Puts faults into every step and counts what is lost.

    python tests/faults/harness/harness.py [--only FAULT] [--cases N]

Prints the rows of the first table of tests/faults/RESULTS.md: the fault, exit codes, cases by step, cases that the fault did
not reach, all cases there are, losses, seconds.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a command; under pytest it is there already

from fault_cases import FAULTS, Fault
from fault_child import import_everything
from fault_place import STEPS, Site, Step


def main() -> int:
    """Run as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cases", type=int, metavar="N", help="of each fault, those that it reaches; default: of a day"
    )
    parser.add_argument("--only", action="append", metavar="FAULT", help="run this fault alone; may be repeated")
    chosen = parser.parse_args()
    import_everything()
    losses = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        site = Site(Path(name))
        site.prepare()
        for fault in FAULTS:
            if fault.name in (chosen.only or [fault.name]):
                wanted = fault.everyday if chosen.cases is None else chosen.cases
                losses += run_cases(site, fault, chosen.seed, wanted)
    return bool(losses)


def run_cases(site: Site, fault: Fault, seed: int, wanted: int) -> int:
    """Run cases of a fault until it has reached as many as wanted; print its row and return the number of losses."""
    began = time.monotonic()
    drawn = draw_cases(site, fault, seed)
    by_step: collections.Counter[str] = collections.Counter()
    codes: collections.Counter[str] = collections.Counter()
    unreached = losses = 0
    for step, case in drawn:
        if by_step.total() == wanted:
            break
        site.reset(step)
        code, problems, reached = fault.run_case(site, step, case)
        by_step[step.name] += reached
        codes[str(code)] += reached
        unreached += not reached
        if problems:
            losses += 1
            print(f"{fault.name}, {step.name}, {case}: " + "; ".join(problems), file=sys.stderr, flush=True)
    ended = ", ".join(f"{code} ({count:,})" for code, count in sorted(codes.items()) if count)
    counts = [str(by_step[step.name] or "–") for step in STEPS]
    numbers = [by_step.total(), unreached, len(drawn), losses, round(time.monotonic() - began)]
    print(f"| {' | '.join([fault.name, ended, *counts, *(f'{number:,}' for number in numbers)])} |", flush=True)
    return losses


def draw_cases(site: Site, fault: Fault, seed: int) -> list[tuple[Step, Any]]:
    """Return all cases of a fault, shuffled such that they go round the steps."""
    chance = random.Random(seed + zlib.crc32(fault.name.encode()))
    by_step = {step: fault.list_cases(site, step, chance) for step in STEPS}
    for cases in by_step.values():
        chance.shuffle(cases)
    steps = chance.sample(STEPS, len(STEPS))
    rounds = itertools.zip_longest(*([(step, case) for case in by_step[step]] for step in steps))
    return [drawn for found in rounds for drawn in found if drawn is not None]


if __name__ == "__main__":
    sys.exit(main())
