"""What is looked at when data is opened: whether its shards are whole, have an image, and keys that differ."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.shard_files import FORMS
from clipcid_cli.formats.data.tar_shards import TarShard
from clipcid_cli.formats.data.tars import COPY_AGAIN, CutTarError
from clipcid_cli.formats.skips import Skips

if TYPE_CHECKING:
    from clipcid_cli.formats.data.index import DataIndex

# Up to this size, keys are compared across all shards when data is opened; of larger data, or data that will have an index,
# those of as many shards as can be listed in this time, two at least, and all once they have been read.
_SMALL = 2**30
_KEY_SECONDS = 1.0
_LOOKED_AT = 10  # shards, for an image
_AT_ONCE = 16  # files that are looked at together


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What is missing of data at the end of truncated tars."""

    problem: str  # which tar is truncated, the first of them, and where; without a full stop
    fraction: float  # of the data, estimated from the sizes of the whole tars
    is_known: bool  # whether there are whole tars

    def __str__(self) -> str:
        lost = f"up to about {self.fraction:.1%} of the data" if self.is_known else "an unknown part of the data"
        return f"{self.problem}; {lost} is missing"


def find_cut(shards: Sequence[Shard]) -> dict[int, str]:
    """Check that local files are whole, other damage than a truncated tar being an error.

    Returns:
        What is wrong with the truncated ones, by their numbers.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        problems = pool.map(methodcaller("find_cut"), shards)
        return {index: problem for index, problem in enumerate(problems) if problem}


def find_indexed_cut(index: DataIndex) -> dict[int, str]:
    """Return what an index knows of truncated tars, as `find_cut`."""
    listed = zip(index.shards, index.records, strict=True)
    return {
        shard_index: f"Shard {shard.source} is truncated."
        for shard_index, (shard, record) in enumerate(listed)
        if "cut_off" in record.skips.counts
    }


def allow_cut(
    shards: Sequence[Shard], cut_off: Mapping[int, str], max_bad_fraction: float
) -> tuple[tuple[Shard, ...], Truncation]:
    """Use what is readable of truncated tars, unless too much is missing.

    How much is estimated from the median size of the whole tars; without any, all may be missing.
    """
    sizes = [shard.stamp()[0] for shard in shards]
    whole = [size for index, size in enumerate(sizes) if size and index not in cut_off]
    fraction = 1.0
    if whole:
        missing = sum(max(1.0, median(whole) - sizes[index]) for index in cut_off)
        fraction = missing / (missing + sum(sizes))
    truncation = Truncation(next(iter(cut_off.values())).removesuffix("."), fraction, bool(whole))
    if fraction > max_bad_fraction:
        enough = math.ceil(fraction * 1000) / 1000
        raise CutTarError(
            f"{truncation}, more than the allowed {max_bad_fraction:.1%}.",
            f"{COPY_AGAIN}\nTo use the samples before its end, add --max-bad-fraction {enough:g}.",
        )
    return tuple(_mark(shard, index in cut_off) for index, shard in enumerate(shards)), truncation


def _mark(shard: Shard, is_cut: bool) -> Shard:
    return dataclasses.replace(shard, is_cut=is_cut) if isinstance(shard, TarShard) else shard


def validate_shards(name: str, shards: Sequence[Shard], *, has_index: bool) -> None:
    """Look into the first shards: some have an image, and keys differ, as far as that is quick.

    Args:
        name: The name of the data.
        has_index: Whether all keys are compared once the data is indexed.
    """
    skips = Skips()
    for shard in shards[:_LOOKED_AT]:
        if next(shard.stream(skips), None) is not None:
            break
    else:
        if "too_many_bytes" in skips.counts:
            raise ClipcidError(
                f"{name}: no sample can be used.\n{skips.describe()}", "Allow more by --max-sample-bytes."
            )
        looked = "it" if len(shards) <= _LOOKED_AT else f"the first {_LOOKED_AT} of its shards"
        without = skips.examples.get("no_image")
        seen = f" ({skips.total} without one, first {without[0]})" if without else ""
        raise ClipcidError(f"{name}: no sample with an image in {looked}{seen}.", FORMS)
    if len(shards) > 1:
        _validate_local_keys(shards, has_index=has_index)


def _validate_local_keys(shards: Sequence[Shard], *, has_index: bool) -> None:
    """Refuse a key of two local tars: to read remote ones whole is not quick, and a shard's name makes a key its own."""
    tars = [shard for shard in shards if isinstance(shard, TarShard)]
    local = [shard.source for shard in tars if not is_remote(shard.source)]
    if len(local) == len(tars) > 1 and not tars[0].prefix_keys:
        is_small = sum(map(os.path.getsize, local)) <= _SMALL
        _validate_keys(tars, math.inf if is_small and not has_index else _KEY_SECONDS)


def _validate_keys(tars: Sequence[Shard], seconds: float) -> None:
    """Refuse a key of two tars, as far as that is found in this time; tars of one name, as of two crawls, come first."""
    names = [shard.name.rpartition("/")[2] for shard in tars]
    count_of = Counter(names)
    order = sorted(range(len(tars)), key=lambda index: (count_of[names[index]] == 1, names[index]))
    end = time.perf_counter() + seconds
    listed = list[Shard]()
    hashes = list[npt.NDArray[np.int64]]()
    for index in order:
        if len(listed) > 1 and time.perf_counter() > end:
            break
        listed.append(tars[index])
        hashes.append(np.fromiter((hash(sample.key) for sample in tars[index].stream()), np.int64))
    hash_N = np.concatenate(hashes)
    owner_N = np.repeat(np.arange(len(listed)), [len(part) for part in hashes])
    sorted_N = np.argsort(hash_N, kind="stable")
    repeats = np.flatnonzero(hash_N[sorted_N][1:] == hash_N[sorted_N][:-1])
    pairs = zip(owner_N[sorted_N[repeats]].tolist(), owner_N[sorted_N[repeats + 1]].tolist(), strict=True)
    for one, other in sorted(set(pairs)):
        keys = {sample.key for sample in listed[one].stream()}
        key = next((sample.key for sample in listed[other].stream() if sample.key in keys), None)
        if key is not None:
            from clipcid_cli.formats.data.index import RepeatedKeyError

            raise RepeatedKeyError(key, listed[one].name, listed[other].name)
