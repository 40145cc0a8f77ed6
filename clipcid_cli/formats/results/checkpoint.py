"""Checkpoints of a training run: whole or absent, read without executing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.reading import reading

# Should the newest be damaged on a failing disk, the run is not lost.
_KEPT = 2


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint made after `step` steps."""
    return folder / f"step_{step:08d}.pt"


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint (tensors, numbers, texts, and dicts and lists of them), then remove all but the newest ones."""
    with atomic_file(checkpoint_path(folder, step)) as file:
        torch.save(state, file)
    remove_old_checkpoints(folder)


def remove_old_checkpoints(folder: Path) -> None:
    """Remove all but the newest checkpoints."""
    for old in list_checkpoints(folder)[:-_KEPT]:
        checkpoint_path(folder, old).unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the existing checkpoints, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob(f"step_{'[0-9]' * 8}.pt"))


def read_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are admitted, so the file cannot run code."""
    path = checkpoint_path(folder, step)
    fix = "Remove it to resume from the one before, or start over with --resume never."
    with reading(path, "a checkpoint", fix):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not the state of a run")
        return state
