"""``balance --write-shards``: the kept samples as new shards, copied byte for byte, one source shard at a time.

Other forms of data are written in the same way, see `write_data.py`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.opening import local_file
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.tars import Copied, copy_samples, count_samples
from clipcid_cli.formats.files import read_regular, write_json
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.join import find_repeat, join, parquet_listing
from clipcid_cli.formats.output import Output, OutputSpec, is_claimed
from clipcid_cli.formats.results.keep_list import KeepList, is_uid, read_keep_list
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.result import WrittenResult
from clipcid_cli.steps.balance.samples import read_uid
from clipcid_cli.steps.claim import claim_output

# open_clip and webdataset's tools read the number of samples of each shard from this file.
_SIZES = "sizes.json"
# img2dataset's name for the statistics of a shard; DataComp's tools read the size of the tar from `successes`.
_STATS = "_stats.json"
WRITE_SHARDS = "write-shards"
_NAMED = 5  # shards, in a message

# Tells the keys to keep of a shard, and how many of its samples to drop.
Choose = Callable[[Shard], tuple[set[str], int]]


class Form(ABC):
    """How the kept samples of one form of data are written."""

    step: ClassVar[str]
    written: ClassVar[str]  # what an output holds
    suffix: ClassVar[str] = ""  # of the file of a shard; empty where shards have none of their own

    def __init__(self, flag: str) -> None:
        self.flag = flag

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the output beside the keep list."""
        return {}

    def validate(self, target: Path) -> None:
        """Refuse a folder that holds what another program wrote."""
        if is_claimed(target, self.step) or not target.exists():
            return
        if any(not path.name.startswith(".") for path in target.iterdir()):
            raise ClipcidError(
                f"{target} holds files that {self.flag} did not write.",
                "Give a new or empty folder: nothing was written.",
            )

    def share(self, shards: Sequence[Shard], context: DistContext) -> Sequence[Shard]:
        """Return the shards whose samples this process writes."""
        return shards[context.rank :: context.size]

    @abstractmethod
    def write(
        self, shards: Sequence[Shard], keep: KeepList, choose: Choose, output: Output[Sidecar]
    ) -> tuple[dict[str, int], list[FileRecord]]:
        """Write the kept samples of some shards; return how many of each, by its name, and the files that stay."""

    def finish(self, data: Dataset, sizes: dict[str, int], output: Output[Sidecar]) -> list[FileRecord]:
        """Write, on the first process, what describes all shards; return these files."""
        return []


def write_kept_samples(
    plan: BalancePlan, data: Dataset, target: Path, form: Form, context: DistContext
) -> WrittenResult:
    """Write the kept samples, divided among the processes; a run that was killed continues with what is not written yet."""
    spec = OutputSpec(
        target,
        form.step,
        Sidecar,
        settings=form.settings,
        inputs=[record(plan.keep_list)],
        overwrite=plan.settings.overwrite,
        elsewhere=form.flag,
    )
    keep = read_keep_list(plan.keep_list)
    lacking = _Lacking(keep, data, plan.settings.max_bad_fraction)

    def check() -> None:
        form.validate(target)  # again: the search may have taken hours
        lacking.check(lacking.images)

    context.on_rank0(check)
    with claim_output(context, spec) as output:
        if output.finished is not None:
            reporting.note(f"{target} already holds {form.written}.")
            counts = output.finished.counts
            lacking.check(counts["missing"])
            return WrittenResult(counts["samples"], counts["missing"])
        context.on_rank0(output.begin_work)
        mine = form.share(data.shards, context)
        parts = context.gather(
            context.on_all(lambda: form.write(mine, keep, choose_kept(keep, data, mine, target), output))
        )

        def finish() -> WrittenResult:
            sizes = {name: size for part, _ in parts for name, size in part.items()}
            written = sum(sizes.values())
            missing = keep.num_kept - written
            if not written or missing < 0:
                copied = "none" if not written else f"{written:,} samples, more than one for some,"
                raise ClipcidError(
                    f"Of the {keep.num_kept:,} images kept, {copied} are in the {len(data.shards):,} shards to copy from.",
                    "Give the data that the embeddings were made from as the first argument: clipcid balance DATA …",
                )
            lacking.check(missing)
            if missing:
                reporting.warn(f"{lacking.describe(missing)}, and were not written.")
            files = [*(file for _, part in parts for file in part), *form.finish(data, sizes, output)]
            counts: dict[str, Any] = {"samples": written, "missing": missing}
            if form.suffix:
                counts["shards"] = {
                    f"{shard.name}{form.suffix}": sizes[shard.name] for shard in data.shards if sizes[shard.name]
                }
            output.commit(counts=counts, seconds={}, outputs=files)
            return WrittenResult(written, missing)

        return context.on_rank0(finish)


class _Lacking:
    """The kept images of shards that the data lacks, by their names; none where the keep list names no shard of it."""

    def __init__(self, keep: KeepList, data: Dataset, max_fraction: float) -> None:
        kept = keep.count_kept_by_shard()
        there = {shard.name for shard in data.shards}
        self._by_shard = {} if there.isdisjoint(kept) else {name: kept[name] for name in kept if name not in there}
        self._kept = keep.num_kept
        self._max_fraction = max_fraction

    @property
    def images(self) -> int:
        return sum(self._by_shard.values())

    def describe(self, missing: int) -> str:
        names = [name for name, count in self._by_shard.items() if count]
        more = ", …" if len(names) > _NAMED else ""
        shards = f" (shards that it lacks: {', '.join(names[:_NAMED])}{more})" if names else ""
        return f"{missing:,} of the {self._kept:,} images kept are not in the data{shards}"

    def check(self, missing: int) -> None:
        """Raise an error where too many of the kept images are missing."""
        share = missing / max(1, self._kept)
        if share > self._max_fraction:
            raise ClipcidError(
                f"{self.describe(missing)}: {share:.1%}, more than the allowed {self._max_fraction:.1%}.",
                "Put them back, or give the data that has them as the first argument: clipcid balance DATA …\n"
                f"Or write the others alone: --max-bad-fraction {math.ceil(1000 * share) / 1000:g}",
            )


class TarForm(Form):
    """Tar shards, whose members are copied byte for byte.

    A shard of which nothing is kept is not written. ``sizes.json`` holds the number of samples of each, and
    ``<shard>_stats.json``, in img2dataset's fields, what became of the samples of the source shard.
    """

    step = WRITE_SHARDS
    written = "these shards"
    suffix = ".tar"

    def validate(self, target: Path) -> None:
        if is_claimed(target, WRITE_SHARDS):
            return
        if any(next(target.rglob(name), None) is not None for name in ("*.tar", f"*{_STATS}")):
            raise ClipcidError(
                f"{target} holds shards that {self.flag} did not write.",
                "Give a new or empty folder: nothing was written.",
            )

    def write(
        self, shards: Sequence[Shard], keep: KeepList, choose: Choose, output: Output[Sidecar]
    ) -> tuple[dict[str, int], list[FileRecord]]:
        dropped_as = "dropped" if keep.has_reasons else "repeat"
        sizes = dict[str, int]()
        files = list[FileRecord]()
        with reporting.progress("shards", len(shards), "shards") as progress:
            for shard in shards:
                sizes[shard.name] = _write_shard(shard, choose, output, dropped_as)
                written = [_STATS, *([".tar"] if sizes[shard.name] else [])]
                files += [record(output.work / f"{shard.name}{suffix}", output.work) for suffix in written]
                progress.advance()
        return sizes, files

    def finish(self, data: Dataset, sizes: dict[str, int], output: Output[Sidecar]) -> list[FileRecord]:
        by_file = {f"{shard.name}.tar": sizes[shard.name] for shard in data.shards if sizes[shard.name]}
        write_json(output.work / _SIZES, by_file)
        return [record(output.work / _SIZES, output.work)]


def _write_shard(shard: Shard, choose: Choose, output: Output[Sidecar], dropped_as: str) -> int:
    """Write one shard, unless this run wrote it before it was killed: its statistics are written after it."""
    path, stats_path = output.work / f"{shard.name}.tar", output.work / f"{shard.name}{_STATS}"
    if output.resumed:
        with suppress(OSError, ValueError, TypeError, LookupError):  # missing or damaged: it is written again
            written = int(json.loads(read_regular(stats_path))["successes"])
            if not written or path.is_file():
                return written
    keys, num_dropped = choose(shard)
    prefix = f"{shard.name}/" if shard.prefix_keys else ""
    keys = {key.removeprefix(prefix) for key in keys}  # as stored in the tar
    with local_file(shard.source) as source:
        if keys:
            copied = copy_samples(source, path, keys)
        else:
            path.unlink(missing_ok=True)
            copied = Copied(0, count_samples(source))
    if copied.samples < len(keys) or copied.read < len(keys) + num_dropped:
        path.unlink(missing_ok=True)
        raise ClipcidError(
            f"Shard {shard.source} holds {copied.samples:,} of its {len(keys):,} samples to keep, and {copied.read:,} "
            f"samples in total, where the keep list has {len(keys) + num_dropped:,}.",
            "It has changed since it was embedded: run clipcid embed and balance again.",
        )
    became = {
        "success": copied.samples,
        dropped_as: num_dropped,
        # No image or caption, unreadable, or a repeated key: the sidecar of `embed` counts them by reason.
        "not_in_keep_list": copied.read - copied.samples - num_dropped,
    }
    # img2dataset's fields, without those that hold times.
    stats = {
        "count": copied.read,
        "successes": copied.samples,
        "dropped": copied.read - copied.samples,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {reason: count for reason, count in became.items() if count},
    }
    write_json(stats_path, stats)
    return copied.samples


def choose_kept(keep: KeepList, data: Dataset, shards: Sequence[Shard], folder: Path) -> Choose:
    """Return what tells the keys to keep of some shards, and how many of their samples to drop.

    `embed` records the shard of each row. Other tools do not; the keep list then holds the names of their files, which match
    no shard. All samples of the process's shards are then looked up by their keys or, where the rows' keys are DataComp's
    uids and a sample's key is not, by the uid in its ``.json``.
    """
    num_rows = keep.count_by_shard()

    def choose_recorded(shard: Shard) -> tuple[set[str], int]:
        keys = keep.kept_of_shard(shard.name)
        return keys, num_rows.get(shard.name, 0) - len(keys)

    if not num_rows.keys().isdisjoint(shard.name for shard in data.shards):
        return choose_recorded
    keys_of = dict(zip((shard.name for shard in shards), _look_up(keep, data, shards, folder), strict=True))

    def choose_found(shard: Shard) -> tuple[set[str], int]:
        all_keys, kept = keys_of[shard.name]
        return set(all_keys.filter(pa.array(kept > 0)).to_pylist()), int(np.count_nonzero(kept == 0))

    return choose_found


def _look_up(
    keep: KeepList, data: Dataset, shards: Sequence[Shard], folder: Path
) -> Iterator[tuple[pa.Array, npt.NDArray[np.int64]]]:
    """Return the keys of each shard's n samples, and int64 [n]: 1 for those kept, 0 for dropped and −1 for others.

    They are joined in a folder.
    """
    keys = list[pa.Array]()
    names = list[pa.ChunkedArray]()
    numbers = {shard.name: index for index, shard in enumerate(data.shards)}
    by_uid = is_uid(keep.first_key)
    for shard in shards:
        part = None if data.index is None else data.index.part(numbers[shard.name])
        samples = shard.samples() if part is None else list(map(part.sample, range(len(part))))
        keys.append(pa.array([sample.key for sample in samples], pa.large_string()))
        called = [(by_uid and not is_uid(sample.key) and read_uid(sample)) or sample.key for sample in samples]
        names.append(pa.chunked_array([called], pa.large_string()))
    ends = np.cumsum([len(sample) for sample in keys], dtype=np.int64)
    if (repeat := find_repeat(lambda: names, folder)) is not None:
        one, other = (shards[int(np.searchsorted(ends, row, side="right"))].name for row in repeat[1:])
        raise ClipcidError(
            f"Sample {repeat.key!r} is in shard {one} and again in shard {other}: it is not known which of them to copy.",
            "Give the data that the embeddings were made from, or its shards without repeats.",
        )
    kept = join(lambda: names, sum(map(len, keys)), parquet_listing(keep.path, "kept"), folder)[:, 0]
    return zip(keys, np.split(kept, ends[:-1]), strict=False)  # without shards, one empty part
