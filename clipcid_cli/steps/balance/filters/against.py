"""The comparison of all rows with the rows of references: which lie within a distance, exactly, and of what."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import FloatArray, HalfArray, IntArray, row_type
from clipcid_cli.algorithms.near.nearest_pairs import NearestReference
from clipcid_cli.algorithms.near.search import CACHE_BYTES, near_pairs
from clipcid_cli.algorithms.near.tiles import TiledSearch
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, map_strings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.balance_parts import ReferenceParts, keep_references
from clipcid_cli.formats.results.keep_list import Column, float_column
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.filters.references import Reference
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.shared_arrays import share_arrays

# Rows that are saved together: some minutes of work beside a million reference rows. Enough stretches for the processes of a
# host, and the same whatever their number.
_LONGEST_STRETCH, _SHORTEST_STRETCH, _NUM_STRETCHES = 2**17, 2**10, 64
_PANEL_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class NearReferences:
    """Which rows lie near a reference.

    Attributes:
        references: The references, in the order given.
        threshold: The distance, inclusive.
        owner: Which reference has the row nearest to each row, int16 [N]; the first of equals, −1 where none is near enough.
        row: That row of its embeddings, integers [N]; of no meaning where there is none.
        distance: Its distance, float32 [N]; NaN where there is none.
        near: How many rows lie near each reference, whatever other references they are near.
    """

    reason: ClassVar = "reference"
    references: list[Reference]
    threshold: float
    owner: npt.NDArray[np.int16]
    row: IntArray
    distance: FloatArray
    near: list[int]

    @property
    def is_dropped(self) -> npt.NDArray[np.bool_]:
        """Which rows are near a reference, bool [N]."""
        return np.asarray(self.owner >= 0)

    def summarise(self) -> dict[str, Any]:
        """Return what the JSON object says."""
        nearest = np.bincount(self.owner[self.owner >= 0], minlength=len(self.references)).tolist()
        return {
            "threshold": self.threshold,
            "dropped": sum(nearest),
            "references": [
                {"name": reference.name, "rows": len(reference.numbers), "near": near, "nearest": number}
                for reference, near, number in zip(self.references, self.near, nearest, strict=True)
            ],
        }

    def columns(self, folder: Path) -> list[Column]:
        """Return the columns of the keep list, which name the nearest reference row of each row that is near one.

        Args:
            folder: Where keys are mapped, which may be more than memory holds.
        """
        keys: dict[int, pa.Array] = {}

        def read_names(part: slice) -> pa.Array:
            owner = self.owner[part]
            return pa.array([each.name for each in self.references]).take(pa.array(owner, mask=owner < 0))

        def read_keys(part: slice) -> pa.Array:
            owner, found = self.owner[part], pa.nulls(part.stop - part.start, pa.string())
            for number in np.unique(owner[owner >= 0]).tolist():
                if number not in keys:
                    embeddings = self.references[number].embeddings
                    chunks = (chunk for file in embeddings.files for chunk in embeddings.keys_of(file).chunks)
                    keys[number] = map_strings(folder, chunks)
                is_its = owner == number
                named = keys[number].take(pa.array(self.row[part][is_its])).cast(pa.string())
                found = pc.replace_with_mask(found, pa.array(is_its), named)
            return found

        return [
            Column("reference", pa.string(), read_names),
            Column("reference_key", pa.string(), read_keys),
            float_column("reference_distance", self.distance),
        ]


def find_near(
    settings: BalanceSettings,
    machine: Machine,
    output: Output[BalanceSidecar],
    rows: BalanceRows,
    references: list[Reference],
    reporter: Reporter,
) -> NearReferences:
    """Compare all rows with all references; the same on every process, and after any crash.

    Args:
        output: That of the run; stretches of rows are saved in its folder.
        rows: All finite rows.
    """
    threshold = settings.reference_distance
    assert threshold is not None  # the settings have checked it
    folder, content = output.folder, [str(each.content) for each in output.run.inputs]
    content.append(str(np.float32(threshold).view(np.uint32)))
    names = [
        hashlib.blake2b("\n".join([*content, reference.identity]).encode(), digest_size=8).hexdigest()
        for reference in references
    ]
    machine.on_main(lambda: keep_references(folder, set(names)))
    for reference, name in zip(references, names, strict=True):
        _compare(settings, machine, rows, reference, ReferenceParts(folder, name), threshold, reporter)
    machine.barrier()

    def merge() -> Arrays:
        owner, near = np.full(len(rows), -1, np.int16), np.zeros(len(references), np.int64)
        kind = row_type(max(each.embeddings.num_rows for each in references))
        row, distance = np.zeros(len(rows), kind), np.full(len(rows), np.inf, np.float32)
        copies = np.ones(len(rows), np.int32)
        np.add.at(copies, rows.copies.a, 1)
        for number, name in enumerate(names):
            parts = ReferenceParts(folder, name)
            for stretch, place in enumerate(_stretches(rows)):
                if (found := parts.read(stretch)) is None:
                    raise ClipcidError(
                        f"{folder}: the comparison with {references[number].name} cannot be read.",
                        "Run the same command again.",
                    )
                near[number] += int(copies[place[found[0] >= 0]].sum())
                nearer = found[1] < distance[place]
                which = place[nearer]
                owner[which], row[which], distance[which] = number, found[0][nearer], found[1][nearer]
        for values in (owner, row, distance):  # copies are as near as the first of their kind
            values[rows.copies.b] = values[rows.copies.a]
        distance[owner < 0] = np.nan
        return owner, row, distance, near

    owner, row, distance, near = share_arrays(machine, output.work, merge)
    return NearReferences(references, threshold, owner, row, distance, near.tolist())


def _stretches(rows: BalanceRows) -> list[IntArray]:
    """Divide the unique rows into what is saved together."""
    size = min(_LONGEST_STRETCH, max(_SHORTEST_STRETCH, -(-len(rows.unique) // _NUM_STRETCHES)))
    return [rows.unique[at : at + size] for at in range(0, len(rows.unique), size)]


def _compare(
    settings: BalanceSettings,
    machine: Machine,
    rows: BalanceRows,
    reference: Reference,
    parts: ReferenceParts,
    threshold: float,
    reporter: Reporter,
) -> None:
    """Find the nearest row of a reference of each unique row, each process in its stretches that are not saved yet."""
    images, num_rows = reference.embeddings.rows(Kind.IMAGES), len(rows)
    kind = row_type(num_rows + len(reference.numbers))
    stretches = _stretches(rows)
    done = machine.on_main(lambda: [parts.read(at) is not None for at in range(len(stretches))])
    left = [at for at, is_done in enumerate(done) if not is_done]
    if len(left) < len(stretches):
        reporter.note(
            f"{len(stretches) - len(left)} of {len(stretches)} parts of the comparison with {reference.name} are done."
        )
    if not left:
        return

    def read(numbers: IntArray) -> HalfArray:
        """Read rows: first those to balance, then those of the reference; never both at once."""
        return rows.read(numbers) if numbers[0] < num_rows else images.take(reference.numbers[numbers - num_rows])

    scan, room = choose_scan(settings.precision, machine.device), memory_for_rows(machine.device, on_cpu=CACHE_BYTES)
    others = np.arange(num_rows, num_rows + len(reference.numbers), dtype=kind)
    search = TiledSearch(read, others, machine.device, scan.dtype, min(_PANEL_ROWS, len(others)), cache_bytes=room)
    panels = list(range(len(search)))
    mine = left[machine.rank :: machine.size]
    total = sum(len(stretches[at]) for at in mine) * len(others)
    with reporter.progress("against", total, "pairs") as progress:
        for at in mine:
            place = stretches[at].astype(kind, copy=False)
            nearest = NearestReference(place, num_rows)
            for start in range(0, len(place), _PANEL_ROWS):
                block = search.load(place[start : start + _PANEL_ROWS])
                for panel in panels:
                    for edges in near_pairs(block, search[panel], threshold, nearest.may_be_nearer):
                        nearest.add(edges)
                    progress.advance(len(block) * len(search.rows_of(panel)))
                panels.reverse()  # those read last are in the cache
            found = np.where(nearest.reference < 0, -1, reference.numbers[nearest.reference])
            parts.write(at, found.astype(np.int64), nearest.distance)
