"""`clipcid balance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import count, file_facts, format_phases, print_facts
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print how much is kept, at which cut-off, and where the files are."""
    if "files" not in result:
        return
    threshold, other, audit = result["threshold"], result.get("other_linkage"), result.get("audit")
    facts = {
        "kept": f"{result['kept']:,} of {count(result['images'], 'image')} ({result['keep_ratio']:.1%})",
        "cut-off": "none, since nothing is merged" if threshold is None else f"{threshold:.6g} (Euclidean distance)",
        "largest group": count(result["largest_component"], "image"),
    }
    searched, cap, dropped_by = result["searched"], result.get("cluster_cap"), result["dropped_by"]
    is_filtered = any(result.get(name) is not None for name in ("against", "caption_window", "cluster_cap"))
    repeats = "dropped repeats" if is_filtered else "dropped images"
    facts["not covered"] = (
        f"{result['uncovered_ratio']:.1%} of the {repeats} are farther from their kept image than the cut-off"
    )
    if is_filtered:
        facts["dropped"] = _format_dropped(dropped_by, searched, result["images"])
    before = "" if cap is None else " before clusters are capped"
    if other is not None:
        facts[f"with {other['linkage']}"] = (
            f"{other['kept']:,} ({other['kept'] / searched:.1%}) would be kept at this cut-off{before}, "
            f"and {other['uncovered_ratio']:.1%} of the {repeats} be farther"
        )
    elif threshold is not None:
        facts["with star"] = "not computed"
    if (against := result.get("against")) is not None:
        names = ", ".join(f"{each['nearest']:,} by {each['name']}" for each in against["references"])
        facts["against"] = f"{count(against['dropped'], 'image')} dropped, within {against['threshold']:g}: {names}"
    if (window := result.get("caption_window")) is not None:
        facts["captions"] = (
            f"{window['inside']:,} inside the window of similarity, {window['below']:,} below, {window['above']:,} above, "
            f"{window['without']:,} without a caption"
        )
    if cap is not None:
        facts["clusters"] = (
            f"{cap['dropped']:,} of the {count(result['components'], 'image')} kept before are dropped: "
            f"{cap['capped']:,} of {count(cap['clusters'], 'cluster')} had more than {count(cap['most'], 'image')}"
        )
    if audit is not None:
        facts["audit"] = _format_audit(audit)
    if result["skipped"]:
        facts["skipped"] = ", ".join(f"{number:,} {reason}" for reason, number in result["skipped"].items())
    facts["time"] = format_phases(result["seconds"])
    print_facts(console, "Balanced", facts | file_facts(result["files"]))


def _format_dropped(numbers: dict[str, int], searched: int, images: int) -> str:
    """Write by what images were dropped, in this order."""
    parts = {
        "reference": "near references",
        "caption": "outside the window of caption similarity",
        "repeat": f"repeats among the {searched:,} left" if searched < images else "repeats",
        "cluster": "in clusters of too many",
    }
    return ", ".join(f"{numbers[name]:,} {text}" for name, text in parts.items() if numbers[name]) or "none"


def _format_audit(audit: dict[str, Any]) -> str:
    """Write how many of the sampled kept images still have a near one among the kept."""
    text = (
        f"{audit['near']:,} of {audit['sampled']:,} sampled kept images {'has' if audit['near'] == 1 else 'have'} another "
        f"kept image within the cut-off ({format_rate(audit['rate'])}"
    )
    if audit["sampled"] < audit["kept"]:
        text += f"; 95 % interval {format_rate(audit['low'])} to {format_rate(audit['high'])}"
    return text + ")"


def format_rate(rate: float) -> str:
    """Write a rate with two significant digits: ``0.013%``."""
    return f"{100 * rate:.2g}%"


command = step_command(
    name="balance",
    settings=BalanceSettings,
    step="clipcid_cli.steps.balance.run",
    summary=show,
    help="Remove near-duplicates: keep one image of each group of images with similar embeddings. All pairs of images are "
    "compared exactly, and the result is stored for every smaller cut-off, so running again with a larger --keep or a "
    "smaller --threshold takes seconds.",
    examples="clipcid balance laion/ --keep 0.563\n"
    "clipcid balance --threshold 0.447 --linkage star\n"
    "clipcid balance laion/ --cosine-distance 0.1 --write-shards laion-balanced/\n"
    "clipcid balance --embeddings metadata/small --npz-array l14_img --keep 0.5 --write-uids subset.npy\n"
    "clipcid balance --embeddings laion-emb/ --keep 0.5 --neighbors partitioned\n"
    "torchrun --nproc-per-node 8 -m clipcid_cli balance --embeddings laion-emb/ --keep 0.5",
)
