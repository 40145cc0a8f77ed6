"""`balance --dry-run`: what a new search costs, told from a second of real work on some of the rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.search.blocks import Block, load_block
from clipcid_cli.algorithms.search.distances import HalfArray, IntArray, ReadRows
from clipcid_cli.algorithms.search.duplicates import hash_rows
from clipcid_cli.algorithms.search.pair_search import TiledSearch
from clipcid_cli.algorithms.search.partition_margin import MARGIN_SAMPLE
from clipcid_cli.algorithms.search.partition_training import LOOKS_AT_SAMPLE, ROWS_PER_CENTROID
from clipcid_cli.algorithms.search.partitions import Partitions, default_num_partitions
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.balance.audit import SAMPLE as AUDIT_SAMPLE
from clipcid_cli.steps.balance.search import CUTOFF_SAMPLE
from clipcid_cli.steps.reporting import Reporter, format_duration
from clipcid_cli.steps.settings.balance import BalanceSettings

_TILE_ROWS = 8192
_SHORTEST = 0.1
# Partitions a row visits beside its own where the margin is as measured on synthetic rows and photographs: 0.1 to 1.
_VISITS = 1.0
# Where a share to keep is asked for: a cosine distance of 0.1 (docs/method.md#balance) for the tile that is measured. What
# is kept at a threshold nobody knows before the search; the audit is reckoned with the paper's share.
_USUAL_CUTOFF = math.sqrt(0.2)
_USUAL_SHARE = 0.563

# Measured above the mapped file, exact: 486 MiB for 50,000 rows of width 512, 1,759 MiB for 1,000,000 (partitioned 1,686).
# Libraries and tiles take half a GiB, remembered panels (as stored and as scanned) up to 1 GiB, forest and lists the rest.
_BYTES_OF_TILES = 2**29
_MOST_REMEMBERED = 2**30
_BYTES_AN_IMAGE = 300
# Measured, with keys of ten letters: 18 where half of the images go.
_BYTES_ON_DISK = 24


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one way to search takes.

    Attributes:
        pairs: Pairs of rows compared: all of them, or those in and near partitions, with centroids, and of the audit.
        flop: Floating-point operations of their products.
        seconds: Time of the search and, where there is one, of the audit, on these processes.
    """

    pairs: int
    flop: int
    seconds: float


def estimate_cost(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, reporter: Reporter
) -> dict[str, Any]:
    """Say what a new search takes; one from a forest that is there takes seconds.

    Returns:
        The JSON object: ``images, width, neighbors, pairs, flop, seconds, exact{pairs, flop, seconds}, partitioned{pairs,
        flop, seconds}, memory{mapped, resident}, disk``; pairs, flop and seconds are those of the neighbors asked for,
        memory and disk are bytes, resident those above the mapped files.
    """
    exact, partitioned = machine.on_main(lambda: _measure(settings, machine, embeddings))
    images, width = embeddings.num_rows, embeddings.width
    chosen = exact if settings.neighbors == "exact" else partitioned
    mapped = 2 * images * width
    scan = choose_scan(settings.precision, machine.device).dtype
    remembered = min(_MOST_REMEMBERED, (2 + scan.itemsize) * images * width)
    resident = _BYTES_OF_TILES + remembered + _BYTES_AN_IMAGE * images
    disk = _BYTES_ON_DISK * images
    processes = f", {machine.size} processes" if machine.size > 1 else ""
    reporter.note(f"{images:,} images of width {width}. A new search, as measured on some of them{processes}:")
    for name, cost in (("exact", exact), ("partitioned", partitioned)):
        audit = " with its audit" if name == "partitioned" else ""
        reporter.note(
            f"  {name}: {cost.pairs:,} pairs, {cost.flop:.3g} FLOP, about {format_duration(cost.seconds)}{audit}."
        )
    reporter.note(
        f"  memory: {resident / 2**30:.1f} GiB a process above the {mapped / 2**30:.2f} GiB of mapped rows; "
        f"disk: {disk / 2**20:,.0f} MiB."
    )
    return {
        "images": images,
        "width": width,
        "neighbors": settings.neighbors,
        **dataclasses.asdict(chosen),
        "exact": dataclasses.asdict(exact),
        "partitioned": dataclasses.asdict(partitioned),
        "memory": {"mapped": mapped, "resident": resident},
        "disk": disk,
    }


def _measure(settings: BalanceSettings, machine: Machine, embeddings: Embeddings) -> tuple[Cost, Cost]:
    """Time the parts of a search on some rows of the embeddings, and multiply."""
    images, width, rows = embeddings.num_rows, embeddings.width, embeddings.images()
    readable = _some_readable(rows.take, images)
    if len(readable) < 2:
        return Cost(0, 0, 0.0), Cost(0, 0, 0.0)
    scan = choose_scan(settings.precision, machine.device).dtype
    cutoff = _USUAL_CUTOFF if settings.distance is None else settings.distance
    half = len(readable) // 2

    def load(start: int, number: int) -> Block:
        return load_block(rows.take, readable[start : start + number], machine.device, scan)

    def compare(number: int) -> float:
        """Return the seconds to compare so many rows with as many others."""
        join, panel, others = (
            TiledSearch(rows.take, readable, machine.device, scan),
            load(0, number),
            load(half, number),
        )

        def work() -> None:
            for _ in join.search(panel, others, cutoff, lambda a, b, _: np.ones(len(a), np.bool_)):
                pass

        return time_trial(work, machine.device, at_least=_SHORTEST).seconds

    look = min(512, len(readable))
    survey_row = time_trial(lambda: _survey(rows.take(readable[:look])), at_least=_SHORTEST).seconds / look
    large = min(half, _TILE_ROWS)
    pair = compare(large) / large**2
    load_row = time_trial(lambda: load(0, large), machine.device, at_least=_SHORTEST).seconds / large
    pairs = images * (images - 1) // 2
    sampled = CUTOFF_SAMPLE * images if settings.keep is not None else 0
    # All rows are prepared once, and once more where the cut-off is looked for.
    seconds = (survey_row + load_row * (1 if settings.keep is None else 2)) * images + pair * (pairs + sampled)

    count = default_num_partitions(images)
    home = max(1, min(half, round(images / count)))
    load_home = time_trial(lambda: load(0, home), machine.device, at_least=_SHORTEST).seconds
    a_partition = (compare(home) * (0.5 + _VISITS) + load_home * (1.0 + _VISITS)) * (images / count / home) ** 2
    assigned = _seconds_a_row(rows.take, readable, count, machine.device)
    kept = images * (_USUAL_SHARE if settings.keep is None else settings.keep)
    in_all = sampled + MARGIN_SAMPLE * images + min(AUDIT_SAMPLE, kept) * kept
    looks = images + LOOKS_AT_SAMPLE * min(images, ROWS_PER_CENTROID * count)
    compared = int(in_all + looks * count + (0.5 + _VISITS) * images * images / count)
    # The rows among which the cut-off, the margin and the audit look for near ones are prepared each time.
    prepared = images * (1 if settings.keep is None else 2) + kept
    partly = survey_row * images + load_row * prepared + pair * in_all + assigned * looks + a_partition * count
    return (
        Cost(pairs, 2 * pairs * width, seconds / machine.size),
        Cost(compared, 2 * compared * width, partly / machine.size),
    )


def _some_readable(read: ReadRows, images: int) -> IntArray:
    """Return numbers of some rows that are finite, from all over the files."""
    numbers = np.unique(np.linspace(0, images - 1, min(images, 2 * _TILE_ROWS)).astype(np.int64))
    finite = np.concatenate(
        [np.isfinite(read(numbers[at : at + 512])).all(axis=1) for at in range(0, len(numbers), 512)]
    )
    return np.asarray(np.random.default_rng(0).permutation(numbers[finite]))


def _survey(rows: HalfArray) -> None:
    hash_rows(rows)
    np.isfinite(rows).all(axis=1)


def _seconds_a_row(read: ReadRows, rows: IntArray, num_partitions: int, device: torch.device) -> float:
    """Measure how long it takes to find a row's partition and those it visits."""
    centroids = np.resize(rows, num_partitions)
    partitions = Partitions(torch.from_numpy(read(centroids)).to(device))
    block = rows[: partitions.rows_at_once]
    # Rows themselves are taken for centroids, so borders are near by chance only: few visits, as in a search.

    def work() -> None:
        partitions.visits(torch.from_numpy(read(block)).to(device), 0.05)

    return time_trial(work, device, at_least=_SHORTEST).seconds / len(block)
