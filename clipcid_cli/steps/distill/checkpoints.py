"""A run's checkpoints: from which one it goes on, and how new ones are written while training goes on.

What resumes: an unfinished run of the same settings and inputs that has saved a checkpoint. That holds the number of steps
done, the student, what its losses learn, the optimiser, the averaged weights and the unreadable images met so far. All else
follows from the number of steps: batches, views, seeds and rates. Logs are cut to that step, and the lines after it logged
again. A run without a checkpoint starts anew, and removes what earlier ones have left (`begin_run`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import reading
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.run_folder import (
    RunFolder,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    remove_old_checkpoints,
    write_checkpoint,
)
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.training.train_state import TrainState


def begin_run(output: Output[Any], folder: RunFolder, requested: str) -> int:
    """Start an output or go on with it, on the first process; return the step to go on from, 0 where the run is new.

    Args:
        requested: ``auto``, ``latest`` or ``never``.
    """
    steps = list_checkpoints(folder.checkpoints) if output.resumed and requested != "never" else []
    if not steps and requested == "latest":
        raise ClipcidError(
            f"--resume latest, but {folder.path} has no checkpoint of an unfinished run with these settings.",
            "Omit --resume to start one.",
        )
    output.begin_work(None if steps else folder.clear)
    return steps[-1] if steps else 0


class Checkpoints:
    """The checkpoints in a run's folder; the first process writes them, in a thread and from a copy."""

    def __init__(self, folder: RunFolder, context: DistContext) -> None:
        self._folder = folder
        self._context = context
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._begun = self._saved = 0  # steps of the last one that was begun, and of the last known to be on the disk

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint that is known to be on the disk, 0 for none."""
        is_written = self._writing is not None and self._writing.done() and self._writing.exception() is None
        return self._begun if is_written else self._saved

    def resume(self, state: TrainState, step: int) -> dict[str, str]:
        """Go on from the checkpoint of a step; return the unreadable images that were met by then, reason by key."""
        folder = self._folder
        path = checkpoint_path(folder.checkpoints, step)
        content = read_checkpoint(folder.checkpoints, step)
        with reading(path, "the state of this run", "Remove it to resume from the one before, or use --resume never."):
            state.load_state_dict(content)
            bad: dict[str, str] = dict(content["bad"])

        def rewind() -> None:
            folder.rewind(state.step)
            remove_old_checkpoints(folder.checkpoints)

        self._context.on_rank0(rewind)
        self._begun = self._saved = state.step
        return bad if self._context.is_main else {}

    def save(self, state: TrainState, bad: dict[str, str]) -> None:
        """Begin to write a checkpoint, unless the processes' students differ; call it on every process.

        Args:
            bad: Unreadable images that any process met so far, reason by key.
        """
        self._wait()
        checksums = self._context.gather(state.checksum() if self._context.size > 1 else 0)
        self._saved = self._begun  # all processes have come here, the first after it had waited
        refuse_differing(checksums, state.step, self._saved)
        if self._context.is_main:
            content = _copy_to_host(state.state_dict() | {"bad": bad})
            if self._context.device.type == "cuda":
                torch.cuda.synchronize(self._context.device)  # the copies are then there
            self._writing = self._writer.submit(write_checkpoint, self._folder.checkpoints, state.step, content)
        self._begun = state.step

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; call it on every process."""
        self._wait()
        self._context.barrier()
        self._saved = self._begun

    def close(self) -> None:
        """Let the checkpoint that is being written be finished, whatever has happened."""
        self._writer.shutdown()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def refuse_differing(checksums: Sequence[int], step: int, saved: int) -> None:
    """Refuse to save a student of which the processes, by checksums of their weights, have different ones."""
    differing = [str(rank) for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    if differing:
        raise ClipcidError(
            f"After step {step:,} the processes no longer train the same student: the weights of process "
            f"{', '.join(differing)} are not those of process 0. They were not saved.",
            f"Run the same command again: it continues from step {saved:,}. If it happens again, look for a host with a "
            "faulty GPU, or with other versions of PyTorch or CUDA.",
        )


def _copy_to_host(value: Any) -> Any:
    """Copy the tensors in dictionaries and lists to the host; a GPU's are there once it is synchronized.

    Equal texts become one object, which is written once: so a run that was resumed writes the same bytes.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {_copy_to_host(name): _copy_to_host(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_host(one) for one in value)
    return value
