"""`embed`: the images and captions of a data set, or the lines of a text file, to rows of float16, shard by shard."""

from __future__ import annotations

import dataclasses
import shutil
import time
from typing import Any

import PIL

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.embeddings.manifest import MANIFEST, merge_skips, read_manifest
from clipcid_cli.formats.embeddings.text_folder import TEXTS, TEXTS_FILE, write_texts
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter
from clipcid_cli.formats.output import Output, find_output
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import default_workers, start_worker_server
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.preprocess import hash_preprocess
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.embed.cost import bytes_per_sample, estimate_cost
from clipcid_cli.steps.embed.encoder import Encoder
from clipcid_cli.steps.embed.plan import IMAGES, EmbeddedSidecar, EmbedPlan, augmentation_identity, make_plan
from clipcid_cli.steps.embed.shards import Timings, embed_shards
from clipcid_cli.steps.embed.views import Views
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings

_ADD_NO_TEXT = "Add --no-text to embed the images alone."

# On a CPU a batch should stay in its cache: 128 and more were slower for a ViT-B-32.
_CPU_BATCH, _GPU_BATCH = 64, 256


def run(settings: EmbedSettings, reporter: Reporter) -> dict[str, Any]:
    """Embed a data set or a file of texts.

    Returns:
        The JSON object of `embed`.

    Raises:
        ClipcidError: when data or model cannot be used, too many samples are bad, or the output is another run's.
    """
    with open_machine(settings.device) as machine:
        return make_embeddings(settings, machine, reporter)


def make_embeddings(
    settings: EmbedSettings, machine: Machine, reporter: Reporter, without_text: str = _ADD_NO_TEXT
) -> dict[str, Any]:
    """Embed with the processes of `machine`; see `run`.

    Args:
        without_text: How to embed the images alone, for the errors; empty when captions are needed.
    """
    plan = machine.on_main(lambda: make_plan(settings, reporter, without_text))
    if plan.finished is not None:
        reporter.note(f"{plan.folder} already holds the embeddings of {plan.dataset.spec} with {plan.name.spec}.")
        return _describe(plan, plan.finished)
    shards = "1 shard" if len(plan.shards) == 1 else f"{len(plan.shards):,} shards"
    reporter.note(f"Embedding {plan.dataset.spec} ({shards}) with {plan.name.spec}.")
    if plan.step == IMAGES and (settings.dry_run or not plan.is_begun):
        check_samples(plan.dataset, machine, settings.seed, dry_run=settings.dry_run, reporter=reporter)
    encoder = _load_encoder(settings, plan, machine)
    _report_encoder(settings, encoder, reporter)
    made = _describe_settings(settings, plan, encoder)
    wanted: dict[str, Any] = {
        "settings": made,
        "inputs": [plan.input],
        "overwrite": settings.overwrite,
        "may_differ": frozenset({"inputs"} if plan.may_grow else ()),
    }
    if settings.dry_run:
        machine.on_main(lambda: find_output(plan.folder, plan.step, plan.sidecar_type, **wanted))
        return estimate_cost(encoder, plan, machine)
    with claim_output(machine, plan.folder, plan.step, plan.sidecar_type, **wanted) as output:
        if output.finished is not None and not plan.must_repair:
            return _describe(plan, output.finished)
        writer = EmbeddingWriter(output.work, made, plan.shards)
        machine.on_main(lambda: _start(output, writer))
        started = time.perf_counter()
        timings = _compute(settings, plan, encoder, writer, machine, reporter)
        elapsed = time.perf_counter() - started
        if plan.step == IMAGES:
            ensure_index(plan.dataset, machine, encoder.workers, reporter)
        sidecar = machine.on_main(
            lambda: _write(settings, plan, encoder, writer, output, timings, elapsed, reporter, without_text)
        )
    return _describe(plan, sidecar)


def _load_encoder(settings: EmbedSettings, plan: EmbedPlan, machine: Machine) -> Encoder:
    workers = default_workers(machine.device) if settings.workers is None else settings.workers
    if workers:
        start_worker_server()
    model = machine.on_all(lambda: load_model(plan.name, machine.device))
    precision = choose_precision(settings.precision, machine.device, "embed", model.info.parameters)
    model.cast_products(precision)
    augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
    encoder = Encoder(
        model=model,
        precision=precision,
        batch_size=settings.batch_size or (_GPU_BATCH if machine.device.type == "cuda" else _CPU_BATCH),
        workers=workers,
        with_images=plan.step == IMAGES,
        with_texts=settings.text,
        fast_decode=settings.fast_decode,
        views=Views(settings.views, settings.view_kinds, augmentation, settings.seed) if settings.views else None,
        text_variants=TextVariants(settings.text_variants, settings.seed) if settings.text_variants else None,
    )
    views = encoder.views
    if views is not None and views.mixes and encoder.batch_size < (least := 2 * (1 + views.number)):
        raise UsageError(
            f"--view-kind mix mixes the images of a batch, but with --batch-size {encoder.batch_size} and {views.number} "
            "views it holds one.",
            f"Give --batch-size {least} or more, or fewer --views: a batch holds batch size/(1 + views) images.",
        )
    return encoder


def _report_encoder(settings: EmbedSettings, encoder: Encoder, reporter: Reporter) -> None:
    """Say how it encodes, and what it makes beside images and captions."""
    precision = encoder.precision
    workers = f"{encoder.workers} worker{'' if encoder.workers == 1 else 's'}"
    kinds = ", ".join(settings.view_kinds)
    if encoder.views is not None and encoder.views.mixes:
        kinds += f"; mixtures within batches of {encoder.samples_at_once} images"
    more = [f"{settings.views} views ({kinds})"] if settings.views else []
    more += [f"{settings.text_variants} text variants"] if settings.text_variants else []
    size = f" Of each image {' and '.join(more)}: {bytes_per_sample(encoder):,} bytes an image." if more else ""
    reporter.note(
        f"{encoder.model.info.parameters / 1e6:.1f} M parameters, precision {precision.name} ({precision.reason}), "
        f"batches of {encoder.batch_size}, {workers} per process.{size}"
    )


def _describe_settings(settings: EmbedSettings, plan: EmbedPlan, encoder: Encoder) -> dict[str, Any]:
    """Return the settings that decide the rows, as JSON values."""
    info = encoder.model.info
    tokenizer = f"{info.tokenizer}, {info.context_length} tokens"
    made = {
        "weights": info.weights_hash,
        "tokenizer": tokenizer if encoder.with_texts else None,
        "precision": encoder.precision.name,
        "batch_size": encoder.batch_size,
    }
    if plan.step != IMAGES:
        return made
    return made | {
        "preprocess": hash_preprocess(info.preprocess, fast_decode=settings.fast_decode),
        "text": settings.text,
        "keys": plan.dataset.keys,
        "fast_decode": settings.fast_decode,
        **augmentation_identity(settings),
    }


def _start(output: Output[Any], writer: EmbeddingWriter) -> None:
    """Make the work folder, and take over what an earlier output has of the same shards."""
    output.start()
    if sidecar_path(output.folder, output.step).exists() and (output.folder / MANIFEST).exists():
        writer.take(output.folder, read_manifest(output.folder, "Remove it: the shards are then embedded again."))


def _compute(
    settings: EmbedSettings,
    plan: EmbedPlan,
    encoder: Encoder,
    writer: EmbeddingWriter,
    machine: Machine,
    reporter: Reporter,
) -> list[Timings]:
    """Embed the shards that are not finished, divided among the processes; return the timings of all."""
    shards = range(len(plan.shards))
    missing = machine.on_main(lambda: [number for number in shards if writer.read_record(number) is None])
    if len(missing) < len(shards):
        reporter.note(f"{len(shards) - len(missing)} of {len(shards)} shards are already embedded.")
    expected = machine.on_main(plan.dataset.estimate_samples) * len(missing) / len(shards)
    mine = missing[machine.rank :: machine.size]
    # Empty lines of a file of texts are no fault of theirs.
    max_bad = settings.max_bad_fraction if plan.step == IMAGES else 1.0
    with reporter.progress("embed", expected, "images" if plan.step == IMAGES else "texts") as progress:
        weight = len(missing) / max(1, len(mine))
        timings = embed_shards(encoder, plan.dataset, mine, writer, max_bad, progress, weight)
    return machine.gather(timings)


def _write(
    settings: EmbedSettings,
    plan: EmbedPlan,
    encoder: Encoder,
    writer: EmbeddingWriter,
    output: Output[Any],
    timings: list[Timings],
    elapsed: float,
    reporter: Reporter,
    without_text: str,
) -> EmbeddedSidecar:
    """Check the embeddings of all shards together and commit them.

    Args:
        timings: Those of every process.
        elapsed: Wall-clock seconds of this run's embedding.
    """
    records = writer.finish()
    rows, read = sum(record.rows for record in records), sum(record.read for record in records)
    laid_on_white = sum(record.laid_on_white for record in records)
    skips = merge_skips(records)
    if not rows:
        shutil.rmtree(output.root, ignore_errors=True)  # it must not stand in the way of other data
        raise ClipcidError(
            f"None of the {read:,} samples in {plan.dataset.spec} can be used:\n{skips.describe()}", "Fix the data."
        )
    embedded = sum(each.samples for each in timings)
    files = [output.work / MANIFEST]
    seconds = {
        phase: sum(getattr(each, phase) for each in timings) / len(timings) for phase in ("read", "encode", "write")
    }
    entries: dict[str, Any] = {
        "model": dataclasses.asdict(encoder.model.info) | {"logit_scale": encoder.model.logit_scale}
    }
    speed = round(embedded / elapsed, 1) if embedded else None
    if plan.step == IMAGES:
        fix = without_text if "no_caption" in skips.counts else ""
        skips.check(read, settings.max_bad_fraction, plan.dataset.spec, fix)
        if laid_on_white:
            reporter.note(f"{laid_on_white:,} images have transparent pixels, which were shown on white.")
        if skips.total:
            reporter.warn(f"{skips.total:,} samples were skipped:\n{skips.describe()}")
        skipped = dict(sorted(skips.counts.items()))
        entries["counts"] = {"images": rows, "read": read, "skipped": skipped, "laid_on_white": laid_on_white}
        entries["images_per_second"] = speed
        entries["data"] = plan.dataset.describe()
        entries["run"] = {"processes": len(timings), "device": encoder.model.device.type, "pillow": PIL.__version__}
    else:
        _write_texts(plan, skips, output)
        files.append(output.work / TEXTS_FILE)
        entries["counts"] = {"texts": rows, "skipped": skips.counts}
        entries["texts_per_second"] = speed
        seconds = {"encode": elapsed}
    outputs = [fingerprint.record(path, output.work) for path in files]
    sidecar: EmbeddedSidecar = output.commit(
        outputs=outputs, seconds={phase: round(each, 3) for phase, each in seconds.items()}, **entries
    )
    return sidecar


def _write_texts(plan: EmbedPlan, skips: Skips, output: Output[Any]) -> None:
    """Keep the texts beside their rows, of which none may be missing."""
    if "nan_row" in skips.counts:
        first = skips.examples["nan_row"][0].rpartition(" ")[2]
        raise ClipcidError(
            f"The embedding of text {int(first) + 1:,} is not finite.", "Try --precision fp32, or remove the text."
        )
    texts = ([sample.captions[0] for sample in shard.stream(Skips())] for shard in plan.dataset.shards)
    write_texts(output.work, texts)


def _describe(plan: EmbedPlan, sidecar: EmbeddedSidecar) -> dict[str, Any]:
    """Return the JSON object of `embed` for finished embeddings."""
    what, per_second = "embeddings", "images_per_second"
    if plan.step == TEXTS:
        what, per_second = "texts", "texts_per_second"
    counted = {name: count for name, count in sidecar.counts.items() if name in ("images", "texts", "skipped")}
    files = {what: str(plan.folder), "sidecar": str(sidecar_path(plan.folder, plan.step))}
    return {**counted, per_second: getattr(sidecar, per_second), "seconds": sidecar.seconds, "files": files}
