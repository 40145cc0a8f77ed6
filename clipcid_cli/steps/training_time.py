"""How long a step of training takes on a device, computed: operations and bytes by their rates there."""

from __future__ import annotations

from clipcid_cli.algorithms.costs import BATCH_OF_DEVICE, Clip, describe_clip
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.devices import Device
from clipcid_cli.runtime.models.names import find_config
from clipcid_cli.steps.models import find_model


def describe_model(spec: str) -> Clip:
    """Return the sizes of a named model, without loading it."""
    config = find_config(find_model(spec))
    if config is None:
        raise ClipcidError(
            f"The operations of {spec} are not known before it is downloaded.",
            "Plan with its architecture, such as ViT-L-14.",
        )
    return describe_clip(config)


def step_seconds(
    clip: Clip, device: Device, own: int = BATCH_OF_DEVICE, batch: int = BATCH_OF_DEVICE, candidates: int = 0
) -> float:
    """Return the seconds of a step of `own` samples on each device, of `batch` over all of them.

    Args:
        candidates: Centroids that the cluster loss compares each sample with.
    """
    device = device.reached()
    products = own * clip.training_operations + clip.optimizer_operations
    moved = own * clip.training_bytes(mixed=device.is_mixed) + clip.update_bytes
    exact = clip.loss_operations(own, batch)
    if device.is_gpu:
        products += clip.cluster_operations(own, candidates, of_parts=True)
        moved += clip.cluster_bytes(own, candidates)
    else:
        exact += clip.cluster_operations(own, candidates)
    return products / device.product + moved / device.bandwidth + exact / device.exact


def encode_seconds(operations: float, bytes_moved: float, device: Device) -> float:
    """Return the seconds of a forward pass."""
    device = device.reached()
    return operations / device.product + bytes_moved / device.bandwidth


def samples_per_second(clip: Clip, device: Device) -> float:
    """Return how many samples a second one device trains on, in steps of the usual size."""
    return BATCH_OF_DEVICE / step_seconds(clip, device)
