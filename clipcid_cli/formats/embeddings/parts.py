"""Parts of embeddings: shards that processes which do not know of one another write to one folder or object store.

`writer.py` draws the folder of unfinished work that they share. Whoever finishes it, a join or a run without parts, finds
the shards finished. `sent_parts.py` has those in a store.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.embeddings.manifest import ShardRecord
from clipcid_cli.formats.embeddings.sidecar import EmbedFacts
from clipcid_cli.formats.files import lock, write_error
from clipcid_cli.formats.journal import Journal, record_journal
from clipcid_cli.formats.sidecar import Provenance

PARTS = ".parts"
_LOCK = re.compile(r"(\d{1,9})-of-(\d{1,9})\.lock")
_MISSING_LOOKED_AT = 2**20  # shards, to name the parts that they are of


@dataclasses.dataclass(frozen=True)
class DataPart:
    """A part of so many: it has the shards whose number is `index` modulo `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def label(self) -> str:
        return f"{self.index}-of-{self.count}"

    def shards(self, total: int) -> range:
        return range(total)[self.index :: self.count]

    def overlaps(self, other: DataPart) -> bool:
        """Tell whether some shard, of however many, is in both parts."""
        step = math.gcd(self.count, other.count)
        return self.index % step == other.index % step


class PartRecord(msgspec.Struct, kw_only=True):
    """What is recorded of a part when it begins and when it ends."""

    index: int
    count: int
    shards: int  # of all parts
    facts: EmbedFacts
    deciding: dict[str, Any]  # the settings that decide the rows of a shard
    timings: list[dict[str, int | float]] = []  # of each process of its last run; none before its end


def part_journal(work: Path) -> Journal[PartRecord]:
    """Return the journal of the parts in a work folder."""
    return record_journal(work / PARTS, PartRecord)


@contextmanager
def hold_part(work: Path, part: DataPart) -> Iterator[None]:
    """Hold a part of a work folder, whose output is locked; one with shards of a part that runs is refused."""
    path = work / PARTS / f"{part.label}.lock"
    for other in _running_parts(work):
        if part.overlaps(other):
            raise _running_error(work, other)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            stack.enter_context(lock(path, wait=False))
        except OSError as error:
            raise write_error(path, error) from error
        yield
        path.unlink(missing_ok=True)


def refuse_running(works: Iterable[Path]) -> None:
    """Refuse to finish or to remove work folders while a part is written to one."""
    for work in works:
        for part in _running_parts(work):
            raise _running_error(work, part)


def _running_parts(work: Path) -> Iterator[DataPart]:
    """Yield the parts that processes hold, and remove the locks that killed ones have left."""
    for path in (work / PARTS).glob("*.lock"):
        match = _LOCK.fullmatch(path.name)
        if match is None:
            continue
        try:
            with lock(path, wait=False):
                path.unlink(missing_ok=True)
        except BlockingIOError:
            yield DataPart(int(match[1]), int(match[2]))
        except OSError as error:  # also of a name that another file has
            raise write_error(path, error) from error


def _running_error(work: Path, part: DataPart) -> ClipcidError:
    return ClipcidError(
        f"Part {part} of {work.parent} is being embedded by another process.", "Wait for it, or stop it."
    )


def validate_complete(
    place: str, parts: Sequence[PartRecord], records: dict[int, ShardRecord], run: Provenance
) -> None:
    """Refuse parts that do not agree, of which some are missing, or whose shards are not the data that was recorded."""
    if not parts:
        raise ClipcidError(f"{place} has no record of a part.", "Run the parts first: clipcid embed DATA --part I/N")
    shards = sorted({part.shards for part in parts})
    if len(shards) > 1:
        raise ClipcidError(
            f"The parts in {place} are of {shards[0]:,} and of {shards[1]:,} shards.",
            "Run all parts on the same data, to another --out.",
        )
    total = shards[0]
    lacking = (index for index in range(total) if index not in records)
    missing = list(islice(lacking, _MISSING_LOOKED_AT))
    if missing:
        count = max(part.count for part in parts)
        of = [str(DataPart(index, count)) for index in sorted({shard % max(1, count) for shard in missing})]
        named = ", ".join(of[:8]) + (f" and {len(of) - 8} more" if len(of) > 8 else "")
        raise ClipcidError(
            f"{total - len(records):,} of {total:,} shards are missing in {place}, of "
            f"{'part' if len(of) == 1 else 'parts'} {named}.",
            f"Run {'it' if len(of) == 1 else 'them'} again: clipcid embed DATA --part {of[0]} …",
        )
    together = fingerprint.record_together("", [records[index].input for index in range(total)])
    if len(records) != total or [file.content for file in run.inputs] != [together.content]:
        raise ClipcidError(
            f"The {len(records):,} shards in {place} are not those of the data, of {total:,} shards: they have "
            f"{together.size:,} bytes, the data {sum(file.size for file in run.inputs):,}.",
            "Embed again to another --out.",
        )
