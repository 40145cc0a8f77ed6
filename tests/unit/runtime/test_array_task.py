"""Which task of a job this process is, as schedulers say it."""

from __future__ import annotations

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.array_task import choose_task

SLURM = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "5"}
SKYPILOT = {"SKYPILOT_JOB_RANK": "5", "SKYPILOT_NUM_JOBS": "8"}


@pytest.mark.parametrize(
    ("named", "variables", "task"),
    [
        ("2/8", SLURM, (2, 8)),  # what is said counts
        ("auto", SLURM, (4, 8)),
        ("auto/9", SLURM, (5, 9)),  # --array=5,7 of nine
        ("auto/8", KUBERNETES, (5, 8)),
        ("auto", SKYPILOT, (5, 8)),
    ],
)
def test_the_task_is_named_or_found(named: str, variables: dict[str, str], task: tuple[int, int]) -> None:
    assert choose_task(named, variables) == task


@pytest.mark.parametrize(
    ("named", "variables", "problem"),
    [
        ("auto", {}, "none of SLURM_ARRAY_TASK_ID, .* is set"),
        ("auto", KUBERNETES, "no variable says how many"),
        ("auto/5", KUBERNETES, "JOB_COMPLETION_INDEX=5 is not one of 5 tasks"),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_COUNT": "3"}, "SLURM_ARRAY_TASK_ID=5 is not one of 3 tasks"),
        ("auto/8", {"JOB_COMPLETION_INDEX": "five"}, "'five', which is no number"),
    ],
)
def test_what_is_not_said_is_not_guessed(named: str, variables: dict[str, str], problem: str) -> None:
    with pytest.raises(ClipcidError, match=problem):
        choose_task(named, variables)
