"""What `doctor` measures of a process, its host and its disks; no file stays, and each part is over in a few seconds."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipcid_cli.formats.data.activity import count_received
from clipcid_cli.formats.data.addresses import is_pipe, is_remote
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.files import lock
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.host import count_cores, memory_limit
from clipcid_cli.runtime.interruption import ends_when_saved
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.pipeline import ordered_map
from clipcid_cli.runtime.probes import (
    measure_copies,
    measure_creation,
    measure_first_bytes,
    measure_reads,
    measure_writes,
)
from clipcid_cli.steps.encode import Decoder

SIDE = 224
"""Pixels that ViT-B-32 and ViT-B-16 see on each side."""

_PACKAGES = ("clipcid", "torch", "open_clip_torch", "pillow", "numpy")
_SECONDS = 3.0  # of a measurement that goes on until it ends
_BATCH = 32
_SAMPLES_OF_A_SHARD = 256
_SHARDS = 4
_MADE_UP, _MADE_UP_SIDE = 64, 256
_WRITTEN = 2**28
# Ends with 0 where the lock of its file is held, else with 3.
_TRY_LOCK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_NOFOLLOW)
try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(0)
sys.exit(3)
"""


@dataclasses.dataclass(frozen=True)
class Process:
    """What one process has: of its host, of the data's disk, and how fast its workers decode."""

    host: str
    cores: int  # its share of those that the job may use
    memory: float  # its share of its host's, bytes
    shared_memory: float | None  # free in /dev/shm, its share; None where there is none
    open_files: int
    workers: int
    image_bytes: float  # of an image file, the mean
    decoded: float  # images a second
    decoded_by_core: float
    unreadable: int  # of the images that were decoded
    versions: dict[str, str]
    first_bytes: float | None  # seconds; None without data in local files
    read: float | None  # bytes a second
    copied: float | None  # bytes a second, of a GPU
    gpu_memory: float | None  # bytes that are free
    gpu: str | None


@dataclasses.dataclass(frozen=True)
class WorkDisk:
    """What one process finds of the disk of the work directory: seconds, bytes a second; a problem where it cannot write."""

    created: float
    written: float
    read: float
    problem: str = ""


def take_samples(dataset: Dataset | None, context: DistContext) -> list[Sample]:
    """Take the first samples of a few shards, other ones in each process as far as there are enough; else make some up."""
    if dataset is None:
        return make_up_samples(_MADE_UP)
    shards = [shard for shard in dataset.shards if not is_pipe(shard.file)]
    mine = (shards[context.rank :: context.size] or shards)[:_SHARDS]
    taken = [sample for shard in mine for sample in islice(shard.stream(), _SAMPLES_OF_A_SHARD)]
    return taken or make_up_samples(_MADE_UP)


def measure_process(context: DistContext, dataset: Dataset | None, samples: Sequence[Sample], workers: int) -> Process:
    """Measure this process; the others of the run do so at the same time."""
    files = [] if dataset is None else _local_files(dataset, samples)
    begin = context.rank * len(files) // context.size
    files = files[begin:] + files[:begin]
    first_bytes = measure_first_bytes(files) if files else None
    read = measure_reads(files, _SECONDS) if files else None
    decoded, unreadable = measure_decoding(samples, workers, _SECONDS)
    on_gpu = context.device.type == "cuda"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = None
    with suppress(OSError):  # only Linux has it
        shared = shutil.disk_usage("/dev/shm").free / processes
    return Process(
        host=socket.gethostname(),
        cores=count_cores(),
        memory=memory_limit() / processes,
        shared_memory=shared,
        open_files=read_open_files(),
        workers=workers,
        image_bytes=_mean_size(samples[:_BATCH]),
        decoded=decoded,
        decoded_by_core=decoded / max(1, workers),
        unreadable=unreadable,
        versions=list_versions(),
        first_bytes=first_bytes,
        read=read,
        copied=measure_copies(context.device) if on_gpu else None,
        gpu_memory=torch.cuda.mem_get_info(context.device)[0] if on_gpu else None,
        gpu=torch.cuda.get_device_name(context.device) if on_gpu else None,
    )


def read_open_files() -> int:
    """Return how many files this process may have open; a very large number where there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**30 if limit == resource.RLIM_INFINITY else limit


def list_versions() -> dict[str, str]:
    """Return the versions of what computes and decodes."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(ImportError):  # not installed under its name, but unpacked
            versions[name] = version(name)
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions


def make_up_samples(count: int) -> list[Sample]:
    """Make JPEGs of several sizes of grain, which compress about as photographs do."""
    random = np.random.default_rng(0)
    samples = list[Sample]()
    for index in range(count):
        pixels = np.zeros((_MADE_UP_SIDE, _MADE_UP_SIDE, 3), dtype=np.float32)
        for side in (4, 16, 64, _MADE_UP_SIDE):
            grain = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
            pixels += np.asarray(grain.resize((_MADE_UP_SIDE, _MADE_UP_SIDE), Image.Resampling.BICUBIC)) / side
        buffer = io.BytesIO()
        Image.fromarray((pixels * (255 / pixels.max())).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        samples.append(Sample(str(index), ByteRange("", data=buffer.getvalue())))
    return samples


def _mean_size(samples: Sequence[Sample]) -> float:
    """Return the mean bytes of the images that can be read, at least 1."""
    total = 0
    for sample in samples:
        with suppress(OSError):
            total += len(sample.image.read())
    return max(1.0, total / len(samples))


def _local_files(dataset: Dataset, samples: Sequence[Sample]) -> list[str]:
    """List the files that hold the data on a mounted disk: its shards, or images of a folder or list."""
    if dataset.kind not in ("images", "list"):
        return [shard.file for shard in dataset.shards if not is_remote(shard.file)]
    return [sample.image.path for sample in samples if sample.image.path and not is_remote(sample.image.path)]


def measure_decoding(samples: Sequence[Sample], workers: int, seconds: float) -> tuple[float, int]:
    """Return the images a second that workers decode again and again, and how many of them cannot be decoded.

    What is measured is what `embed` does: bytes to pixels of the model's size.
    """
    decoder = Decoder(Renderer({"size": SIDE}), None)
    batches = [samples[first : first + _BATCH] for first in range(0, len(samples), _BATCH)]
    images = 0
    unreadable = 0
    began = 0.0
    with closing(ordered_map(decoder, itertools.cycle(batches), workers, count_received)) as decoded:
        for number, batch in enumerate(decoded):
            now = time.perf_counter()
            if number < len(batches):
                unreadable += len(batch.failures)
            if not number:  # the workers have started
                began = now
                continue
            images += _BATCH if batch.pixels is None else len(batch.pixels)
            if now - began > seconds:
                break
    return images / (now - began), unreadable


def measure_work_disk(folder: Path) -> WorkDisk:
    """Measure the disk of a folder, by files without a name."""
    try:
        return WorkDisk(measure_creation(folder), *measure_writes(folder, _WRITTEN, _SECONDS / 2))
    except OSError as error:
        return WorkDisk(0.0, 0.0, 0.0, error.strerror or str(error))


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or where it does not exist yet the one above it that does."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def find_lock_problem(context: DistContext, folder: Path) -> str:
    """Say why a lock in a folder does not keep the run's processes apart, the same on all; nothing where it does.

    The first process holds a file, and the others, or where there are none a process of its own, try to.
    """
    path = context.broadcast(folder / f".clipcid-doctor-{os.getpid()}-{time.monotonic_ns()}.lock")
    with ExitStack() as stack:

        def hold() -> str:
            try:
                stack.enter_context(_held(path))
            except OSError as error:
                return f"cannot write to {folder}: {error.strerror or error}"
            return ""

        problem = context.on_rank0(hold)
        if problem:
            return problem
        if not context.is_main:
            problem = _try_lock(path)
        elif context.size == 1:
            problem = _try_lock_elsewhere(path)
        return next(filter(None, context.gather(problem)), "")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a file that is removed at the end; a signal ends the process only then."""
    with ends_when_saved(lambda: ""), lock(path, wait=False):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _try_lock(path: Path) -> str:
    """Try to hold what another process holds."""
    host = socket.gethostname()
    if not path.exists():
        return f"{host} does not see what another process writes to {path.parent}"
    with suppress(BlockingIOError), lock(path, wait=False):
        return f"{host} could take a lock in {path.parent} that another process holds"
    return ""


def _try_lock_elsewhere(path: Path) -> str:
    # A program of this module; the path is a word of its own, which no shell reads.
    ended = subprocess.run([sys.executable, "-I", "-c", _TRY_LOCK, path], check=False, stderr=subprocess.DEVNULL)
    return "" if ended.returncode == 0 else f"a second process could take a lock in {path.parent} that the first holds"
