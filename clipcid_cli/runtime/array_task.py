"""Which of the equal tasks of a job this process is, as the scheduler that started it says by variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from clipcid_cli.errors import ClipcidError

# The number of the task, from 0 or from the first one; how many there are; the number of the first one. Kubernetes does not
# say how many.
_SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("JOB_COMPLETION_INDEX", "", ""),
    ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS", ""),
)
_AUTO = "auto"


def choose_task(named: str, variables: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the number of a task, from 0, and how many there are.

    Args:
        named: ``I/N``; ``auto`` for both from the scheduler; ``auto/N`` for the number of the task from there, as it is.
    """
    given, _, count = named.partition("/")
    if given != _AUTO:
        return int(given), int(count)
    scheduler = next((names for names in _SCHEDULERS if names[0] in variables), None)
    if scheduler is None:
        looked_for = ", ".join(names[0] for names in _SCHEDULERS)
        raise ClipcidError(f"--part {named}: none of {looked_for} is set.", "Give the part itself: --part 0/8")
    own, total, first = scheduler
    index = _read(own, variables)
    if count:
        tasks = int(count)
    elif total in variables:
        tasks = _read(total, variables)
        index -= _read(first, variables) if first in variables else 0
    else:
        raise ClipcidError(
            f"--part auto: {own} is set, and no variable says how many tasks there are.",
            "Say how many: --part auto/8",
        )
    if not 0 <= index < tasks:
        raise ClipcidError(
            f"--part {named}: {own}={variables[own]} is not one of {tasks} tasks in a row.",
            f"Say how many parts there are in all, which are numbered from 0: --part auto/{tasks}",
        )
    return index, tasks


def _read(name: str, variables: Mapping[str, str]) -> int:
    if not variables[name].isdecimal():
        raise ClipcidError(f"{name} is {variables[name]!r}, which is no number.", "Give the part itself: --part 0/8")
    return int(variables[name])
