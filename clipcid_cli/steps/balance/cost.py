"""`balance --dry-run`: what a new search and its filters take, by a formula and one timed tile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import Block, bytes_an_entry, load_block
from clipcid_cli.algorithms.near.duplicates import hash_rows
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.partitions import SAMPLE_ROWS, default_num_partitions
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import CACHE_BYTES, BalancePlan
from clipcid_cli.steps.balance.filters.against import open_reference
from clipcid_cli.steps.balance.filters.captions import CaptionWindow, compare_captions
from clipcid_cli.steps.balance.filters.cluster_cap import warn_of_few
from clipcid_cli.steps.balance.partition import AUDIT_SAMPLE, ITERATIONS, ROWS_PER_PARTITION
from clipcid_cli.steps.balance.result import BalanceCost, CaptionCost, MemoryCost, ReferenceCost, SearchCost
from clipcid_cli.steps.balance.samples import validate_data_there
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.reporting import Progress, format_duration

# Rows that are looked at, in stretches: captions are read file by file, whole.
_SAMPLED = 8192
_STRETCHES = 8
# Partitions a row visits besides its own; with the margins measured on synthetic rows and photographs, 0.1 to 1.
_VISITS = 1.0
# With --keep, the tile is searched to a cosine distance of 0.1 (docs/method.md#balance). With --threshold, the share that
# will be kept is not known; the audit is estimated with the paper's.
_USUAL_CUTOFF = math.sqrt(0.2)
_USUAL_SHARE = 0.563
# Memory: libraries and tiles, cached panels (as stored and as scanned), forest, sets and lists (97 to 124 were measured).
_BYTES_OF_TILES = 2**29
_BYTES_AN_IMAGE = 128
# Written an image: keep list and forest (18 were measured where half of the images are dropped, with keys of ten letters);
# the nearest row of a reference and its distance, and once more as names; a number; its place, home and visits.
_BYTES_OF_LISTS = 24
_BYTES_OF_REFERENCE = 12
_BYTES_OF_NUMBER = 4
_BYTES_OF_PLACES = 16


def estimate_cost(plan: BalancePlan) -> BalanceCost:
    """Estimate a new search; with an existing forest, `balance` takes seconds."""
    settings, context = plan.settings, plan.context
    references = [open_reference(settings, plan.embeddings, name, context) for name in settings.against]
    return context.on_rank0(lambda: _estimate(plan, references))


def _estimate(plan: BalancePlan, references: list[Embeddings | EmbedCost]) -> BalanceCost:
    settings, context = plan.settings, plan.context
    validate_data_there(settings, plan.embeddings)
    images = plan.embeddings.num_rows
    width = plan.embeddings.width
    clusters = plan.clusters
    scan = choose_coarse_dtype(settings.precision, context.device).dtype
    a_row, a_pair, captions = _measure(plan, scan)
    searched = round(_share_inside(captions) * images)

    def cost(pairs: float, compared: float, rows: float) -> SearchCost:
        seconds = (a_pair * compared + a_row * rows) / context.size
        return SearchCost(int(pairs), 2 * int(pairs) * width, seconds)

    # Rows are prepared once, and once more for the cut-off; in partitions also for the margin, each visit and the audit.
    kept = searched * (settings.keep or _USUAL_SHARE)
    for_cutoff = 0 if settings.keep is None else searched
    all_pairs = searched * (searched - 1) // 2
    partitions = default_num_partitions(searched)
    looks = searched + ITERATIONS * min(searched, ROWS_PER_PARTITION * partitions)
    visited = (0.5 + _VISITS) * searched * searched / partitions
    sample = min(SAMPLE_ROWS, searched)
    some_pairs = looks * partitions + visited + sample * (for_cutoff + searched) + min(AUDIT_SAMPLE, kept) * kept
    exact = cost(all_pairs, all_pairs + sample * for_cutoff, searched + for_cutoff)
    partitioned = cost(some_pairs, some_pairs, searched * (2.0 + _VISITS) + for_cutoff + kept)
    chosen = exact if settings.neighbors == "exact" else partitioned
    to_embed = [each if isinstance(each, EmbedCost) else None for each in references]
    against = []
    for name, found, made in zip(settings.against, references, to_embed, strict=True):
        rows = found.num_rows if isinstance(found, Embeddings) else found.images
        compared = cost(images * rows, images * rows, images + rows)
        embed_seconds = 0.0 if made is None else made.seconds["encode"]
        against.append(ReferenceCost(name, rows, made is not None, embed_seconds, compared.pairs, compared.seconds))

    other_rows = sum(each.rows for each in against)
    in_panels = searched if settings.neighbors == "exact" else round((1.0 + _VISITS) * searched)
    cached = min(CACHE_BYTES, bytes_an_entry(scan) * width * max(in_panels, other_rows))
    an_image = _BYTES_OF_LISTS + _BYTES_OF_NUMBER * ((captions is not None) + (clusters is not None))
    an_image += _BYTES_OF_REFERENCE * (len(references) + 1 if references else 0)
    disk = images * an_image + sum(made.bytes for made in to_embed if made is not None)
    if settings.neighbors == "partitioned":
        disk += _BYTES_OF_PLACES * searched  # their places and visits are listed
    if settings.neighbors == "partitioned" or not plan.embeddings.rows(Kind.IMAGES).stay_mapped:
        disk += 2 * width * searched  # rows are copied, those of partitions or at most all in sets
    result = BalanceCost(
        images=images,
        searched=searched,
        width=width,
        neighbors=settings.neighbors,
        pairs=chosen.pairs,
        flop=chosen.flop,
        seconds=chosen.seconds,
        exact=exact,
        partitioned=partitioned,
        against=against or None,
        caption_window=captions,
        clustered_images=None if clusters is None else clusters.images,
        memory=MemoryCost(
            mapped=2 * width * (images * (1 if captions is None else 2) + other_rows),
            resident=_BYTES_OF_TILES + cached + _BYTES_AN_IMAGE * images,
        ),
        disk=disk,
    )
    for line in _describe(result, context.size):
        reporting.note(line)
    if clusters is not None:
        reporting.note(f"After it, clusters are capped: {clusters.folder}, {clusters.images:,} images.")
        warn_of_few(plan, clusters, searched)
    return result


def _share_inside(captions: CaptionCost | None) -> float:
    """Return the share of images that a window leaves; where none of those measured is, the most at 95 % confidence."""
    return 1.0 if captions is None else captions.inside or min(1.0, 3.0 / captions.sampled)


def _describe(result: BalanceCost, num_processes: int) -> Iterator[str]:
    captions = result.caption_window
    against = result.against or []
    searched = result.searched
    most = "at most " if captions is not None and not captions.inside else ""
    of = f" of {most}{searched:,} of them" if searched < result.images else ""
    processes = f", {num_processes} processes" if num_processes > 1 else ""
    images = f"{result.images:,} images of width {result.width}"
    yield f"{images}. Cost of a new search{of}, estimated from a sample{processes}:"
    for name, cost, audit in (("exact", result.exact, ""), ("partitioned", result.partitioned, " with its audit")):
        yield f"  {name}: {cost.pairs:,} pairs, {cost.flop:.3g} FLOP, about {format_duration(cost.seconds)}{audit}."
    if against or captions is not None:
        yield "Before it, images are dropped:"
    for each in against:
        embed = f" to embed first, about {format_duration(each.embed_seconds)}" if each.to_embed else ""
        taken = format_duration(each.seconds)
        yield f"  against {each.name}: {each.rows:,} images{embed}; {each.pairs:,} pairs, about {taken}."
    if captions is not None:
        sampled = f"{captions.sampled:,} sampled images"
        found = f"{captions.inside:.1%} of {sampled} are inside the window."
        if most:
            share = f"{100 * _share_inside(captions):.2g}%"
            found = f"none of {sampled} is inside the window, so at most {share} of all images are (95 % confidence)."
        yield f"  captions: about {format_duration(captions.seconds)}; {found}"
    resident, mapped = result.memory.resident / 2**30, result.memory.mapped / 2**30
    memory = f"Memory: {resident:.1f} GiB per process, besides the {mapped:.2f} GiB of mapped rows"
    yield f"{memory}; disk: {result.disk / 2**20:,.0f} MiB."


def _measure(plan: BalancePlan, scan: torch.dtype) -> tuple[float, float, CaptionCost | None]:
    """Measure on some finite rows the seconds to prepare a row and to compare a pair; and, with a window, captions."""
    settings, context, embeddings = plan.settings, plan.context, plan.embeddings
    read = embeddings.rows(Kind.IMAGES).take
    num_rows = embeddings.num_rows
    if num_rows > _SAMPLED:
        starts = np.linspace(0, num_rows - _SAMPLED // _STRETCHES, _STRETCHES).astype(np.int64)
        numbers = (starts[:, None] + np.arange(_SAMPLED // _STRETCHES)).reshape(-1)
    else:
        numbers = np.arange(num_rows)
    rows: IntArray = numbers[np.isfinite(read(numbers)).all(axis=1)]
    if not len(rows):
        sampled = "" if len(numbers) == num_rows else "sampled "
        raise ClipcidError(
            f"None of the {len(numbers):,} {sampled}rows of {embeddings.folder} is finite.",
            "Embed again.",
        )
    captions = None
    if settings.has_window:
        compared = time_trial(lambda: compare_captions(embeddings, rows, Progress()), warm_up=0)
        window = CaptionWindow.of(settings, compared.result)
        if len(numbers) == num_rows:
            window.validate_not_empty()
        inside = int(np.count_nonzero(~window.is_dropped)) / len(rows)
        seconds = compared.seconds * num_rows / len(rows) / context.size
        captions = CaptionCost(len(rows), inside, seconds)
    one, other = np.array_split(np.random.default_rng(0).permutation(rows), 2)
    if not len(other):
        return 0.0, 0.0, captions
    cutoff = _USUAL_CUTOFF if settings.distance is None else settings.distance

    def prepare() -> tuple[Block, Block]:
        hash_rows(read(one))
        return load_block(read, one, context.device, scan), load_block(read, other, context.device, scan)

    def compare() -> None:
        block, others = prepared.result
        for _ in near_pairs(block, others, cutoff):
            pass

    prepared = time_trial(prepare, context.device)
    tile = time_trial(compare, context.device, at_least=0.1)
    return prepared.seconds / len(rows), tile.seconds / (len(one) * len(other)), captions
