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
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.files import atomic_file, link_or_copy, open_regular, read_regular, write_error, write_json
from clipcid_cli.formats.fingerprint import FileRecord, hash_json, record
from clipcid_cli.formats.output import Output, is_claimed
from clipcid_cli.formats.results.keep_list import KeepList
from clipcid_cli.formats.sidecar import Sidecar, sidecar_path
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.shown import redact
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.result import WrittenResult
from clipcid_cli.steps.balance.samples import validate_data
from clipcid_cli.steps.balance.write_shards import WRITE_SHARDS, Choose, Form, TarForm, write_kept_samples
from clipcid_cli.steps.settings.balance import BalanceSettings

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


def validate_target(settings: BalanceSettings) -> None:
    """Refuse a folder that holds what another program wrote, before it is known which form is written."""
    if settings.write_shards is not None:
        TarForm("--write-shards").validate(settings.write_shards)
    if settings.write_data is not None and not is_claimed(settings.write_data, WRITE_SHARDS):
        ListForm(FLAG).validate(settings.write_data)


def validate_new_samples(settings: BalanceSettings) -> None:
    """Refuse a folder that holds samples which this run would replace."""
    for folder in (settings.write_shards, settings.write_data):
        if folder is not None and any(sidecar_path(folder, step).exists() for step in (WRITE_SHARDS, WRITE_DATA)):
            what = "shards" if sidecar_path(folder, WRITE_SHARDS).exists() else "data"
            raise ClipcidError(
                f"{folder} already holds {what}, and this run would replace them.",
                "Add --overwrite, or choose another folder.",
            )


def open_source(settings: BalanceSettings, embeddings: Embeddings) -> Dataset:
    """Open the data that the kept samples are copied from, and check where they are written."""
    data = validate_data(settings, embeddings, FLAG if settings.write_shards is None else "--write-shards")
    if settings.write_shards is not None and not data.has_tars:
        raise ClipcidError(
            f"--write-shards copies tar members, and {data.spec} does not consist of tars.",
            f"Give {FLAG} in its place, which writes the form of the data.",
        )
    folder, form = _choose_form(settings, data)
    _validate_apart(folder, form, data)
    form.validate(folder)
    return data


def write_samples(plan: BalancePlan, context: DistContext) -> tuple[str, WrittenResult]:
    """Write the kept samples, on all processes; return the result and its name in the JSON object."""
    assert plan.data is not None, "the plan has opened it"
    folder, form = _choose_form(plan.settings, plan.data)
    written = write_kept_samples(plan, plan.data, folder, form, context)
    return "data" if plan.settings.write_data else "shards", written


def _choose_form(settings: BalanceSettings, data: Dataset) -> tuple[Path, Form]:
    """Return where the kept samples are written, and how."""
    if settings.write_shards is not None:
        return settings.write_shards, TarForm("--write-shards")
    assert settings.write_data is not None, "one of the two is given"
    return settings.write_data, form_of(data)


def _validate_apart(folder: Path, form: Form, data: Dataset) -> None:
    """Refuse a folder whose files would replace the data or become part of it, and names that lead out of the folder."""
    place = folder.resolve()
    for shard in data.shards:
        target = Path(os.path.normpath(place / f"{shard.name}{form.suffix}"))
        if not target.is_relative_to(place):
            raise ClipcidError(
                f"Shard {shard.source} is named {shard.name}, which leads out of {folder}.", "Rename the shard."
            )
        if "://" in shard.source:
            continue
        source = Path(shard.source).resolve()
        if target == source:
            raise ClipcidError(f"{form.flag} {folder} would overwrite the data itself.", "Give another folder.")
        if data.kind == "images" and place.is_relative_to(source):
            raise ClipcidError(f"{form.flag} {folder} would become part of the data.", "Give a folder outside of it.")


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

            def keys_of(index: int) -> Set[str]:
                progress.advance()
                keys = _stored_keys(shards[index], choose) if index < len(shards) else set[str]()
                counts.append(len(keys))
                return keys

            written = copy_list(images, target, keys_of)
        sizes = dict[str, int]()
        for shard, size, count in zip(shards, written, counts, strict=False):
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
