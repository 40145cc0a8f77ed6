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
    if "texts" in result:
        _show_texts(result, console)
        return
    if result.get("dry_run"):
        facts = {
            "images": f"about {result['images']:,} in {count(result['shards'], 'shard')}",
            "disk": f"{result['bytes'] / 1e6:,.0f} MB, {result['bytes_per_image']:,} bytes an image",
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
    print_facts(console, "Embedded", facts | file_facts(result["files"]))


def _show_texts(result: dict[str, Any], console: Console) -> None:
    """Print the same of texts without images."""
    if result.get("dry_run"):
        facts = {
            "texts": f"{result['texts']:,}",
            "disk": f"{result['bytes'] / 1e6:,.1f} MB and the texts",
            "time": f"about {format_seconds(result['seconds']['encode'])}",
        }
        print_facts(console, "Would embed", facts)
        return
    skipped = result["skipped"].get("empty_line", 0)
    rate = result["texts_per_second"]
    facts = {
        "texts": f"{result['texts']:,}",
        "skipped": count(skipped, "empty line") if skipped else "none",
        "speed": f"{rate:,.0f} texts/s" if rate else "embedded earlier",
    }
    print_facts(console, "Embedded", facts | file_facts(result["files"]))


command = step_command(
    name="embed",
    settings=EmbedSettings,
    step="clipcid_cli.steps.embed.run",
    summary=show,
    help="Embed images and their captions with a CLIP. Other steps do this themselves if there are no embeddings yet; run "
    "it on its own to embed on a GPU machine. Embeddings are written shard by shard, and a run that was stopped resumes.",
    examples="clipcid embed laion/\n"
    "clipcid embed photos/ --model ViT-B-32:laion2b_s34b_b79k --no-text\n"
    "clipcid embed photos/ --views 8 --view-kind strong,mix --text-variants 8\n"
    "clipcid embed --texts captions.txt --model ViT-B-32:laion2b_s34b_b79k\n"
    'clipcid embed "laion/{00000..00099}.tar" --model models/my-clip --out embeddings/',
)
