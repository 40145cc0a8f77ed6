"""What embedding takes: time of a few batches, bytes of each sample. Nothing is written."""

from __future__ import annotations

import math
from collections import deque

from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.embed.encoder import Encoder
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.embed.result import EmbedCost, TextsCost

# About as long as the median caption on the web, for estimates.
TYPICAL_CAPTION = "a photo of a cat on a red chair"


def estimate_cost(encoder: Encoder, plan: EmbedPlan, machine: Machine) -> EmbedCost | TextsCost:
    """Estimate what embedding would cost from the time of a few batches."""
    samples = machine.on_main(plan.dataset.estimate_samples)
    encode = _measure_batch(encoder) * samples / encoder.preparation.batch_size / machine.size
    seconds = {"encode": round(encode, 1)}
    size = bytes_per_sample(encoder)
    if plan.of_texts:
        return TextsCost(True, samples, samples * size, seconds)
    return EmbedCost(True, len(plan.shards), samples, samples * size, size, seconds)


def bytes_per_sample(encoder: Encoder) -> int:
    """Return what a sample takes on the disk, with its first caption, views and text variants, without its metadata."""
    return sum(kind.dtype.itemsize * math.prod(shape) for kind, shape in encoder.shapes.items())


def _measure_batch(encoder: Encoder) -> float:
    """Return the seconds one batch takes to encode, the median of three after a warm-up.

    Its captions are of typical length, since tokens after a text's end are not encoded.
    """
    prepared = encoder.preparation(())
    model = encoder.model
    tokens = model.tokenizer([TYPICAL_CAPTION] * encoder.preparation.batch_size)
    threads = threads_for_batches(model.device)
    texts_of_each = int(encoder.preparation.with_texts) + encoder.shapes.get(Kind.VARIANTS, (0,))[0]

    def encode(_: int) -> None:
        if encoder.preparation.with_images:
            encoder.encode_pixels(prepared)
        for _ in range(texts_of_each):
            encoder.encode_texts(tokens)

    def encode_together() -> None:
        deque(thread_map(encode, range(threads), threads), maxlen=0)

    return time_trial(encode_together, model.device, repeats=3).seconds / threads
