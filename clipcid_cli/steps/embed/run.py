"""`embed`: the images and captions of a data set to rows of float16, shard by shard."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe
from clipcid_cli.formats.embeddings.manifest import MANIFEST, read_manifest
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.output import Output, find_output, find_works
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.skipped import skipped_file
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.pipeline import Background
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.data_index import count_captions, ensure_index, stream_shard
from clipcid_cli.steps.embed.encoder import EmbedEncoder, load_encoder
from clipcid_cli.steps.embed.memory import validate_memory
from clipcid_cli.steps.embed.plan import EMBED, EmbedPlan, make_plan, take_finished
from clipcid_cli.steps.embed.result import Embedded, EmbedResult
from clipcid_cli.steps.embed.write import Timings, commit, make_rows, state_facts
from clipcid_cli.steps.encode import Encoded, encode, list_batches
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.embed import EmbedSettings

_ADD_NO_TEXT = "Add --no-text to embed the images alone."
# From this many samples on, too many unusable ones end the step before all data is read.
_EARLY_CHECK = 10_000


def run(settings: EmbedSettings) -> Embedded:
    """Embed a data set."""
    with open_dist_context(settings.device) as context:
        if settings.join is not None:
            from clipcid_cli.steps.embed.join import join_parts

            return context.on_rank0(join_parts, settings)
        return make_embeddings(settings, context)


def make_embeddings(settings: EmbedSettings, context: DistContext, without_text: str = _ADD_NO_TEXT) -> Embedded:
    """Embed with the processes of `context`; `without_text` is as of `EmbedPlan`."""
    plan = context.on_rank0(make_plan, settings, without_text)
    if plan.finished is not None:
        context.on_rank0(take_finished, plan, plan.finished)
        return describe(plan.folder, plan.finished)
    return embed_planned(plan, context)


def embed_planned(plan: EmbedPlan, context: DistContext) -> Embedded:
    """Embed what is not embedded yet; of a dry run return what that would cost."""
    settings = plan.settings
    shards = "1 shard" if len(plan.shards) == 1 else f"{len(plan.shards):,} shards"
    reporting.note(f"Embedding {plan.dataset.spec} ({shards}) with {plan.name.spec}.")
    if settings.dry_run or not plan.is_begun:
        validate_samples(plan.dataset, context, settings, dry_run=settings.dry_run)
    encoder = load_encoder(plan, context)
    reporting.note(encoder.describe())
    spec = plan.identify(encoder.settings, may_differ={"inputs"} if plan.may_grow else ())
    if settings.dry_run:
        from clipcid_cli.steps.embed.cost import estimate_cost

        output = context.on_rank0(find_output, spec)
        context.on_rank0(note_replaced, output)
        return estimate_cost(encoder, plan, output, context)
    if plan.task is not None:
        from clipcid_cli.steps.embed.part import embed_part

        return embed_part(plan, encoder, spec, context)
    with claim_output(context, spec) as output:
        if output.finished is not None:
            return describe(plan.folder, output.finished)
        writer = EmbeddingWriter(output.work, plan.decide_rows(spec.settings), plan.shards, plan.dataset.keys)
        context.on_rank0(_start, output, writer)
        timings = embed_missing(plan, encoder, writer, context, range(len(plan.shards)))
        plan = dataclasses.replace(plan, dataset=ensure_index(plan.dataset, context, encoder.workers))
        sidecar = context.on_rank0(_commit, plan, encoder, output, writer, timings)
    return describe(plan.folder, sidecar)


def _start(output: Output[EmbedSidecar], writer: EmbeddingWriter) -> None:
    """Make the work folder, and take over what an earlier run or output has of the same shards."""
    begun = find_works(output.folder, EMBED)
    if begun:
        from clipcid_cli.formats.embeddings.parts import refuse_running

        refuse_running(begun)
    note_replaced(output)
    output.begin_work()
    embedded = (output.folder / MANIFEST).exists()
    if embedded:
        with suppress(ClipcidError):  # it is damaged: all shards are embedded again
            writer.take(output.folder, read_manifest(output.folder, ""))
    if begun or embedded:
        writer.rename_keys()


def note_replaced(output: Output[EmbedSidecar]) -> None:
    """Say which finished embeddings will be replaced, where not the same ones are made again."""
    if not output.differences or output.earlier is not None:
        return
    there = read_sidecar(sidecar_path(output.folder, EMBED), EmbedSidecar)
    if there is not None:
        images = f"{there.counts['images']:,} images of {there.data.spec}"
        reporting.note(f"The embeddings in {output.folder} ({images}) will be replaced.")


def embed_missing(
    plan: EmbedPlan, encoder: EmbedEncoder, writer: EmbeddingWriter, context: DistContext, shards: range
) -> list[Timings]:
    """Embed those of some shards that are not finished; each is written while the next is encoded.

    The processes divide them among themselves.

    Returns:
        Of each process, how its time went.
    """
    missing, expected = context.on_rank0(_find_missing, plan, writer, shards)
    if missing:
        context.on_all(validate_memory, plan, encoder, expected)
    total = len(shards)
    if len(missing) < total:
        reporting.note(f"{total - len(missing)} of {total} shards are already embedded.")
    own = missing[context.rank :: context.size]
    batches = list_batches(plan.dataset, own, partial(stream_shard, plan.dataset), encoder.samples_at_once, plan.reject)
    seen = _Seen(plan)
    timings = Timings()
    parts = list[Encoded]()
    start = time.perf_counter()
    with reporting.progress("embed", expected, "images") as progress, Background() as background:
        for batch, encoded in encode(batches, encoder.decoder, encoder, encoder.model.device, encoder.workers):
            parts.append(encoded)
            timings.read += batch.waited
            # The bar covers all processes.
            progress.advance(len(encoded.samples) * len(missing) / len(own))
            seen.samples += len(encoded.samples)
            if batch.read is None:
                continue
            rows = make_rows(encoder, plan.dataset.shards[batch.shard], parts, batch)
            parts.clear()
            timings.write += background.start(partial(writer.write, batch.shard, rows))
            timings.embedded += len(rows.keys)
            seen.add(rows)
            if plan.dataset.index is None:  # what remains is estimated by what was read
                progress.expect(seen.samples * len(missing) / seen.shards)
        timings.write += background.wait()
    timings.encode = time.perf_counter() - start - timings.read - timings.write
    return context.gather(timings)


def _find_missing(plan: EmbedPlan, writer: EmbeddingWriter, shards: range) -> tuple[list[int], float | None]:
    """Return the numbers of the shards that are not finished, and about how many samples they have; None if unknown."""
    dataset = plan.dataset
    missing = [shard_index for shard_index in shards if writer.finished_record(shard_index) is None]
    if dataset.index is None and any(is_pipe(shard.file) for shard in dataset.shards):
        return missing, None  # nothing is known of the output of a command
    return missing, dataset.estimate_samples() * len(missing) / len(plan.shards)


@dataclasses.dataclass
class _Seen:
    """What a process has seen of the data: too many samples that cannot be used end the step early."""

    plan: EmbedPlan
    shards: int = 0
    samples: int = 0  # also of shards that are not encoded to the end
    read: int = 0
    skipped: Skips = dataclasses.field(default_factory=Skips)

    def add(self, rows: ShardRows) -> None:
        self.shards += 1
        self.read += rows.read
        self.skipped.merge(rows.skipped.counted())
        if self.read >= _EARLY_CHECK:
            self.skipped.check(self.read, self.plan.settings.max_bad_fraction, self.plan.dataset.spec)


def _commit(
    plan: EmbedPlan,
    encoder: EmbedEncoder,
    output: Output[EmbedSidecar],
    writer: EmbeddingWriter,
    timings: list[Timings],
) -> EmbedSidecar:
    return commit(
        output,
        state_facts(plan, encoder),
        writer.finish(),
        timings,
        count_captions(plan.dataset) if plan.settings.text else None,
        max_bad_fraction=plan.settings.max_bad_fraction,
        without_text=plan.without_text,
    )


def describe(folder: Path, sidecar: EmbedSidecar) -> EmbedResult:
    """Return what finished embeddings in a folder are."""
    counts = sidecar.counts
    files = {"embeddings": str(folder)}
    files |= skipped_file(sidecar, folder)
    files["sidecar"] = str(sidecar_path(folder, EMBED))
    return EmbedResult(counts["images"], counts["skipped"], sidecar.images_per_second, sidecar.seconds, files)
