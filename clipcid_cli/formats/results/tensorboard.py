"""TensorBoard's event files of a run, in its folder ``tensorboard/``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError


def import_tensorboard() -> Any:
    """Import PyTorch's side of TensorBoard.

    Raises:
        ClipcidError: when TensorBoard is not installed.
    """
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        raise ClipcidError(
            "--report-to tensorboard needs TensorBoard, which is not installed.",
            "pip install 'clipcid[logging]', or omit --report-to: train.jsonl holds the same numbers.",
        ) from error
    return tensorboard


class TensorBoardLog:
    """Scalars of a run as TensorBoard shows them; nothing is written without a folder."""

    def __init__(self, folder: Path | None, step: int) -> None:
        """Open the event files.

        Args:
            folder: Where they lie; None for none.
            step: Steps done: what a killed run wrote of later ones is no longer shown.

        Raises:
            ClipcidError: when TensorBoard is not installed.
        """
        self._writer: Any = None
        if folder is not None:
            self._writer = import_tensorboard().SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of one step; values that are not finite numbers are omitted."""
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flush what was written to the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
