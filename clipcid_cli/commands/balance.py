"""`clipcid balance`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import count, format_phases, format_skipped, print_facts
from clipcid_cli.steps.balance.result import Audit, BalanceResult, ReferenceResult
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.cost_result import BalanceCost
    from clipcid_cli.steps.embed.result import EmbedCost

# Files that only a later `balance` reads: the JSON object names them, too.
_OWN_FILES = ("row_numbering", "forest_row_numbering", "forest_sidecar")


def show(result: BalanceResult | BalanceCost | EmbedCost, console: Console) -> None:
    """Print how much is kept, at which cut-off, and where the files are."""
    if not isinstance(result, BalanceResult):
        _show_cost(result, console)
        return
    threshold = result.threshold
    other = result.other_linkage
    facts = {
        "kept": f"{result.kept:,} of {count(result.images, 'image')} ({result.keep_ratio:.1%})",
        "cut-off": "none, since nothing is merged" if threshold is None else f"{threshold:.6g} (Euclidean distance)",
        "largest set": count(result.largest_component, "image"),
    }
    repeats = "dropped repeats" if result.is_filtered else "dropped images"
    if threshold is not None:
        facts["not covered"] = (
            f"{result.uncovered_ratio:.1%} of the {repeats} are farther from their kept image than the cut-off"
        )
    if result.is_filtered:
        facts["dropped"] = _format_dropped(result)
    if other is not None:
        before = "" if result.cluster_cap is None else " before clusters are capped"
        of = f"of {count(result.images, 'image')} "
        if result.searched < result.images:
            of = f"of the {result.searched:,} left "
        facts[f"with {other.linkage}"] = (
            f"{other.kept:,} {of}({other.kept / result.searched:.1%}) would be kept at this cut-off{before}, "
            f"and {other.uncovered_ratio:.1%} of the {repeats} would not be covered"
        )
    elif threshold is not None:
        facts["other linkage"] = "not computed"
    if (against := result.against) is not None:
        names = _format_references(against.references)
        facts["against"] = f"{count(against.dropped, 'image')} dropped, within {against.threshold:g}: {names}"
    if (window := result.caption_window) is not None:
        facts["captions"] = (
            f"{window.inside:,} inside the window of similarity, {window.below:,} below, {window.above:,} above, "
            f"{window.without:,} without a caption"
        )
    if (near := result.near) is not None:
        of = count(near.kept + near.dropped, "image")
        facts["near"] = f"{near.kept:,} of {of} within {near.threshold:g}: {_format_references(near.references)}"
    if (cap := result.cluster_cap) is not None:
        facts["clusters"] = (
            f"{cap.dropped:,} of the {count(result.components, 'image')} kept before are dropped: "
            f"{cap.capped:,} of {count(cap.clusters, 'cluster')} had more than {count(cap.most, 'image')}"
        )
    if result.audit is not None:
        facts["audit"] = _format_audit(result.audit)
    if result.skipped:
        facts["skipped"] = format_skipped(result.skipped)
    for written in (result.shards, result.data):
        if written is not None:
            lacking = f"; {written.not_written:,} are not in the data" if written.not_written else ""
            facts["written"] = f"{count(written.written, 'kept image')}{lacking}"
    facts["time"] = format_phases(result.seconds)
    files = {name: path for name, path in result.files.items() if name not in _OWN_FILES}
    print_facts(console, "Balanced", facts, files)


def _show_cost(result: BalanceCost | EmbedCost, console: Console) -> None:
    """Print what the embeddings that are missing would take; the cost of a search is in its notes."""
    from clipcid_cli.commands.embed import show as show_embedded
    from clipcid_cli.steps.embed.result import EmbedCost

    if isinstance(result, EmbedCost):
        show_embedded(result, console)


def _format_references(references: list[ReferenceResult]) -> str:
    """Write how many images are nearest to which reference."""
    return ", ".join(f"{reference.nearest:,} by {reference.name}" for reference in references)


def _format_dropped(result: BalanceResult) -> str:
    """Write by what images were dropped, in this order."""
    parts = {
        "reference": "near references",
        "caption": "outside the window of caption similarity",
        "far": "far from all targets",
        "repeat": f"repeats among the {result.searched:,} left" if result.searched < result.images else "repeats",
        "cluster": "in clusters with too many images",
    }
    numbers = result.dropped_by
    return ", ".join(f"{numbers[name]:,} {text}" for name, text in parts.items() if numbers.get(name)) or "none"


def _format_audit(audit: Audit) -> str:
    """Write how many of the sampled kept images still have a near one among the kept."""
    has = "has" if audit.near == 1 else "have"
    rate, low, high = (f"{100 * value:.2g}%" for value in (audit.rate, audit.low, audit.high))
    interval = f"; 95 % interval {low} to {high}" if audit.sampled < audit.kept else ""
    return (
        f"{audit.near:,} of {audit.sampled:,} sampled kept images {has} another kept image within the cut-off "
        f"({rate}{interval})"
    )


command = step_command(
    "balance",
    BalanceSettings,
    step="clipcid_cli.steps.balance.run",
    show=show,
    page="""
Remove near-duplicates: keep one image of each set of images with similar embeddings. All pairs of images are
compared exactly, and the result is stored for every smaller cut-off, so running again with a larger --keep or a
smaller --threshold takes seconds.

\b
Examples:
  clipcid balance laion/ --keep 0.563
  clipcid balance --threshold 0.447 --linkage star
  clipcid balance laion/ --cosine-distance 0.1 --write-shards balanced/
  clipcid balance laion/ --near birds/ --near-keep 0.1 --threshold 0.2
  clipcid balance --embeddings metadata/small --npz-array l14_img --keep 0.5 \\
      --write-uids subset.npy
  clipcid balance --embeddings laion-emb/ --keep 0.5 --neighbors partitioned
  torchrun --nproc-per-node 8 -m clipcid_cli balance --keep 0.5 \\
      --embeddings laion-emb/
""",
)
