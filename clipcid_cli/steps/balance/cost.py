"""`balance --dry-run`: all inputs are checked; what a new search compares, holds in memory and writes is counted."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from clipcid_cli.algorithms.near.block import bytes_an_entry
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.jobs import panel_rows_of
from clipcid_cli.algorithms.near.partitions import default_num_partitions
from clipcid_cli.algorithms.near.search import bytes_of_scores
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.runtime.distributed import DistContext, memory_for_rows
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import CACHE_BYTES
from clipcid_cli.steps.balance.plan import BalanceInputs, NamedReference, check_inputs
from clipcid_cli.steps.balance.samples import validate_data_there
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.reporting import Progress, format_duration
from clipcid_cli.steps.settings.balance import BalanceSettings

# Rows that are looked at, in stretches: captions are read file by file, whole.
_SAMPLED = 8192
_STRETCHES = 8
# Partitions a row visits besides its own, and how many times √N rows it is compared with: 0.6 and 1.8 of 60,000 synthetic
# rows, 2.3 and 5.1 of 240,000, 3.2 and 5.4 of a million.
_VISITS = 3.2
_COMPARED = 5.4
# Memory: libraries and tiles, cached panels (as stored and as scanned), forest, sets and lists (97 to 124 were measured).
_BYTES_OF_TILES = 2**29
_BYTES_AN_IMAGE = 128
# Written an image: keep list and forest (18 were measured where half of the images are dropped, with keys of ten letters);
# the nearest row of a reference and its distance, and once more as names; a number; its place, home and visits.
_BYTES_OF_LISTS = 24
_BYTES_OF_REFERENCE = 12
_BYTES_OF_NUMBER = 4
_BYTES_OF_PLACES = 16


class SearchCost(msgspec.Struct):
    """What a search would take."""

    pairs: int
    flop: int


class ReferenceCost(msgspec.Struct):
    """What a reference would take, and first its embedding where it has none."""

    name: str
    rows: int
    to_embed: bool
    embed_seconds: float
    pairs: int


class CaptionCost(msgspec.Struct):
    """What a caption window would leave: how many images were sampled, and the share inside."""

    sampled: int
    inside: float


class MemoryCost(msgspec.Struct, omit_defaults=True):
    """Bytes of mapped files, of a process without them, and of its GPU."""

    mapped: int
    resident: int
    device: int = 0  # on a CPU none


class BalanceCost(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a new search would take; pairs and flop are those of ``neighbors``."""

    images: int
    # Fewer than all images where a caption window or --near-keep drops some; the most they may be where the window drops all
    # that were sampled. What references drop within a distance is not known.
    searched: int
    width: int
    neighbors: str
    pairs: int
    flop: int
    exact: SearchCost
    partitioned: SearchCost
    against: list[ReferenceCost] | None
    caption_window: CaptionCost | None
    clustered_images: int | None
    memory: MemoryCost
    disk: int  # bytes
    near: list[ReferenceCost] | None = None


def estimate_cost(settings: BalanceSettings, inputs: BalanceInputs, context: DistContext) -> BalanceCost:
    """Count, on the first process, what a new search takes; with an existing forest, `balance` takes seconds."""
    check_inputs(settings, inputs)
    embeddings = inputs.embeddings
    validate_data_there(settings, embeddings)
    sample = _sample_rows(embeddings)
    captions = _look_at_captions(settings, embeddings, sample) if settings.has_window else None
    searched = round(_share_inside(captions) * embeddings.num_rows)
    near = [_count_reference(near, searched) for near in inputs.references if near.flag == "--near"]
    if settings.near_keep is not None:
        searched = max(1, round(settings.near_keep * searched))
    against = [
        _count_reference(reference, embeddings.num_rows)
        for reference in inputs.references
        if reference.flag == "--against"
    ]
    searches = {
        "exact": _count_search(searched * (searched - 1) // 2, embeddings.width),
        "partitioned": _count_search(_pairs_in_partitions(searched), embeddings.width),
    }
    chosen = searches[settings.neighbors]
    scan = choose_coarse_dtype(settings.precision, context.device).dtype
    cost = BalanceCost(
        images=embeddings.num_rows,
        searched=searched,
        width=embeddings.width,
        neighbors=settings.neighbors,
        pairs=chosen.pairs,
        flop=chosen.flop,
        exact=searches["exact"],
        partitioned=searches["partitioned"],
        against=against or None,
        near=near or None,
        caption_window=captions,
        clustered_images=None if inputs.clusters is None else inputs.clusters.images,
        memory=_count_memory(settings, inputs, searched, context.device, scan),
        disk=_count_disk(settings, inputs, searched),
    )
    for line in _describe(cost):
        reporting.note(line)
    if inputs.clusters is not None:
        from clipcid_cli.steps.balance.filters.cluster_cap import warn_of_few

        reporting.note(f"After it, clusters are capped: {inputs.clusters.folder}, {inputs.clusters.images:,} images.")
        warn_of_few(settings, inputs.clusters, searched)
    return cost


def _sample_rows(embeddings: Embeddings) -> IntArray:
    """Return the numbers of some finite rows, in stretches, int64 [n], ascending; of all where they are few."""
    num_rows = embeddings.num_rows
    if num_rows <= _SAMPLED:
        numbers = np.arange(num_rows)
    else:
        starts = np.linspace(0, num_rows - _SAMPLED // _STRETCHES, _STRETCHES).astype(np.int64)
        numbers = (starts[:, None] + np.arange(_SAMPLED // _STRETCHES)).reshape(-1)
    rows: IntArray = numbers[np.isfinite(embeddings.rows(Kind.IMAGES).take(numbers)).all(axis=1)]
    if not len(rows):
        sampled = "" if len(numbers) == num_rows else "sampled "
        raise ClipcidError(
            f"None of the {len(numbers):,} {sampled}rows of {embeddings.folder} is finite.",
            "Embed again.",
        )
    return rows


def _look_at_captions(settings: BalanceSettings, embeddings: Embeddings, sample: IntArray) -> CaptionCost:
    """Tell which share of some images is inside the window of caption similarity."""
    from clipcid_cli.steps.balance.filters.captions import CaptionWindow, compare_captions

    window = CaptionWindow.from_settings(settings, compare_captions(embeddings, sample, Progress()))
    if embeddings.num_rows <= _SAMPLED:
        window.validate_not_empty()
    return CaptionCost(len(sample), int(np.count_nonzero(~window.is_dropped)) / len(sample))


def _share_inside(captions: CaptionCost | None) -> float:
    """Return the share of images that a window leaves; where none of those sampled is, the most at 95 % confidence."""
    return 1.0 if captions is None else captions.inside or min(1.0, 3.0 / captions.sampled)


def _count_search(pairs: int, width: int) -> SearchCost:
    return SearchCost(pairs, 2 * pairs * width)


def _pairs_in_partitions(searched: int) -> int:
    """Count pairs of a row with centroids, and with others at home in its partition or in those that it visits."""
    return round((1.0 + _COMPARED) * searched * default_num_partitions(searched))


def _count_reference(reference: NamedReference, compared: int) -> ReferenceCost:
    rows = reference.rows
    embed_seconds = 0.0 if isinstance(rows, Embeddings) else rows.seconds["encode"]
    to_embed = not isinstance(rows, Embeddings)
    return ReferenceCost(reference.name, _count_rows(rows), to_embed, embed_seconds, compared * _count_rows(rows))


def _count_rows(rows: Embeddings | EmbedCost) -> int:
    return rows.num_rows if isinstance(rows, Embeddings) else rows.images + rows.images_done


def _count_memory(
    settings: BalanceSettings, inputs: BalanceInputs, searched: int, device: torch.device, scan: torch.dtype
) -> MemoryCost:
    """Count the bytes of mapped rows, of a process without them, and of its GPU, which keeps panels and makes scores."""
    images, width = inputs.embeddings.num_rows, inputs.embeddings.width
    others = sum(_count_rows(reference.rows) for reference in inputs.references)
    is_exact = settings.neighbors == "exact"
    in_panels = searched if is_exact else round((1.0 + _VISITS) * searched)
    room = memory_for_rows(device, on_cpu=CACHE_BYTES)
    cached = min(room, bytes_an_entry(scan) * width * max(in_panels, others))
    kinds = 2 if settings.has_window else 1
    mapped = 2 * width * (kinds * images + others)
    resident = _BYTES_OF_TILES + _BYTES_AN_IMAGE * images
    if device.type == "cpu":
        return MemoryCost(mapped, resident + cached)
    panel_rows = min(searched, panel_rows_of(searched, all_pairs=is_exact))
    return MemoryCost(mapped, resident, cached + bytes_of_scores(device, scan, panel_rows))


def _count_disk(settings: BalanceSettings, inputs: BalanceInputs, searched: int) -> int:
    """Count the bytes that are written, those of unfinished work included."""
    images, width = inputs.embeddings.num_rows, inputs.embeddings.width
    an_image = _BYTES_OF_LISTS + _BYTES_OF_NUMBER * (settings.has_window + (inputs.clusters is not None))
    if inputs.references:
        an_image += _BYTES_OF_REFERENCE * (len(inputs.references) + 1)
    disk = an_image * images
    disk += sum(reference.rows.bytes for reference in inputs.references if isinstance(reference.rows, EmbedCost))
    is_partitioned = settings.neighbors == "partitioned"
    if is_partitioned:
        disk += _BYTES_OF_PLACES * searched
    if is_partitioned or not inputs.embeddings.rows(Kind.IMAGES).stay_mapped:
        disk += 2 * width * searched  # rows are copied, those of partitions or at most all in sets
    return disk


def _describe(cost: BalanceCost) -> Iterator[str]:
    captions = cost.caption_window
    references = [*(("against", one) for one in cost.against or []), *(("near", one) for one in cost.near or [])]
    most = "at most " if captions is not None and not captions.inside else ""
    of = f" of {most}{cost.searched:,} of them" if cost.searched < cost.images else ""
    yield f"{cost.images:,} images of width {cost.width}. A new search{of} compares:"
    for name, search in (("exact", cost.exact), ("partitioned", cost.partitioned)):
        about = "" if name == "exact" else "about "
        yield f"  {name}: {about}{search.pairs:,} pairs, {search.flop:.3g} FLOP."
    if references or captions is not None:
        yield "Before it, images are dropped:"
    for word, reference in references:
        embed = ""
        if reference.to_embed:
            embed = f" to embed first, about {format_duration(reference.embed_seconds)}"
        yield f"  {word} {reference.name}: {reference.rows:,} images{embed}; {reference.pairs:,} pairs."
    if captions is not None:
        sampled = f"{captions.sampled:,} sampled images"
        inside = f"{captions.inside:.1%} of {sampled} are inside the window."
        if most:
            share = f"{100 * _share_inside(captions):.2g}%"
            inside = f"none of {sampled} is inside the window, so at most {share} of all images are (95 % confidence)."
        yield f"  captions: {inside}"
    resident, mapped = cost.memory.resident / 2**30, cost.memory.mapped / 2**30
    on_device = f", {cost.memory.device / 2**30:.2f} GiB of its GPU" if cost.memory.device else ""
    memory = f"Memory: {resident:.1f} GiB per process{on_device}, besides the {mapped:.2f} GiB of mapped rows"
    yield f"{memory}; disk: {cost.disk / 2**20:,.0f} MiB."
