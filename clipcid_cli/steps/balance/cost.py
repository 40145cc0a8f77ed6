"""`balance --dry-run`: the cost of a new search, of the filters before it and the cap after it, from one timed tile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clipcid_cli.algorithms.near.cutoff import SAMPLE_ROWS as CUTOFF_SAMPLE
from clipcid_cli.algorithms.near.distances import IntArray
from clipcid_cli.algorithms.near.duplicates import hash_rows
from clipcid_cli.algorithms.near.pair_search import TiledSearch
from clipcid_cli.algorithms.near.partition_margin import MARGIN_SAMPLE
from clipcid_cli.algorithms.near.partition_training import LOOKS_AT_SAMPLE, ROWS_PER_CENTROID
from clipcid_cli.algorithms.near.partitions import default_num_partitions
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.balance.audit import SAMPLE as AUDIT_SAMPLE
from clipcid_cli.steps.balance.filters.captions import CaptionWindow, compare_captions, have_captions
from clipcid_cli.steps.balance.filters.references import PlannedReference
from clipcid_cli.steps.balance.plan import Plan
from clipcid_cli.steps.reporting import Progress, Reporter, format_duration

# Rows that are looked at, in stretches: captions are read file by file, whole.
_SAMPLED, _STRETCHES = 8192, 8
# Partitions a row visits besides its own; with the margins measured on synthetic rows and photographs, 0.1 to 1.
_VISITS = 1.0
# With --keep, the tile is searched to a cosine distance of 0.1 (docs/method.md#balance). With --threshold, the share that
# will be kept is not known; the audit is estimated with the paper's.
_USUAL_CUTOFF = math.sqrt(0.2)
_USUAL_SHARE = 0.563
# Libraries and tiles take half a GiB, cached panels (as stored and as scanned) up to 1 GiB; then come forest, sets and
# lists: 97 to 124 bytes an image were measured on the first process.
_BYTES_OF_TILES = 2**29
_MOST_CACHED = 2**30
_BYTES_AN_IMAGE = 128
# Written an image: keep list and forest (measured with keys of ten letters: 18 where half of the images are dropped); of
# each reference, the nearest row and its distance while they are compared, then both names and the distance in the keep
# list; a number for captions and one for clusters; in partitions its place, its home, and each visit twice.
_BYTES_OF_LISTS = 24
_BYTES_OF_REFERENCE = 12
_BYTES_OF_NUMBER = 4
_BYTES_OF_PLACES = 16


def estimate_cost(
    plan: Plan, references: list[PlannedReference], machine: Machine, reporter: Reporter
) -> dict[str, Any]:
    """Estimate the cost of a new search, and of the filters; with an existing forest, `balance` takes seconds.

    Returns:
        The JSON object: ``images, searched, width, neighbors, pairs, flop, seconds, exact{pairs, flop, seconds},
        partitioned{pairs, flop, seconds}, against[{name, rows, to_embed, embed_seconds, pairs, seconds}],
        caption_window{sampled, inside, seconds}, clustered_images, memory{mapped, resident}, disk``. The first pairs, flop
        and seconds are those of ``neighbors``; of ``searched`` images, fewer than all where a caption window drops some,
        the most they may be where it drops all that were sampled. ``against``, ``caption_window`` and
        ``clustered_images`` (those in the clusters) are null where they are not asked for. Memory and disk are in bytes,
        resident without the mapped files.
    """
    return machine.on_main(lambda: _estimate(plan, references, machine, reporter))


def _estimate(plan: Plan, references: list[PlannedReference], machine: Machine, reporter: Reporter) -> dict[str, Any]:
    settings, embeddings, clusters = plan.settings, plan.embeddings, plan.clusters
    images, width, note = embeddings.num_rows, embeddings.width, reporter.note
    sample = _sample(images)
    is_finite = np.isfinite(embeddings.rows(Kind.IMAGES).take(sample)).all(axis=1)
    if not is_finite.any():
        sampled = "" if len(sample) == images else "sampled "
        raise ClipcidError(
            f"None of the {len(sample):,} {sampled}rows of {embeddings.folder} is finite.",
            "Make the embeddings again.",
        )
    a_row, a_pair = _time_tile(plan, sample[is_finite], machine)
    searched, inside, captions = images, 1.0, None
    if settings.has_window:
        captions = _estimate_captions(plan, sample[is_finite], machine)
        # Where none of those measured is inside, the most that may be with 95 % confidence.
        inside = captions["inside"] or min(1.0, 3.0 / max(1, captions["sampled"]))
        searched = round(inside * images)
    against: list[dict[str, Any]] = [
        {
            "name": each.name,
            "rows": each.num_rows,
            "to_embed": each.embedding is not None,
            "embed_seconds": 0.0 if each.embedding is None else float(each.embedding["seconds"]["encode"]),
            "pairs": images * each.num_rows,
            "seconds": (a_pair * images * each.num_rows + a_row * (images + each.num_rows)) / machine.size,
        }
        for each in references
    ]

    # Rows are prepared once, and once more where the cut-off is estimated; in partitions, also for the margin, where they
    # are visited, and for the audit.
    kept = searched * (_USUAL_SHARE if settings.keep is None else settings.keep)
    for_cutoff = 0 if settings.keep is None else searched
    partitions = default_num_partitions(searched)
    looks = searched + LOOKS_AT_SAMPLE * min(searched, ROWS_PER_CENTROID * partitions)
    visited = (0.5 + _VISITS) * searched * searched / partitions
    audited = min(AUDIT_SAMPLE, kept) * kept
    all_pairs = searched * (searched - 1) // 2
    by_cutoff = CUTOFF_SAMPLE * for_cutoff
    some_pairs = int(looks * partitions + by_cutoff + MARGIN_SAMPLE * searched + visited + audited)
    in_partitions = searched * (2.0 + _VISITS) + for_cutoff + kept

    def cost(pairs: int, compared: int, rows: float) -> dict[str, Any]:
        return {
            "pairs": pairs,
            "flop": 2 * pairs * width,
            "seconds": (a_pair * compared + a_row * rows) / machine.size,
        }

    costs = {
        "exact": cost(all_pairs, all_pairs + by_cutoff, searched + for_cutoff),
        "partitioned": cost(some_pairs, some_pairs, in_partitions),
    }
    itemsize = choose_scan(settings.precision, machine.device).dtype.itemsize
    most_rows = max(searched, *(each.num_rows for each in references), 0)
    resident = _BYTES_OF_TILES + min(_MOST_CACHED, (2 + itemsize) * most_rows * width) + _BYTES_AN_IMAGE * images
    numbers = (captions is not None) + (clusters is not None)
    disk = images * (_BYTES_OF_LISTS + _BYTES_OF_NUMBER * numbers)
    disk += sum(each.embedding["bytes"] for each in references if each.embedding is not None)
    disk += images * _BYTES_OF_REFERENCE * (len(references) + 1 if references else 0)
    if settings.neighbors == "partitioned":  # the rows are copied, and their places and visits listed
        disk += (2 * width + _BYTES_OF_PLACES) * searched
    mapped = 2 * width * (images * (1 if captions is None else 2) + sum(each.num_rows for each in references))

    processes = f", {machine.size} processes" if machine.size > 1 else ""
    is_bound = captions is not None and not captions["inside"]
    of = f" of {'at most ' if is_bound else ''}{searched:,} of them" if searched < images else ""
    note(f"{images:,} images of width {width}. Cost of a new search{of}, estimated from some{processes}:")
    for name, each in costs.items():
        audit = " with its audit" if name == "partitioned" else ""
        taken = format_duration(each["seconds"])
        note(f"  {name}: {each['pairs']:,} pairs, {each['flop']:.3g} FLOP, about {taken}{audit}.")
    if references or captions is not None:
        note("Before it, images are dropped:")
    for entry in against:
        embed = f" to embed first, about {format_duration(entry['embed_seconds'])}" if entry["to_embed"] else ""
        taken = format_duration(entry["seconds"])
        note(f"  against {entry['name']}: {entry['rows']:,} images{embed}; {entry['pairs']:,} pairs, about {taken}.")
    if captions is not None:
        found = (
            f"none of {captions['sampled']:,} sampled images is inside the window, so at most {100 * inside:.2g}% of all "
            "images are (95 % confidence)."
            if is_bound
            else f"{inside:.1%} of {captions['sampled']:,} sampled images are inside the window."
        )
        note(f"  captions: about {format_duration(captions['seconds'])}; {found}")
    if clusters is not None:
        note(f"After it, clusters are capped: {clusters.folder}, {clusters.images:,} images.")
        clusters.warn_of_few(settings, searched, reporter)
    note(
        f"Memory: {resident / 2**30:.1f} GiB a process above the {mapped / 2**30:.2f} GiB of mapped rows; "
        f"disk: {disk / 2**20:,.0f} MiB."
    )
    return {
        "images": images,
        "searched": searched,
        "width": width,
        "neighbors": settings.neighbors,
        **costs[settings.neighbors],
        **costs,
        "against": against or None,
        "caption_window": captions,
        "clustered_images": None if clusters is None else clusters.images,
        "memory": {"mapped": mapped, "resident": resident},
        "disk": disk,
    }


def _sample(num_rows: int) -> IntArray:
    """Return the numbers of all rows, or of stretches spread over them, int64 [n], ascending."""
    if num_rows <= _SAMPLED:
        return np.arange(num_rows)
    starts = np.linspace(0, num_rows - _SAMPLED // _STRETCHES, _STRETCHES).astype(np.int64)
    return (starts[:, None] + np.arange(_SAMPLED // _STRETCHES)).reshape(-1)


def _time_tile(plan: Plan, rows: IntArray, machine: Machine) -> tuple[float, float]:
    """Return the seconds to read and prepare a row, and to compare a pair, measured on some finite rows."""
    half = len(rows) // 2
    if not half:
        return 0.0, 0.0
    read = plan.embeddings.rows(Kind.IMAGES).take
    cutoff = _USUAL_CUTOFF if plan.settings.distance is None else plan.settings.distance
    rows = np.random.default_rng(0).permutation(rows)
    scan = choose_scan(plan.settings.precision, machine.device).dtype
    search = TiledSearch(read, rows, machine.device, scan)

    def prepare() -> list[Any]:
        hash_rows(read(rows[:half]))
        return [search.load(part) for part in (rows[:half], rows[half : 2 * half])]

    def compare() -> None:
        for _ in search.search(one, other, cutoff, lambda a, b, _: np.ones(len(a), np.bool_)):
            pass

    prepared = time_trial(prepare, machine.device)
    one, other = prepared.result
    compared = time_trial(compare, machine.device, at_least=0.1)
    return prepared.seconds / (2 * half), compared.seconds / half**2


def _estimate_captions(plan: Plan, rows: IntArray, machine: Machine) -> dict[str, Any]:
    """Compare some finite rows with their captions: ``sampled`` of them, the share ``inside``, ``seconds`` for all."""
    embeddings = plan.embeddings
    trial = time_trial(lambda: compare_captions(embeddings, rows, Progress()), warm_up=0)
    window = CaptionWindow.of(plan.settings, trial.result, have_captions(embeddings, rows))
    if len(rows) == embeddings.num_rows:
        window.refuse_empty()
    inside = int(np.count_nonzero(~window.is_dropped)) / len(rows)
    seconds = trial.seconds * embeddings.num_rows / len(rows) / machine.size
    return {"sampled": len(rows), "inside": inside, "seconds": seconds}
