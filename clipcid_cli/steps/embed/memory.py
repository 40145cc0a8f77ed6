"""Whether batches fit: on the device that encodes them, and with the workers that decode them on its host."""

from __future__ import annotations

from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import available_memory
from clipcid_cli.runtime.pipeline import HostMemory, host_memory_of, validate_host_memory
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.plan import EmbedPlan


def validate_memory(plan: EmbedPlan, encoder: EmbedEncoder, samples: float | None) -> HostMemory:
    """Refuse batches for which this process's device or its host has too little memory; return what a host's processes take.

    Args:
        samples: That are left to embed, by all processes; None where nobody knows.
    """
    device = encoder.model.device
    if device.type == "cuda":
        needed, available = _bytes_of_batch(encoder), available_memory(device)
        if needed > available:
            raise ClipcidError(
                f"Encoding {encoder.batch_size:,} images at once takes {needed / 1e9:.3g} GB at least, and this GPU has "
                f"{available / 1e9:.3g} GB free.",
                "Use a smaller --batch-size, or end other programs on the GPU.",
            )
    values: dict[str, Any] = vars(encoder.decoder(()))
    batch = sum(value.nbytes for value in values.values() if isinstance(value, torch.Tensor))
    batches = None
    if samples is not None:  # the last one of a shard may hold few
        batches = len(plan.shards) + int(samples // encoder.samples_at_once)
    return validate_host_memory(host_memory_of(batch, batch, encoder.workers, num_items=batches), encoder.workers)


def _bytes_of_batch(encoder: EmbedEncoder) -> int:
    """Return the least bytes that a batch takes on a GPU: pixels, and what a layer of a known tower holds."""
    from clipcid_cli.algorithms.costs import describe_clip

    height, width = encoder.model.info.image_size
    pixels = encoder.batch_size * 3 * height * width
    try:
        clip = describe_clip(encoder.model.info.config)
    except ClipcidError:
        return pixels
    return pixels + encoder.batch_size * clip.image.layer_bytes()
