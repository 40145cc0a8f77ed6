"""The keep list that `cluster` and `distill` read: which one is taken, and which of their samples it keeps."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import held_folder, remove_abandoned, write_error
from clipcid_cli.formats.key_streams import JoinedMatch, OrderedMatch, Values, join_stream, parquet_keys
from clipcid_cli.formats.results.keep_list import read_keep_list
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.reporting import Reporter

NO_KEEP_LIST = "none"
_SCRATCH = ".clipcid-join-"

Found = TypeVar("Found")


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

    Raises:
        ClipcidError: when the list cannot be read.
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

    Raises:
        ClipcidError: when it lacks more: it was made from other data.
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
    keys: Callable[[], Iterable[pa.ChunkedArray]],
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

    Raises:
        ClipcidError: when the list cannot be read, was made from other data, or cannot be joined for lack of space.
    """
    keep_list = choose_keep_list(option, work, samples, reporter)
    if keep_list is None:
        return None
    is_kept, num_missing = _look_up(keep_list.path, keys, count, None if dry_run else work.path)
    report_keep_list(
        keep_list.path,
        kept=int(np.count_nonzero(is_kept)),
        missing=num_missing,
        total=count,
        samples=samples,
        source=source,
        max_missing=max_missing,
        reporter=reporter,
    )
    return AppliedKeepList(**vars(keep_list), is_kept=is_kept)


def _look_up(
    path: Path, keys: Callable[[], Iterable[pa.ChunkedArray]], count: int, folder: Path | None
) -> tuple[npt.NDArray[np.bool_], int]:
    """Tell which samples a keep list keeps, bool [N], and how many it lacks."""

    def read(parts: Iterable[Values]) -> tuple[npt.NDArray[np.bool_], int]:
        is_kept, first, missing = np.zeros(count, dtype=np.bool_), 0, 0
        for found in parts:
            is_kept[first : first + len(found)] = found[:, 0] > 0
            missing += int(np.count_nonzero(found < 0))
            first += len(found)
        return is_kept, missing

    return _read_matches(path, "kept", keys, count, folder, read)


def find_rows_of_keys(
    path: Path, keys: Callable[[], Iterable[pa.ChunkedArray]], count: int, folder: Path
) -> npt.NDArray[np.int64]:
    """Find keys in the column `key` of a parquet file.

    Args:
        keys: Starts reading the keys, all different.
        count: N, how many there are.
        folder: Where they are joined if the file has another order.

    Returns:
        The row of each key, int64 [N]; −1 where it is not there.
    """

    def read(parts: Iterable[Values]) -> npt.NDArray[np.int64]:
        rows, first = np.empty(count, np.int64), 0
        for found in parts:
            rows[first : first + len(found)] = found[:, 0]
            first += len(found)
        return rows

    return _read_matches(path, None, keys, count, folder, read)


def _read_matches(
    path: Path,
    value: str | None,
    keys: Callable[[], Iterable[pa.ChunkedArray]],
    count: int,
    folder: Path | None,
    read: Callable[[Iterator[Values]], Found],
) -> Found:
    """Give what a parquet file says of keys to `read`: in one pass where it has their order, else once more when joined."""

    def chunks() -> Iterator[pa.Array]:
        return (part.combine_chunks().cast(pa.large_string()) for part in keys())

    stream = parquet_keys(path, value)
    ordered = OrderedMatch(stream, 1)
    answer = read(map(ordered.match, chunks()))
    if ordered.is_complete():
        return answer
    with _scratch_folder(folder) as scratch:
        return read(map(JoinedMatch(join_stream(chunks(), count, stream, 1, scratch, path)).match, chunks()))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _scratch_folder(parent: Path | None) -> Iterator[Path]:
    """Make a temporary folder, in the system's place for them where there is no `parent`."""
    remove_abandoned((parent or Path(tempfile.gettempdir())).glob(f"{_SCRATCH}*"))  # of runs that were killed
    with ExitStack() as stack:
        try:
            if parent is not None and not parent.exists():
                parent.mkdir(parents=True)
                stack.callback(_remove_if_empty, parent)  # a list that does not fit the data leaves nothing
            scratch = stack.enter_context(held_folder(_SCRATCH, parent))
        except OSError as error:
            raise write_error(parent or Path(tempfile.gettempdir()), error) from error
        yield scratch


def _choose(option: str | None, work: WorkDirectory) -> Path | None:
    if option is None:
        return work.find_keep_list()
    return None if option == NO_KEEP_LIST else Path(option)
