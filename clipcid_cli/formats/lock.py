"""The one lock: on a file, held by a process and ended by the kernel with it, however it ends and whatever the clock says.

Locks must hold between the hosts of a shared disk.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold a file, which is made where it is missing, and give its descriptor, open for reading and writing.

    Args:
        wait: Whether to wait for the process that holds it; if not, that is a BlockingIOError.
    """
    held = False
    while not held:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):  # removed or renamed before it was held
                held = os.path.samestat(os.fstat(descriptor), path.stat())
            if held:
                yield descriptor
        finally:
            os.close(descriptor)
