"""The end of `embed`: all shards are checked together, and the sidecar declares them complete."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import PIL

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRecord
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.sidecar import EmbedSidecar, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.steps.embed.shards import ShardEmbedder, Timings
from clipcid_cli.steps.reporting import Reporter


def finish(
    output: Output[EmbedSidecar],
    embedder: ShardEmbedder,
    writer: EmbeddingWriter,
    timings: list[Timings],
    elapsed: float,
    reporter: Reporter,
    without_text: str,
) -> EmbedSidecar:
    """Check the embeddings of all shards and commit them.

    Args:
        timings: Those of every process.
        elapsed: Wall-clock seconds of this run's embedding.
        without_text: How to embed the images alone, for the errors; empty when captions are needed.

    Returns:
        The sidecar.

    Raises:
        ClipcidError: when too many samples were skipped.
    """
    dataset, info = embedder.dataset, embedder.model.info
    records = [writer.read_record(number) for number in range(len(dataset.shards))]
    whole = [record for record in records if record is not None]
    assert len(whole) == len(dataset.shards), "every shard was written by one of the processes"
    if not any(record.rows for record in whole):
        writer.remove_all()
        output.discard()
    skips = _check_skips(whole, embedder, without_text)
    writer.remove_others(embedder.with_texts)
    flattened = sum(record.flattened for record in whole)
    if flattened:
        reporter.note(f"{flattened:,} images have transparent pixels, which were shown on white.")
    if skips.total:
        reporter.warn(f"{skips.total:,} samples were skipped:\n{skips.describe()}")
    embedded = sum(each.images for each in timings)
    seconds = {
        phase: sum(getattr(each, phase) for each in timings) / len(timings) for phase in ("read", "encode", "write")
    }
    sidecar = output.commit(
        outputs=writer.describe(),
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
    writer.remove_notes()
    return sidecar


def describe_result(folder: Path, sidecar: EmbedSidecar) -> dict[str, Any]:
    """Return the JSON object of `embed` for finished embeddings."""
    return {
        "images": sidecar.counts["images"],
        "skipped": sidecar.counts["skipped"],
        "images_per_second": sidecar.images_per_second,
        "seconds": sidecar.seconds,
        "files": {"embeddings": str(folder), "sidecar": str(sidecar_path(folder, "embed"))},
    }


def _check_skips(records: list[ShardRecord], embedder: ShardEmbedder, without_text: str) -> Skips:
    skips, where = Skips(), embedder.dataset.spec
    for record in records:
        skips.merge(record.skips)
    read = sum(record.read for record in records)
    if read == skips.total:
        raise ClipcidError(f"None of the {read:,} samples in {where} can be used:\n{skips.describe()}", "Fix the data.")
    fix = without_text if "no_caption" in skips.counts else ""
    skips.check(read, embedder.max_bad_fraction, where, fix)
    return skips
