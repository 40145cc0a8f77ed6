"""`balance --dry-run`: the cost of a new search, estimated from a second of real work on some of the rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import Block, load_block
from clipcid_cli.algorithms.near.duplicates import hash_rows
from clipcid_cli.algorithms.near.exact import HalfArray, IntArray, ReadRows
from clipcid_cli.algorithms.near.partition_training import LOOKS_AT_SAMPLE, ROWS_PER_CENTROID
from clipcid_cli.algorithms.near.partitions import SAMPLE_ROWS, Partitions, default_num_partitions
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.balance.audit import SAMPLE as AUDIT_SAMPLE
from clipcid_cli.steps.balance.filters.cluster_cap import FoundClusters
from clipcid_cli.steps.balance.filters.cost import FilterCost, describe_filters, estimate_filters
from clipcid_cli.steps.balance.filters.references import PlannedReference
from clipcid_cli.steps.reporting import Reporter, format_duration
from clipcid_cli.steps.settings.balance import BalanceSettings

_TILE_ROWS = 8192
_SHORTEST = 0.1
# Partitions a row visits besides its own; with the margins measured on synthetic rows and photographs, 0.1 to 1.
_VISITS = 1.0
# With --keep, the measured tile is searched to a cosine distance of 0.1 (docs/method.md#balance). With --threshold, the
# share that will be kept is not known; the audit is estimated with the paper's.
_USUAL_CUTOFF = math.sqrt(0.2)
_USUAL_SHARE = 0.563

# Libraries and tiles take half a GiB, cached panels (as stored and as scanned) up to 1 GiB; then come forest, sets and
# lists: 97 to 124 bytes an image were measured on the first process.
_BYTES_OF_TILES = 2**29
_MOST_CACHED = 2**30
_BYTES_AN_IMAGE = 128
# Measured with keys of ten letters: 18 where half of the images are dropped.
_BYTES_ON_DISK = 24
# While partitions are searched: of each row its place, its home, and each visit twice.
_BYTES_OF_PLACES = 16


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one kind of search.

    Attributes:
        pairs: Pairs of rows compared: all of them; or those in and near partitions, with centroids, and in the audit.
        flop: Floating-point operations of their products.
        seconds: Time of the search, and of the audit where there is one, on these processes.
    """

    pairs: int
    flop: int
    seconds: float


def estimate_cost(
    settings: BalanceSettings,
    machine: Machine,
    embeddings: Embeddings,
    references: list[PlannedReference],
    clusters: FoundClusters | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Estimate the cost of a new search, and of the filters; with an existing forest, `balance` takes seconds.

    Args:
        clusters: Those of ``--max-per-cluster``.

    Returns:
        The JSON object: ``images, searched, width, neighbors, pairs, flop, seconds, exact{pairs, flop, seconds},
        partitioned{pairs, flop, seconds}, against[{name, rows, to_embed, embed_seconds, pairs, seconds}],
        caption_window{sampled, inside, seconds}, clustered_images, memory{mapped, resident}, disk``. The first pairs, flop
        and seconds are those of ``neighbors``; of ``searched`` images, fewer than all where a caption window drops some,
        the most they may be where it drops all that were sampled. ``against``, ``caption_window`` and
        ``clustered_images`` (those in the clusters) are null where they are not asked for. Memory and disk are in bytes,
        resident without the mapped files.
    """

    def measure() -> tuple[Cost, Cost, FilterCost, int]:
        finite = _sample_finite(embeddings)
        filters = estimate_filters(settings, machine, embeddings, finite, references, clusters)
        searched = round(filters.share_searched * embeddings.num_rows)
        return *_measure(settings, machine, embeddings, finite, searched), filters, searched

    exact, partitioned, filters, searched = machine.on_main(measure)
    images, width = embeddings.num_rows, embeddings.width
    chosen = exact if settings.neighbors == "exact" else partitioned
    mapped = 2 * images * width + filters.mapped
    scan = choose_scan(settings.precision, machine.device).dtype
    most_rows = max(searched, *(each.num_rows for each in references), 0)
    cached = min(_MOST_CACHED, (2 + scan.itemsize) * most_rows * width)
    resident = _BYTES_OF_TILES + cached + _BYTES_AN_IMAGE * images
    disk = _BYTES_ON_DISK * images + filters.disk
    if settings.neighbors == "partitioned":  # the rows are copied, and their places and visits listed
        disk += (2 * width + _BYTES_OF_PLACES) * searched
    processes = f", {machine.size} processes" if machine.size > 1 else ""
    of = f" of {'at most ' if filters.is_bound else ''}{searched:,} of them" if searched < images else ""
    reporter.note(f"{images:,} images of width {width}. Cost of a new search{of}, estimated from some{processes}:")
    for name, cost in (("exact", exact), ("partitioned", partitioned)):
        audit = " with its audit" if name == "partitioned" else ""
        reporter.note(
            f"  {name}: {cost.pairs:,} pairs, {cost.flop:.3g} FLOP, about {format_duration(cost.seconds)}{audit}."
        )
    describe_filters(filters, clusters, reporter)
    if clusters is not None:
        clusters.warn_of_few(settings, searched, reporter)
    reporter.note(
        f"Memory: {resident / 2**30:.1f} GiB a process above the {mapped / 2**30:.2f} GiB of mapped rows; "
        f"disk: {disk / 2**20:,.0f} MiB."
    )
    return {
        "images": images,
        "searched": searched,
        "width": width,
        "neighbors": settings.neighbors,
        **dataclasses.asdict(chosen),
        "exact": dataclasses.asdict(exact),
        "partitioned": dataclasses.asdict(partitioned),
        "against": None if filters.against is None else [dataclasses.asdict(each) for each in filters.against],
        "caption_window": None if filters.captions is None else dataclasses.asdict(filters.captions),
        "clustered_images": filters.clusters,
        "memory": {"mapped": mapped, "resident": resident},
        "disk": disk,
    }


def _measure(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, finite: IntArray, images: int
) -> tuple[Cost, Cost]:
    """Time the parts of a search on some finite rows of the embeddings, and extrapolate to so many images."""
    width, rows = embeddings.width, embeddings.rows(Kind.IMAGES)
    if min(len(finite), images) < 2:
        return Cost(0, 0, 0.0), Cost(0, 0, 0.0)
    scan = choose_scan(settings.precision, machine.device).dtype
    cutoff = _USUAL_CUTOFF if settings.distance is None else settings.distance
    half = len(finite) // 2

    def load(start: int, number: int) -> Block:
        return load_block(rows.take, finite[start : start + number], machine.device, scan)

    def compare(number: int) -> float:
        """Return the seconds to compare `number` rows with as many others."""
        panel, others = load(0, number), load(half, number)

        def work() -> None:
            for _ in near_pairs(panel, others, cutoff, lambda a, b, _: np.ones(len(a), np.bool_)):
                pass

        return time_trial(work, machine.device, at_least=_SHORTEST).seconds

    few = min(512, len(finite))
    read_row = time_trial(lambda: _read_once(rows.take(finite[:few])), at_least=_SHORTEST).seconds / few
    large = min(half, _TILE_ROWS)
    pair = compare(large) / large**2
    load_row = time_trial(lambda: load(0, large), machine.device, at_least=_SHORTEST).seconds / large
    pairs = images * (images - 1) // 2
    sampled = SAMPLE_ROWS * images if settings.keep is not None else 0
    # All rows are prepared once, and once more where the cut-off is estimated.
    seconds = (read_row + load_row * (1 if settings.keep is None else 2)) * images + pair * (pairs + sampled)

    count = default_num_partitions(images)
    home = max(1, min(half, round(images / count)))
    load_home = time_trial(lambda: load(0, home), machine.device, at_least=_SHORTEST).seconds
    a_partition = (compare(home) * (0.5 + _VISITS) + load_home * (1.0 + _VISITS)) * (images / count / home) ** 2
    assigned = _seconds_a_row(rows.take, finite, count, machine.device)
    kept = images * (_USUAL_SHARE if settings.keep is None else settings.keep)
    in_all = sampled + SAMPLE_ROWS * images + min(AUDIT_SAMPLE, kept) * kept
    looks = images + LOOKS_AT_SAMPLE * min(images, ROWS_PER_CENTROID * count)
    compared = int(in_all + looks * count + (0.5 + _VISITS) * images * images / count)
    # Rows are prepared anew for the cut-off, for the margin and for the audit.
    prepared = images * (1 if settings.keep is None else 2) + kept
    partly = read_row * images + load_row * prepared + pair * in_all + assigned * looks + a_partition * count
    return (
        Cost(pairs, 2 * pairs * width, seconds / machine.size),
        Cost(compared, 2 * compared * width, partly / machine.size),
    )


def _sample_finite(embeddings: Embeddings) -> IntArray:
    """Return the numbers of some finite rows, spread over all files, in random order."""
    read, images = embeddings.rows(Kind.IMAGES).take, embeddings.num_rows
    numbers = np.unique(np.linspace(0, images - 1, min(images, 2 * _TILE_ROWS)).astype(np.int64))
    finite = np.concatenate(
        [np.isfinite(read(numbers[at : at + 512])).all(axis=1) for at in range(0, len(numbers), 512)]
    )
    if not finite.any():
        sampled = "" if len(numbers) == images else "sampled "
        raise ClipcidError(
            f"None of the {len(numbers):,} {sampled}rows of {embeddings.folder} is finite.",
            "Make the embeddings again.",
        )
    return np.asarray(np.random.default_rng(0).permutation(numbers[finite]))


def _read_once(rows: HalfArray) -> None:
    hash_rows(rows)
    np.isfinite(rows).all(axis=1)


def _seconds_a_row(read: ReadRows, rows: IntArray, num_partitions: int, device: torch.device) -> float:
    """Measure the time to find the partition of a row and those it visits."""
    centroids = np.resize(rows, num_partitions)
    partitions = Partitions(torch.from_numpy(read(centroids)).to(device))
    block = rows[: partitions.rows_at_once]
    # The centroids are rows, so borders are near by chance only: few visits, as in a search.

    def work() -> None:
        for _, gap_BK in partitions.gaps(torch.from_numpy(read(block)).to(device)):
            (gap_BK <= 0.05).nonzero()

    return time_trial(work, device, at_least=_SHORTEST).seconds / len(block)
