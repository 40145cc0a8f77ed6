"""A look at the data before long work begins: a few samples of every shard are read and decoded, in parallel.

In a dry run it takes at most 2 s. Before a run it takes at most a hundredth of the data, and so of the run, which reads and
decodes all of it, or 0.1 s where that is longer; never more than 10 s. Where not all shards can be looked at in that time,
those that are lie evenly in the data, in an order that depends on the seed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import islice

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_pipe, is_remote, is_url
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.reporting import Reporter

SAMPLES_OF_A_SHARD = 3
SHARE = 0.01
"""Largest share of the data that is looked at before a run, where that takes longer than 0.1 s."""

_MIN_SECONDS, _MAX_SECONDS = 0.1, 10.0
_DRY_RUN_SECONDS = 2.0
_SHARDS_BEHIND_URLS = 4
_THREADS = 16
_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a look at some shards found.

    Attributes:
        shards: Shards looked at.
        samples: Samples looked at.
        bad: Those whose image cannot be decoded.
        share: Sum of the shares of the shards, in [0, 1] each, that were looked at.
    """

    shards: int = 0
    samples: int = 0
    bad: Skips = dataclasses.field(default_factory=Skips)
    share: float = 0.0

    def __add__(self, other: Findings) -> Findings:
        bad = Skips()
        bad.merge(self.bad)
        bad.merge(other.bad)
        return Findings(self.shards + other.shards, self.samples + other.samples, bad, self.share + other.share)


def check_samples(dataset: Dataset, machine: Machine, seed: int, *, dry_run: bool, reporter: Reporter) -> Findings:
    """Look at a few samples of every shard, or of as many as there is time for, and report images that cannot be decoded.

    Such images are no error: a step skips and counts them. Of data behind URLs a dry run looks at the first samples of a few
    shards, a run at nothing; the output of a command is never looked at.

    Args:
        seed: Decides which shards are looked at where there is no time for all.
        dry_run: Whether to report, too, that all is well.

    Raises:
        ClipcidError: when a shard cannot be read.
    """
    order = choose_order(dataset, seed, dry_run=dry_run)
    mine = order[machine.rank :: machine.size]
    found: Findings = reduce(
        lambda one, other: one + other, machine.gather(machine.on_all(lambda: _look_at(dataset, mine, dry_run)))
    )
    if found.bad.total or dry_run:
        _report(dataset, found, reporter)
    return found


def choose_order(dataset: Dataset, seed: int, *, dry_run: bool) -> list[int]:
    """Return the numbers of the shards to look at; those of any first part of it lie evenly in the data."""
    shards = dataset.shards
    # Multiples of the golden ratio fill [0, 1) evenly, however many of them are taken.
    offset = derive_seed("preflight", seed) / 2**63
    positions = (np.arange(len(shards)) * _GOLDEN_RATIO + offset) % 1.0
    order: list[int] = np.argsort(np.argsort(positions)).tolist()
    remote = [number for number in order if is_remote(shards[number].file)]
    looked_at = (
        [number for number in remote if not is_pipe(shards[number].file)][:_SHARDS_BEHIND_URLS] if dry_run else []
    )
    passed_over = set(remote) - set(looked_at)
    return [number for number in order if number not in passed_over]


def _look_at(dataset: Dataset, order: Sequence[int], dry_run: bool) -> Findings:
    """Look at shards in the given order until the time is up, or before a run enough of the data has been looked at."""
    least, most = (_DRY_RUN_SECONDS, _DRY_RUN_SECONDS) if dry_run else (_MIN_SECONDS, _MAX_SECONDS)
    found, started = Findings(), time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(order), _THREADS):
            elapsed = time.perf_counter() - started
            # Of an indexed shard of 10,000 samples three are 0.03 %: the share alone would never stop it.
            if elapsed > most or (elapsed > least and found.share > SHARE * len(order)):
                break
            for shard in pool.map(lambda number: _look(dataset, number), order[first : first + _THREADS]):
                found += shard
    return found


def _look(dataset: Dataset, number: int) -> Findings:
    """Read and decode a few samples of a shard: from the index spread over it, else the first ones."""
    name = dataset.shards[number].name
    try:
        samples, share = _some_samples(dataset, number)
    except OSError as error:
        raise ClipcidError(
            f"Shard {name} of {dataset.spec} cannot be read: {error.strerror or error}.",
            "Check the disk and the permissions of its files, or remove the shard from the data.",
        ) from error
    bad = Skips()
    for sample in samples:
        image = read_image(sample.image)
        if isinstance(image, SkippedImage):
            bad.add(image.reason, f"{name}: {sample.key}")
    return Findings(1, len(samples), bad, share)


def _some_samples(dataset: Dataset, number: int) -> tuple[list[Sample], float]:
    """Return a few samples of a shard, and which share of it is read for them."""
    shard, index = dataset.shards[number], dataset.index
    if index is not None and not is_remote(shard.file):
        size = index.records[number].samples
        places = np.unique(np.linspace(0, max(0, size - 1), min(size, SAMPLES_OF_A_SHARD)).astype(np.int64)).tolist()
        samples, share = [index.sample(number, place) for place in places], len(places) / max(1, size)
    else:
        samples, share = list(islice(shard.stream(), SAMPLES_OF_A_SHARD)), 0.0
        if samples and shard.file and not is_remote(shard.file):
            image = samples[-1].image
            share = (image.offset + (image.size or 0)) / max(1, shard.stamp()[0])
    # A list may name images behind URLs.
    return [sample for sample in samples if sample.image.data is not None or not is_url(sample.image.path)], share


def _report(dataset: Dataset, found: Findings, reporter: Reporter) -> None:
    number, total = found.shards, len(dataset.shards)
    looked = f"{dataset.spec}: checked {number:,} of {total:,} shard{'s' * (total > 1)}, {found.samples:,} samples"
    if number < total:
        looked += " (evenly spread)"
    if found.bad.total:
        reporter.warn(f"{looked}: {found.bad.total:,} cannot be decoded.\n{found.bad.describe()}")
    else:
        reporter.note(f"{looked}: all can be decoded.")
