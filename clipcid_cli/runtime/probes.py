"""Rates of this machine, each measured in a second or two: products, memory, disks, copies to a GPU, gradients."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipcid_cli.runtime.devices import Device
from clipcid_cli.runtime.host import memory_limit
from clipcid_cli.runtime.interruption import ends_when_saved
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.runtime.timing import time_trial

# Rows and widths of the products within a layer of ViT-B.
_ROWS = {"cpu": 1_600, "cuda": 25_600}
_WIDTH, _HIDDEN = 768, 3_072
# Passes over memory of a norm, an activation and a residual.
_PASSES = 7
_LARGE = 100_000_000  # parameters of a model for which the format of training is chosen
_SECONDS = 0.4
_COPIED_BYTES = 2**26
_REPEATS = 5
_LONGEST_EXCHANGE = 5.0  # seconds

_BLOCK = 4 * 2**20
_FIRST_BYTES = 4096
_FILES = 32
_THREADS = 8


def measure_device(device: torch.device, precision: str = "auto") -> Device:
    """Measure products and passes over memory of the shapes of a ViT-B, at the best of a second."""
    dtype = choose_precision(precision, device, "train", _LARGE).dtype
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_limit()
    return Device(
        name="this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        product=_measure_products(device, dtype),
        exact=_measure_products(device, torch.float32),
        bandwidth=_measure_passes(device),
        memory=memory,
        is_measured=True,
        is_mixed=dtype != torch.float32,
        is_gpu=device.type == "cuda",
    )


def _measure_products(device: torch.device, dtype: torch.dtype) -> float:
    rows = torch.randn(_ROWS[device.type], _WIDTH, device=device).to(dtype)
    weight = torch.randn(_HIDDEN, _WIDTH, device=device).to(dtype)
    seconds = _best(lambda: F.linear(rows, weight), device)
    return 2 * rows.shape[0] * _WIDTH * _HIDDEN / seconds


def _measure_passes(device: torch.device) -> float:
    rows = torch.randn(_ROWS[device.type], _HIDDEN, device=device)

    def passes() -> None:
        torch.add(F.gelu(F.layer_norm(rows, (_HIDDEN,))), rows)

    return _PASSES * rows.nbytes / _best(passes, device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Return the least of the times of some work: other programs can only lengthen it."""
    time_trial(work, device)
    end = time.perf_counter() + _SECONDS
    seconds = [time_trial(work, device, warm_up=0).seconds]
    while time.perf_counter() < end:
        seconds.append(time_trial(work, device, warm_up=0).seconds)
    return min(seconds)


def measure_copies(device: torch.device) -> float:
    """Return the bytes a second that are copied from pinned memory to a GPU."""
    pinned = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    return _COPIED_BYTES / _best(lambda: pinned.to(device, non_blocking=True), device)


def measure_exchange(device: torch.device) -> float:
    """Return the bytes a second of float32 gradients that all processes of the run sum over one another."""
    few = _time_exchange(device, _COPIED_BYTES // 16, repeats=1)
    slowest = torch.tensor(few, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # so that all processes go on alike
    if 16 * _REPEATS * float(slowest) > _LONGEST_EXCHANGE:
        return _COPIED_BYTES / 16 / few
    return _COPIED_BYTES / _time_exchange(device, _COPIED_BYTES, repeats=_REPEATS)


def _time_exchange(device: torch.device, num_bytes: int, repeats: int) -> float:
    gradients = torch.zeros(num_bytes // 4, device=device)
    return time_trial(lambda: dist.all_reduce(gradients), device, repeats=repeats).seconds


def measure_first_bytes(files: Sequence[str]) -> float:
    """Return the median seconds to open a file and read its first bytes, which the host has not kept."""
    seconds = list[float]()
    for file in files[:_FILES]:
        began = time.perf_counter()
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _forget(descriptor)
            os.pread(descriptor, _FIRST_BYTES, 0)
        finally:
            os.close(descriptor)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_reads(files: Sequence[str], seconds: float) -> float:
    """Return the bytes a second that threads read of files together, for so many seconds at most."""
    end = time.perf_counter() + seconds
    began = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(partial(_read_until, end), files))
    return sum(sizes) / (time.perf_counter() - began)


def _read_until(end: float, file: str) -> int:
    """Read a file in blocks until the time is over; return the bytes that were read."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _forget(descriptor)
        size = 0
        while time.perf_counter() < end:
            block = len(os.pread(descriptor, _BLOCK, size))
            size += block
            if not block:
                break
        return size
    finally:
        os.close(descriptor)


def _forget(descriptor: int) -> None:
    """Ask the system to drop what it keeps of a file, so that reading it is reading the disk."""
    with suppress(OSError, AttributeError):  # only Linux has it
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def unnamed_file(folder: Path) -> Iterator[int]:
    """Open a new file in a folder, for reading and writing, whose name is gone at once: nothing stays, however this ends."""
    path = folder / f".clipcid-doctor-{os.getpid()}-{time.monotonic_ns()}"
    with ends_when_saved(lambda: ""):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        path.unlink()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def measure_writes(folder: Path, num_bytes: int, seconds: float) -> tuple[float, float]:
    """Return the bytes a second that one process writes to a folder's disk, and then reads from there."""
    with unnamed_file(folder) as descriptor:
        block = os.urandom(_BLOCK)
        written = 0
        began = time.perf_counter()
        while written < num_bytes and time.perf_counter() - began < seconds:
            written += os.pwrite(descriptor, block, written)
        os.fsync(descriptor)
        write_rate = written / (time.perf_counter() - began)
        _forget(descriptor)
        began = time.perf_counter()
        for offset in range(0, written, _BLOCK):
            os.pread(descriptor, _BLOCK, offset)
            if time.perf_counter() - began > seconds:
                written = offset + _BLOCK
                break
        return write_rate, written / (time.perf_counter() - began)


def measure_creation(folder: Path) -> float:
    """Return the median seconds to make, flush and remove a file in a folder."""
    seconds = list[float]()
    for _ in range(_REPEATS):
        began = time.perf_counter()
        with unnamed_file(folder) as descriptor:
            os.pwrite(descriptor, b"0" * _FIRST_BYTES, 0)
            os.fsync(descriptor)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
