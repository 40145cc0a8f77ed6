"""`embed`: the images and captions of a data set, or the lines of a text file, to rows of float16, shard by shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.embeddings.manifest import MANIFEST, ShardRecord, merge_skips, read_manifest
from clipcid_cli.formats.embeddings.text_folder import TEXTS_FILE, write_texts
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.output import Output, find_output, find_works, open_output
from clipcid_cli.formats.sidecar import TextsSidecar, sidecar_path
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.embed.cost import estimate_cost
from clipcid_cli.steps.embed.encoder import EmbedEncoder, load_encoder
from clipcid_cli.steps.embed.plan import EmbeddedSidecar, EmbedPlan, describe_shards, make_plan
from clipcid_cli.steps.embed.result import Embedded, EmbedResult, TextsResult
from clipcid_cli.steps.embed.shards import Timings, embed_missing
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings

_ADD_NO_TEXT = "Add --no-text to embed the images alone."


def run(settings: EmbedSettings, reporter: Reporter) -> Embedded:
    """Embed a data set or a file of texts."""
    with open_machine(settings.device) as machine:
        return make_embeddings(settings, machine, reporter)


def make_embeddings(
    settings: EmbedSettings, machine: Machine, reporter: Reporter, without_text: str = _ADD_NO_TEXT
) -> Embedded:
    """Embed with the processes of `machine`; see `run`.

    Args:
        without_text: How to embed the images alone, for the errors; empty when captions are needed.
    """
    plan = machine.on_main(lambda: make_plan(settings, reporter, without_text))
    if plan.finished is not None:
        if not settings.dry_run:
            machine.on_main(lambda: _remove_leftovers(plan))
        reporter.note(f"{plan.folder} already holds the embeddings of {plan.dataset.spec} with {plan.name.spec}.")
        return _describe(plan, plan.finished)
    shards = "1 shard" if len(plan.shards) == 1 else f"{len(plan.shards):,} shards"
    reporter.note(f"Embedding {plan.dataset.spec} ({shards}) with {plan.name.spec}.")
    if not plan.of_texts and (settings.dry_run or not plan.is_begun):
        check_samples(plan.dataset, machine, settings.seed, dry_run=settings.dry_run, reporter=reporter)
    encoder = load_encoder(plan, machine)
    reporter.note(encoder.describe())
    made = plan.requested | encoder.settings
    wanted: dict[str, Any] = {
        "settings": made,
        "inputs": [plan.input],
        "overwrite": settings.overwrite,
        "may_differ": {"inputs"} if plan.may_grow else set(),
    }
    if settings.dry_run:
        machine.on_main(lambda: find_output(plan.folder, plan.step, plan.sidecar_type, **wanted))
        return estimate_cost(encoder, plan, machine)
    with claim_output(machine, plan.folder, plan.step, plan.sidecar_type, **wanted) as output:
        if output.finished is not None:
            return _describe(plan, output.finished)
        writer = EmbeddingWriter(output.work, made, plan.shards)
        machine.on_main(lambda: _start(output, writer))
        timings = embed_missing(plan, encoder, writer, machine, reporter)
        if not plan.of_texts:
            ensure_index(plan.dataset, machine, encoder.workers, reporter)
        sidecar = machine.on_main(lambda: _commit(plan, encoder, output, writer.finish(), timings, reporter))
    return _describe(plan, sidecar)


def _remove_leftovers(plan: EmbedPlan) -> None:
    """Remove what a run left that was killed right after its sidecar, but not what one works with that goes on."""
    made = plan.finished
    if made is not None and find_works(plan.folder, plan.step):
        wanted: dict[str, Any] = {"settings": made.settings, "inputs": made.inputs, "overwrite": False}
        with suppress(ClipcidError), open_output(plan.folder, plan.step, plan.sidecar_type, **wanted):
            pass


def _start(output: Output[Any], writer: EmbeddingWriter) -> None:
    """Make the work folder, and take over what an earlier output has of the same shards."""
    output.start()
    if (output.folder / MANIFEST).exists():
        with suppress(ClipcidError):  # it is damaged: all shards are embedded again
            writer.take(output.folder, read_manifest(output.folder, ""))


def _commit(
    plan: EmbedPlan,
    encoder: EmbedEncoder,
    output: Output[Any],
    records: Sequence[ShardRecord],
    timings: Sequence[Timings],
    reporter: Reporter,
) -> EmbeddedSidecar:
    """Check the embeddings of all shards together and commit them."""
    rows = sum(each.rows for each in records)
    read = sum(each.read for each in records)
    skips = merge_skips(records)
    if not rows:
        output.discard()  # it must not stand in the way of other data
        raise ClipcidError(
            f"None of the {read:,} samples in {plan.dataset.spec} can be used:\n{skips.describe()}", "Fix the data."
        )
    embedded = sum(each.samples for each in timings)
    elapsed = max(each.elapsed for each in timings)
    speed = round(embedded / elapsed, 1) if embedded else None
    model = dataclasses.asdict(encoder.model.info) | {"logit_scale": encoder.model.logit_scale}
    outputs = [fingerprint.record(output.work / MANIFEST, output.work)]
    skipped = dict(sorted(skips.counts.items()))
    sidecar: EmbeddedSidecar
    if plan.of_texts:
        outputs.append(_write_texts(plan, output.work))
        sidecar = output.commit(
            outputs=outputs,
            counts={"texts": rows, "skipped": skipped},
            seconds={"encode": elapsed},
            texts_per_second=speed,
            model=model,
        )
        return sidecar
    skips.check(
        read, plan.max_bad_fraction, plan.dataset.spec, plan.without_text if "no_caption" in skips.counts else ""
    )
    laid_on_white = sum(each.laid_on_white for each in records)
    if laid_on_white:
        reporter.note(f"{laid_on_white:,} images have transparent pixels, which were shown on white.")
    if skips.total:
        reporter.warn(f"{skips.total:,} samples were skipped:\n{skips.describe()}")
    phases = ("read", "encode", "write")
    sidecar = output.commit(
        outputs=outputs,
        counts={"images": rows, "read": read, "skipped": skipped, "laid_on_white": laid_on_white},
        seconds={phase: sum(getattr(each, phase) for each in timings) / len(timings) for phase in phases},
        images_per_second=speed,
        model=model,
        data=plan.dataset.describe(),
        run={"processes": len(timings), "device": encoder.model.device.type, "pillow": PIL.__version__},
    )
    return sidecar


def _write_texts(plan: EmbedPlan, folder: Path) -> FileRecord:
    """Keep the texts beside their rows."""
    if describe_shards(plan.dataset) != plan.shards:
        raise ClipcidError(f"{plan.dataset.spec} has changed while it was embedded.", "Give the command again.")
    write_texts(folder, ([sample.captions[0] for sample in shard.stream()] for shard in plan.dataset.shards))
    return fingerprint.record(folder / TEXTS_FILE, folder)


def _describe(plan: EmbedPlan, sidecar: EmbeddedSidecar) -> EmbedResult | TextsResult:
    """Return the result for finished embeddings."""
    counts, seconds, path = sidecar.counts, sidecar.seconds, str(sidecar_path(plan.folder, plan.step))
    if isinstance(sidecar, TextsSidecar):
        files = {"texts": str(plan.folder), "sidecar": path}
        return TextsResult(counts["texts"], counts["skipped"], sidecar.texts_per_second, seconds, files)
    files = {"embeddings": str(plan.folder), "sidecar": path}
    return EmbedResult(counts["images"], counts["skipped"], sidecar.images_per_second, seconds, files)
