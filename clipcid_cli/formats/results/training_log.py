"""What a run logs while it trains: ``train.jsonl``, ``results.jsonl`` and, where requested, TensorBoard's files."""

from __future__ import annotations

import time
from typing import Any

from clipcid_cli.formats.results.run_folder import RunFolder, append_lines
from clipcid_cli.formats.results.tensorboard import TensorBoardLog

# Seconds after which logged lines reach the disk.
_FLUSH_SECONDS = 2.0


class TrainingLog:
    """The logs of a run. Lines of training steps are written every two seconds, evaluations at once."""

    def __init__(self, folder: RunFolder, step: int, *, writes: bool, tensorboard: bool) -> None:
        """Open the logs.

        Args:
            step: Steps done so far.
            writes: Whether this process writes; nothing is written otherwise.
            tensorboard: Whether to log for TensorBoard too.

        Raises:
            ClipcidError: when TensorBoard is requested and not installed.
        """
        self._folder, self._writes = folder, writes
        self._tensorboard = TensorBoardLog(folder.tensorboard if tensorboard and writes else None, step)
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
            self._tensorboard.write(step, {f"eval/{name}": value for name, value in metrics.items()})

    def flush(self) -> None:
        """Write the lines that are not on the disk yet."""
        if self._writes:
            append_lines(self._folder.train_log, self._lines)
            for line in self._lines:
                self._tensorboard.write(line["step"], {f"train/{name}": line[name] for name in line if name != "step"})
            self._tensorboard.flush()
        self._lines, self._flushed = [], time.monotonic()

    def close(self) -> None:
        """Close TensorBoard's files; lines that are not flushed are lost, as after a kill."""
        self._tensorboard.close()
