"""What a run needs of a machine, computed, and how what is there compares: docs/gpu.md#what-doctor-compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from clipcid_cli.algorithms.costs import BATCH_OF_DEVICE, Clip
from clipcid_cli.runtime.devices import Device
from clipcid_cli.runtime.pipeline import host_memory_of
from clipcid_cli.steps.doctor.measure import Process, WorkDisk
from clipcid_cli.steps.training_time import samples_per_second, step_seconds

OK, SLOW, STARVES, FAILS = "ok", "slow", "starves", "fails"

# A worker makes a part of a batch of so many samples; beside each image its tokens and the teacher's rows.
_SAMPLES_OF_ITEM = 256
_BYTES_BESIDE_IMAGE = 8 * 77 + 2 * 2 * 768
# Files that a process opens (embeddings, shards, libraries), and the pipes of a worker.
_FILES, _FILES_OF_WORKER = 256, 4
# The share of a worker's time that waiting for the first byte may take.
_SHARE_OF_WAITING = 0.1
# The share of the time of a shard that making its files may take: rows of images and captions, keys, and a record.
_SHARE_OF_FILES, _IMAGES_OF_SHARD, _FILES_OF_SHARD = 0.05, 10_000, 4
# The share of a step in which gradients can be sent: the backward pass.
_SHARE_OF_BACKWARD = 2 / 3

# What is left after SIGTERM to save a checkpoint (``commands/signals.py``).
_SECONDS_OF_SAVE = 25.0
# A rate of less than this share of its need leaves devices waiting for most of the time.
_STARVING = 0.5

_CORES = "More cores a GPU; under SLURM --cpus-per-task and SRUN_CPUS_PER_TASK, in a container --cpus."
_DECODE = "More cores a GPU, images of 256 pixels on the shorter side, or --fast-decode."
_MEMORY = "Fewer --workers, a smaller --batch-size, or a host with more memory."
_SHARED = "In a container more --shm-size; else fewer --workers."
_SAVES = "A disk that saves a checkpoint within the 25 s that torchrun, SLURM and Kubernetes leave after SIGTERM."
_COPIES = "Look for a GPU on a narrow or shared PCIe link: nvidia-smi topo -m"
_GPU_MEMORY = "A smaller --batch-size, --accum-freq or --grad-checkpointing; end other programs on the GPU."
_DISK = "A local disk, or a faster file system; pack single files into tars."


class Check(msgspec.Struct):
    """A figure of this machine beside what runs need."""

    name: str
    unit: str  # ``cores``, ``files``, ``images/s``, ``B``, ``B/s``, ``s``, ``FLOP/s``, or empty of what is no number
    figure: float | None
    needs: dict[str, float]  # computed, by model: at least so much, of ``s`` at most
    verdict: str  # ``ok``, ``slow``, ``starves`` (less than half), ``fails`` or, of what is not compared, empty
    formula: str = ""  # of the need
    problem: str = ""
    advice: str = ""


class Situation(NamedTuple):
    """What needs are computed from."""

    clips: Mapping[str, Clip]
    device: Device  # of each process
    processes: int  # that were measured, of the run and of a host
    local_processes: int
    on_gpu: bool


def list_checks(measured: Sequence[Process], disk: WorkDisk, where: Situation) -> list[Check]:
    """Compare each thing with its need; of the processes the one that has least counts."""
    rates = {name: samples_per_second(clip, where.device) for name, clip in where.clips.items()}
    decoded = min(process.decoded for process in measured)
    return [
        *_check_host(measured, rates, where),
        *_check_data(measured, rates),
        _compare_rate("decoding", "images/s", decoded, rates, "images/s that a device trains on", _DECODE),
        *_check_work(disk, rates, where),
        *_check_gpu(measured, rates, where),
    ]


def _check_host(measured: Sequence[Process], rates: Mapping[str, float], where: Situation) -> list[Check]:
    """Compare cores, memory and files of a process."""
    workers = min(process.workers for process in measured)
    by_core = min(process.decoded_by_core for process in measured)
    cores = dict.fromkeys(rates, 1.0)  # on a CPU what computes also decodes
    if where.on_gpu:
        cores = {name: math.ceil(rate / by_core) + 1.0 for name, rate in rates.items()}
    memory, shared = dict[str, float](), dict[str, float]()
    for name, clip in where.clips.items():
        item = _SAMPLES_OF_ITEM * (clip.image_bytes + _BYTES_BESIDE_IMAGE)
        total, in_shared = host_memory_of(item, item * BATCH_OF_DEVICE // _SAMPLES_OF_ITEM, workers)
        memory[name] = total / where.local_processes
        shared[name] = in_shared / where.local_processes
    files = dict.fromkeys(rates, float(_FILES + _FILES_OF_WORKER * workers))
    has_cores = min(process.cores for process in measured)
    has_memory = min(process.memory for process in measured)
    has_shared = [process.shared_memory for process in measured if process.shared_memory is not None]
    has_files = min(process.open_files for process in measured)
    checks = [
        _compare_rate("cores a process", "cores", has_cores, cores, "images/s ÷ those a core decodes + 1", _CORES),
        _compare_limit("memory a process", "B", has_memory, memory, "2 batches + workers × 3 × 256 images", _MEMORY),
    ]
    if has_shared:
        formula = "(2 × workers + 1) × 256 images"
        checks.append(_compare_limit("/dev/shm a process", "B", min(has_shared), shared, formula, _SHARED))
    checks.append(_compare_limit("open files", "files", has_files, files, "256 + 4 × workers", "ulimit -n 4096"))
    return checks


def _check_data(measured: Sequence[Process], rates: Mapping[str, float]) -> list[Check]:
    """Compare the disk of the data: how long until the first bytes of a file, and how much a second."""
    first = [process.first_bytes for process in measured if process.first_bytes is not None]
    reads = [process.read for process in measured if process.read is not None]
    if not first or not reads:
        return []
    workers = min(process.workers for process in measured)
    by_core = min(process.decoded_by_core for process in measured)
    image_bytes = max(process.image_bytes for process in measured)
    # Of as many workers as decode so much.
    waits = {name: _SHARE_OF_WAITING * max(1.0, rate / by_core, workers) / rate for name, rate in rates.items()}
    needs = {name: rate * image_bytes for name, rate in rates.items()}
    return [
        _compare_wait("data, first bytes", max(first), waits, "a tenth of workers ÷ images/s", _DISK),
        _compare_rate("data, reading", "B/s", min(reads), needs, "images/s × bytes of an image", _DISK),
    ]


def _check_work(disk: WorkDisk, rates: Mapping[str, float], where: Situation) -> list[Check]:
    """Compare the disk of the work directory."""
    if disk.problem:
        problem = f"cannot write: {disk.problem}"
        return [_check_without_figure("work, writing", problem, "Name another folder by --work.", unit="B/s")]
    needs = {name: clip.checkpoint_bytes / _SECONDS_OF_SAVE for name, clip in where.clips.items()}
    creations = {name: _SHARE_OF_FILES * _IMAGES_OF_SHARD / rate / _FILES_OF_SHARD for name, rate in rates.items()}
    is_quick = all(disk.created <= need for need in creations.values())
    created = _check(
        "work, new file",
        "s",
        disk.created,
        creations,
        OK if is_quick else SLOW,
        "a twentieth of a shard ÷ 4 files",
        _DISK,
    )
    return [
        created,
        _compare_rate("work, writing", "B/s", disk.written, needs, "12 × parameters ÷ 25 s", _SAVES),
        _compare_rate("work, reading", "B/s", disk.read, needs, "as writing", _SAVES),
    ]


def _check_gpu(measured: Sequence[Process], rates: Mapping[str, float], where: Situation) -> list[Check]:
    """Compare copies to GPUs, and their free memory."""
    copies = [process.copied for process in measured if process.copied is not None]
    memories = [process.gpu_memory for process in measured if process.gpu_memory is not None]
    if not copies or not memories:
        return []
    copied = {name: rates[name] * clip.image_bytes for name, clip in where.clips.items()}
    taken = {name: clip.state_bytes + BATCH_OF_DEVICE * float(clip.kept_bytes()) for name, clip in where.clips.items()}
    formula = "18 × parameters + 512 × activations"
    return [
        _compare_rate("copies to the GPU", "B/s", min(copies), copied, "images/s × 3 × 224 × 224", _COPIES),
        _compare_limit("free GPU memory", "B", min(memories), taken, formula, _GPU_MEMORY),
    ]


def check_products(measured: Device, where: Situation) -> Check:
    """Compare the products a second of a GPU with what its kind reaches."""
    reached = where.device.reached().product
    return _compare_rate(
        "products, 16 bits",
        "FLOP/s",
        measured.product,
        dict.fromkeys(where.clips, reached),
        "60 % of the data sheet's",
        "Look at clocks, power and heat: nvidia-smi -q -d PERFORMANCE",
    )


def check_exchange(rate: float, where: Situation) -> Check:
    """Compare how fast processes sum gradients with what is hidden behind the backward pass."""

    def bytes_a_second(clip: Clip) -> float:
        step = step_seconds(clip, where.device, BATCH_OF_DEVICE, BATCH_OF_DEVICE * where.processes)
        return clip.gradient_bytes / (_SHARE_OF_BACKWARD * step)

    return _compare_rate(
        "sum of gradients",
        "B/s",
        rate,
        {name: bytes_a_second(clip) for name, clip in where.clips.items()},
        "4 × parameters ÷ ⅔ of a step of 512 a process",
        "Look at NCCL_DEBUG=INFO: NVLink within a host, InfiniBand or RoCE between hosts; else larger batches.",
    )


def check_locks(problem: str) -> Check:
    """Say whether locks keep processes apart."""
    advice = "Put --work on a disk that all hosts share and that supports flock (NFS 4, Lustre with -o flock)."
    return _check_without_figure("locks hold", problem, advice)


def check_versions(measured: Sequence[Process]) -> Check:
    """Say whether all processes have the same versions."""
    first = measured[0].versions
    differing = next((rank for rank, process in enumerate(measured) if process.versions != first), None)
    problem = ""
    if differing is not None:
        other = measured[differing].versions
        name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
        problem = f"process {differing} has {name} {other.get(name)}, the first has {first.get(name)}"
    return _check_without_figure("versions agree", problem, "Install the same versions on all hosts.")


def _check_without_figure(name: str, problem: str, advice: str, *, unit: str = "") -> Check:
    """Fail where there is a problem."""
    verdict, advice = (FAILS, advice) if problem else (OK, "")
    return Check(name, unit, None, {}, verdict, problem=problem, advice=advice)


def check_unreadable(measured: Sequence[Process]) -> list[Check]:
    """Say how many of the images that were decoded could not be, if any."""
    unreadable = sum(process.unreadable for process in measured)
    if not unreadable:
        return []
    problem = f"{unreadable:,} of {sum(process.tried for process in measured):,} images cannot be decoded"
    return [Check("data decodes", "", None, {}, "", problem=problem, advice="clipcid embed names and skips them.")]


def _compare_rate(name: str, unit: str, figure: float, needs: dict[str, float], formula: str, advice: str) -> Check:
    """Compare a rate: with less than its need devices wait, with less than half of it most of the time."""
    share = min(figure / need for need in needs.values())
    return _check(name, unit, figure, needs, _judge(share, _STARVING), formula, advice)


def _compare_wait(name: str, figure: float, needs: dict[str, float], formula: str, advice: str) -> Check:
    """Compare a time that is to be short: at five times its need workers wait half of their time."""
    share = min(need / max(figure, 1e-9) for need in needs.values())
    return _check(name, "s", figure, needs, _judge(share, _SHARE_OF_WAITING / _STARVING), formula, advice)


def _compare_limit(name: str, unit: str, figure: float, needs: dict[str, float], formula: str, advice: str) -> Check:
    """Compare what a run takes whole, or ends with an error."""
    enough = all(figure >= need for need in needs.values())
    return _check(name, unit, figure, needs, OK if enough else FAILS, formula, advice)


def _judge(share: float, starving: float) -> str:
    return OK if share >= 1 else SLOW if share >= starving else STARVES


def _check(
    name: str, unit: str, figure: float, needs: dict[str, float], verdict: str, formula: str, advice: str
) -> Check:
    return Check(name, unit, figure, needs, verdict, formula, advice="" if verdict == OK else advice)
