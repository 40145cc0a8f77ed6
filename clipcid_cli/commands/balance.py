"""`clipcid balance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.console import file_facts, format_seconds, print_facts
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from rich.console import Console


def format_rate(rate: float) -> str:
    """Print a rate with two digits that count: 0.013%."""
    return f"{100 * rate:.2g}%"


def show(result: dict[str, Any], console: Console) -> None:
    """Print how much is kept, at which cut-off, and what lies where."""
    if "files" not in result:
        return
    threshold = result["threshold"]
    facts = {
        "kept": f"{result['kept']:,} of {result['images']:,} images ({result['keep_ratio']:.1%})",
        "cut-off": "none: nothing was to be merged" if threshold is None else f"{threshold:.6g} (Euclidean)",
        "largest set": f"{result['largest_component']:,} image{'s' if result['largest_component'] > 1 else ''}",
        "coverage": f"{result['coverage']:.1%} of the dropped images are farther than the cut-off from the kept one",
    }
    other = result.get("other_linkage")
    if other is not None:
        facts[f"with {other['linkage']}"] = (
            f"{other['kept']:,} images kept at this cut-off ({other['kept'] / result['images']:.1%}), "
            f"{other['coverage']:.1%} of the dropped ones farther"
        )
    elif threshold is not None:
        facts["with star"] = "not computed"
    audit = result.get("audit")
    if audit is not None:
        have = "has" if audit["near"] == 1 else "have"
        interval = f"; 95% interval {format_rate(audit['low'])} to {format_rate(audit['high'])}"
        facts["audit"] = (
            f"{audit['near']:,} of {audit['sampled']:,} kept images looked at {have} another kept one within the cut-off "
            f"({format_rate(audit['rate'])}{interval if audit['sampled'] < audit['kept'] else ''})"
        )
    if result["skipped"]:
        facts["skipped"] = ", ".join(f"{number:,} {reason}" for reason, number in result["skipped"].items())
    facts["time"] = ", ".join(f"{phase} {format_seconds(value)}" for phase, value in result["seconds"].items())
    print_facts(console, "Balanced", facts | file_facts(result))


command = step_command(
    name="balance",
    settings=BalanceSettings,
    step="clipcid_cli.steps.balance.run",
    summary=show,
    help="Remove semantic repeats: keep one image of each set of near ones. Images are compared by their embeddings, all "
    "pairs, exactly. The sets at any other cut-off follow from the same search, so another --keep or --threshold on a "
    "finished run takes seconds.",
    examples="clipcid balance laion/ --keep 0.563\n"
    "clipcid balance --threshold 0.447 --linkage star\n"
    "clipcid balance laion/ --cosine-distance 0.1 --write-shards laion-balanced/\n"
    "clipcid balance --embeddings metadata/small --npz-array l14_img --keep 0.5 --write-uids subset.npy\n"
    "clipcid balance --embeddings laion-emb/ --keep 0.5 --neighbors partitioned\n"
    "torchrun --nproc-per-node 8 -m clipcid_cli balance --embeddings laion-emb/ --keep 0.5",
)
