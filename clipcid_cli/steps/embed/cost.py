"""What embedding takes: time of a few batches, bytes of each image. Nothing is written."""

from __future__ import annotations

from collections import deque
from typing import Any

from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.embed.shards import ShardEmbedder

# About as long as the median caption on the web, for estimates.
TYPICAL_CAPTION = "a photo of a cat on a red chair"


def estimate_cost(embedder: ShardEmbedder, machine: Machine) -> dict[str, Any]:
    """Estimate what embedding would cost from the time of a few batches."""
    images = machine.on_main(embedder.dataset.estimate_samples)
    seconds = measure_batch(embedder) * images / embedder.samples_at_once / machine.size
    return {
        "dry_run": True,
        "shards": len(embedder.dataset.shards),
        "images": images,
        "bytes": images * bytes_per_image(embedder),
        "bytes_per_image": bytes_per_image(embedder),
        "seconds": {"encode": round(seconds, 1)},
    }


def bytes_per_image(embedder: ShardEmbedder) -> int:
    """Return what an image takes on the disk, with its first caption, views and text variants, without its metadata."""
    views = embedder.views
    rows, numbers = (1, 0) if views is None else (1 + views.number, views.number * views.packed_size)
    rows += embedder.texts_per_image
    return 2 * rows * embedder.model.info.embed_dim + 4 * numbers


def measure_batch(embedder: ShardEmbedder) -> float:
    """Return the seconds one batch takes to encode, the median of three after a warm-up.

    Its captions are of typical length, since tokens after a text's end are not encoded.
    """
    prepared, model = embedder.preparation()(()), embedder.model
    tokens = model.tokenizer([TYPICAL_CAPTION] * embedder.samples_at_once)
    threads = threads_for_batches(model.device)

    def encode(_: int) -> None:
        embedder.encode_pixels(prepared)
        for _ in range(embedder.texts_per_image):
            embedder.encode_texts(tokens)

    def encode_together() -> None:
        deque(map_threads(range(threads), encode, threads), maxlen=0)

    return time_trial(encode_together, model.device, repeats=3).seconds / threads
