"""The files of a folder of embeddings that the sidecar of `embed` records, and whether they are still those."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.npy import NpyFile
from clipcid_cli.formats.fingerprint import FileRecord, refuse_changed
from clipcid_cli.formats.sidecar import sidecar_path

if TYPE_CHECKING:
    from clipcid_cli.formats.embeddings.folder import EmbeddingFile


class RecordedFiles:
    """The files that `embed` wrote, when they have been found unchanged."""

    def __init__(self, folder: Path, outputs: Sequence[FileRecord], fix: Callable[[], str]) -> None:
        """Take what the sidecar records of each, with the times that they have now: those of a copied folder are others.

        Args:
            fix: Says what to do where one has changed.
        """
        self._folder, self._fix = folder, fix
        self._prefix = os.path.join(folder, "")
        self._entries = {
            each.path: msgspec.structs.replace(each, time=(folder / each.path).stat().st_mtime_ns) for each in outputs
        }

    def describe(self, path: Path) -> FileRecord:
        """Describe a file as `record` does."""
        return msgspec.structs.replace(self._entries[self._place(path)], path=str(path))

    def refuse_changed(self) -> None:
        """Refuse files that were replaced since they were found unchanged.

        Raises:
            ClipcidError: naming the first.
        """
        self._refuse_changed([*self._entries.values()])

    def refuse_others(self, files: list[EmbeddingFile]) -> None:
        """Refuse files that were opened and that `embed` did not write, or that were replaced before they were opened.

        Raises:
            ClipcidError: naming the first.
        """
        replaced = []
        for file in files:
            parts = (file.images, file.texts, *file.extras.files().values())
            opened = {self._place(part.path): part for part in parts if part is not None}
            for place in [*opened, *([] if file.metadata is None else [self._place(file.metadata)])]:
                if place not in self._entries:
                    raise ClipcidError(
                        f"{self._folder / place} was added since {sidecar_path(self._folder, 'embed')} was written.",
                        self._fix(),
                    )
                part = opened.get(place)
                if isinstance(part, NpyFile) and part.stamp[1] != self._entries[place].time:
                    replaced.append(self._entries[place])
        self._refuse_changed(replaced)

    def _refuse_changed(self, records: Sequence[FileRecord]) -> None:
        refuse_changed(self._folder, records, sidecar_path(self._folder, "embed"), self._fix)

    def _place(self, path: Path) -> str:
        """Return the path in the folder of a file that was found there."""
        return str(path).removeprefix(self._prefix)  # Path(".") / name has no "./" to remove
