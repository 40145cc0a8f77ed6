"""`embed`: the images and captions of a data set to rows of float16, shard by shard."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import PIL
import torch

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.data.addresses import is_pipe
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.manifest import MANIFEST, ShardRecord, merge_skips, read_manifest
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar, read_embed_sidecar
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output, OutputSpec, find_output, remove_leftovers
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skipped import SKIPPED, skipped_file
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.pipeline import estimate_host_memory, thread_map, threads_for_batches
from clipcid_cli.runtime.timing import time_trial, timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.data_index import ensure_index, note_captions, stream_shard
from clipcid_cli.steps.embed.encoder import EmbedEncoder, load_encoder, recount_partners
from clipcid_cli.steps.embed.plan import EMBED, EmbedPlan, choose_text, make_plan
from clipcid_cli.steps.embed.result import EmbedCost, Embedded, EmbedResult
from clipcid_cli.steps.encode import Batch, Encoded, encode, join, list_batches
from clipcid_cli.steps.models import choose_embeddings
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.embed import EmbedSettings, configured
from clipcid_cli.steps.settings.shared import ReadingSettings

_ADD_NO_TEXT = "Add --no-text to embed the images alone."
# About as long as the median caption on the web, for estimates.
TYPICAL_CAPTION = "a photo of a cat on a red chair"
# What is done to images that are not shown as they are stored.
_ADAPTED = {
    "laid_on_white": "transparent pixels, shown on white",
    "from_16_bit": "16 bits of grey, scaled to 8",
}
# From this many samples on, too many unusable ones end the step before all data is read.
_EARLY_CHECK = 10_000


def run(settings: EmbedSettings) -> Embedded:
    """Embed a data set."""
    with open_dist_context(settings.device) as context:
        return make_embeddings(settings, context)


def make_embeddings(settings: EmbedSettings, context: DistContext, without_text: str = _ADD_NO_TEXT) -> Embedded:
    """Embed with the processes of `context`; `without_text` is as of `EmbedPlan`."""
    plan = context.on_rank0(lambda: make_plan(settings, without_text))
    if plan.finished is not None:
        if not settings.dry_run:
            context.on_rank0(lambda: _remove_leftovers(plan))
        reporting.note(f"{plan.folder} already holds the embeddings of {plan.dataset.spec} with {plan.name.spec}.")
        return _describe(plan, plan.finished)
    shards = "1 shard" if len(plan.shards) == 1 else f"{len(plan.shards):,} shards"
    reporting.note(f"Embedding {plan.dataset.spec} ({shards}) with {plan.name.spec}.")
    if settings.dry_run or not plan.is_begun:
        validate_samples(plan.dataset, context, settings, dry_run=settings.dry_run)
    encoder = load_encoder(plan, context)
    reporting.note(encoder.describe())
    spec = plan.identify(encoder.settings, may_differ={"inputs"} if plan.may_grow else ())
    if settings.dry_run:
        context.on_rank0(lambda: find_output(spec))
        return _estimate_cost(encoder, plan, context)
    with claim_output(context, spec) as output:
        if output.finished is not None:
            return _describe(plan, output.finished)
        writer = EmbeddingWriter(output.work, plan.decide_rows(spec.settings), plan.shards, plan.dataset.keys)
        context.on_rank0(lambda: _start(output, writer))
        timings = _embed_missing(plan, encoder, writer, context)
        plan = dataclasses.replace(plan, dataset=ensure_index(plan.dataset, context, encoder.workers))
        sidecar = context.on_rank0(lambda: _commit(plan, encoder, output, writer.finish(), timings))
    return _describe(plan, sidecar)


def ensure_embeddings(
    settings: ReadingSettings,
    context: DistContext,
    *,
    data: str | None,
    model: str,
    text: bool | None = None,
) -> Path | EmbedCost:
    """Find the embeddings another step needs in its work directory, and make them where they are missing.

    Existing ones are taken whatever their batch size and precision.

    Args:
        text: Whether text embeddings are needed; None makes them where the data has captions.

    Returns:
        Folder of finished embeddings of this model over this data; in a dry run without them what they would cost.
    """
    name = with_default_tag(parse_model(model))
    folder = choose_embeddings(settings.work, name)
    sidecar = context.on_rank0(lambda: read_embed_sidecar(folder))
    given = configured() if sidecar is None else {}
    wanted = given.get("text", sidecar is None) if text is None else text
    request = EmbedSettings.asked_by(settings, **given | {"data": data, "model": model, "text": wanted})
    if sidecar is not None:
        own = {field.name for field in dataclasses.fields(EmbedSettings)} - {"keys", "batch_size", "precision"}
        made = {name: getattr(sidecar.made, name) for name in own.intersection(sidecar.settings)}
        request = dataclasses.replace(request, **made | {"text": sidecar.made.text or bool(text)})
        if not request.text:  # how captions are read made no difference
            captions = {name: getattr(sidecar.made, name) for name in ("caption_key", "caption_lines")}
            request = dataclasses.replace(request, **captions)
    elif text is None and wanted:
        request = dataclasses.replace(request, text=context.on_rank0(lambda: choose_text(request)))
    result = make_embeddings(request, context, "" if text else embed_images_first(request, name))
    if isinstance(result, EmbedCost):
        flags = settings.data_flags | {"work": settings.work, "text": None if request.text else False}
        embed = command_line("embed", data or "DATA", model=model, **flags)
        reporting.note(
            f"There are no embeddings of {name.spec} in {folder}, and this is what they would cost. Once they are made, "
            f"--dry-run estimates this step: {embed}"
        )
        return result
    return folder


def embed_images_first(request: EmbedSettings, name: ModelName) -> str:
    """Give the command for embeddings that a step without captions accepts; this run has begun ones with text."""
    data = () if request.data is None else (request.data,)
    flags: dict[str, Any] = {**request.data_flags, "work": request.work, "text": False, "overwrite": True}
    for flag in ("caption_column", "caption_key"):
        flags.pop(flag, None)
    return f"Embed the images alone first: {command_line('embed', *data, model=name.spec, **flags)}"


def _remove_leftovers(plan: EmbedPlan) -> None:
    made = plan.finished
    assert made is not None
    remove_leftovers(OutputSpec(plan.folder, EMBED, EmbedSidecar, settings=made.settings, inputs=made.inputs))


def _start(output: Output[Any], writer: EmbeddingWriter) -> None:
    """Make the work folder, and take over what an earlier output has of the same shards."""
    output.start()
    if (output.folder / MANIFEST).exists():
        with suppress(ClipcidError):  # it is damaged: all shards are embedded again
            writer.take(output.folder, read_manifest(output.folder, ""))
    writer.rename_keys()


def _embed_missing(
    plan: EmbedPlan, encoder: EmbedEncoder, writer: EmbeddingWriter, context: DistContext
) -> list[tuple[int, dict[str, float]]]:
    """Embed the shards that are not finished, divided among the processes, and write each one when it is complete.

    Returns:
        Of each process, how many samples it embedded, and the seconds of each phase.
    """
    total = len(plan.shards)

    def find_missing() -> tuple[list[int], float | None]:
        missing = [number for number in range(total) if writer.read_record(number) is None]
        if any(is_pipe(shard.file) for shard in plan.dataset.shards) and plan.dataset.index is None:
            return missing, None  # nothing is known of the output of a command
        return missing, plan.dataset.estimate_samples() * len(missing) / total

    missing, expected = context.on_rank0(find_missing)
    if len(missing) < total:
        reporting.note(f"{total - len(missing)} of {total} shards are already embedded.")
    mine = missing[context.rank :: context.size]
    seconds = {"read": 0.0, "write": 0.0}
    embedded = 0
    read = 0
    finished = 0
    shown = 0
    skipped = Skips()
    with_texts = encoder.decoder.tokenizer is not None

    def reject(sample: Sample) -> str | None:
        return "no_caption" if with_texts and not sample.captions else None

    stream = partial(stream_shard, plan.dataset)
    batches = list_batches(plan.dataset, mine, stream, encoder.decoder.batch_size, reject)
    parts = list[Encoded]()
    start = time.perf_counter()
    with reporting.progress("embed", expected, "images") as progress:
        for batch, encoded in encode(batches, encoder.decoder, encoder, encoder.model.device, encoder.workers):
            parts.append(encoded)
            shown += len(encoded.samples)
            progress.advance(len(encoded.samples) * len(missing) / len(mine))  # the bar covers all processes
            seconds["read"] += batch.waited
            if batch.read is None:
                continue
            with timed(seconds, "write"):
                made = _make_rows(encoder, plan.dataset.shards[batch.shard], parts, batch)
                writer.write(batch.shard, made)
            parts.clear()
            embedded += len(made.keys)
            skipped.merge(made.skipped.counted())
            read += made.read
            finished += 1
            if plan.dataset.index is None:  # what remains is estimated by what was read
                progress.expect(shown * len(missing) / finished)
            if read >= _EARLY_CHECK:
                skipped.check(read, plan.settings.max_bad_fraction, plan.dataset.spec)
        # What was spent neither waiting for workers nor writing.
        seconds["encode"] = time.perf_counter() - start - sum(seconds.values())
        return context.gather((embedded, seconds))


def _make_rows(encoder: EmbedEncoder, shard: Shard, parts: Sequence[Encoded], last: Batch) -> ShardRows:
    """Join what was made of the batches of a shard, without what is not usable."""
    skipped = Skips()
    for part in parts:
        recount_partners(part)
        skipped.merge(part.count_skips(shard))
    skipped.merge(last.skipped)
    made = join(parts)
    rows = {kind: np.empty((0, *shape), kind.dtype) for kind, shape in encoder.shapes.items()}
    rows |= {kind: found.numpy() for kind, found in made.rows.items()}
    counts = [max(1, len(sample.captions)) for sample in made.samples]
    several = Kind.TEXTS in rows and max(counts, default=1) > 1
    if several:
        texts = rows[Kind.TEXTS]
        firsts = np.cumsum([0, *counts[:-1]])
        rows[Kind.TEXTS] = texts[firsts]
        rows[Kind.FURTHER] = np.delete(texts, firsts, axis=0)
    assert last.read is not None, "a shard's last batch"
    return ShardRows(
        read=last.read,
        skipped=skipped,
        adapted={how: made.adapted[how] for how in _ADAPTED},
        keys=[sample.key for sample in made.samples],
        captions=[sample.captions[0] if sample.captions else "" for sample in made.samples],
        counts=counts if several else None,
        rows=rows,
    )


def _commit(
    plan: EmbedPlan,
    encoder: EmbedEncoder,
    output: Output[EmbedSidecar],
    records: Sequence[ShardRecord],
    timings: Sequence[tuple[int, dict[str, float]]],
) -> EmbedSidecar:
    """Check the embeddings of all shards together and commit them."""
    rows = sum(each.rows for each in records)
    skips = merge_skips(records)
    if not rows:
        output.discard()  # it must not stand in the way of other data
        read = sum(each.read for each in records)
        raise ClipcidError(
            f"None of the {read:,} samples in {plan.dataset.spec} can be used:\n{skips.describe()}", "Fix the data."
        )
    embedded = sum(number for number, _ in timings)
    elapsed = max(sum(seconds.values()) for _, seconds in timings)
    speed = round(embedded / elapsed, 1) if embedded else None
    written = [output.work / name for name in (MANIFEST, SKIPPED)]
    outputs = [record(path, output.work) for path in written if path.exists()]
    model = _describe_model(encoder.model)
    return output.commit(
        outputs=outputs,
        model=model,
        counts={"images": rows, **_count_images(plan, records, skips)},
        seconds={phase: fmean(seconds[phase] for _, seconds in timings) for phase in ("read", "encode", "write")},
        images_per_second=speed,
        data=plan.dataset.describe(),
        run={"processes": len(timings), "device": encoder.model.device.type, "pillow": PIL.__version__},
    )


def _count_images(plan: EmbedPlan, records: Sequence[ShardRecord], skips: Skips) -> dict[str, Any]:
    """Count the samples that were read, skipped and adapted, and say so; refuse too many that were skipped."""
    read = sum(each.read for each in records)
    fix = plan.without_text if "no_caption" in skips.counts else ""
    skips.check(read, plan.settings.max_bad_fraction, plan.dataset.spec, fix)
    adapted = {how: sum(getattr(each, how) for each in records) for how in _ADAPTED}
    for how, number in adapted.items():
        if number:
            reporting.note(f"Images with {_ADAPTED[how]}: {number:,}.")
    captions = note_captions(plan.dataset) if plan.settings.text else {}
    if skips.total:
        reporting.warn(f"Samples skipped: {skips.total:,}\n{skips.describe()}")
    counts = {"read": read, "skipped": dict(sorted(skips.counts.items())), **adapted, **captions}
    truncation = plan.dataset.truncation
    return counts if truncation is None else counts | {"missing_fraction": round(truncation.fraction, 4)}


def _describe_model(model: ClipModel) -> dict[str, Any]:
    found = dataclasses.asdict(model.info) | {"logit_scale": model.logit_scale}
    return found if model.logit_bias is None else found | {"logit_bias": model.logit_bias}


def _describe(plan: EmbedPlan, sidecar: EmbedSidecar) -> EmbedResult:
    counts = sidecar.counts
    files = {"embeddings": str(plan.folder)}
    files |= skipped_file(sidecar, plan.folder)
    files["sidecar"] = str(sidecar_path(plan.folder, EMBED))
    return EmbedResult(counts["images"], counts["skipped"], sidecar.images_per_second, sidecar.seconds, files)


def _estimate_cost(encoder: EmbedEncoder, plan: EmbedPlan, context: DistContext) -> EmbedCost:
    """Estimate what embedding would cost: from the median time of three batches, with captions of typical length."""
    samples = context.on_rank0(plan.dataset.estimate_samples)
    decoder = encoder.decoder
    device = encoder.model.device
    texts = [TYPICAL_CAPTION] * decoder.batch_size  # tokens after a text's end are not encoded
    batch = decoder(())
    batch.tokens = decoder.tokenize(texts)
    if decoder.text_variants is not None:
        batch.variants = decoder.tokenize(texts * decoder.text_variants.number)
    item = sum(each.nbytes for each in vars(batch).values() if isinstance(each, torch.Tensor))
    memory = context.on_all(lambda: estimate_host_memory(item, item, encoder.workers))
    threads = threads_for_batches(device)

    def encode_together() -> None:
        deque(thread_map(lambda _: encoder(batch), range(threads), threads), maxlen=0)

    taken = time_trial(encode_together, device, repeats=3).seconds
    seconds = {"encode": round(taken / threads * samples / decoder.batch_size / context.size, 1)}
    size = encoder.bytes_per_sample
    folder = plan.folder.absolute()
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    return EmbedCost(True, len(plan.shards), samples, samples * size, size, seconds, free, memory.total, memory.shared)
