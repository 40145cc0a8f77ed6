"""``balance --write-data``: the kept samples in the form of the data: tars, parquet files, a list, or a folder of images."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import without_query
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.folders import FolderImages
from clipcid_cli.formats.data.list_copies import copy_list
from clipcid_cli.formats.data.lists import ListImages
from clipcid_cli.formats.data.parquet_shards import ParquetShard, copy_rows
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.slices import Slice
from clipcid_cli.formats.files import atomic_file, link_or_copy, open_regular, read_regular, write_error, write_json
from clipcid_cli.formats.fingerprint import FileRecord, hash_json, record
from clipcid_cli.formats.output import Output, is_claimed
from clipcid_cli.formats.results.keep_list import KeepList
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.shown import redact
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.write_shards import WRITE_SHARDS, Choose, Form, TarForm

WRITE_DATA = "write-data"
FLAG = "--write-data"
# The paths of the linked files of a folder, a JSON string a line: a sidecar with a record of each would be too large.
_LINKED = "write-data.files.jsonl"


def form_of(data: Dataset) -> Form:
    """Choose how the kept samples of data are written."""
    if data.has_tars:
        return TarForm(FLAG)
    if data.kind == "parquet":
        return ParquetForm(FLAG)
    return ListForm(FLAG) if data.kind == "list" else FolderForm(FLAG)


def validate_own(target: Path) -> None:
    """Refuse a folder that holds what another program wrote, before it is known which form is written."""
    if not is_claimed(target, WRITE_SHARDS):
        ListForm(FLAG).validate(target)


class _OwnForm(Form):
    step = WRITE_DATA
    written = "this data"
    name: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        return {"form": self.name}


class _ShardwiseForm(_OwnForm):
    """A form that is written shard by shard, each followed by a record, by which a run that was killed continues."""

    records_files: ClassVar[bool]  # whether the sidecar records each file

    @abstractmethod
    def write_one(self, shard: Shard, keys: Set[str], output: Output[Sidecar]) -> tuple[int, list[str]]:
        """Write the samples of a shard with some keys; return how many there were, and the paths of their files."""

    def write(
        self, shards: Sequence[Shard], keep: KeepList, choose: Choose, output: Output[Sidecar]
    ) -> tuple[dict[str, int], list[FileRecord]]:
        sizes = dict[str, int]()
        files = list[FileRecord]()
        with reporting.progress("shards", len(shards), "shards") as progress:
            for shard in shards:
                done = _read_done(output, shard)
                if done is None:
                    keys = _stored_keys(shard, choose)
                    count, paths = self.write_one(shard, keys, output)
                    _validate_count(shard, count, len(keys))
                    done = {"written": count, "files": paths}
                    write_json(_done_path(output, shard), done | _name(shard))
                sizes[shard.name] = done["written"]
                if self.records_files:
                    files += [record(output.work / path, output.work) for path in done["files"]]
                progress.advance()
        return sizes, files


class ParquetForm(_ShardwiseForm):
    """Parquet files of the same names with the kept rows, all columns and the images in them; none where nothing is kept."""

    name = "parquet"
    suffix = ".parquet"
    records_files = True

    def write_one(self, shard: Shard, keys: Set[str], output: Output[Sidecar]) -> tuple[int, list[str]]:
        assert isinstance(shard, ParquetShard), "a parquet file"
        path = f"{shard.name}{self.suffix}"
        if not keys:
            (output.work / path).unlink(missing_ok=True)
            return 0, []
        return copy_rows(shard.source, shard.name, output.work / path, shard.table, keys), [path]


class FolderForm(_ShardwiseForm):
    """The kept images and their captions in the same folders, as further names of the same files or as copies."""

    name = "folder"
    records_files = False

    def write_one(self, shard: Shard, keys: Set[str], output: Output[Sidecar]) -> tuple[int, list[str]]:
        assert isinstance(shard, Slice), "a slice of a folder"
        assert isinstance(shard.images, FolderImages), "a slice of a folder"
        linked = list[str]()
        count = 0
        for key, paths in shard.images.files(shard.index):
            if key in keys:
                count += 1
                linked += paths
        for path in linked:
            link_or_copy(Path(shard.source, path), output.work / path)
        return count, linked

    def finish(self, data: Dataset, sizes: dict[str, int], output: Output[Sidecar]) -> list[FileRecord]:
        folders = set[Path]()
        with atomic_file(output.work / _LINKED) as file:
            for shard in data.shards:
                done = _read_done(output, shard)
                assert done is not None, "all shards are written"
                for path in done["files"]:
                    folders.update(Path(path).parents)
                    file.write(f"{json.dumps(path)}\n".encode())
        _remove_earlier(output.folder)
        for folder in sorted(folders):
            if (output.folder / folder).is_symlink():  # files would be written elsewhere
                place = output.folder / folder
                raise write_error(place, FileExistsError(f"{place} is a link"))
        return [record(output.work / _LINKED, output.work)]


class ListForm(_OwnForm):
    """A list of the same name with the kept rows, which the first process writes."""

    name = "list"

    def share(self, shards: Sequence[Shard], context: DistContext) -> Sequence[Shard]:
        return shards if context.is_main else ()

    def write(
        self, shards: Sequence[Shard], keep: KeepList, choose: Choose, output: Output[Sidecar]
    ) -> tuple[dict[str, int], list[FileRecord]]:
        if not shards:
            return {}, []
        assert isinstance(shards[0], Slice), "a slice of a list"
        images = shards[0].images
        assert isinstance(images, ListImages), "a list"
        target = output.work / os.path.basename(redact(without_query(images.source))).lstrip(
            "."
        )  # hidden files are scratch
        counts = list[int]()
        with reporting.progress("list", len(shards), "slices") as progress:

            def keys_of(number: int) -> Set[str]:
                progress.advance()
                keys = _stored_keys(shards[number], choose) if number < len(shards) else set[str]()
                counts.append(len(keys))
                return keys

            found = copy_list(images, target, keys_of)
        sizes = dict[str, int]()
        for shard, size, count in zip(shards, found, counts, strict=False):
            _validate_count(shard, size, count)
            sizes[shard.name] = size
        return sizes, [record(target, output.work)]


def _stored_keys(shard: Shard, choose: Choose) -> set[str]:
    """Return the keys to keep of a shard, as its file has them."""
    keys, _ = choose(shard)
    prefix = f"{shard.name}/" if shard.prefix_keys else ""
    return {key.removeprefix(prefix) for key in keys}


def _validate_count(shard: Shard, count: int, expected: int) -> None:
    if count < expected:
        raise ClipcidError(
            f"Shard {shard.name} of {shard.source} holds {count:,} of its {expected:,} samples to keep.",
            "It has changed since it was embedded: run clipcid embed and balance again.",
        )


def _name(shard: Shard) -> dict[str, str]:
    return {"shard": shard.name, "source": redact(shard.source)}


def _done_path(output: Output[Sidecar], shard: Shard) -> Path:
    return output.work / f".{hash_json(_name(shard))}.json"


def _read_done(output: Output[Sidecar], shard: Shard) -> dict[str, Any] | None:
    """Read what this run wrote of a shard, also before it was killed; None where it is to be written."""
    with suppress(OSError, ValueError, TypeError, LookupError):  # missing or damaged: it is written again
        done: dict[str, Any] = json.loads(read_regular(_done_path(output, shard)))
        if {name: done[name] for name in _name(shard)} == _name(shard):
            return done if all((output.work / path).is_file() for path in done["files"]) else None
    return None


def _remove_earlier(folder: Path) -> None:
    """Remove the files that an earlier run has linked in a folder, and the folders that are then empty."""
    root = folder.resolve()
    with suppress(OSError), open_regular(folder / _LINKED) as file, os.fdopen(os.dup(file.fileno()), "rb") as lines:
        for line in lines:
            with suppress(OSError, ValueError, TypeError):  # of a listing that was edited
                path = folder / json.loads(line)
                if path.parent.resolve().is_relative_to(root):
                    path.unlink()
                    for above in path.relative_to(folder).parents[:-1]:
                        (folder / above).rmdir()
