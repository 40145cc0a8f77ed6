"""Cores and memory of a job, from the files in which Linux keeps the limits of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipcid_cli.runtime.host import count_cores, memory_limit

MACHINE = memory_limit(Path("/nowhere"))


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(192)), raising=False)


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 192, MACHINE),
        # Version 2: a pod's limit is that of a group above the container's; the container sees its own as the root.
        (
            {
                "proc/self/cgroup": "0::/pod/container",
                "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
                "sys/fs/cgroup/pod/cpu.max": "9600000 100000",
                "sys/fs/cgroup/pod/container/memory.max": "1000000",
                "sys/fs/cgroup/pod/memory.max": "max",
            },
            96,
            1_000_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/cpu.max": "250000 100000",
                "sys/fs/cgroup/memory.max": "2000000",
            },
            2,
            2_000_000,
        ),
        # Version 1: a mount for each controller; in a container the path is the host's.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n1:name=systemd:/docker/1\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000",
            },
            6,
            3_000_000,
        ),
        (
            {
                "proc/self/cgroup": "2:memory:/\n1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            192,
            MACHINE,
        ),
    ],
    ids=["none", "pod", "container", "version 1", "version 1 without limits"],
)
def test_a_job_has_what_its_control_groups_leave_it(
    files: dict[str, str], cores: int, memory: int, tmp_path: Path
) -> None:
    write_files(tmp_path, files)
    assert (count_cores(tmp_path), memory_limit(tmp_path)) == (cores, memory)


def test_processes_of_a_host_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9600000 100000"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert count_cores(tmp_path) == 12
