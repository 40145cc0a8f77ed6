"""What `balance` starts from: embeddings, found or made, and their rows: which are finite, and which are equal."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.duplicates import collapse_duplicates, hash_rows, unique_positions
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import DoubleArray, HalfArray, IntArray, row_type
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.folder import EmbeddingFile, Embeddings
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.embeddings.manifest import find_lost
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.output import WORK_OR_OUT
from clipcid_cli.formats.results.row_files import ROW_FILES, RowFile, read_row_files
from clipcid_cli.formats.sidecar import EmbedSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.embed.ensure import ensure_embeddings
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL
from clipcid_cli.steps.shared_arrays import collect_arrays, share_arrays

# What is computed from so few rows stays in the processor's cache.
_ROWS_AT_ONCE = 512
_CAPTIONS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class BalanceRows:
    """The finite rows of the embeddings, numbered 0 … N − 1 in their order, as in the keep list.

    Attributes:
        images: All rows of the embeddings.
        numbers: Numbers of the finite ones among them, integers [N], ascending.
        unique: The rows that equal no earlier one, integers [U], ascending.
        copies: Edges of weight 0 that join each other row to the first of its kind.
        positions: Where filters have chosen among the finite rows: positions of the chosen ones, integers [N], ascending.
        num_finite: Number of the finite rows that they were chosen from.
    """

    images: Rows
    numbers: IntArray
    unique: IntArray
    copies: Edges
    positions: IntArray | None = None
    num_finite: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def describe_choice(self) -> list[FileRecord]:
        """Describe which of the finite rows these are, as an input of what is made of them; nothing where all are."""
        if self.positions is None:
            return []
        is_chosen = np.zeros(self.num_finite, np.bool_)
        is_chosen[self.positions] = True
        digest = hashlib.blake2b(np.packbits(is_chosen).tobytes(), digest_size=16).hexdigest()
        return [FileRecord("rows that filters have left", len(self), f"blake2b:{digest}")]

    def read(self, rows: IntArray) -> HalfArray:
        """Read some rows, float16 [n, D]."""
        return self.images.take(self.numbers[rows])

    def pick(self, parts: Iterable[tuple[EmbeddingFile, pa.ChunkedArray]]) -> Iterator[pa.Array]:
        """Yield the values of the finite rows, of a column of the embeddings that comes file by file."""
        for file, values in parts:
            bounds = [file.first, file.first + file.rows]  # of another type, they would convert all numbers
            start, stop = np.searchsorted(self.numbers, np.array(bounds, self.numbers.dtype))
            part = self.numbers[start:stop] - file.first
            yield from (values if len(part) == file.rows else values.take(pa.array(part))).chunks

    def unique_positions(self) -> IntArray:
        """Return the position in `unique` of the row that each row equals, integers [N]."""
        return unique_positions(len(self), self.unique, self.copies)


def find_embeddings(settings: BalanceSettings, machine: Machine, reporter: Reporter) -> Path:
    """Return the folder of the embeddings to balance, and make them where there are none."""
    if settings.embeddings is not None:
        return settings.embeddings
    work = WorkDirectory(settings.work)
    if settings.data is None and settings.model is None:
        folder = machine.on_main(work.find_embeddings)
        reporter.note(f"Embeddings: {folder}.")
        return folder
    model = settings.model or machine.on_main(lambda: _model_of(work)) or DEFAULT_MODEL
    return ensure_embeddings(settings, machine, reporter, data=settings.data, model=model)


def _model_of(work: WorkDirectory) -> str | None:
    """Return the model of the work directory's embeddings, when there are those of one model."""
    try:
        sidecar = read_sidecar(sidecar_path(work.find_embeddings(), "embed"), EmbedSidecar)
    except ClipcidError:
        return None
    return None if sidecar is None else sidecar.model.spec


def needs_texts(settings: BalanceSettings) -> bool:
    """Tell whether images are compared with their captions."""
    return settings.has_window or settings.select == "similarity"


def output_identity(settings: BalanceSettings, embeddings: Embeddings) -> dict[str, Any]:
    """Return the settings that decide what is written; all of them may change on an existing forest."""
    texts = None
    if needs_texts(settings):
        texts = embeddings.fingerprints([Kind.TEXTS])[-1].hash
    names = ("keep", "threshold", "cosine_distance", "linkage", "select", "neighbors")
    window = ("min_caption_similarity", "max_caption_similarity")
    return {name: getattr(settings, name) for name in (*names, *window)} | {
        "seed": settings.seed if settings.select == "random" else None,
        "texts": texts,
    }


def list_row_files(embeddings: Embeddings) -> list[RowFile]:
    """List the files through which rows are numbered, each with the metadata beside it."""
    metadata = iter(embeddings.contents(METADATA))
    found: list[RowFile] = []
    for images, file in zip(embeddings.contents(Kind.IMAGES), embeddings.files, strict=True):
        found.append(RowFile(images.path, images.size, images.hash, rows=file.rows))
        if file.metadata is not None:
            beside = next(metadata)
            found.append(RowFile(beside.path, beside.size, beside.hash))
    return found


def holds_earlier(folder: Path, embeddings: Embeddings, overwrite: bool) -> bool:
    """Tell whether all files of an output of `balance`, finished or not, are among those of the embeddings."""
    if overwrite:
        return False
    now, fix = list_row_files(embeddings), f"Add --overwrite to replace it, or write elsewhere ({WORK_OR_OUT})."
    for path in (folder / ROW_FILES, *folder.glob(f".balance-*/{ROW_FILES}")):
        if path.exists() and (lost := find_lost(read_row_files(path, fix), now)):
            raise ClipcidError(
                f"{folder} holds balance output made with other settings or inputs:\n  inputs: {lost}", fix
            )
    return True


def find_rows(machine: Machine, folder: Path, images: Rows, reporter: Reporter) -> BalanceRows:
    """Read every row once, each process its share, to find rows that are not finite and rows that are equal.

    Args:
        folder: Where processes share what they find.
    """
    start, stop = machine.share(len(images))
    hashes, finite = np.empty(stop - start, np.uint64), np.empty(stop - start, np.bool_)
    for begin in range(start, stop, _ROWS_AT_ONCE):
        rows, part = (
            images.read(begin, min(begin + _ROWS_AT_ONCE, stop)),
            slice(begin - start, begin - start + _ROWS_AT_ONCE),
        )
        hashes[part] = hash_rows(rows)
        finite[part] = np.all(np.isfinite(rows), axis=1)
    parts = collect_arrays(machine, folder, (hashes, finite))
    del hashes, finite

    def survey() -> Arrays:
        kind = row_type(len(images))
        hash_N, finite_N = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        numbers = np.flatnonzero(finite_N).astype(kind)
        if len(numbers) < len(hash_N):
            hash_N = hash_N[numbers]
        rows = np.arange(len(numbers), dtype=kind)
        unique, copies = collapse_duplicates(lambda rows: images.take(numbers[rows]), rows, hash_N)
        return numbers, unique, copies.a, copies.b

    numbers, unique, a, b = share_arrays(machine, folder, survey)
    if len(b):
        reporter.note(f"{len(b):,} rows are exact copies of earlier ones.")
    return BalanceRows(images, numbers, unique, Edges(a, b, np.zeros(len(b), np.float32)))


def take_texts(
    embeddings: Embeddings, read: Callable[[EmbeddingFile], pa.ChunkedArray], numbers: IntArray
) -> list[str]:
    """Read a column of the embeddings at some rows, n strings; one file's column is in memory at a time.

    Args:
        read: Reads the column of one file.
        numbers: Numbers of the rows, int64 [n].
    """
    found = np.empty(len(numbers), object)
    owners = np.searchsorted([file.first for file in embeddings.files], numbers, side="right") - 1
    for owner in np.unique(owners).tolist():
        places, file = np.flatnonzero(owners == owner), embeddings.files[owner]
        found[places] = read(file).take(pa.array(numbers[places] - file.first)).to_pylist()
    texts: list[str] = found.tolist()
    return texts


def has_caption(embeddings: Embeddings, file: EmbeddingFile) -> npt.NDArray[np.bool_]:
    """Tell which rows of a file have a caption, bool [n]."""
    return np.asarray(pc.not_equal(embeddings.captions_of(file), pa.scalar("", pa.large_string())).to_numpy())


def caption_similarities(
    embeddings: Embeddings, rows: BalanceRows, members: IntArray, reporter: Reporter
) -> DoubleArray:
    """Return the cosine similarity of some images to their captions, float64 [M].

    It is −inf where there is no caption, or its embedding is zero or not finite; the latter are counted in a warning.
    Folders of other tools may have text embeddings without captions: all their images then count as captioned.

    Args:
        members: Which rows, integers [M], ascending.
    """
    texts, skips, numbers = embeddings.rows(Kind.TEXTS), Skips(), rows.numbers[members]
    captioned, scores = np.empty(len(members), np.bool_), np.empty(len(members), np.float64)
    bounds = np.searchsorted(numbers, np.array([file.first for file in embeddings.files], numbers.dtype))
    for file, (begin, end) in zip(embeddings.files, pairwise([*bounds.tolist(), len(numbers)]), strict=True):
        if begin < end:
            captioned[begin:end] = has_caption(embeddings, file)[numbers[begin:end] - file.first]
    if not captioned.any() and not any(has_caption(embeddings, file).any() for file in embeddings.files):
        captioned[:] = True
    unusable = [np.empty(0, numbers.dtype)]
    for start in range(0, len(members), _CAPTIONS_AT_ONCE):
        part = slice(start, start + _CAPTIONS_AT_ONCE)
        text = texts.take(numbers[part]).astype(np.float64)
        usable = np.isfinite(text).all(axis=1) & text.any(axis=1)
        text[~usable] = 0.0
        similarity = (rows.images.take(numbers[part]).astype(np.float64) * text).sum(axis=1)
        scores[part] = np.where(captioned[part] & usable, similarity, -np.inf)
        unusable.append(numbers[part][captioned[part] & ~usable])
    for key in take_texts(embeddings, embeddings.keys_of, np.concatenate(unusable)):
        skips.add("nan_row", key)
    if skips.total:
        reporter.warn(
            f"{skips.total:,} text embeddings of images in groups are zero or not finite: such an image is kept only where "
            f"no other image of its group has a usable one.\n{skips.describe()}"
        )
    return scores


def count_skipped(settings: BalanceSettings, embeddings: Embeddings, rows: BalanceRows, reporter: Reporter) -> Skips:
    """Count and name the rows that are not finite."""
    skips = Skips()
    is_bad = np.ones(embeddings.num_rows, np.bool_)
    is_bad[rows.numbers] = False
    bad = np.flatnonzero(is_bad)
    for key in take_texts(embeddings, embeddings.keys_of, bad):
        skips.add("nan_row", key)
    if not len(rows):
        raise ClipcidError(
            f"None of the {embeddings.num_rows:,} rows of {embeddings.folder} is finite.", "Make the embeddings again."
        )
    skips.check(embeddings.num_rows, settings.max_bad_fraction, str(embeddings.folder))
    if skips.total:
        reporter.warn(f"{skips.total:,} rows were skipped:\n{skips.describe()}")
    return skips
