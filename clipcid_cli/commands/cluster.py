"""`clipcid cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import file_facts, format_phases, print_facts
from clipcid_cli.steps.settings.cluster import ClusterSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print how many clusters there are, how close images are to their centroids, and where the files are."""
    facts = {"images": f"{result['images']:,}", "clusters": f"{result['clusters']:,}"}
    if "objective" in result:
        facts["similarity"] = f"{result['objective']:.4f} to an image's centroid, on average"
        facts["iterations"] = str(result["iterations"])
        facts["time"] = format_phases(result["seconds"])
    files = {"centroids": "centroids file", "clusters": "clusters file"}
    facts |= {files.get(name, name): path for name, path in file_facts(result.get("files", {})).items()}
    print_facts(console, "Clustered" if "objective" in result else "Would cluster", facts)


command = step_command(
    name="cluster",
    settings=ClusterSettings,
    step="clipcid_cli.steps.cluster.run",
    summary=show,
    help="Cluster the embeddings of the kept images with spherical k-means. The 16 nearest centroids of each image, and of "
    "each embedded caption, are stored. The output does not depend on the number of processes.",
    examples="clipcid cluster\n"
    "clipcid cluster --num-clusters 4096 --features joint\n"
    "clipcid cluster --embeddings laion-emb/ --keep-list none\n"
    "torchrun --nproc-per-node 8 -m clipcid_cli cluster --num-clusters 1000000",
)
