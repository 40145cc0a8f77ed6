"""The rows that `cluster` works on: which embeddings, and which of them are kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.algorithms.kmeans.kmeans import joint_features
from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.command import data_command
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Float16, Rows
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.sidecar import RepairFigures
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.keep_list import choose_keep_list
from clipcid_cli.steps.repair import repair_teacher
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.cluster import ClusterSettings

Numbers = npt.NDArray[np.int64]

# Rows of which the chosen ones are counted.
_BLOCK = 4096


class Selection:
    """Some of M rows, numbered 0 … N − 1 in their order. Memory: 0.13 bytes for each of the M."""

    def __init__(self, chosen: BoolArray) -> None:
        """Take the chosen ones of all rows, bool [M]."""
        self.num_all = len(chosen)
        self._bits = np.packbits(chosen)
        counts = np.add.reduceat(chosen, np.arange(0, len(chosen), _BLOCK), dtype=np.int64)
        self._before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._before[-1])

    def between(self, start: int, stop: int) -> Numbers:
        """Return the numbers, among all rows, of the chosen ones from start to stop − 1: int64, ascending."""
        first = int(np.searchsorted(self._before, start, side="right")) - 1
        begin = int(self._before[first])
        return self._numbers(first, int(np.searchsorted(self._before, stop)))[start - begin : stop - begin]

    def at(self, positions: Numbers) -> Numbers:
        """Return the numbers, among all rows, of the chosen ones at some positions, int64 [n] in any order."""
        blocks = np.searchsorted(self._before, positions, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        different, firsts = np.unique(blocks[order], return_index=True)
        numbers = np.empty(len(positions), dtype=np.int64)
        for block, first, last in zip(different.tolist(), firsts, [*firsts[1:], len(order)], strict=False):
            places = order[first:last]
            numbers[places] = self._numbers(block, block + 1)[positions[places] - self._before[block]]
        return numbers

    def subset(self, positions: Numbers) -> Selection:
        """Return the selection of the chosen ones at some positions."""
        chosen = np.zeros(self.num_all, dtype=np.bool_)
        chosen[self.at(positions)] = True
        return Selection(chosen)

    def _numbers(self, first: int, last: int) -> Numbers:
        """Return the numbers of the rows chosen of the blocks from first to last − 1."""
        bits = self._bits[first * _BLOCK // 8 : last * _BLOCK // 8]
        # Bits beyond the last row are 0.
        return np.flatnonzero(np.unpackbits(bits)) + first * _BLOCK


@dataclasses.dataclass(frozen=True)
class ClusterRows:
    """The rows to cluster, numbered 0 … N − 1 in the order of the embeddings.

    Attributes:
        keep_list: The keep list that chose them; None for all.
        chosen: Which of all rows of the embeddings they are.
        joint: Whether the features are joint ones of image and caption.
        repair: What was found of the repair of the teacher; None where nothing was judged.
        skips: Rows that cannot be used.
    """

    embeddings: Embeddings
    keep_list: Path | None
    chosen: Selection
    joint: bool
    repair: RepairFigures | None
    skips: Skips
    images: Rows
    texts: Rows | None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.embeddings.width

    def sample(self, count: int, seed: int) -> ClusterRows:
        """Return `count` of the rows, each set of them as likely as another. They share the mapped files."""
        random = np.random.default_rng(derive_seed("cluster rows", seed))
        positions = np.sort(random.choice(len(self), count, replace=False, shuffle=False))
        return dataclasses.replace(self, chosen=self.chosen.subset(positions))

    def features(self, start: int, stop: int) -> Float16:
        """Read what is clustered of rows start … stop − 1: unit rows, float16 [n, D]."""
        images = self._read(self.images, start, stop)
        return joint_features(images, self.captions(start, stop)) if self.joint else images

    def features_at(self, positions: npt.NDArray[np.int64]) -> Float16:
        """Read what is clustered of single rows: unit rows, float16 [n, D]."""
        numbers = self.chosen.at(positions)
        images = self.images.take(numbers)
        return joint_features(images, self.texts.take(numbers)) if self.joint and self.texts is not None else images

    def captions(self, start: int, stop: int) -> Float16:
        """Read the captions' embeddings: unit rows, float16 [n, D]."""
        assert self.texts is not None  # they are asked for
        return self._read(self.texts, start, stop)

    def keys(self, start: int, stop: int) -> pa.ChunkedArray:
        """Read the keys of rows start … stop − 1, strings."""
        pieces = self.embeddings.take_column(self.embeddings.keys_of, self.chosen.between(start, stop))
        return pa.chunked_array(pieces, pa.large_string())

    def fingerprint(self) -> list[FileRecord]:
        """Describe every input file."""
        found = self.embeddings.fingerprints([Kind.TEXTS])
        return found if self.keep_list is None else [*found, record(self.keep_list)]

    def _read(self, rows: Rows, start: int, stop: int) -> Float16:
        if len(self) == len(rows):
            return rows.read(start, stop)
        return rows.take(self.chosen.between(start, stop))


def choose_rows(settings: ClusterSettings, reporter: Reporter) -> ClusterRows:
    """Find the embeddings and the keep list, join them by key and say which were taken."""
    work = WorkDirectory(settings.work)
    folder = settings.embeddings if settings.embeddings is not None else work.find_embeddings()
    cache = None if settings.dry_run else work.fingerprints
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array, cache)
    reporter.note(f"Embeddings: {folder}, {embeddings.num_rows:,} rows of width {embeddings.width}.")
    if settings.features == "joint" and not embeddings.has_texts:
        raise ClipcidError(
            f"--features joint needs text embeddings, but {folder} has none.",
            f"Use --features image, or embed the captions too: {data_command(folder, embeddings.sidecar, text=True)}",
        )
    embeddings.refuse_repeated_keys()
    usable = np.ones(embeddings.num_rows, dtype=np.bool_)
    bad = embeddings.find_bad_rows(texts=True)
    usable[bad] = False
    skips = Skips.of(
        {key: "nan_row" for piece in embeddings.take_column(embeddings.keys_of, bad) for key in piece.to_pylist()}
    )
    skips.check(embeddings.num_rows, settings.max_bad_fraction, str(folder))
    if skips.total:
        reporter.warn(f"{skips.total:,} rows were skipped:\n{skips.describe()}")
    keep_list = choose_keep_list(settings.keep_list, work, "rows", settings.max_bad_fraction, reporter)
    if keep_list is not None:
        scratch = None if settings.dry_run else work.path  # a dry run leaves it as it is
        usable &= keep_list.find_kept(
            lambda: map(embeddings.keys_of, embeddings.files), embeddings.num_rows, scratch, str(folder), reporter
        )
    if not usable.any():
        raise ClipcidError(
            f"Nothing is left to cluster: no row of {folder} is kept.", "Give another --keep-list, or --keep-list none."
        )
    embeddings, repair = repair_teacher(settings, embeddings, reporter)
    return ClusterRows(
        embeddings,
        keep_list=None if keep_list is None else keep_list.path,
        chosen=Selection(usable),
        joint=settings.features == "joint",
        repair=repair,
        skips=skips,
        images=embeddings.rows(Kind.IMAGES),
        texts=embeddings.rows(Kind.TEXTS) if embeddings.has_texts else None,
    )
