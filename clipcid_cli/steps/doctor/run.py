"""`doctor`: measure this machine, processes together, and compare it with what runs need."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.runtime.devices import DEVICES, THIS, Device, find_device, parse_devices
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.interruption import starts_over
from clipcid_cli.runtime.pipeline import default_workers
from clipcid_cli.runtime.probes import measure_device, measure_exchange
from clipcid_cli.steps import reporting
from clipcid_cli.steps.doctor.measure import (
    Process,
    find_lock_problem,
    measure_process,
    measure_work_disk,
    nearest_folder,
    take_samples,
)
from clipcid_cli.steps.doctor.needs import (
    FAILS,
    STARVES,
    Check,
    Situation,
    check_exchange,
    check_locks,
    check_products,
    check_unreadable,
    check_versions,
    list_checks,
)
from clipcid_cli.steps.open_data import open_named
from clipcid_cli.steps.settings.doctor import DoctorSettings
from clipcid_cli.steps.training_time import describe_model, samples_per_second

MODELS = ("ViT-B-32", "ViT-B-16")
"""The models whose needs are compared."""


class DoctorResult(msgspec.Struct):
    """What was measured, beside what is needed."""

    device: str  # of which the needs are
    processes: int
    hosts: int
    images_per_second: dict[str, float]  # that a device trains on, computed, by model
    checks: list[Check]
    versions: dict[str, str]

    @property
    def exit_code(self) -> int:
        """1 where a run would starve or end, else 0."""
        return int(any(check.verdict in (STARVES, FAILS) for check in self.checks))


def run(settings: DoctorSettings) -> DoctorResult:
    """Look at everything that a run takes from this machine."""
    with starts_over(), open_dist_context(settings.device) as context:
        dataset = context.on_rank0(lambda: _open_data(settings))
        samples = context.on_all(lambda: take_samples(dataset, context))
        reporting.note("Measuring this machine, which takes about 15 seconds.")
        folder = context.broadcast(nearest_folder(settings.work))
        disk = context.on_rank0(lambda: measure_work_disk(folder))
        locks = [] if disk.problem else [check_locks(find_lock_problem(context, folder))]
        workers = default_workers(context.device) if settings.workers is None else settings.workers
        measured = context.gather(context.on_all(lambda: measure_process(context, dataset, samples, workers)))
        own = context.broadcast(measure_device(context.device, settings.precision))
        exchanged = measure_exchange(context.device) if context.size > 1 else None
    hosts = Counter(process.host for process in measured)
    local = max(hosts.values())
    count, device = _choose_device(settings.gpus, local, measured[0].gpu, own)
    measured = [_share(process, count // local) for process in measured]
    clips = {name: describe_model(name) for name in MODELS}
    on_gpu = measured[0].gpu is not None or not device.is_measured
    where = Situation(clips, device, context.size, local, on_gpu)
    checks = [*locks, *list_checks(measured, disk, where), *check_unreadable(measured)]
    if measured[0].gpu is not None and not device.is_measured:
        checks.append(check_products(own, where))
    if exchanged is not None:
        checks.append(check_exchange(exchanged, where))
    return DoctorResult(
        device=device.name,
        processes=context.size,
        hosts=len(hosts),
        images_per_second={name: samples_per_second(clip, device) for name, clip in clips.items()},
        checks=[*checks, check_versions(measured)],
        versions=measured[0].versions,
    )


def _open_data(settings: DoctorSettings) -> Dataset | None:
    if settings.data is None:
        return None
    # Cut-off shards and repeated keys are for the steps to judge.
    return open_named(dataclasses.replace(settings, max_bad_fraction=1.0, keys="shard"), settings.data)


def _choose_device(gpus: str | None, per_host: int, gpu: str | None, own: Device) -> tuple[int, Device]:
    """Return how many devices share a host, and what each of them can do: as asked for, in the table, else as measured."""
    if gpus is not None:
        count, name = parse_devices(gpus)
        return max(per_host, count), own if name == THIS else DEVICES[name]
    return per_host, (find_device(gpu) if gpu is not None else None) or own


def _share(process: Process, processes: int) -> Process:
    """Return what each of so many processes would have in the place of one."""
    if processes <= 1:
        return process
    return dataclasses.replace(
        process,
        cores=process.cores // processes,
        memory=process.memory / processes,
        shared_memory=None if process.shared_memory is None else process.shared_memory / processes,
        workers=max(1, process.workers // processes),
        decoded=process.decoded / processes,
        read=None if process.read is None else process.read / processes,
    )
