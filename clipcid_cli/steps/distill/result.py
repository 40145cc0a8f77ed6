"""What `distill` answers: what a run made, and of a dry run what it would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clipcid_cli.records import Pairing, Repair

if TYPE_CHECKING:
    from clipcid_cli.steps.evaluate.result import Preview, ZeroshotResult


class Distilled(msgspec.Struct, omit_defaults=True):
    """What a run made."""

    student: str
    steps: int
    samples: int
    samples_per_second: float
    losses: dict[str, float]  # those of the last step that was logged
    metrics: dict[str, float]  # those of the last evaluation during the training
    evaluations: list[ZeroshotResult]  # what `eval-zeroshot` returns for ``--eval-data``
    seconds: dict[str, float]  # time by phase
    files: dict[str, str]
    chance: dict[str, float] = {}  # what a guess scores on the held-out part
    repair: Repair | None = None  # that of the teacher, where it was repaired
    pairing: Pairing | None = None  # how well the teacher knows these captions and images


class DistillCost(msgspec.Struct):
    """What a run would take."""

    student: str
    steps: int
    samples: int
    parameters: int
    memory_bytes: int  # of one process, on its device
    host_memory_bytes: int  # of all processes of a host, with what waits in /dev/shm
    shared_memory_bytes: int
    checkpoint_copy_bytes: int  # of host memory, while the first process writes a checkpoint
    seconds_per_step: float
    data_seconds_per_step: float  # of one core
    samples_per_second: float
    data_samples_per_second: float  # what all workers read and decode
    bound_by: str  # ``data`` where that is less than the model takes, else ``model``
    seconds: dict[str, float]
    pairing: Pairing | None = None  # how well the teacher knows these captions and images
    files: dict[str, str] = {}
    evaluations: list[Preview] = []
