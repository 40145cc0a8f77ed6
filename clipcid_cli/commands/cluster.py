"""`clipcid cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.summary import format_phases, print_facts
from clipcid_cli.steps.settings.cluster import ClusterSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.cluster import ClusterCost, ClusterResult


def show(result: ClusterResult | ClusterCost, console: Console) -> None:
    """Print how many clusters there are, how close images are to their centroids, and where the files are."""
    from clipcid_cli.steps.cluster import ClusterCost

    facts = {"images": f"{result.images:,}", "clusters": f"{result.clusters:,}"}
    if isinstance(result, ClusterCost):
        print_facts(console, "Would cluster", facts)
        return
    facts |= {
        "similarity": f"{result.objective:.4f} to an image's centroid, on average",
        "iterations": str(result.iterations),
        "time": format_phases(result.seconds),
        "centroids file": result.files["centroids"],
        "clusters file": result.files["clusters"],
        "sidecar": result.files["sidecar"],
    }
    print_facts(console, "Clustered", facts)


command = step_command(
    "cluster",
    ClusterSettings,
    step="clipcid_cli.steps.cluster",
    show=show,
    page="""
Cluster the embeddings of the kept images with spherical k-means. The 16 nearest centroids of each image, and of each
embedded caption, are stored. The output does not depend on the number of processes.

\b
Examples:
  clipcid cluster
  clipcid cluster --num-clusters 4096 --features joint
  clipcid cluster --embeddings laion-emb/ --keep-list none
  torchrun --nproc-per-node 8 -m clipcid_cli cluster --num-clusters 1000000
""",
)
