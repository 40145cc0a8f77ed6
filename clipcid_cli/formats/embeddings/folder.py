"""Embeddings on disk, in the layout of clip-retrieval and embedding-reader.

    img_emb/img_emb_0000.npy        float16 [n, D], unit rows
    text_emb/text_emb_0000.npy      the same, of the captions
    metadata/metadata_0000.parquet  key, shard, caption; row i belongs to row i of both

One group of files per shard; `extras` describes optional ones. Folders made by other tools are read as they are: rows of
another number format, or that are not unit rows, are normalised and cast to float16 when they are read, each row by itself.
DataComp's metadata is such a folder:

    0a1b….npz      arrays l14_img, l14_txt, b32_img, b32_txt, …, float16 [n, D]
    0a1b….parquet  uid, text, …; row i belongs to row i of every array
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.embeddings.checks import (
    AGAIN,
    check_file,
    check_rows,
    find_unusable_rows,
    read_embed_sidecar,
)
from clipcid_cli.formats.embeddings.command import data_command, remake
from clipcid_cli.formats.embeddings.extras import Extras, ExtrasFinder, ViewParams
from clipcid_cli.formats.embeddings.npy import Fingerprint, RowFile, find_npy
from clipcid_cli.formats.embeddings.npz import MOST_UNPACKED
from clipcid_cli.formats.embeddings.pairing import DIGITS, list_files, list_inner_files, pair_by_name, pair_by_number
from clipcid_cli.formats.embeddings.recorded import RecordedFiles
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord, Memo, identity_of, refuse_changed
from clipcid_cli.formats.key_join import find_repeated_key, hash_keys
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.parquet import column_names, read_first_column, replace_invalid
from clipcid_cli.formats.sidecar import EmbedSidecar, sidecar_path

# Names generated at once for rows without keys: Python's strings take several times the memory of Arrow's.
_NAMES_AT_ONCE = 65_536
_TEXT = pa.large_string()


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """The files of one shard.

    Attributes:
        images: Image embeddings: an npy, or an array of an npz.
        texts: Text embeddings likewise; None where there are none.
        metadata: parquet of keys and captions; None where there is none.
        first: Number of its first row among all rows.
        extras: Views and further captions.
    """

    images: RowFile
    texts: RowFile | None
    metadata: Path | None
    first: int
    rows: int
    extras: Extras

    @property
    def name(self) -> str:
        """Name of the file without its suffix, used as the shard's where another tool did not record it."""
        return self.images.path.stem

    def fingerprints(
        self, of_file: Fingerprint, *, texts: bool = False, extras: Collection[str] = ()
    ) -> list[FileRecord]:
        """Describe its files: image embeddings, metadata, and those requested that exist: texts, fields of `Extras`."""
        parts = [self.images, *([self.texts] if texts and self.texts is not None else [])]
        parts += [file for name, file in self.extras.files().items() if name in extras]
        found = [part.fingerprint(of_file) for part in parts]
        return found if self.metadata is None else [*found, of_file(self.metadata)]


class Embeddings:
    """The embeddings of one model over one data set.

    Attributes:
        files: Its files, in order of rows.
        sidecar: That of `embed`, without its lists of files; None for a folder of another tool.
    """

    def __init__(
        self,
        folder: Path,
        files: tuple[EmbeddingFile, ...],
        width: int,
        sidecar: EmbedSidecar | None,
        recorded: RecordedFiles | None = None,
        prefix_keys: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.folder, self.files, self.width, self.sidecar = folder, files, width, sidecar
        self._recorded, self._cache = recorded, cache
        self._prefix_keys = prefix_keys and sidecar is None
        self.num_rows = sum(file.rows for file in files)

    @property
    def is_verified(self) -> bool:
        """Whether `embed` wrote the files, as its sidecar records them: all rows are then unit float16."""
        return self._recorded is not None

    @cached_property
    def has_texts(self) -> bool:
        """Whether there are text embeddings."""
        return all(file.texts is not None for file in self.files)

    def images(self) -> Rows:
        """Map the image embeddings."""
        return self._map(lambda file: file.images)

    def texts(self) -> Rows:
        """Map the text embeddings, row-aligned with the images.

        Raises:
            ClipcidError: when there are none.
        """
        if not self.has_texts:
            raise ClipcidError(
                f"{self.folder} contains no text embeddings.",
                f"Embed captions too; the data needs some: {data_command(self.folder, self.sidecar, text=True)}",
            )
        return self._map(lambda file: file.texts)

    @property
    def num_views(self) -> int:
        """Number V of embedded views per image, 0 for none."""
        return self.files[0].extras.num_views

    def views(self) -> Rows:
        """Map the embeddings of the views, [N·V, D]: view v of row i is row i·V + v."""
        return self._map(lambda file: file.extras.views)

    def view_params(self) -> ViewParams:
        """Map the parameters that reproduce the views."""
        parts = [file.extras.view_params for file in self.files]
        return ViewParams([part for part in parts if part is not None], self.num_views)

    @property
    def num_variants(self) -> int:
        """Number W of embedded variants of each row's captions, 0 for none."""
        return self.files[0].extras.num_variants

    def variants(self) -> Rows:
        """Map the embeddings of the text variants, [N·W, D]: variant w of row i is row i·W + w."""
        return self._map(lambda file: file.extras.variants)

    @cached_property
    def has_further_captions(self) -> bool:
        """Whether captions after the first are embedded, for any row."""
        return any(file.extras.further is not None for file in self.files)

    def further_captions(self) -> Rows:
        """Map the embeddings of the captions after the first: caption k ≥ 1 of row i is row k − 1 of those of i."""
        return self._map(lambda file: file.extras.further)

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """Keys of the rows, N strings: column ``key``, else ``image_path``, else ``uid``, else file and row."""
        return self._join(self.keys_of)

    @cached_property
    def shards(self) -> pa.ChunkedArray:
        """Names of the rows' shards, N strings; the file's name where another tool did not record them."""
        return self._join(self.shards_of)

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """Captions of the rows, N strings: column ``caption``, else DataComp's ``text``; empty where there is none."""
        return self._join(self.captions_of)

    def keys_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the :attr:`keys` of one file's rows."""
        keys = _read_column(file, ("key", "image_path", "uid"), lambda row: f"{file.name}/{row}")
        if not self._prefix_keys:
            return keys
        shards, slash = self.shards_of(file).combine_chunks(), pa.scalar("/", _TEXT)
        return pa.chunked_array([pc.binary_join_element_wise(shards, keys.combine_chunks(), slash)])

    def shards_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the :attr:`shards` of one file's rows."""
        return _read_column(file, ("shard",), lambda row: file.name)

    def captions_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the :attr:`captions` of one file's rows."""
        return replace_invalid(_read_column(file, ("caption", "text"), lambda row: ""))

    @property
    def has_uids(self) -> bool:
        """Whether the metadata have a column ``uid``."""
        file = self.files[0].metadata
        return file is not None and "uid" in column_names(file, AGAIN)

    def uids_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read DataComp's identifiers of one file's rows, strings; empty where the metadata have no column ``uid``."""
        return _read_column(file, ("uid",), lambda row: "")

    def fingerprints(self, *, texts: bool = False, extras: Collection[str] = ()) -> list[FileRecord]:
        """Describe the files of every shard for a sidecar: image embeddings, metadata, and what is requested of the rest."""
        look = partial(EmbeddingFile.fingerprints, texts=texts, extras=extras)
        return [entry for part in self._fingerprint(look) for entry in part]

    def text_fingerprints(self) -> list[FileRecord]:
        """Describe the text embeddings of every shard."""

        def look(file: EmbeddingFile, of_file: Fingerprint) -> list[FileRecord]:
            return [] if file.texts is None else [file.texts.fingerprint(of_file)]

        return [entry for part in self._fingerprint(look) for entry in part]

    def _fingerprint(self, look: Callable[[EmbeddingFile, Fingerprint], list[FileRecord]]) -> list[list[FileRecord]]:
        if self._recorded is not None:
            self._recorded.refuse_changed()
            return [look(file, self._recorded.describe) for file in self.files]
        memo = Memo(self._cache)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda file: look(file, memo.record), self.files))
        memo.save()
        return found

    def refuse_repeated_keys(self) -> None:
        """Refuse keys of two rows in a folder of another tool; `embed` has checked its own.

        Raises:
            ClipcidError: when there are any.
        """
        if self.sidecar is not None:
            return
        # Hashes alone first, file by file: 9 bytes a row. Where none repeats, no key does.
        hashes, first = np.empty(self.num_rows, dtype=np.uint64), 0
        for file in self.files:
            hashes[first : first + file.rows] = hash_keys(self.keys_of(file))
            first += file.rows
        hashes.sort()
        if not (hashes[1:] == hashes[:-1]).any():
            return
        repeat = find_repeated_key(self._join(self.keys_of))
        if repeat is not None:
            key, one, other = repeat
            raise ClipcidError(
                f"Key {key!r} belongs to rows {one:,} and {other:,} of {self.folder}.",
                "Add --keys shard, which puts the shard's name before each key, or give the rows distinct keys.",
            )

    def find_bad_rows(self, *, texts: bool) -> npt.NDArray[np.int64]:
        """Find rows that are zero or not finite: their distances to others are undefined.

        Verified folders are not read for this: `embed` leaves such rows out. Of others the answer is remembered.

        Args:
            texts: Whether text embeddings count too, where there are any.

        Returns:
            Their numbers, int64, ascending.
        """
        if self.is_verified:
            return np.empty(0, dtype=np.int64)
        texts = texts and self.has_texts
        remembered = None
        if self._cache is not None and self._cache.parent.is_dir():
            identity = identity_of({"texts": texts}, self.fingerprints(texts=texts))
            remembered = self._cache.with_name(".bad-rows") / f"{identity}.npy"
            if remembered.is_file():
                with suppress(ClipcidError):
                    return np.array(find_npy(remembered).map(), dtype=np.int64)
        sides = [self.images(), *([self.texts()] if texts else [])]
        found = np.unique(np.concatenate([find_unusable_rows(side) for side in sides]))
        if remembered is not None:
            with suppress(ClipcidError):  # a work directory that is read-only
                write_npy(remembered, found)
        return found

    def _map(self, choose: Callable[[EmbeddingFile], RowFile | None]) -> Rows:
        parts = [part for part in map(choose, self.files) if part is not None]
        if (size := sum(part.unpacked for part in parts)) > MOST_UNPACKED:
            raise ClipcidError(
                f"The arrays in {self.folder} are compressed, so that they cannot be mapped: unpacked, they take "
                f"{size / 2**30:.1f} GiB of memory, more than the allowed {MOST_UNPACKED / 2**30:g} GiB.",
                "Save them uncompressed: numpy.savez(new, **numpy.load(old)).",
            )
        return Rows(parts, self.width, self.is_verified)

    def _join(self, read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for file in self.files for chunk in read(file).chunks], _TEXT)


def _read_column(file: EmbeddingFile, names: tuple[str, ...], default: Callable[[int], str]) -> pa.ChunkedArray:
    """Read the first of some columns that the metadata have, nulls as empty strings; else make the defaults."""
    column = None if file.metadata is None else read_first_column(file.metadata, names, _TEXT, AGAIN)
    if column is not None:
        if len(column) != file.rows:
            raise ClipcidError(f"{file.metadata} has {len(column):,} rows; {file.rows:,} were found before.", AGAIN)
        return column.fill_null("") if column.null_count else column
    pieces = (range(file.rows)[at : at + _NAMES_AT_ONCE] for at in range(0, file.rows, _NAMES_AT_ONCE))
    return pa.chunked_array([pa.array(map(default, piece), _TEXT) for piece in pieces], type=_TEXT)


def open_embeddings(
    folder: Path, keys: str = "sample", npz_array: str | None = None, cache: Path | None = None
) -> Embeddings:
    """Open a folder of embeddings.

    Args:
        folder: One that `embed` finished, or one of clip-retrieval or embedding-reader: ``img_emb/*.npy`` with
            ``metadata/*.parquet`` (and ``text_emb/*.npy``) of the same numbers, or a folder of bare ``.npy``, or one of
            DataComp's ``.npz`` with a ``.parquet`` of the same name for each, in subfolders where it has none itself.
        keys: ``shard`` puts the shard's name before each key of another tool's folder, where keys repeat across shards;
            the keys of `embed` are as its own option made them.
        npz_array: Name of the array in each ``.npz``; None for the only one whose name ends in ``_img``.
        cache: Table in which the fingerprints of the files are remembered; None hashes them each time.

    Raises:
        ClipcidError: when there are no embeddings, they are unfinished, or files do not match.
    """
    folder, recorded = Path(folder), None
    sidecar = read_embed_sidecar(folder)
    if sidecar is None and unfinished(folder, "embed") is not None:
        raise ClipcidError(
            f"The embeddings in {folder} are unfinished.", "Run the same embed command again: it continues."
        )
    if sidecar is not None:
        memo = Memo(cache)
        refuse_changed(folder, sidecar.outputs, sidecar_path(folder, "embed"), partial(remake, folder, sidecar), memo)
        memo.save()
        if sidecar.outputs:
            recorded = RecordedFiles(folder, sidecar.outputs, partial(remake, folder, sidecar))
        sidecar.inputs, sidecar.outputs = [], []  # those of 41,000 shards take 100 MB
    inside = folder / "img_emb"
    images = list_files(inside if inside.is_dir() else folder, ".npy")
    archives = list_files(folder, ".npz") or list_inner_files(folder, ".npz")
    if images and npz_array is None:
        parts = pair_by_number(folder, images)
    elif archives:
        parts = pair_by_name(archives, npz_array)
    elif images:
        raise ClipcidError(f"{folder} contains no .npz, so there is no array {npz_array}.", "Omit --npz-array.")
    else:
        raise ClipcidError(
            f"{folder} contains no embeddings (img_emb/*.npy, or *.npz).",
            "Give --embeddings DIR, or make them: clipcid embed DATA",
        )
    with_texts, with_metadata = (any(part[place] is not None for part in parts) for place in (1, 2))
    check_rows(parts[0][0])
    first, width = 0, parts[0][0].shape[1]
    files: list[EmbeddingFile] = []
    finder = ExtrasFinder(folder)
    for image, text, metadata in parts:
        check_rows(image)
        extras = finder.find(digits[1]) if (digits := DIGITS.search(image.path.stem)) else Extras()
        file = EmbeddingFile(image, text, metadata, first, image.shape[0], extras)
        check_file(file, width, with_texts, with_metadata, count_metadata=recorded is None)
        extras.check(file.rows, width)
        for what, count in extras.shape.items() if files else ():
            if count != (before := files[0].extras.shape[what]):
                raise ClipcidError(
                    f"{image.path} has {count} {what} for each image, the files before it {before}.",
                    "Make the folder again.",
                )
        files.append(file)
        first += file.rows
    if first == 0:
        raise ClipcidError(f"{folder} contains {len(files)} files of embeddings, all without rows.", "Make them again.")
    if recorded is not None:
        recorded.refuse_others(files)
    return Embeddings(folder, tuple(files), width, sidecar, recorded, prefix_keys=keys == "shard", cache=cache)
