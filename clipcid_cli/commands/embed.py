"""`clipcid embed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import count, file_facts, format_seconds, print_facts
from clipcid_cli.steps.settings.embed import EmbedSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print how many images were embedded, how fast, and where the rows are."""
    if result.get("dry_run"):
        facts = {
            "images": f"about {result['images']:,} in {count(result['shards'], 'shard')}",
            "disk": f"{result['bytes'] / 1e6:,.0f} MB",
            "time": f"about {format_seconds(result['seconds']['encode'])}, if the data is read as fast",
        }
        print_facts(console, "Would embed", facts)
        return
    skipped = ", ".join(f"{number:,} {reason}" for reason, number in result["skipped"].items())
    rate = result["images_per_second"]
    facts = {
        "images": f"{result['images']:,}",
        "skipped": skipped or "none",
        "speed": f"{rate:,.0f} images/s" if rate else "embedded earlier",
    }
    print_facts(console, "Embedded", facts | file_facts(result))


command = step_command(
    name="embed",
    settings=EmbedSettings,
    step="clipcid_cli.steps.embed.run",
    summary=show,
    help="Embed images and their captions with a CLIP. Other steps do this themselves if there are no embeddings yet; run "
    "it on its own to embed on a GPU machine. Embeddings are written shard by shard, and a run that was stopped resumes.",
    examples="clipcid embed laion/\n"
    "clipcid embed photos/ --model ViT-B-32:laion2b_s34b_b79k --no-text\n"
    "clipcid embed photos/ --views 8 --crop-scale 0.4 --color-jitter 0.2\n"
    'clipcid embed "laion/{00000..00099}.tar" --model models/my-clip --out embeddings/',
)
