"""The sidecar of clusters that a test wrote itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.formats.atomic import write_json
from clipcid_cli.formats.sidecar import ClusterSidecar, Run, make_sidecar


def write_cluster_sidecar(folder: Path, images: int, temperatures: dict[str, float]) -> None:
    """Write ``cluster.json`` of so many images, which records no file."""
    result = {"images": images, "clusters": 6, "objective": 0.5, "iterations": 1, "seconds": {}}
    entries: dict[str, Any] = {"embeddings": "e", "keep_list": None, "model": None, "flags": {}, "num_nearest": 3}
    entries |= {"temperatures": temperatures, "result": result, "counts": {"skipped": {}}, "seconds": {}}
    sidecar = make_sidecar(ClusterSidecar, "cluster", Run(settings={}, inputs=[]), entries)
    write_json(folder / "cluster.json", msgspec.to_builtins(sidecar))
