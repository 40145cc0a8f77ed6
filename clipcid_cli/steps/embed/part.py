"""A part of the embeddings: some of the shards, written without a word to the processes that write the others."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from clipcid_cli.formats.data.object_store import ObjectStore
from clipcid_cli.formats.embeddings.manifest import merge_skips
from clipcid_cli.formats.embeddings.parts import (
    PARTS,
    DataPart,
    PartRecord,
    hold_part,
    part_journal,
    refuse_running,
)
from clipcid_cli.formats.embeddings.sent_parts import SendingWriter, validate_same
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter
from clipcid_cli.formats.output import RUN_FILE, Output, OutputSpec, find_works, open_output
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.plan import EMBED, EmbedPlan
from clipcid_cli.steps.embed.result import EmbedPart, EmbedResult
from clipcid_cli.steps.embed.run import describe, embed_missing
from clipcid_cli.steps.embed.write import Timings, measure, state_facts
from clipcid_cli.steps.settings.shared import url_of


def embed_part(
    plan: EmbedPlan, encoder: EmbedEncoder, spec: OutputSpec[EmbedSidecar], context: DistContext
) -> EmbedResult:
    """Embed the shards of the part that the settings name, for a folder or an object store."""
    settings = plan.settings
    assert plan.task is not None, "asked for a part"
    part = DataPart(*plan.task)
    url = None if settings.out is None else url_of(settings.out)
    place = None if url is None else ObjectStore(url)
    shards = part.shards(len(plan.shards))
    # Other parts are running: what they write is never taken for work of an earlier run, of less data or other keys.
    spec = dataclasses.replace(spec, may_differ=(), begun_may_differ=())
    with ExitStack() as stack:
        output = context.on_rank0(_begin, spec, part, place, stack)
        if output.finished is not None:
            return describe(plan.folder, output.finished)
        deciding = plan.decide_rows(spec.settings)
        writer = _open_writer(plan, deciding, output.work, shards, place)
        record = PartRecord(
            index=part.index,
            count=part.count,
            shards=len(plan.shards),
            facts=state_facts(plan, encoder),
            deciding=deciding,
        )
        context.on_rank0(_write_record, record, output.work, place)
        timings = embed_missing(plan, encoder, writer, context, shards)
        record.timings = [dataclasses.asdict(process) for process in timings]
        context.on_rank0(_write_record, record, output.work, place)
        return context.on_rank0(_describe, plan, part, writer, timings, place)


def _begin(
    spec: OutputSpec[EmbedSidecar], part: DataPart, place: ObjectStore | None, stack: ExitStack
) -> Output[EmbedSidecar]:
    """Make the work folder unless another part has, and hold the part until the stack ends."""
    if place is not None:
        validate_same(place, spec.work_top.name, spec.provenance)
    with open_output(spec, waits=True) as output:  # for a moment: all parts do so when they begin
        if output.finished is None:
            # Starting removes unfinished work of other settings that has no shard yet.
            refuse_running(work for work in find_works(output.folder, EMBED) if work != output.work_top)
            output.begin_work()
            stack.enter_context(hold_part(output.work_top, part))
    if place is not None:
        place.below(output.work_top.name).send(output.work_top / RUN_FILE, RUN_FILE)
    return output


def _open_writer(
    plan: EmbedPlan, deciding: dict[str, Any], work: Path, shards: range, place: ObjectStore | None
) -> EmbeddingWriter:
    if place is None:
        return EmbeddingWriter(work, deciding, plan.shards, plan.dataset.keys)
    return SendingWriter(place.below(work.name), shards, work, deciding, plan.shards, plan.dataset.keys)


def _write_record(record: PartRecord, work: Path, place: ObjectStore | None) -> None:
    journal = part_journal(work)
    label = DataPart(record.index, record.count).label
    journal.append(label, record)
    if place is not None:
        path = journal.path(label)
        place.below(work.name).send(path, f"{PARTS}/{path.name}")


def _describe(
    plan: EmbedPlan, part: DataPart, writer: EmbeddingWriter, timings: list[Timings], place: ObjectStore | None
) -> EmbedPart:
    """Say what the part has; of one that was sent nothing is left here."""
    if isinstance(writer, SendingWriter):
        writer.forget_sent()
        shutil.rmtree(plan.folder, ignore_errors=True)
    shards = part.shards(len(plan.shards))
    records = [record for shard_index in shards if (record := writer.finished_record(shard_index)) is not None]
    return EmbedPart(
        images=sum(record.rows for record in records),
        skipped=dict(sorted(merge_skips(records).counts.items())),
        **measure(timings),
        files={"parts": str(place or plan.folder)},
        part=str(part),
        shards=len(shards),
    )
