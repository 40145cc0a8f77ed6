"""The keep list that a command takes: of what data it is, and what it keeps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.join import Keys, join, parquet_listing
from clipcid_cli.formats.results.keep_list import read_keep_list
from clipcid_cli.steps import reporting


@dataclasses.dataclass(frozen=True)
class ChosenKeepList:
    """A keep list, and how many of the images that it lists it keeps."""

    path: Path
    kept: int
    images: int
    samples: str  # what the step's samples are called in messages: ``rows`` or ``samples``
    max_missing: float  # largest fraction of them that the list may lack

    @classmethod
    def read(cls, path: Path, samples: str, max_missing: float) -> ChosenKeepList:
        """Count what a list keeps."""
        keep_list = read_keep_list(path)
        return cls(path, keep_list.num_kept, len(keep_list), samples, max_missing)

    def describe(self) -> dict[str, Any]:
        """Return where it is and its counts as JSON values, for a sidecar."""
        return {"path": str(self.path), "kept": self.kept, "images": self.images}

    def report(self, source: str, total: int, *, kept: int, missing: int, key: str) -> None:
        """Report that it was taken; one that lacks too many of the step's samples was made from other data.

        `key` is one of the step's, for the error.
        """
        if missing > self.max_missing * total:
            how = f"lacks {missing:,} of the {total:,} {self.samples} of {source}"
            if 2 * missing > total:
                raise self._other_data(how, key)
            allowed = math.ceil(1000 * missing / total) / 1000
            raise ClipcidError(
                f"Keep list {self.path} {how}, more than the allowed {self.max_missing:.1%}.",
                "If they were added since, run clipcid balance again. If they are images that could not be used, allow "
                f"them: --max-bad-fraction {allowed:g}. If the list is of other data, give another --keep-list, or "
                "--keep-list none.",
            )
        unlisted = f"; {missing:,} not in it" if missing else ""
        reporting.note(f"Keep list: {self.path}, {kept:,} of {total:,} {self.samples} kept{unlisted}.")

    def validate_related(self, keys: pa.Array, source: str) -> None:
        """Refuse a list that has none of some keys of `source`, n strings."""
        for listed, _ in parquet_listing(self.path).read():
            if pc.any(pc.is_in(listed, value_set=keys.cast(listed.type))).as_py():
                return
        raise self._other_data(f"has none of the {self.samples} of {source}", str(keys[0]))

    def _other_data(self, how: str, key: str) -> ClipcidError:
        listed = next((str(keys[0]) for keys, _ in parquet_listing(self.path).read() if len(keys)), "")
        return ClipcidError(
            f"Keep list {self.path} {how}: it was made from other data. One of its keys is {listed!r}, one of the "
            f"{self.samples} {key!r}.",
            "If these are the same images, make the list from embeddings with the data's keys (--key-column NAME). Or give "
            "the data or embeddings it was made from, another --keep-list, or --keep-list none to use all "
            f"{self.samples}.",
        )

    def find_kept(self, keys: Keys, count: int, folder: Path | None, source: str) -> npt.NDArray[np.bool_]:
        """Look up the N rows of `source` by their keys, all different, and report that the list was taken.

        A list in another order than the rows is joined with them in `folder`, see `join`.

        Returns:
            Which rows it keeps, bool [N]; those that it lacks are not kept.
        """
        kept_or_missing = join(keys, count, parquet_listing(self.path, "kept"), folder)[:, 0]
        kept = int(np.count_nonzero(kept_or_missing > 0))
        missing = int(np.count_nonzero(kept_or_missing < 0))
        first = next((str(column[0]) for column in keys() if len(column)), "")
        self.report(source, count, kept=kept, missing=missing, key=first)
        return kept_or_missing > 0
