"""The keep list that `cluster` and `distill` read: which one is taken, and which of their samples it keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.join import Keys, join, parquet_listing
from clipcid_cli.formats.results.keep_list import read_keep_list
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.reporting import Reporter

NO_KEEP_LIST = "none"


@dataclasses.dataclass(frozen=True)
class ChosenKeepList:
    """A keep list, and how many of the images that it lists it keeps."""

    path: Path
    kept: int
    images: int

    def describe(self) -> dict[str, Any]:
        """Return where it is and its counts as JSON values, for a sidecar."""
        return {"path": str(self.path), "kept": self.kept, "images": self.images}


def choose_keep_list(
    option: str | None, work: WorkDirectory, samples: str, reporter: Reporter
) -> ChosenKeepList | None:
    """Choose the keep list of a step; None where all samples are to be used, which is reported.

    Args:
        option: Value of ``--keep-list``: a file, ``none``, or None for the work directory's list where there is one.
        samples: What the step's samples are called in messages: ``rows`` or ``samples``.
    """
    path = work.find_keep_list() if option is None else Path(option)
    if path is None or option == NO_KEEP_LIST:
        reporter.note(f"Keep list: none, all {samples} are used.")
        return None
    keep_list = read_keep_list(path)
    return ChosenKeepList(path, keep_list.num_kept, len(keep_list))


def report_keep_list(
    path: Path,
    *,
    kept: int,
    missing: int,
    total: int,
    samples: str,
    source: str,
    max_missing: float,
    reporter: Reporter,
) -> None:
    """Report that a keep list was taken; one that lacks too many of the step's samples was made from other data.

    Args:
        samples: What they are called in messages: ``rows`` or ``samples``.
        max_missing: Largest share of them that the list may lack.
    """
    if missing > max_missing * total:
        raise ClipcidError(
            f"Keep list {path} lacks {missing:,} of the {total:,} {samples} of {source}: it was made from other data.",
            f"Give the data or embeddings it was made from, another --keep-list, or --keep-list none to use all {samples}.",
        )
    reporter.note(f"Keep list: {path}, {kept:,} of {total:,} {samples} kept.")


def find_kept(
    path: Path,
    keys: Keys,
    count: int,
    folder: Path | None,
    *,
    source: str,
    max_missing: float,
    reporter: Reporter,
) -> npt.NDArray[np.bool_]:
    """Look up rows in a keep list, and report that it was taken: which of them it keeps, bool [N].

    Args:
        keys: The keys of the rows, all different; those that the list lacks are not kept.
        folder: Where a list in another order than the rows is joined with them, see `join`.
        source: As for `report_keep_list`, like what follows.
    """
    found = join(keys, count, parquet_listing(path, "kept"), folder)[:, 0]
    report_keep_list(
        path,
        kept=int(np.count_nonzero(found > 0)),
        missing=int(np.count_nonzero(found < 0)),
        total=count,
        samples="rows",
        source=source,
        max_missing=max_missing,
        reporter=reporter,
    )
    return found > 0
