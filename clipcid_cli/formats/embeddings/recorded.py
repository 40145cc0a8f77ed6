"""The files of a folder of embeddings that the sidecar of `embed` records, and whether they are still those."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.npy import NpyFile
from clipcid_cli.formats.listing import Stat
from clipcid_cli.formats.output import refuse_changed, sidecar_path

if TYPE_CHECKING:
    from clipcid_cli.formats.embeddings.folder import EmbeddingFile


class RecordedFiles:
    """The files that `embed` wrote, when they have been found unchanged."""

    def __init__(
        self, folder: Path, outputs: list[dict[str, Any]], stats: Mapping[str, Stat], fix: Callable[[], str]
    ) -> None:
        """Take what the sidecar records of each.

        Args:
            outputs: Entries of `describe_outputs`.
            stats: What `list_recorded` found before they were compared: files of a copied folder have other times.
            fix: Says what to do where one has changed.
        """
        self._folder, self._fix = folder, fix
        self._prefix = os.path.join(folder, "")
        self._entries: dict[str, dict[str, Any]] = {}
        for entry in outputs:
            place, size, time = entry["path"], entry["size"], entry["time"]
            time = stats[place].time if place in stats else time
            self._entries[place] = {"path": place, "size": size, "time": time, "hash": entry["hash"]}

    def describe(self, path: Path) -> dict[str, Any]:
        """Describe a file as `fingerprint_file` does."""
        entry = self._entries[self._place(path)]
        return {"path": str(path), "size": entry["size"], "hash": entry["hash"]}

    def refuse_changed(self) -> None:
        """Refuse files that were replaced since they were found unchanged.

        Raises:
            ClipcidError: naming the first.
        """
        refuse_changed(self._folder, "embed", {"outputs": list(self._entries.values())}, self._fix)

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
                if isinstance(part, NpyFile) and part.stamp[1] != self._entries[place]["time"]:
                    replaced.append(self._entries[place])
        refuse_changed(self._folder, "embed", {"outputs": replaced}, self._fix)

    def _place(self, path: Path) -> str:
        """Return the path in the folder of a file that was found there."""
        return str(path).removeprefix(self._prefix)  # Path(".") / name has no "./" to remove
