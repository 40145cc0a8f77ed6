"""Parts to embeddings: the shards of all parts, checked, with the manifest and the sidecar that one process would write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.index import RepeatedKeyError
from clipcid_cli.formats.data.object_store import ObjectStore
from clipcid_cli.formats.embeddings.kinds import METADATA
from clipcid_cli.formats.embeddings.manifest import ShardRecord, merge_skips
from clipcid_cli.formats.embeddings.parts import PartRecord, part_journal, refuse_running, validate_complete
from clipcid_cli.formats.embeddings.sent_parts import fetch_shards, read_runs, read_sent, read_sent_parts
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar, read_embed_sidecar
from clipcid_cli.formats.embeddings.writer import FINISHED, EmbeddingWriter, read_finished
from clipcid_cli.formats.join import find_repeat
from clipcid_cli.formats.output import Output, OutputSpec, find_works, open_output, unfinished
from clipcid_cli.formats.parquet import read_first_column
from clipcid_cli.formats.sidecar import Provenance
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.embed.plan import EMBED
from clipcid_cli.steps.embed.result import EmbedResult
from clipcid_cli.steps.embed.run import describe, note_replaced
from clipcid_cli.steps.embed.write import Timings, commit
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.shared import flag_of, given_fields, setting_of, url_of

_SLUG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")  # of a stranger's record, which becomes the name of a folder
_AGAIN = "Run the parts again."


def join_parts(settings: EmbedSettings) -> EmbedResult:
    """Join parts in their folder, or those of an object store in a folder here."""
    place = settings.join
    assert place is not None, "asked to join"
    without_effect = [flag_of(field) for field in given_fields(settings) if not _has_effect(field)]
    if without_effect:
        given = ", ".join(without_effect)
        reporting.warn(f"Without effect on --join, since the parts record how they were made: {given}.")
    url = url_of(place)
    if url is None:
        return _join_folder(settings, place)
    return _join_sent(settings, ObjectStore(url))


def _has_effect(field: dataclasses.Field[Any]) -> bool:
    return setting_of(field).operational or field.name == "max_bad_fraction"


def _join_folder(settings: EmbedSettings, folder: Path) -> EmbedResult:
    run = unfinished(folder, EMBED)
    if run is None:
        sidecar = read_embed_sidecar(folder)
        if sidecar is None:
            raise _no_parts_error(str(folder))
        reporting.note(f"{folder} holds finished embeddings, and no parts.")
        return describe(folder, sidecar)
    with open_output(_specify(settings, folder, run)) as output:
        if output.finished is not None:
            return describe(folder, output.finished)
        refuse_running(find_works(folder, EMBED))
        parts = [part for _, part in part_journal(output.work).entries()]
        records = read_finished(output.work)
        validate_complete(str(folder), parts, records, run)
        note_replaced(output)
        return _finish(settings, output, parts, [record for _, record in sorted(records.items())])


def _join_sent(settings: EmbedSettings, place: ObjectStore) -> EmbedResult:
    runs = read_runs(place)
    if not runs:
        raise _no_parts_error(str(place))
    if len(runs) > 1:
        raise ClipcidError(
            f"{place} holds parts of {len(runs)} runs with other settings or inputs: {', '.join(runs)}.",
            "Remove those that you do not want.",
        )
    ((name, run),) = runs.items()
    store = place.below(name)
    parts = read_sent_parts(store)
    records = read_sent(store)
    validate_complete(str(place), parts, records, run)
    folder = settings.out or _choose_folder(settings, parts[0])
    with open_output(_specify(settings, folder, run)) as output:
        if output.finished is not None:
            reporting.note(f"{folder} already holds the embeddings of {place}.")
            return describe(folder, output.finished)
        note_replaced(output)
        output.begin_work()
        reporting.note(f"Fetching {len(records):,} shards of {place}.")
        ordered = [record for _, record in sorted(records.items())]
        fetch_shards(store, _open_writer(output, parts, ordered), ordered)
        return _finish(settings, output, parts, ordered)


def _choose_folder(settings: EmbedSettings, part: PartRecord) -> Path:
    """Return the folder of the model's embeddings in the work directory."""
    name = part.facts.model.slug
    if not _SLUG.fullmatch(name):
        raise ClipcidError(
            f"The parts are of a model called {name!r}, which names no folder.", "Name a folder with --out."
        )
    return WorkDirectory(settings.work).embeddings(name)


def _specify(settings: EmbedSettings, folder: Path, run: Provenance) -> OutputSpec[EmbedSidecar]:
    return OutputSpec(
        folder,
        EMBED,
        EmbedSidecar,
        settings=run.settings,
        inputs=run.inputs,
        overwrite=settings.overwrite,
        elsewhere="--out",
        parts=FINISHED,
    )


def _open_writer(output: Output[EmbedSidecar], parts: list[PartRecord], records: list[ShardRecord]) -> EmbeddingWriter:
    keys = str(output.spec.settings.get("keys", "sample"))
    return EmbeddingWriter(output.work, parts[0].deciding, [record.input for record in records], keys)


def _finish(
    settings: EmbedSettings, output: Output[EmbedSidecar], parts: list[PartRecord], records: list[ShardRecord]
) -> EmbedResult:
    """Write the manifest and the sidecar of shards that are all here."""
    writer = _open_writer(output, parts, records)
    for shard_index, record in enumerate(records):
        if not writer.holds(shard_index, record) or writer.finished_record(shard_index) is None:
            raise ClipcidError(
                f"Shard {record.input.shard} in {output.folder} is not what its record says: its files or its settings "
                "are others.",
                _AGAIN,
            )
    finished = writer.finish()
    _validate_keys(output.work, finished)
    timings = _read_timings(parts)
    sidecar = commit(
        output,
        parts[0].facts,
        finished,
        timings,
        merge_skips(records) if output.spec.settings.get("text") else None,
        max_bad_fraction=settings.max_bad_fraction,
    )
    return describe(output.folder, sidecar)


def _read_timings(parts: list[PartRecord]) -> list[Timings]:
    try:
        return [msgspec.convert(process, Timings) for part in parts for process in part.timings] or [Timings()]
    except msgspec.ValidationError as error:  # of a record that was edited
        raise ClipcidError(f"The record of a part has no times of processes: {error}.", _AGAIN) from error


def _validate_keys(work: Path, records: list[ShardRecord]) -> None:
    """Refuse a key that two shards have: of all shards only the join knows."""

    def read() -> Iterator[pa.ChunkedArray]:
        for record in records:
            column = read_first_column(work / record.files[METADATA].path, ("key",), pa.large_string(), _AGAIN)
            if column is None or len(column) != record.rows:
                raise ClipcidError(
                    f"The metadata of shard {record.input.shard} do not hold {record.rows:,} keys.", _AGAIN
                )
            yield column

    repeat = find_repeat(read, work)
    if repeat is not None:
        ends = np.cumsum([record.rows for record in records])
        shards = np.searchsorted(ends, (repeat.first, repeat.second), side="right")
        one, other = (str(records[shard_index].input.shard) for shard_index in shards)
        raise RepeatedKeyError(repeat.key, one, other)


def _no_parts_error(place: str) -> ClipcidError:
    return ClipcidError(f"{place} holds no parts.", "Run them first: clipcid embed DATA --part 0/8 --out PLACE")
