"""What this host gives to a job: the cores and the memory that scheduler, container and machine leave it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def count_processes() -> int:
    """Return how many processes of the run this host has, as torchrun says; 1 where nobody does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def count_cores(root: Path = _ROOT) -> int:
    """Return this process's share of the cores that this host gives to its job: of those it may run on, within its quota.

    Args:
        root: The folder that holds ``proc`` and ``sys``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_cpu_quotas(root), default=math.inf)
    return int(min(cores, quota)) // count_processes()


def memory_limit(root: Path = _ROOT) -> int:
    """Return the bytes of memory that the job's processes on this host may use together; `root` as for `count_cores`."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_memory_limits(root)])


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group above this process allows it; nothing where none sets a limit."""
    for group in _control_groups(root, "cpu"):
        with suppress(OSError, ValueError):  # ``max 100000`` is no limit
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii")
            if int(quota) > 0:  # -1 is no limit
                yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group above this process allows it; nothing where none sets a limit."""
    for group in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # ``max`` is no limit
                yield int((group / name).read_text(encoding="ascii"))


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of those above it, of version 2 and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        # In a container the path may be that of the host, and its own group is what is mounted.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield folder
