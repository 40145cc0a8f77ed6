"""`embed`: image and caption embeddings of a data set, shard by shard."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import PIL

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.embeddings.key_join import find_repeated_key
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRecord, plan_identity, refuse_foreign_folder
from clipcid_cli.formats.output import Output, read_sidecar, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.loading import default_workers, start_worker_server
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.models.augment import PACKED_VIEW, Augmentation
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.models.preprocess import hash_preprocess
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.embed.shards import ShardEmbedder, Timings, Views
from clipcid_cli.steps.model_identity import is_of
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.shared import ReadingSettings

_ADD_NO_TEXT = "Add --no-text to embed the images alone."

# What decides the views of an image; recorded where there are any.
_VIEW_SETTINGS = ("views", "crop_scale", "color_jitter", "gray_probability", "seed")

# Batches of a CPU stay in its cache; 128 and more were slower for a ViT-B-32.
_CPU_BATCH, _GPU_BATCH = 64, 256


def run(settings: EmbedSettings, reporter: Reporter) -> dict[str, Any]:
    """Embed a data set.

    Args:
        settings: What to embed, with what, how.
        reporter: Who is told about it.

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
    """Embed a data set with the processes of `machine`; see `run`.

    Args:
        settings: What to embed, with what, how.
        reporter: Who is told about it.
        without_text: What to do about data that lacks captions, for the errors; empty when captions are needed.
    """
    name = with_default_tag(parse_model(settings.model))
    folder = settings.out or WorkDirectory(settings.work).embeddings(name.slug)
    dataset = machine.on_main(lambda: _open_data(settings, reporter))
    if settings.text:
        machine.on_main(lambda: _require_captions(dataset, without_text))
    inputs = machine.on_main(dataset.fingerprints)
    finished = machine.on_main(lambda: _find_finished(folder, settings, name, dataset, inputs))
    if finished is not None:
        reporter.note(f"{folder} holds the embeddings of {dataset.spec} with {name.spec} already.")
        return _result(folder, finished)
    reporter.note(f"Embedding {dataset.spec} ({len(dataset.shards)} shards) with {name.spec}.")
    embedder = _load_embedder(settings, machine, name, dataset)
    info = embedder.model.info
    reporter.note(
        f"{info.parameters / 1e6:.1f} M parameters, precision {embedder.precision.name} ({embedder.precision.reason}), "
        f"batches of {embedder.batch_size}, workers for each process: {embedder.workers}."
        + (f" {settings.views} augmented views of each image." if settings.views else "")
    )
    if settings.dry_run:
        return _estimate_cost(embedder, machine)
    identity = {
        "weights": info.weights_hash,
        "preprocess": hash_preprocess(info.preprocess, fast_decode=settings.fast_decode),
        "tokenizer": f"{info.tokenizer}, {info.context_length} tokens" if settings.text else None,
        "text": settings.text,
        "precision": embedder.precision.name,
        "batch_size": embedder.batch_size,
        "keys": dataset.keys,
        "fast_decode": settings.fast_decode,
        **_view_settings(settings),
    }
    machine.on_main(lambda: refuse_foreign_folder(folder))
    with claim_output(
        machine, folder, "embed", settings=identity, inputs=inputs, overwrite=settings.overwrite
    ) as output:
        writer = EmbeddingWriter(folder, len(dataset.shards), plan_identity(identity, inputs))
        timings, elapsed = _embed_missing(embedder, writer, machine, reporter)
        sidecar = machine.on_main(lambda: _finish(output, embedder, writer, timings, elapsed, reporter, without_text))
    return _result(folder, sidecar)


def _find_finished(
    folder: Path, settings: EmbedSettings, name: ModelName, dataset: Dataset, inputs: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the sidecar of finished embeddings that are what is asked for, without loading the model.

    A batch size or precision that was left to us may be any.
    """
    sidecar = read_sidecar(sidecar_path(folder, "embed"))
    if sidecar is None:
        return None
    made = sidecar["settings"]
    same = (
        made["text"] == settings.text
        and made["keys"] == dataset.keys
        and made["fast_decode"] == settings.fast_decode
        and {name: made[name] for name in _VIEW_SETTINGS if name in made} == _view_settings(settings)
        and settings.batch_size in (None, made["batch_size"])
        and settings.precision in ("auto", made["precision"])
        and plan_identity({}, sidecar["inputs"]) == plan_identity({}, inputs)
        and is_of(sidecar["model"], name)
    )
    return sidecar if same else None


def _view_settings(settings: EmbedSettings) -> dict[str, Any]:
    """Return the settings that decide the views; empty where none are asked for."""
    return {name: getattr(settings, name) for name in _VIEW_SETTINGS} if settings.views else {}


def _load_embedder(settings: EmbedSettings, machine: Machine, name: ModelName, dataset: Dataset) -> ShardEmbedder:
    workers = default_workers() if settings.workers is None else settings.workers
    if workers:
        start_worker_server()
    model = machine.on_all(lambda: load_model(name, machine.device))
    precision = choose_precision(settings.precision, machine.device, "embed", model.info.parameters)
    model.cast_products(precision)
    augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
    return ShardEmbedder(
        model=model,
        precision=precision,
        dataset=dataset,
        with_texts=settings.text,
        fast_decode=settings.fast_decode,
        batch_size=settings.batch_size or (_GPU_BATCH if machine.device.type == "cuda" else _CPU_BATCH),
        workers=workers,
        max_bad_fraction=settings.max_bad_fraction,
        views=Views(settings.views, augmentation, settings.seed) if settings.views else None,
    )


def _open_data(settings: EmbedSettings, reporter: Reporter) -> Dataset:
    if settings.data is None:
        dataset = open_described(WorkDirectory(settings.work).find_data())
        reporter.note(f"Taking the data of the embeddings in {settings.work}: {dataset.spec}.")
        return dataset
    columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
    return open_dataset(settings.data, keys=settings.keys, columns=columns)


def _require_captions(dataset: Dataset, without_text: str) -> None:
    """Refuse to embed captions of data that has none, before a model is loaded."""
    if not has_captions(dataset):
        captions = "captions beside the images (.txt, or --caption-column of a list)."
        raise ClipcidError(
            f"{dataset.spec}: no sample of the first shard has a caption.",
            f"{without_text} Or put {captions}" if without_text else f"Put {captions}",
        )


def has_captions(dataset: Dataset) -> bool:
    """Tell whether any sample of the first shard has a caption."""
    return any(sample.captions for sample in dataset.shards[0].samples())


def _embed_missing(
    embedder: ShardEmbedder, writer: EmbeddingWriter, machine: Machine, reporter: Reporter
) -> tuple[list[Timings], float]:
    """Embed the shards that no earlier run has finished, dealt out to the processes."""
    shards = range(len(embedder.dataset.shards))
    missing = machine.on_main(lambda: [number for number in shards if writer.read_record(number) is None])
    if len(missing) < len(shards):
        reporter.note(f"{len(shards) - len(missing)} of {len(shards)} shards are embedded already.")
    expected = machine.on_main(embedder.dataset.estimate_samples) * len(missing) / len(shards)
    mine = missing[machine.rank :: machine.size]
    start = time.perf_counter()
    with reporter.progress("embed", expected, "images") as progress:
        timings = embedder.embed(mine, writer, progress, weight=len(missing) / max(1, len(mine)))
    everyone = machine.gather(timings)
    return everyone, time.perf_counter() - start


def _finish(
    output: Output,
    embedder: ShardEmbedder,
    writer: EmbeddingWriter,
    timings: list[Timings],
    elapsed: float,
    reporter: Reporter,
    without_text: str,
) -> dict[str, Any]:
    """Check the whole and declare it complete."""
    dataset, info = embedder.dataset, embedder.model.info
    records = [writer.read_record(number) for number in range(len(dataset.shards))]
    whole = [record for record in records if record is not None]
    assert len(whole) == len(dataset.shards), "every shard was written by one of the processes"
    if not any(record.rows for record in whole):
        writer.remove_all()
    skips = _check_skips(whole, embedder, without_text)
    _refuse_repeated_keys(writer, dataset)
    writer.remove_others(embedder.with_texts)
    flattened = sum(record.flattened for record in whole)
    if flattened:
        reporter.note(f"{flattened:,} images have transparent pixels; they were laid on white.")
    if skips.total:
        reporter.warn(f"{skips.total:,} samples were skipped:\n{skips.describe()}")
    embedded = sum(each.images for each in timings)
    seconds = {
        phase: sum(getattr(each, phase) for each in timings) / len(timings) for phase in ("read", "encode", "write")
    }
    return output.commit(
        counts={
            "images": sum(record.rows for record in whole),
            "read": sum(record.read for record in whole),
            "skipped": dict(sorted(skips.counts.items())),
            "laid_on_white": flattened,
        },
        seconds=seconds,
        images_per_second=round(embedded / elapsed, 1) if embedded else None,
        model=dataclasses.asdict(info) | {"logit_scale": embedder.model.logit_scale},
        data=dataset.describe(),
        run={"processes": len(timings), "device": embedder.model.device.type, "pillow": PIL.__version__},
    )


def _check_skips(records: list[ShardRecord], embedder: ShardEmbedder, without_text: str) -> Skips:
    skips, where = Skips(), embedder.dataset.spec
    for record in records:
        skips.merge(record.skips)
    read = sum(record.read for record in records)
    if read == skips.total:
        raise ClipcidError(
            f"None of the {read:,} samples in {where} can be used:\n{skips.describe()}", "Mend the data."
        )
    fix = without_text if "no_caption" in skips.counts else ""
    skips.check(read, embedder.max_bad_fraction, where, fix)
    return skips


def _refuse_repeated_keys(writer: EmbeddingWriter, dataset: Dataset) -> None:
    """Refuse keys that occur in two shards, now that all are known; most such data was refused when it was opened."""
    repeat = find_repeated_key(writer.read_column("key"))
    if repeat is not None:
        key, one, other = repeat
        shards = writer.read_column("shard")
        raise ClipcidError(
            f"Key {key!r} occurs in shard {shards[one]} and again in shard {shards[other]} of {dataset.spec}.",
            "Add --keys shard, which puts the shard's name before each key.",
        )


def _result(folder: Path, sidecar: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": sidecar["counts"]["images"],
        "skipped": sidecar["counts"]["skipped"],
        "images_per_second": sidecar["images_per_second"],
        "seconds": sidecar["seconds"],
        "files": {"embeddings": str(folder), "sidecar": str(sidecar_path(folder, "embed"))},
    }


def _estimate_cost(embedder: ShardEmbedder, machine: Machine) -> dict[str, Any]:
    """Say what embedding would cost, from the time of a few batches; nothing is written."""
    images = machine.on_main(embedder.dataset.estimate_samples)
    seconds = embedder.measure_batch() * images / embedder.samples_at_once / machine.size
    rows = 2 if embedder.with_texts else 1
    views = 0 if embedder.views is None else embedder.views.number
    return {
        "dry_run": True,
        "shards": len(embedder.dataset.shards),
        "images": images,
        "bytes": images * (embedder.model.info.embed_dim * 2 * (rows + views) + 4 * PACKED_VIEW * views),
        "seconds": {"encode": round(seconds, 1)},
    }


def ensure_embeddings(
    settings: ReadingSettings,
    machine: Machine,
    reporter: Reporter,
    *,
    data: str | None,
    model: str,
    text: bool | None = None,
) -> Path:
    """Find the embeddings another step needs in its work directory, and make them where they are missing.

    Args:
        data: The data; None for that of the embeddings in the work directory.
        text: Whether text embeddings are needed; None makes them where the data has captions.

    Returns:
        Folder of finished embeddings of this model over this data. Ones that are there are taken whatever their batch
        size and precision.

    Raises:
        ClipcidError: when they can neither be found nor made.
    """
    name = with_default_tag(parse_model(model))
    folder = WorkDirectory(settings.work).embeddings(name.slug)
    wanted = EmbedSettings(
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(ReadingSettings)}
        | {"batch_size": None, "precision": "auto"},
        data=data,
        model=model,
        text=bool(text),
    )
    sidecar = machine.on_main(lambda: read_sidecar(sidecar_path(folder, "embed")))
    if sidecar is not None:
        made = sidecar["settings"]
        views = {name: made[name] for name in _VIEW_SETTINGS if name in made}
        wanted = dataclasses.replace(wanted, text=made["text"] or bool(text), fast_decode=made["fast_decode"], **views)
    elif text is None:
        dataset = machine.on_main(lambda: _open_data(wanted, reporter))
        wanted = dataclasses.replace(wanted, text=has_captions(dataset))
        if not wanted.text:
            reporter.note(f"{dataset.spec} has no captions: only its images are embedded.")
    result = make_embeddings(wanted, machine, reporter, "" if text else _embed_images_first(wanted, name))
    if result.get("dry_run"):
        raise ClipcidError(
            f"There are no embeddings of {name.spec} in {folder}; making them would take about "
            f"{result['seconds']['encode']:,} s for {result['images']:,} images.",
            "Make them first (clipcid embed), then --dry-run can say what this step costs.",
        )
    return folder


def _embed_images_first(wanted: EmbedSettings, name: ModelName) -> str:
    """Say how to make the embeddings that a step of images alone can take; the step's own run has begun others."""
    words = ["clipcid", "embed", *([] if wanted.data is None else [wanted.data]), "--model", name.spec]
    for field in dataclasses.fields(ReadingSettings):
        value = getattr(wanted, field.name)
        if field.name in ("work", "keys", "image_column", "key_column") and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return f"Embed the images alone first ({shlex.join([*words, '--no-text', '--overwrite'])})."
