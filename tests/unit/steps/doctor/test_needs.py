"""What `doctor` says of a host with 8 GPUs that has all it needs, and of one that lacks something."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clipcid_cli.runtime.devices import DEVICES
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps.doctor import measure
from clipcid_cli.steps.doctor.measure import Process, WorkDisk, find_lock_problem, measure_work_disk, read_open_files
from clipcid_cli.steps.doctor.needs import (
    Check,
    Situation,
    check_exchange,
    check_products,
    check_unreadable,
    check_versions,
    list_checks,
)
from clipcid_cli.steps.training_time import describe_model

PROCESS = Process(
    host="one",
    cores=24,
    memory=250e9,
    shared_memory=100e9,
    open_files=1024,
    workers=23,
    image_bytes=25_000,
    decoded=11_500,
    decoded_by_core=500,
    tried=640,
    unreadable=0,
    versions={"torch": "2.9"},
    first_bytes=1e-4,
    read=1e9,
    copied=20e9,
    gpu_memory=79e9,
    gpu="NVIDIA H100 80GB HBM3",
)
DISK = WorkDisk(created=1e-3, written=1e9, read=2e9)
WHERE = Situation(
    {name: describe_model(name) for name in ("ViT-B-32", "ViT-B-16")},
    DEVICES["H100"],
    processes=8,
    local_processes=8,
    on_gpu=True,
)


def checks_of(disk: WorkDisk = DISK, **changes: Any) -> dict[str, Check]:
    lacking = dataclasses.replace(PROCESS, **changes)
    return {check.name: check for check in list_checks([PROCESS, lacking], disk, WHERE)}


def test_a_host_that_has_enough_is_well() -> None:
    checks = checks_of()
    assert len(checks) == 12
    assert {name for name, check in checks.items() if check.verdict not in ("ok", "")} == set()
    assert not any(check.advice for check in checks.values())


@pytest.mark.parametrize(
    ("changes", "name", "verdict"),
    [
        ({"cores": 12}, "cores a process", "slow"),
        ({"cores": 1}, "cores a process", "starves"),
        ({"memory": 2e8}, "memory a process", "fails"),
        ({"shared_memory": 64 * 2**20}, "/dev/shm a process", "fails"),
        ({"open_files": 256}, "open files", "fails"),
        ({"first_bytes": 5e-4}, "data, first bytes", "slow"),
        ({"first_bytes": 5e-3}, "data, first bytes", "starves"),
        ({"read": 5e7}, "data, reading", "starves"),
        ({"decoded": 6_000}, "decoding", "slow"),
        ({"decoded": 500}, "decoding", "starves"),
        ({"copied": 1e9}, "copies to the GPU", "slow"),
        ({"gpu_memory": 2e9}, "free GPU memory", "fails"),
    ],
)
def test_what_one_process_lacks_is_named_with_its_cure(changes: dict[str, Any], name: str, verdict: str) -> None:
    checks = checks_of(**changes)
    assert {name for name, check in checks.items() if check.advice} == {name}
    assert checks[name].verdict == verdict
    assert checks[name].formula


def test_a_disk_that_cannot_save_in_time_or_at_all_is_named() -> None:
    assert checks_of(dataclasses.replace(DISK, written=5e7))["work, writing"].verdict == "slow"
    assert checks_of(dataclasses.replace(DISK, created=1.0))["work, new file"].verdict == "slow"
    check = checks_of(measure_work_disk(Path("/proc")))["work, writing"]
    assert (check.verdict, check.figure) == ("fails", None)
    assert check.problem.startswith("cannot write: ")


def test_slow_products_slow_links_and_other_versions_are_named() -> None:
    h100 = DEVICES["H100"]
    measured = dataclasses.replace(h100, product=400e12, is_measured=True)
    assert check_products(measured, WHERE).verdict == "slow"
    assert check_products(dataclasses.replace(measured, product=610e12), WHERE).verdict == "ok"
    assert check_exchange(200e9, WHERE).verdict == "ok"
    assert check_exchange(1e9, WHERE).verdict == "starves"
    other = dataclasses.replace(PROCESS, versions={"torch": "2.10"})
    assert check_versions([PROCESS, PROCESS]).verdict == "ok"
    assert check_versions([PROCESS, other]).problem == "process 1 has torch 2.10, the first has 2.9"


def test_no_limit_of_open_files_is_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert read_open_files() > 1_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert read_open_files() == 256


def test_measuring_a_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_WRITTEN", 2**22)
    disk = measure_work_disk(tmp_path)
    assert min(disk.created, disk.written, disk.read) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 7)
    (tmp_path / "link").rename(tmp_path / ".clipcid-doctor-7-7")
    assert measure_work_disk(tmp_path).problem == os.strerror(errno.EEXIST)
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_does_not_hold_is_found_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = DistContext(0, 1, 0, torch.device("cpu"))
    assert find_lock_problem(context, tmp_path) == ""
    # As on a mount without locks, for this process alone: the other one gets what it asks for.
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "a second process could take a lock" in find_lock_problem(context, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_decoded_are_counted_and_called_neither_slow_nor_a_failure() -> None:
    assert check_unreadable([PROCESS]) == []
    (check,) = check_unreadable([PROCESS, dataclasses.replace(PROCESS, unreadable=3)])
    assert (check.name, check.verdict) == ("data decodes", "")
    assert check.problem == "3 of 1,280 images cannot be decoded"
