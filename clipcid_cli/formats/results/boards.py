"""Programs that show the values of a run while it trains, beside its logs: TensorBoard, and Weights & Biases.

Both take values by ``train/<name>`` and ``eval/<name>`` over the training step, and keep files in the run's folder.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.results.run_folder import Board, RunFolder

_OR_NONE = "or omit --report-to: train.jsonl holds the same numbers."


def validate_board(kind: str, *, quiet: bool) -> None:
    """Refuse a board whose package, or whose key, is missing."""
    if kind == "tensorboard":
        _import_tensorboard()
    if kind == "wandb":
        wandb = _import_wandb()
        try:
            wandb.setup(wandb.Settings(silent=quiet))
            wandb.login()
        except wandb.Error as error:
            raise _wandb_error(error) from error


def open_board(kind: str, folder: RunFolder, step: int, settings: dict[str, Any], *, quiet: bool) -> Board:
    """Open a board, for the steps after `step`."""
    return _TensorBoard(folder, step) if kind == "tensorboard" else _WeightsAndBiases(folder, settings, quiet)


class _TensorBoard:
    def __init__(self, folder: RunFolder, step: int) -> None:
        # Of what a killed run gave it, what comes after `step` is no longer shown.
        purge = step + 1 if step else None
        self._writer = _import_tensorboard().SummaryWriter(str(folder.tensorboard), purge_step=purge)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of wandb that a killed run continues; steps that are made again are shown twice, with equal values."""

    def __init__(self, folder: RunFolder, settings: dict[str, Any], quiet: bool) -> None:
        wandb = _import_wandb()
        name = folder.wandb / "run-id"
        if not name.exists():
            name.parent.mkdir(exist_ok=True)
            write_text(name, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "clipcid"),
                name=folder.path.name,
                id=name.read_text(),
                dir=folder.path,
                resume="allow",
                config=settings,
                settings=wandb.Settings(console="off", silent=quiet),
            )
        except wandb.Error as error:
            raise _wandb_error(error) from error
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """Nothing: wandb writes by itself."""

    def close(self) -> None:
        self._run.finish()


def _import_tensorboard() -> Any:
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        raise _missing_error("tensorboard", "TensorBoard", "logging") from error
    return tensorboard


def _import_wandb() -> Any:
    try:
        import wandb.sdk  # `import wandb` alone would take a folder wandb/ of logged runs for the package
    except ImportError as error:
        raise _missing_error("wandb", "wandb", "wandb") from error
    return wandb


def _missing_error(kind: str, package: str, extra: str) -> ClipcidError:
    return ClipcidError(
        f"--report-to {kind} needs {package}, which is not installed.",
        f"In the checkout of clipcid: pip install '.[{extra}]'; {_OR_NONE}",
    )


def _wandb_error(error: Exception) -> ClipcidError:
    return ClipcidError(f"--report-to wandb: {error}", f"Run wandb login, or set WANDB_MODE=offline; {_OR_NONE}")
