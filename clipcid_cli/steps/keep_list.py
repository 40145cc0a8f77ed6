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
    """A keep list.

    Attributes:
        kept: Number of images it keeps.
        images: Number of images it lists.
    """

    path: Path
    kept: int
    images: int

    def describe(self) -> dict[str, Any]:
        """Return where it is and its counts as JSON values, for a sidecar."""
        return {"path": str(self.path), "kept": self.kept, "images": self.images}


@dataclasses.dataclass(frozen=True)
class AppliedKeepList(ChosenKeepList):
    """A keep list and what it says of a step's samples.

    Attributes:
        is_kept: Which of the step's N samples it keeps, bool [N].
    """

    is_kept: npt.NDArray[np.bool_]


def choose_keep_list(
    option: str | None, work: WorkDirectory, samples: str, reporter: Reporter
) -> ChosenKeepList | None:
    """Choose the keep list of a step; None where all samples are to be used, which is reported.

    Args:
        option: Value of ``--keep-list``: a file, ``none``, or None for the work directory's list where there is one.
        samples: What the step's samples are called in messages: ``rows`` or ``samples``.
    """
    path = _choose(option, work)
    if path is None:
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
    """Report that a keep list was taken.

    Args:
        kept: How many of the step's samples it keeps.
        missing: How many of them it lacks.
        total: How many there are.
        samples: What they are called in messages: ``rows`` or ``samples``.
        source: Where they come from, for messages.
        max_missing: Largest share of them that the list may lack.
    """
    if missing > max_missing * total:
        raise ClipcidError(
            f"Keep list {path} lacks {missing:,} of the {total:,} {samples} of {source}: it was made from other data.",
            f"Give the data or embeddings it was made from, another --keep-list, or --keep-list none to use all {samples}.",
        )
    reporter.note(f"Keep list: {path}, {kept:,} of {total:,} {samples} kept.")


def apply_keep_list(
    option: str | None,
    work: WorkDirectory,
    keys: Keys,
    count: int,
    *,
    samples: str,
    source: str,
    max_missing: float,
    dry_run: bool,
    reporter: Reporter,
) -> AppliedKeepList | None:
    """Look up the step's samples in the keep list, and report which list was taken.

    Args:
        option: Value of ``--keep-list``: a file, ``none``, or None for the work directory's list where there is one.
        keys: Starts reading the keys of the step's samples, all different.
        count: N, how many there are.
        samples: What they are called in messages: ``rows`` or ``samples``.
        source: Where they come from, for messages.
        max_missing: Largest share of the samples that may be missing from the list; missing ones are not kept.
        dry_run: Whether the work directory must stay as it is: a list in another order than the samples is then joined in
            the system's folder for temporary files, else in the work directory, which has room for outputs of that size.

    Returns:
        None where all samples are to be used.
    """
    keep_list = choose_keep_list(option, work, samples, reporter)
    if keep_list is None:
        return None
    found = join(keys, count, parquet_listing(keep_list.path, "kept"), None if dry_run else work.path)[:, 0]
    is_kept = found > 0
    report_keep_list(
        keep_list.path,
        kept=int(np.count_nonzero(is_kept)),
        missing=int(np.count_nonzero(found < 0)),
        total=count,
        samples=samples,
        source=source,
        max_missing=max_missing,
        reporter=reporter,
    )
    return AppliedKeepList(**vars(keep_list), is_kept=is_kept)


def _choose(option: str | None, work: WorkDirectory) -> Path | None:
    if option is None:
        return work.find_keep_list()
    return None if option == NO_KEEP_LIST else Path(option)
