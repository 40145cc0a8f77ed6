"""`balance --dry-run`: all inputs are checked; what a new search compares, holds in memory and writes is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import bytes_an_entry
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.jobs import panel_rows_of
from clipcid_cli.algorithms.near.partitions import default_num_partitions
from clipcid_cli.algorithms.near.search import bytes_of_scores
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.distributed import DistContext, memory_for_rows
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import CACHE_BYTES
from clipcid_cli.steps.balance.cost_result import BalanceCost, MemoryCost, SearchCost
from clipcid_cli.steps.balance.filters.filter import SAMPLED, FilterCost
from clipcid_cli.steps.balance.plan import BalanceInputs, check_inputs
from clipcid_cli.steps.balance.samples import validate_data_there
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.reporting import format_duration
from clipcid_cli.steps.settings.balance import BalanceSettings

# Rows are looked at in so many stretches: captions are read file by file, whole.
_STRETCHES = 8
# Partitions a row visits besides its own, and how many times √N rows it is compared with: 0.6 and 1.8 of 60,000 synthetic
# rows, 2.3 and 5.1 of 240,000, 3.2 and 5.4 of a million.
_VISITS = 3.2
_COMPARED = 5.4
# Memory: libraries and tiles, cached panels (as stored and as scanned), forest, sets and lists (97 to 124 were measured).
_BYTES_OF_TILES = 2**29
_BYTES_AN_IMAGE = 128
# Written an image: keep list and forest (18 were measured where half of the images are dropped, with keys of ten letters);
# the nearest row of a reference and its distance, and once more as names; its place, home and visits.
_BYTES_OF_LISTS = 24
_BYTES_OF_REFERENCE = 12
_BYTES_OF_PLACES = 16


def estimate_cost(settings: BalanceSettings, inputs: BalanceInputs, context: DistContext) -> BalanceCost:
    """Count, on the first process, what a new search takes; with an existing forest, `balance` takes seconds."""
    check_inputs(settings, inputs)
    embeddings = inputs.embeddings
    validate_data_there(settings, embeddings)
    sample = _sample_rows(embeddings)
    searched = embeddings.num_rows
    filters = list[FilterCost]()
    for rule in inputs.filters:
        filters.append(rule.estimate(inputs, sample, searched))
        searched = filters[-1].searched
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
        memory=_count_memory(settings, inputs, filters, searched, context.device, scan),
        disk=_count_disk(settings, inputs, filters, searched),
        **{name: value for added in filters for name, value in added.fields.items()},
    )
    for line in _describe(cost):
        reporting.note(line)
    for added in filters:
        if added.note:
            reporting.note(added.note)
    for rule in inputs.filters:
        if risk := rule.find_risk(searched):
            reporting.warn(risk)
    return cost


def _sample_rows(embeddings: Embeddings) -> IntArray:
    """Return the numbers of some finite rows, in stretches, int64 [n], ascending; of all where they are few."""
    num_rows = embeddings.num_rows
    if num_rows <= SAMPLED:
        numbers = np.arange(num_rows)
    else:
        starts = np.linspace(0, num_rows - SAMPLED // _STRETCHES, _STRETCHES).astype(np.int64)
        numbers = (starts[:, None] + np.arange(SAMPLED // _STRETCHES)).reshape(-1)
    rows: IntArray = numbers[np.isfinite(embeddings.rows(Kind.IMAGES).take(numbers)).all(axis=1)]
    if not len(rows):
        sampled = "" if len(numbers) == num_rows else "sampled "
        raise ClipcidError(
            f"None of the {len(numbers):,} {sampled}rows of {embeddings.folder} is finite.",
            "Embed again.",
        )
    return rows


def _count_search(pairs: int, width: int) -> SearchCost:
    return SearchCost(pairs, 2 * pairs * width)


def _pairs_in_partitions(searched: int) -> int:
    """Count pairs of a row with centroids, and with others at home in its partition or in those that it visits."""
    return round((1.0 + _COMPARED) * searched * default_num_partitions(searched))


def _count_memory(
    settings: BalanceSettings,
    inputs: BalanceInputs,
    filters: Sequence[FilterCost],
    searched: int,
    device: torch.device,
    scan: torch.dtype,
) -> MemoryCost:
    """Count the bytes of mapped rows, of a process without them, and of its GPU, which keeps panels and makes scores."""
    images, width = inputs.embeddings.num_rows, inputs.embeddings.width
    others = sum(reference.num_rows for reference in inputs.references)
    is_exact = settings.neighbors == "exact"
    in_panels = searched if is_exact else round((1.0 + _VISITS) * searched)
    room = memory_for_rows(device, on_cpu=CACHE_BYTES)
    cached = min(room, bytes_an_entry(scan) * width * max(in_panels, others))
    mapped = 2 * width * (images + others + sum(added.mapped_rows for added in filters))
    resident = _BYTES_OF_TILES + _BYTES_AN_IMAGE * images
    if device.type == "cpu":
        return MemoryCost(mapped, resident + cached)
    panel_rows = min(searched, panel_rows_of(searched, all_pairs=is_exact))
    return MemoryCost(mapped, resident, cached + bytes_of_scores(device, scan, panel_rows))


def _count_disk(settings: BalanceSettings, inputs: BalanceInputs, filters: Sequence[FilterCost], searched: int) -> int:
    """Count the bytes that are written, those of unfinished work included."""
    images, width = inputs.embeddings.num_rows, inputs.embeddings.width
    an_image = _BYTES_OF_LISTS + sum(added.bytes_an_image for added in filters)
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
    most = "at most " if captions is not None and not captions.inside else ""
    of = f" of {most}{cost.searched:,} of them" if cost.searched < cost.images else ""
    yield f"{cost.images:,} images of width {cost.width}. A new search{of} compares:"
    for name, search in (("exact", cost.exact), ("partitioned", cost.partitioned)):
        about = "" if name == "exact" else "about "
        yield f"  {name}: {about}{search.pairs:,} pairs, {search.flop:.3g} FLOP."
    if cost.references or captions is not None:
        yield "Before it, images are dropped:"
    for name, reference in cost.references:
        embed = ""
        if reference.to_embed:
            embed = f" to embed first, about {format_duration(reference.embed_seconds)}"
        yield f"  {name} {reference.name}: {reference.rows:,} images{embed}; {reference.pairs:,} pairs."
    if captions is not None:
        sampled = f"{captions.sampled:,} sampled images"
        inside = f"{captions.inside:.1%} of {sampled} are inside the window."
        if most:
            share = f"{100 * captions.share:.2g}%"
            inside = f"none of {sampled} is inside the window, so at most {share} of all images are (95 % confidence)."
        yield f"  captions: {inside}"
    resident, mapped = cost.memory.resident / 2**30, cost.memory.mapped / 2**30
    on_device = f", {cost.memory.device / 2**30:.2f} GiB of its GPU" if cost.memory.device else ""
    memory = f"Memory: {resident:.1f} GiB per process{on_device}, besides the {mapped:.2f} GiB of mapped rows"
    yield f"{memory}; disk: {cost.disk / 2**20:,.0f} MiB."
