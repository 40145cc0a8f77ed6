"""One file of rows in numpy's ``.npy`` form, mapped rather than read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.output import fingerprint_file


class RowFile(Protocol):
    """Rows [n, D] in a file of some form, known by their header until they are mapped."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def label(self) -> str:
        """What names the rows in an error: the file, and the part of it where it holds several."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Their shape as the header states it."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Their number format."""

    @property
    def unpacked(self) -> int:
        """Bytes of memory that mapping takes; 0 where the rows stay on the disk."""

    def map(self) -> npt.NDArray[Any]:
        """Return the rows, mapped where that can be done."""

    def fingerprint(self) -> dict[str, Any]:
        """Describe the content for a sidecar: ``path``, ``size``, ``hash``."""


@dataclasses.dataclass(frozen=True)
class NpyFile:
    """An npy."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    unpacked: int = 0

    @property
    def label(self) -> str:
        """The file's path."""
        return str(self.path)

    def map(self) -> npt.NDArray[Any]:
        """Return the array, mapped.

        Raises:
            ClipcidError: when it cannot be read any more.
        """
        return _map(self.path)

    def fingerprint(self) -> dict[str, Any]:
        """Describe the file for a sidecar."""
        return fingerprint_file(self.path)


def find_npy(path: Path) -> NpyFile:
    """Look at an npy's header.

    Raises:
        ClipcidError: when it cannot be read, is cut off, or holds Python objects.
    """
    array = _map(path)
    return NpyFile(path, array.shape, array.dtype)


def _map(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        # An array without rows cannot be mapped, only read.
        array = _load_empty(path, error)
    return array


def _load_empty(path: Path, error: Exception) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        raise ClipcidError(f"{path} cannot be read: {error}.", "Make it again, or give other embeddings.") from error
    return array
