"""`clipcid embed`."""

from __future__ import annotations

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import (
    count,
    format_bytes,
    format_host_memory,
    format_seconds,
    format_skipped,
    print_facts,
)
from clipcid_cli.steps.embed.result import EmbedCost, Embedded, EmbedPart
from clipcid_cli.steps.settings.embed import EmbedSettings


def show(result: Embedded, console: Console) -> None:
    """Print how much was embedded, how fast, and where the rows are; of a dry run, what it would take."""
    if isinstance(result, EmbedCost):
        facts = {
            "images": f"about {result.images:,} in {count(result.shards, 'shard')}",
            "disk": f"{format_bytes(result.bytes)}, {result.bytes_per_image:,} bytes per image",
            "time": f"about {format_seconds(result.seconds['encode'])}, at the pace of the first batches",
            "speed": f"about {result.images_per_second:,.0f} images/s",
            "memory": format_host_memory(result.host_memory_bytes, result.shared_memory_bytes),
        }
        if result.shards_done:
            facts["images"] += f" that are left; about {result.images_done:,} in {result.shards_done:,} are done"
        if result.bound_by == "data":
            facts["speed"] += ", bound by decoding"
        if result.bytes > result.free_bytes:
            facts["disk"] += f": more than the {format_bytes(result.free_bytes)} free"
        print_facts(console, "Would embed", facts)
        return
    rate = result.images_per_second
    facts = {
        "images": f"{result.images:,}",
        "skipped": format_skipped(result.skipped) or "none",
        "speed": f"{rate:,.0f} images/s" if rate else "embedded earlier",
    }
    if isinstance(result, EmbedPart):
        shards = count(result.shards, "shard")
        facts["images"] += f" in {shards}"
        print_facts(console, f"Embedded part {result.part}", facts, result.files)
        return
    print_facts(console, "Embedded", facts, result.files)


command = step_command(
    "embed",
    EmbedSettings,
    step="clipcid_cli.steps.embed.run",
    show=show,
    page="""
Embed images and their captions with a CLIP. Other steps do this themselves if there are no embeddings yet; run it on
its own to embed on a GPU machine. Embeddings are written shard by shard, and a run that was stopped resumes.

\b
Examples:
  clipcid embed laion/
  clipcid embed photos/ --model ViT-B-32:laion2b_s34b_b79k --no-text
  clipcid embed photos/ --views 4 --view-kind mix --text-variants 4
  clipcid embed "laion/{00000..00099}.tar" --model my-clip/ --out my-clip-emb/
  clipcid embed laion/ --part 0/8 --out s3://bucket/laion
  clipcid embed --join s3://bucket/laion --out laion-emb/
""",
)
