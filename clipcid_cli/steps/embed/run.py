"""`embed`: image and caption embeddings of a data set, shard by shard."""

from __future__ import annotations

import time
from typing import Any

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, refuse_foreign_folder, remove_leftovers
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.output import find_output
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.loading import default_workers, start_worker_server
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.models.preprocess import hash_preprocess
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.embed.cost import bytes_per_image, estimate_cost
from clipcid_cli.steps.embed.finish import describe_result, finish
from clipcid_cli.steps.embed.inputs import (
    augmentation_identity,
    describe_shards,
    find_finished,
    is_begun,
    open_data,
    require_captions,
)
from clipcid_cli.steps.embed.shards import ShardEmbedder, Timings
from clipcid_cli.steps.embed.texts import TextEmbedder, embed_texts
from clipcid_cli.steps.embed.views import Views
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings

_ADD_NO_TEXT = "Add --no-text to embed the images alone."

# On a CPU a batch should stay in its cache: 128 and more were slower for a ViT-B-32.
_CPU_BATCH, _GPU_BATCH = 64, 256


def run(settings: EmbedSettings, reporter: Reporter) -> dict[str, Any]:
    """Embed a data set.

    Returns:
        The JSON object of `embed`.

    Raises:
        ClipcidError: when data or model cannot be used, too many samples are bad, or the output is another run's.
    """
    with open_machine(settings.device) as machine:
        if settings.texts is None:
            return make_embeddings(settings, machine, reporter)
        name = with_default_tag(parse_model(settings.model))
        return embed_texts(
            settings, machine, reporter, name, lambda: TextEmbedder(*_load_model(settings, machine, name))
        )


def make_embeddings(
    settings: EmbedSettings, machine: Machine, reporter: Reporter, without_text: str = _ADD_NO_TEXT
) -> dict[str, Any]:
    """Embed a data set with the processes of `machine`; see `run`.

    Args:
        without_text: How to embed the images alone, for the errors; empty when captions are needed.
    """
    name = with_default_tag(parse_model(settings.model))
    folder = settings.out or WorkDirectory(settings.work).embeddings(name.slug)
    dataset = machine.on_main(lambda: open_data(settings, reporter))
    if settings.text:
        machine.on_main(lambda: require_captions(dataset, without_text))
    inputs = machine.on_main(lambda: describe_shards(dataset))
    finished = machine.on_main(lambda: find_finished(folder, settings, name, dataset, inputs))
    if finished is not None:
        if not settings.dry_run:
            machine.on_main(lambda: remove_leftovers(folder, finished))
        reporter.note(f"{folder} already holds the embeddings of {dataset.spec} with {name.spec}.")
        return describe_result(folder, finished)
    machine.on_main(lambda: refuse_foreign_folder(folder))
    shards = "1 shard" if len(dataset.shards) == 1 else f"{len(dataset.shards):,} shards"
    reporter.note(f"Embedding {dataset.spec} ({shards}) with {name.spec}.")
    if settings.dry_run or not machine.on_main(lambda: is_begun(folder, inputs)):
        check_samples(dataset, machine, settings.seed, dry_run=settings.dry_run, reporter=reporter)
    embedder = _load_embedder(settings, machine, name, dataset)
    info, workers = embedder.model.info, f"{embedder.workers} worker{'' if embedder.workers == 1 else 's'}"
    reporter.note(
        f"{info.parameters / 1e6:.1f} M parameters, precision {embedder.precision.name} ({embedder.precision.reason}), "
        f"batches of {embedder.batch_size}, {workers} per process." + _describe_extras(settings, embedder)
    )
    identity = {
        "weights": info.weights_hash,
        "preprocess": hash_preprocess(info.preprocess, fast_decode=settings.fast_decode),
        "tokenizer": f"{info.tokenizer}, {info.context_length} tokens" if settings.text else None,
        "text": settings.text,
        "precision": embedder.precision.name,
        "batch_size": embedder.batch_size,
        "keys": dataset.keys,
        "fast_decode": settings.fast_decode,
        **augmentation_identity(settings),
    }
    wanted: dict[str, Any] = {"settings": identity, "inputs": inputs, "overwrite": settings.overwrite, "may_grow": True}
    if settings.dry_run:
        machine.on_main(lambda: find_output(folder, "embed", EmbedSidecar, **wanted))
        return estimate_cost(embedder, machine)
    writer = EmbeddingWriter(folder, [identity_of(identity, [shard]) for shard in inputs])
    with claim_output(machine, folder, "embed", EmbedSidecar, **wanted) as output:
        earlier = output.earlier
        if earlier is not None:  # those of the shards that are still wanted stay
            machine.on_main(lambda: writer.reopen(earlier.outputs))
        machine.on_main(lambda: output.start(clear=lambda: None))
        timings, elapsed = _embed_missing(embedder, writer, machine, reporter)
        ensure_index(dataset, machine, embedder.workers, reporter)
        sidecar = machine.on_main(lambda: finish(output, embedder, writer, timings, elapsed, reporter, without_text))
    return describe_result(folder, sidecar)


def _describe_extras(settings: EmbedSettings, embedder: ShardEmbedder) -> str:
    """Say what is embedded beside images and captions, and what an image then takes on the disk."""
    kinds = ", ".join(settings.view_kinds)
    if embedder.views is not None and embedder.views.mixes:
        kinds += f"; mixtures within batches of {embedder.samples_at_once} images"
    parts = [f"{settings.views} views ({kinds})"] if settings.views else []
    parts += [f"{settings.text_variants} text variants"] if settings.text_variants else []
    return f" Of each image {' and '.join(parts)}: {bytes_per_image(embedder):,} bytes an image." if parts else ""


def _load_embedder(settings: EmbedSettings, machine: Machine, name: ModelName, dataset: Dataset) -> ShardEmbedder:
    model, precision, batch_size, workers = _load_model(settings, machine, name)
    augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
    views = Views(settings.views, settings.view_kinds, augmentation, settings.seed) if settings.views else None
    if views is not None and views.mixes and batch_size < (least := 2 * (1 + views.number)):
        raise UsageError(
            f"--view-kind mix mixes the images of a batch, but with --batch-size {batch_size} and {views.number} views it "
            "holds one.",
            f"Give --batch-size {least} or more, or fewer --views: a batch holds batch size/(1 + views) images.",
        )
    return ShardEmbedder(
        model=model,
        precision=precision,
        dataset=dataset,
        with_texts=settings.text,
        fast_decode=settings.fast_decode,
        batch_size=batch_size,
        workers=workers,
        max_bad_fraction=settings.max_bad_fraction,
        views=views,
        text_variants=TextVariants(settings.text_variants, settings.seed) if settings.text_variants else None,
    )


def _load_model(settings: EmbedSettings, machine: Machine, name: ModelName) -> tuple[ClipModel, Precision, int, int]:
    """Return the model, the number format of its products, the batch size and the number of workers."""
    workers = default_workers(machine.device) if settings.workers is None else settings.workers
    if workers:
        start_worker_server()
    model = machine.on_all(lambda: load_model(name, machine.device))
    precision = choose_precision(settings.precision, machine.device, "embed", model.info.parameters)
    model.cast_products(precision)
    return (
        model,
        precision,
        settings.batch_size or (_GPU_BATCH if machine.device.type == "cuda" else _CPU_BATCH),
        workers,
    )


def _embed_missing(
    embedder: ShardEmbedder, writer: EmbeddingWriter, machine: Machine, reporter: Reporter
) -> tuple[list[Timings], float]:
    """Embed the shards that no earlier run has finished, divided among the processes."""
    shards = range(len(embedder.dataset.shards))
    missing = machine.on_main(lambda: [number for number in shards if writer.read_record(number) is None])
    if len(missing) < len(shards):
        reporter.note(f"{len(shards) - len(missing)} of {len(shards)} shards are already embedded.")
    expected = machine.on_main(embedder.dataset.estimate_samples) * len(missing) / len(shards)
    mine = missing[machine.rank :: machine.size]
    start = time.perf_counter()
    with reporter.progress("embed", expected, "images") as progress:
        timings = embedder.embed(mine, writer, progress, weight=len(missing) / max(1, len(mine)))
    everyone = machine.gather(timings)
    return everyone, time.perf_counter() - start
