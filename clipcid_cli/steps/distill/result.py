"""What `distill` answers: the JSON objects, in the order of their keys."""

from __future__ import annotations

import msgspec

from clipcid_cli.formats.sidecar import RepairFigures
from clipcid_cli.steps.evaluate.result import Preview, ZeroshotResult


class Distilled(msgspec.Struct, omit_defaults=True):
    """What a run made.

    Attributes:
        losses: Those of the last step that was logged.
        metrics: Those of the last evaluation during the training.
        evaluations: What `eval-zeroshot` returns for ``--eval-data``.
        seconds: Time by phase.
        repair: That of the teacher, where it was repaired.
    """

    student: str
    steps: int
    samples: int
    samples_per_second: float
    losses: dict[str, float]
    metrics: dict[str, float]
    evaluations: list[ZeroshotResult]
    seconds: dict[str, float]
    files: dict[str, str]
    repair: RepairFigures | None = None


class TeacherCost(msgspec.Struct):
    """What the teacher takes.

    Attributes:
        seconds: For the images and captions of one process's part of a batch.
        share: Its share of a step that runs it.
        break_even: Epochs after which embedding everything once has cost less than running the teacher in each step.
    """

    parameters: int
    seconds: float
    share: float
    break_even: float


class DistillCost(msgspec.Struct):
    """What a run would take.

    Attributes:
        memory_bytes: Of one process.
        data_seconds_per_step: Of one core.
        teacher: None where there is none, or it cannot be loaded here.
    """

    student: str
    steps: int
    samples: int
    parameters: int
    memory_bytes: int
    seconds_per_step: float
    data_seconds_per_step: float
    samples_per_second: float
    seconds: dict[str, float]
    teacher: TeacherCost | None
    files: dict[str, str] = {}
    evaluations: list[Preview] = []
