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
    """Estimate what embedding would cost: from the median time of three batches, with captions of typical length."""
    samples = machine.on_main(plan.dataset.estimate_samples)
    decoder, device = encoder.decoder, encoder.model.device
    texts = [TYPICAL_CAPTION] * decoder.batch_size  # tokens after a text's end are not encoded
    batch = decoder(())
    batch.tokens = decoder.tokenize(texts)
    if decoder.text_variants is not None:
        batch.variants = decoder.tokenize(texts * decoder.text_variants.number)
    threads = threads_for_batches(device)

    def encode_together() -> None:
        deque(thread_map(lambda _: encoder(batch), range(threads), threads), maxlen=0)

    taken = time_trial(encode_together, device, repeats=3).seconds
    seconds = {"encode": round(taken / threads * samples / decoder.batch_size / machine.size, 1)}
    size = encoder.bytes_per_sample
    if plan.of_texts:
        return TextsCost(True, samples, samples * size, seconds)
    return EmbedCost(True, len(plan.shards), samples, samples * size, size, seconds)
