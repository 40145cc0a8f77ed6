"""What a step takes on GPUs that need not be there, computed; docs/gpu.md#what-is-computed has the formulas."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import NamedTuple

import msgspec

from clipcid_cli.algorithms.costs import Clip
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.devices import DEVICES, THIS, Device, parse_devices
from clipcid_cli.runtime.models.names import find_config, parse_model
from clipcid_cli.steps import reporting
from clipcid_cli.steps.models import find_embedded_model
from clipcid_cli.steps.open_data import open_named
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.distill import DEFAULT_EPOCHS, DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL, EmbedSettings
from clipcid_cli.steps.settings.gpu_plan import GpuPlanSettings
from clipcid_cli.steps.settings.shared import TrainingDataSettings
from clipcid_cli.steps.training_memory import SHARE_OF_DEFAULT, planned_states, training_memory
from clipcid_cli.steps.training_time import describe_model, encode_seconds, step_seconds

# Bytes of an image file of 256 pixels with its caption, and images a core decodes a second (docs/scale.md).
_IMAGE_BYTES = 25_000
_DECODED_BY_CORE = 531
# Of the memory, what is left for a run after the driver, NCCL and fragments.
_SHARE_OF_MEMORY = 0.9
# Of the rate of products that a GPU reaches, what k-means reaches of it: a fifth of the data sheet's (docs/scale.md).
_SHARE_OF_KMEANS = 1 / 3
# Images a cluster by default, and the most clusters.
_IMAGES_OF_CLUSTER, _MOST_CLUSTERS = 225, 1_000_000
# Keep list and forest of an image (docs/scale.md).
_BYTES_OF_LISTS = 65
# Partitioned, a row is compared with √N centroids and with so many times √N rows (measured, docs/gpu.md), rows of the audit
# with all; rows are read from storage once, and copied once. Besides, the host takes so long for each row: the first process
# alone, and each process for the rows of its share (docs/gpu.md).
_COMPARED_IN_PARTITIONS = 5.4
_AUDITED = 30_000
_HOST_SECONDS_OF_ROW = 1.1e-6
_HOST_SECONDS_OF_OWN_ROW = 2.5e-6
_ENCODED_AT_ONCE = 256
_BYTES_OF_WEIGHT = 4  # a parameter that only lies there, in float32
_NEAREST, _BYTES_OF_NEAREST = 16, 6


class GpuPlan(msgspec.Struct, kw_only=True):
    """What a step takes on GPUs. Every figure is computed."""

    computed: bool = True
    step: str
    gpus: str
    images: int
    hours: float
    host_hours: float | None = None  # of them, in which GPUs wait for the host; None where that is not counted
    operations: float  # of products, on all GPUs
    peak_share: float | None  # of the data sheet's rate of products; None on a measured device
    cost: float | None  # at ``--price``
    bytes_read: float
    read_bytes_per_second: float
    disk_bytes: float  # what the step writes
    memory_bytes: float  # of each GPU
    gpu_memory_bytes: float  # that a GPU has
    images_per_second: float | None = None  # by all GPUs
    decode_cores: int | None = None  # for all GPUs
    steps: int | None = None
    batch_size: int | None = None  # of all GPUs, as `seconds_per_step`
    seconds_per_step: float | None = None
    largest_batch_per_gpu: int | None = None  # that fits


def run(settings: GpuPlanSettings) -> GpuPlan:
    """Compute what the step of these settings takes."""
    if isinstance(settings, DistillSettings):
        return plan_distill(settings)
    if isinstance(settings, EmbedSettings):
        return plan_embed(settings)
    if isinstance(settings, ClusterSettings):
        return plan_cluster(settings)
    assert isinstance(settings, BalanceSettings), "the steps whose settings have --gpus"
    return plan_balance(settings)


class _Gpus(NamedTuple):
    name: str
    total: int
    device: Device
    are_gpus: bool = True  # the device at hand may be a CPU


class _Known(NamedTuple):
    """What the work directory says; None where it says nothing."""

    images: int | None
    kept: int | None
    width: int | None


def plan_distill(settings: DistillSettings) -> GpuPlan:
    """Compute what training takes."""
    gpus = _choose_gpus(settings.gpus, settings.precision)
    known = _look_up(settings)
    clip, held_bytes = _describe_student(settings)
    kept = None if settings.keep_list == "none" else known.kept
    images = _count_images(settings, kept or known.images)
    trained = max(1, round(images * (1 - settings.val_fraction)))
    online = settings.named_teacher if settings.online_teacher else None
    teachers = [] if online is None else [describe_model(online)]
    centroids = _default_clusters(images) if settings.needs_clusters else 0
    states = held_bytes + planned_states(settings, clip, gpus.device.memory, centroids)
    needs = training_memory(settings, clip, states, mixed=gpus.device.is_mixed, teachers=teachers)
    fitting = needs.largest(SHARE_OF_DEFAULT * gpus.device.memory) if gpus.are_gpus else None
    batch = settings.batch_size or settings.default_batch_size(trained, gpus.total, fitting)
    steps = settings.steps or max(1, (settings.epochs or DEFAULT_EPOCHS) * trained // batch)
    own = math.ceil(batch / gpus.total)
    candidates = _count_candidates(settings, images)
    taken = step_seconds(clip, gpus.device, own, batch, candidates)
    operations = batch * clip.training_operations + gpus.total * clip.optimizer_operations
    # Beside the step: layers that are computed again, and a teacher that encodes the same samples.
    again = [clip] if settings.grad_checkpointing else []
    for model in (*again, *teachers):
        taken += encode_seconds(own * model.operations, own * model.encoding_bytes(), gpus.device)
        operations += batch * model.operations
    plan = _finish(
        "distill",
        gpus,
        images,
        steps * taken,
        operations=float(steps) * operations,
        bytes_read=float(steps) * batch * (_IMAGE_BYTES + _count_row_bytes(settings, known.width)),
        disk_bytes=3.0 * (clip.checkpoint_bytes + held_bytes),
        memory_bytes=needs.needed(own),
        price=settings.price,
    )
    plan.images_per_second = batch / taken
    plan.decode_cores = math.ceil(batch / taken / _DECODED_BY_CORE)
    plan.steps, plan.batch_size, plan.seconds_per_step = steps, batch, taken
    plan.largest_batch_per_gpu = needs.largest(_SHARE_OF_MEMORY * gpus.device.memory)
    return plan


def _describe_student(settings: DistillSettings) -> tuple[Clip, int]:
    """Describe what is trained, and return the bytes of what is held beside it: a text tower that is the teacher's."""
    clip = describe_model(str(settings.student))
    if not settings.keeps_text_tower:
        return clip, 0
    embedded = find_embedded_model(WorkDirectory(settings.work))
    teacher = describe_model(settings.named_teacher or embedded or DEFAULT_MODEL)
    return clip.image_alone(teacher.embed_dim), _BYTES_OF_WEIGHT * teacher.text.parameters


def _count_candidates(settings: DistillSettings, images: int) -> int:
    """Return how many centroids the cluster loss compares a sample with, of the default number of clusters."""
    if not settings.needs_clusters:
        return 0
    clusters = _default_clusters(images)
    return min(clusters, max(settings.min_candidates, round(settings.candidate_ratio * clusters)))


def _count_row_bytes(settings: DistillSettings, width: int | None) -> int:
    """Return the bytes of a teacher's stored rows of an image and its caption."""
    if settings.has_no_teacher or settings.online_teacher:
        return 0
    return 2 * 2 * (width or _width_of(settings.named_teacher or DEFAULT_MODEL))


def plan_embed(settings: EmbedSettings) -> GpuPlan:
    """Compute what embedding takes."""
    gpus = _choose_gpus(settings.gpus, settings.precision)
    known_model = None if settings.data is not None else find_embedded_model(WorkDirectory(settings.work))
    model = settings.model or known_model or DEFAULT_MODEL
    reporting.note(f"Model: {model}.")
    clip = describe_model(model)
    images = _count_images(settings, _look_up(settings).images)
    shown, texts = 1 + settings.views, (1 + settings.text_variants) * settings.text
    operations = shown * clip.image.operations + texts * clip.text.operations
    number_bytes = 2 if gpus.device.is_mixed else 4
    moved = number_bytes * (shown * clip.image.moved + texts * clip.text.moved)
    seconds = images * encode_seconds(operations, moved, gpus.device) / gpus.total
    row_bytes = 2 * clip.embed_dim * (shown + texts) + 136 * settings.views
    batch = settings.batch_size or _ENCODED_AT_ONCE
    plan = _finish(
        "embed",
        gpus,
        images,
        seconds,
        operations=float(images) * operations,
        bytes_read=float(images) * _IMAGE_BYTES,
        disk_bytes=float(images) * row_bytes,
        memory_bytes=float(clip.encoder_bytes(batch)),
        price=settings.price,
    )
    plan.images_per_second = images / seconds
    plan.decode_cores = math.ceil(images / seconds / _DECODED_BY_CORE)
    return plan


def plan_cluster(settings: ClusterSettings) -> GpuPlan:
    """Compute what k-means and the assignment of all images take."""
    gpus = _choose_gpus(settings.gpus, settings.precision)
    known = _look_up(settings)
    kept = None if settings.keep_list == "none" else known.kept
    images = _count_images(settings, kept or known.images)
    width = known.width or _width_of(DEFAULT_MODEL)
    clusters = settings.num_clusters or _default_clusters(images)
    trained = min(images, settings.train_rows or images)
    products = 2 * width * clusters * float(settings.iterations * trained + images)
    row_bytes = 2 * width
    own = images / gpus.total
    return _finish(
        "cluster",
        gpus,
        images,
        products / (_SHARE_OF_KMEANS * gpus.device.reached().product) / gpus.total,
        operations=products,
        bytes_read=float(images) * row_bytes * (settings.iterations + 1),
        disk_bytes=float(images) * _NEAREST * _BYTES_OF_NEAREST + 4.0 * clusters * width,
        memory_bytes=min(0.6 * gpus.device.memory, own * row_bytes) + 14.0 * clusters * width,
        price=settings.price,
    )


def plan_balance(settings: BalanceSettings) -> GpuPlan:
    """Compute what the search takes: of all pairs the products alone, of partitions also what the host does."""
    gpus = _choose_gpus(settings.gpus, settings.precision)
    known = _look_up(settings)
    images = _count_images(settings, known.images)
    width = known.width or _width_of(settings.model or DEFAULT_MODEL)
    row_bytes = 2 * width
    pairs = images * (images - 1.0) / 2
    bytes_read = float(images) * row_bytes
    disk_bytes = float(images) * _BYTES_OF_LISTS
    host_seconds = 0.0
    if settings.neighbors == "partitioned":
        disk_bytes += bytes_read
        pairs = images * ((1 + _COMPARED_IN_PARTITIONS) * math.sqrt(images) + min(images, _AUDITED))
        host_seconds = images * (_HOST_SECONDS_OF_ROW + _HOST_SECONDS_OF_OWN_ROW / gpus.total)
    operations = 2 * width * pairs
    own = images / gpus.total
    plan = _finish(
        "balance",
        gpus,
        images,
        operations / gpus.device.reached().product / gpus.total + host_seconds,
        operations=operations,
        bytes_read=bytes_read,
        disk_bytes=disk_bytes,
        memory_bytes=min(0.6 * gpus.device.memory, own * row_bytes),
        price=settings.price,
    )
    plan.host_hours = host_seconds / 3600 or None
    return plan


def _finish(
    step: str,
    gpus: _Gpus,
    images: int,
    seconds: float,
    *,
    operations: float,
    bytes_read: float,
    disk_bytes: float,
    memory_bytes: float,
    price: float | None,
) -> GpuPlan:
    peak = gpus.total * gpus.device.product
    return GpuPlan(
        step=step,
        gpus=gpus.name,
        images=images,
        hours=seconds / 3600,
        operations=operations,
        peak_share=None if gpus.device.is_measured else operations / seconds / peak,
        cost=None if price is None else price * gpus.total * seconds / 3600,
        bytes_read=bytes_read,
        read_bytes_per_second=bytes_read / seconds,
        disk_bytes=disk_bytes,
        memory_bytes=memory_bytes,
        gpu_memory_bytes=gpus.device.memory,
    )


def _choose_gpus(given: str | None, precision: str) -> _Gpus:
    assert given is not None
    count, name = parse_devices(given)
    if name != THIS:
        return _Gpus(f"{count}x{name}", count, DEVICES[name])
    import torch  # what measures needs it

    from clipcid_cli.runtime.probes import measure_device

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _Gpus(f"{count}x{name}", count, measure_device(device, precision), device.type == "cuda")


def _width_of(spec: str) -> int:
    config = find_config(parse_model(spec))
    return 768 if config is None else int(config["embed_dim"])


def _default_clusters(images: int) -> int:
    return max(1, min(_MOST_CLUSTERS, images // _IMAGES_OF_CLUSTER))


def _look_up(settings: GpuPlanSettings) -> _Known:
    """Read from the work directory how many images were embedded, how many `balance` kept, and their width."""
    work = WorkDirectory(settings.work)
    with suppress(ClipcidError):  # nothing is there, or several things: the flags say what is planned
        embedded = read_sidecar(sidecar_path(work.find_embeddings(), "embed"), EmbedSidecar)
        balanced = read_sidecar(sidecar_path(work.balance, "balance"), BalanceSidecar)
        if embedded is not None:
            kept = None if balanced is None else int(balanced.result["kept"])
            return _Known(int(embedded.counts["images"]), kept, embedded.model.embed_dim)
    return _Known(None, None, None)


def _count_images(settings: GpuPlanSettings, known: int | None) -> int:
    """Return the number of images: as given, as the work directory says, or of the data that is named."""
    count = settings.images or known
    if count is not None:
        return count
    if isinstance(settings, TrainingDataSettings) and settings.data is not None:
        return max(1, open_named(settings, settings.data, WorkDirectory(settings.work).indexes).estimate_samples())
    raise ClipcidError(
        "The work directory does not say how many images there are to plan for.",
        "Add --images N.",
    )
