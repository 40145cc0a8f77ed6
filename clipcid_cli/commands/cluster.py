"""`clipcid cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.console import file_facts, format_seconds, print_facts
from clipcid_cli.steps.settings.cluster import ClusterSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print how many clusters there are, how close images are to them, and where they lie."""
    facts = {"images": f"{result['images']:,}", "clusters": f"{result['clusters']:,}"}
    if "objective" in result:
        facts["similarity to the own centroid"] = f"{result['objective']:.4f} (mean)"
        facts["iterations"] = str(result["iterations"])
        facts["time"] = ", ".join(f"{phase} {format_seconds(value)}" for phase, value in result["seconds"].items())
    files = {f"{name} file": path for name, path in file_facts(result).items()}
    print_facts(console, "Clustered" if "objective" in result else "Would cluster", facts | files)


command = step_command(
    name="cluster",
    settings=ClusterSettings,
    step="clipcid_cli.steps.cluster.run",
    summary=show,
    help="Cluster the kept images' embeddings. Spherical k-means over all rows, decided exactly: any number of processes "
    "writes the same bytes. For each image, and for each caption where captions are embedded, the 16 nearest centroids are "
    "stored.",
    examples="clipcid cluster\n"
    "clipcid cluster --num-clusters 4096 --features joint\n"
    "clipcid cluster --embeddings laion-emb/ --keep-list none\n"
    "torchrun --nproc-per-node 8 -m clipcid_cli cluster --num-clusters 1000000",
)
