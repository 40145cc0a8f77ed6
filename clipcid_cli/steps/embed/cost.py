"""What embedding takes: time of a few batches, bytes of each sample. Nothing is written."""

from __future__ import annotations

from collections import deque

from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.embed.result import EmbedCost, TextsCost

# About as long as the median caption on the web, for estimates.
TYPICAL_CAPTION = "a photo of a cat on a red chair"


def estimate_cost(encoder: EmbedEncoder, plan: EmbedPlan, machine: Machine) -> EmbedCost | TextsCost:
    """Estimate what embedding would cost from the time of a few batches."""
    samples = machine.on_main(plan.dataset.estimate_samples)
    encode = _measure_batch(encoder) * samples / encoder.decoder.batch_size / machine.size
    seconds = {"encode": round(encode, 1)}
    size = encoder.bytes_per_sample
    if plan.of_texts:
        return TextsCost(True, samples, samples * size, seconds)
    return EmbedCost(True, len(plan.shards), samples, samples * size, size, seconds)


def _measure_batch(encoder: EmbedEncoder) -> float:
    """Return the seconds one batch takes to encode, the median of three after a warm-up.

    Its captions are of typical length, since tokens after a text's end are not encoded.
    """
    decoder = encoder.decoder
    batch = decoder(())
    variants = 0 if decoder.text_variants is None else decoder.text_variants.number
    texts = [TYPICAL_CAPTION] * decoder.batch_size
    batch.tokens, batch.variants = decoder.tokenize(texts), decoder.tokenize(texts * variants) if variants else None
    threads = threads_for_batches(encoder.model.device)

    def encode_together() -> None:
        deque(thread_map(lambda _: encoder(batch), range(threads), threads), maxlen=0)

    return time_trial(encode_together, encoder.model.device, repeats=3).seconds / threads
