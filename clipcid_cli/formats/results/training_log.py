"""What a run logs while it trains: ``train.jsonl``, ``results.jsonl`` and, where requested, TensorBoard's files."""

from __future__ import annotations

import math
import time
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.run_folder import RunFolder, append_lines

# Seconds after which logged lines reach the disk.
_FLUSH_SECONDS = 2.0


def import_tensorboard() -> Any:
    """Import PyTorch's side of TensorBoard, which may not be installed."""
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        raise ClipcidError(
            "--report-to tensorboard needs TensorBoard, which is not installed.",
            "pip install 'clipcid[logging]', or omit --report-to: train.jsonl holds the same numbers.",
        ) from error
    return tensorboard


class TrainingLog:
    """The logs of a run. Lines of training steps are written every two seconds, evaluations at once."""

    def __init__(self, folder: RunFolder, step: int, *, writes: bool, tensorboard: bool) -> None:
        """Open the logs.

        Args:
            step: Steps done so far: of what a killed run gave TensorBoard, later ones are no longer shown.
            writes: Whether this process writes; nothing is written otherwise.
            tensorboard: Whether to log for TensorBoard too.
        """
        self._folder, self._writes = folder, writes
        self._board: Any = None
        if tensorboard and writes:
            purge = step + 1 if step else None
            self._board = import_tensorboard().SummaryWriter(str(folder.tensorboard), purge_step=purge)
        self._lines: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    def add(self, line: dict[str, Any]) -> None:
        """Log a training step: ``step`` and its values by name."""
        self._lines.append(line)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation after `step` steps."""
        if self._writes:
            append_lines(self._folder.results_log, [{"step": step, **metrics}])
            self._show("eval", step, metrics)

    def flush(self) -> None:
        """Write the lines that are not on the disk yet."""
        if self._writes:
            append_lines(self._folder.train_log, self._lines)
            for line in self._lines:
                self._show("train", line["step"], {name: line[name] for name in line if name != "step"})
        if self._board is not None:
            self._board.flush()
        self._lines, self._flushed = [], time.monotonic()

    def _show(self, group: str, step: int, values: dict[str, Any]) -> None:
        """Give the values that are finite numbers to TensorBoard."""
        for name, value in values.items() if self._board is not None else ():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Close TensorBoard's files; lines that are not flushed are lost, as after a kill."""
        if self._board is not None:
            self._board.close()
