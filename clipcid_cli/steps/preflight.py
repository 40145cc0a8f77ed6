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
from itertools import islice

import numpy as np

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote, is_url
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.reporting import Reporter

_SAMPLES_OF_A_SHARD = 3
_SHARE = 0.01
_MIN_SECONDS, _MAX_SECONDS = 0.1, 10.0
_DRY_RUN_SECONDS = 2.0
_SHARDS_BEHIND_URLS = 4
_THREADS = 16
_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclasses.dataclass
class Findings:
    """What a look at some shards found.

    Attributes:
        share: Sum of the shares of the shards, in [0, 1] each, that were looked at.
    """

    shards: int = 0
    samples: int = 0
    bad: Skips = dataclasses.field(default_factory=Skips)
    share: float = 0.0

    def add(self, other: Findings) -> None:
        """Add what a look at other shards found."""
        self.shards += other.shards
        self.samples += other.samples
        self.bad.merge(other.bad)
        self.share += other.share


def check_samples(dataset: Dataset, machine: Machine, seed: int, *, dry_run: bool, reporter: Reporter) -> Findings:
    """Look at a few samples of every shard, or of as many as there is time for, and report images that cannot be decoded.

    Such images are no error: a step skips and counts them. A shard that cannot be read is one. A dry run also reports that
    all is well.
    """
    mine = choose_order(dataset, seed, dry_run=dry_run)[machine.rank :: machine.size]
    found = Findings()
    for part in machine.gather(machine.on_all(lambda: _look_at(dataset, mine, dry_run))):
        found.add(part)
    total = len(dataset.shards)
    looked = (
        f"{dataset.spec}: checked {found.shards:,} of {total:,} shard{'s' * (total > 1)}, {found.samples:,} samples"
    )
    if found.shards < total:
        looked += " (evenly spread)"
    if found.bad.total:
        reporter.warn(f"{looked}: {found.bad.total:,} cannot be decoded.\n{found.bad.describe()}")
    elif dry_run:
        reporter.note(f"{looked}: all can be decoded.")
    return found


def choose_order(dataset: Dataset, seed: int, *, dry_run: bool) -> list[int]:
    """Return the numbers of the shards to look at; those of any first part of it lie evenly in the data.

    Of shards behind URLs a dry run looks at a few, a run at none; the output of a command is never looked at.
    """
    # Multiples of the golden ratio fill [0, 1) evenly, however many of them are taken.
    offset = derive_seed("preflight", seed) / 2**63
    positions = (np.arange(len(dataset.shards)) * _GOLDEN_RATIO + offset) % 1.0
    order = positions.argsort().argsort().tolist()
    behind_urls = [number for number in order if is_url(dataset.shards[number].file)]
    local = [number for number in order if not is_remote(dataset.shards[number].file)]
    return local + behind_urls[: _SHARDS_BEHIND_URLS if dry_run else 0]


def _look_at(dataset: Dataset, order: Sequence[int], dry_run: bool) -> Findings:
    """Look at shards in the given order until the time is up, or before a run enough of the data has been looked at."""
    least, most = (_DRY_RUN_SECONDS, _DRY_RUN_SECONDS) if dry_run else (_MIN_SECONDS, _MAX_SECONDS)
    found = Findings()
    started = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(order), _THREADS):
            elapsed = time.perf_counter() - started
            # Of an indexed shard of 10,000 samples three are 0.03 %: the share alone would never stop it.
            if elapsed > most or (elapsed > least and found.share > _SHARE * len(order)):
                break
            for shard in pool.map(lambda number: _look(dataset, number), order[first : first + _THREADS]):
                found.add(shard)
    return found


def _look(dataset: Dataset, number: int) -> Findings:
    """Read and decode a few samples of a shard: from the index spread over it, else the first ones."""
    shard = dataset.shards[number]
    found = Findings(shards=1)
    if dataset.index is not None and not is_remote(shard.file):
        part = dataset.index.part(number)
        places = np.unique(np.linspace(0, len(part) - 1, min(len(part), _SAMPLES_OF_A_SHARD)).astype(np.int64))
        samples = list(map(part.sample, places.tolist()))
        found.share = len(samples) / max(1, len(part))
    else:
        samples = list(islice(shard.stream(), _SAMPLES_OF_A_SHARD))
        if samples and shard.file and not is_remote(shard.file):
            image = samples[-1].image
            found.share = (image.offset + (image.size or 0)) / max(1, shard.stamp()[0])
    for sample in samples:
        if sample.image.data is None and is_url(sample.image.path):  # a list may name images behind URLs
            continue
        found.samples += 1
        decoded = read_image(sample.image)
        if isinstance(decoded, SkippedImage):
            found.bad.add(decoded.reason, f"{shard.name}: {sample.key}")
    return found
