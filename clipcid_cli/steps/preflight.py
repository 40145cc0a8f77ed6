"""What is looked at before long work begins: whether the cores suffice, and a few samples of every shard.

The samples are read and decoded in parallel, which takes at most two seconds. Where not all shards can be looked at in that
time, those that are lie evenly in the data, in an order that depends on the seed.
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe, is_url
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.skips import REASONS, Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.host import count_cores
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.pipeline import default_workers
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.shared import ReadingSettings

if TYPE_CHECKING:
    from clipcid_cli.formats.data.cells import Origin

_SECONDS = 2.0
_SAMPLES_OF_A_SHARD = 3
_SAMPLES_OF_BAD_DATA = 15  # where none of the first can be used
# Where so large a share of the samples may be bad, it means little that a few are.
_MOST = 0.5
_STREAMED_SHARDS = 4
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
_THREADS = 16
_GOLDEN_RATIO = (5**0.5 - 1) / 2

# A core decodes some 500 images a second (docs/scale.md); a GPU of today takes more than 2,000 (assumed).
_CORES_OF_GPU = 4


def choose_workers(asked: int | None, device: torch.device) -> int:
    """Return the number of worker processes: what was asked for, else what the cores of this process allow.

    A GPU with too few cores to decode for it is reported. Under SLURM that is an error: since version 22.05 `srun` gives a
    task one core unless it is told otherwise.
    """
    if asked is not None:
        return asked
    cores = count_cores()
    if device.type == "cuda" and cores < _CORES_OF_GPU:
        problem = (
            f"This process may use {cores} of the host's cores, and decoding for a GPU takes {_CORES_OF_GPU} or more."
        )
        if "SLURM_JOB_ID" in os.environ:
            fix = "Set SRUN_CPUS_PER_TASK to the cores of a task (a GPU's times its GPUs), or choose a number of --workers."
            raise ClipcidError(problem, fix)
        reporting.warn(problem)
    return default_workers(device)


class _Look(NamedTuple):
    """What was seen of one shard."""

    samples: int  # that were looked at
    bad: Skips  # which of them cannot be decoded


def validate_samples(dataset: Dataset, context: DistContext, settings: ReadingSettings, *, dry_run: bool) -> None:
    """Look at a few samples of every shard, or of as many as there is time for, and report images that cannot be decoded.

    What is missing at the end of truncated shards is reported too.

    Such images are no error, unless all are such: a step skips and counts them. A shard that cannot be read is one. A dry
    run also names the images, or reports that all is well.
    """
    if dataset.truncation is not None:
        reporting.warn(f"{dataset.truncation}; its samples before the end are used.")
    mine = choose_order(dataset, settings.seed, dry_run=dry_run)[context.rank :: context.size]

    def look(few: int) -> list[_Look]:
        looks = list[_Look]()
        end = time.perf_counter() + _SECONDS
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(mine), _THREADS):
                if time.perf_counter() > end:
                    break
                looks += pool.map(partial(_look, dataset, few, urls=dry_run), mine[first : first + _THREADS])
        return looks

    for few in (_SAMPLES_OF_A_SHARD, _SAMPLES_OF_BAD_DATA):
        looks = list(chain.from_iterable(context.gather(context.on_all(partial(look, few)))))
        samples = sum(shard.samples for shard in looks)
        bad = Skips()
        for shard in looks:
            bad.merge(shard.bad)
        if bad.total < samples or not samples:
            break
    total = len(dataset.shards)
    shards = "shard" if total == 1 else "shards"
    noun = "sample" if samples == 1 else "samples"
    looked = f"{dataset.spec}: checked {len(looks):,} of {total:,} {shards}, {samples:,} {noun}"
    if len(looks) < total:
        looked += " (evenly spread)"
    if bad.total and bad.total == samples and settings.max_bad_fraction < _MOST:
        raise ClipcidError(f"{looked}: none can be used.\n{bad.describe()}", _advise(dataset, bad))
    if bad.total:
        # A run names what it leaves out at its end.
        reasons = ", ".join(f"{count:,} × {REASONS[reason]}" for reason, count in bad.counts.items())
        why = "cannot be decoded" if list(bad.counts) == ["unreadable_image"] else f"cannot be used, {reasons}"
        warning = f"{looked}: {bad.total:,} {why}."
        reporting.warn(f"{warning}\n{bad.describe()}" if dry_run else warning)
    elif dry_run:
        reporting.note(f"{looked}: all can be decoded.")


def _advise(dataset: Dataset, bad: Skips) -> str:
    """Say what to do about samples of which none can be used."""
    if dataset.kind != "list" or "not_found" not in bad.counts:
        return "Fix the data."
    images = (sample.image for sample in dataset.shards[0].stream())
    drive = next(filter(None, (_find_drive(image.origin, image.path) for image in images if image.origin)), "")
    if drive:
        return (
            f"{drive} is a path of a Windows machine, which cannot exist here: make the paths in the list relative, and "
            "name the folder they are in with --list-root DIR."
        )
    folder = dataset.list_format.root or os.path.dirname(dataset.spec)
    return f"Check the paths in the list: relative ones are looked for in {folder}, or where --list-root DIR says."


def _find_drive(origin: Origin, path: str) -> str:
    """Return the name in a list that led to a path where it begins with the drive of a Windows machine; else nothing."""
    name = path.removeprefix(f"{origin.folder}/")
    return name if origin.url is None and _DRIVE.match(name) else ""


def choose_order(dataset: Dataset, seed: int, *, dry_run: bool) -> list[int]:
    """Choose the shards to look at, in an order of which any beginning lies evenly in the data.

    Of shards that are streamed a dry run looks at a few, a run at none; the output of a command is never looked at.
    """
    # Multiples of the golden ratio fill [0, 1) evenly, however many of them are taken.
    offset = derive_seed("preflight", seed) / 2**63
    positions = (np.arange(len(dataset.shards)) * _GOLDEN_RATIO + offset) % 1.0
    order = positions.argsort().argsort().tolist()
    others, streamed = list[int](), list[int]()
    for shard_index in order:
        shard = dataset.shards[shard_index]
        if not shard.is_streamed:
            others.append(shard_index)
        elif not is_pipe(shard.file):
            streamed.append(shard_index)
    return others + streamed[: _STREAMED_SHARDS if dry_run else 0]


def _look(dataset: Dataset, few: int, shard_index: int, *, urls: bool) -> _Look:
    """Read and decode a few samples of a shard, from the index spread over it, else the first; count all, and bad ones.

    Images of a list behind URLs are looked at where `urls` says so.
    """
    shard = dataset.shards[shard_index]
    if dataset.index is not None and not shard.is_streamed:
        part = dataset.index.part(shard_index)
        places = np.unique(np.linspace(0, len(part) - 1, min(len(part), few)).astype(np.int64))
        samples = list(map(part.sample, places.tolist()))
    else:
        samples = list(islice(shard.stream(), few))
    if not shard.file:  # each image is a file of its own
        remote = [sample for sample in samples if is_url(sample.image.path)]
        left = remote[_SAMPLES_OF_A_SHARD if urls and shard_index < _STREAMED_SHARDS else 0 :]
        samples = [sample for sample in samples if sample not in left]
    bad = Skips()
    for sample in samples:
        decoded = read_image(sample.image)
        if isinstance(decoded, SkippedImage):
            bad.add(decoded.reason, shard.describe(sample.key))
    return _Look(len(samples), bad)
