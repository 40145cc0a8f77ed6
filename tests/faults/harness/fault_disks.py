"""A disk that is full or read-only, a limit of file sizes, and permissions that hold for root too."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT = 1, 32  # MS_RDONLY, MS_REMOUNT
_DETACH = 2  # MNT_DETACH
_VERSION_3 = 0x20080522  # of Linux's capabilities
_PASSES_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_LARGE = 256 * 2**20


@contextmanager
def own_disk(place: Path) -> Iterator[None]:
    """Mount an empty disk in memory at a folder, for the time of a case."""
    place.mkdir(exist_ok=True)
    _mount(place, 0, _LARGE)
    try:
        yield
    finally:
        _LIBC.umount2(os.fsencode(place), _DETACH)


def limit_room(place: Path, room: int | None) -> None:
    """Leave `room` bytes free on the disk at a place; None: as much as there was."""
    found = os.statvfs(place)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    _mount(place, _REMOUNT, _LARGE if room is None else used + max(room, 0))


def set_read_only(place: Path, read_only: bool) -> None:
    """Allow or forbid every change to the disk at a place."""
    _mount(place, _REMOUNT | (_READ_ONLY if read_only else 0), _LARGE)


def _mount(place: Path, flags: int, size: int) -> None:
    if _LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", ctypes.c_ulong(flags), f"size={size}".encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(place))


@functools.cache
def can_mount() -> bool:
    """Tell whether this process may mount a disk: root on Linux."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with own_disk(Path(name)):
                return True
        except (OSError, AttributeError):
            return False


def limit_file_sizes(size: int, pipe: Path) -> None:
    """Let every write beyond `size` bytes of a file fail; what the process says goes to a pipe, which has no size."""
    for stream in (1, 2):
        os.dup2(os.open(pipe, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def heed_permissions() -> None:
    """Let permissions hold for this process even where it is root's."""
    if os.geteuid() != 0:
        return
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    assert _LIBC.capget(header, data) == 0
    words = list(struct.unpack("6I", data.raw))
    words[0] &= ~_PASSES_PERMISSIONS  # the effective ones of the first 32
    assert _LIBC.capset(header, ctypes.create_string_buffer(struct.pack("6I", *words), 24)) == 0
