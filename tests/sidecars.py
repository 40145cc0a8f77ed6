"""Sidecars as steps leave them, and outputs as killed runs leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.formats import sidecar as formats
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.results.run_folder import DistillSidecar
from clipcid_cli.formats.sidecar import FORMAT_VERSION, Provenance, sidecar_path

MODEL = {"spec": "tiny", "weights_hash": "blake2b:0", "config": {"text_cfg": {}, "vision_cfg": {}}}
DATA = {"spec": "data", "keys": "sample", "image": "filepath", "caption": "title", "key": "key"}
_EMBED_SETTINGS = {"text": True, "keys": "sample", "fast_decode": False, "precision": "fp32", "batch_size": 64}
_ENTRIES: dict[type, dict[str, Any]] = {
    EmbedSidecar: {
        "settings": {**_EMBED_SETTINGS, "preprocess": "blake2b:1"},
        "counts": {"images": 3, "read": 3, "skipped": {}, "laid_on_white": 0},
        "images_per_second": 1.0,
        "model": MODEL,
        "data": DATA,
    },
    BalanceSidecar: {
        "embeddings": "embeddings/tiny",
        "pictures": {"shown": 0, "unread": [], "why": ""},
        "result": {
            "images": 24,
            "searched": 24,
            "kept": 18,
            "keep_ratio": 0.75,
            "threshold": None,
            "components": 18,
            "largest_component": 2,
            "uncovered_ratio": 0.0,
            "other_linkage": None,
            "audit": None,
            "dropped_by": {"reference": 0, "caption": 0, "repeat": 6, "cluster": 0},
            "against": None,
            "caption_window": None,
            "cluster_cap": None,
            "skipped": {},
            "seconds": {},
        },
    },
    ClusterSidecar: {
        "counts": {"read": 3, "used": 3, "skipped": {}},
        "embeddings": "embeddings/tiny",
        "keep_list": None,
        "model": None,
        "num_nearest": 3,
        "temperatures": {"image": 0.02, "caption": 0.03},
        "result": {"images": 3, "clusters": 3, "objective": 0.5, "iterations": 1, "seconds": {}},
    },
    DistillSidecar: {
        "settings": {"losses": {"clip": {"value": 1.0}}, "val_fraction": 0.01, "ema": None},
        "counts": {"read": 3, "used": 3, "held_out": 0, "skipped": {}},
        "model": {},
        "data": DATA,
        "keep_list": None,
        "result": {"steps": 1, "samples": 1, "samples_per_second": 1.0, "losses": {}, "metrics": {}},
    },
}


def make_sidecar(kind: type[formats.Sidecar], **entries: Any) -> dict[str, Any]:
    """Return the entries of a sidecar, with those given in the place of plain ones."""
    plain = {"format_version": FORMAT_VERSION, "tool": "clipcid", "tool_version": "0", "step": "step"}
    plain |= {"settings": {}, "inputs": [], "outputs": [], "counts": {}, "seconds": {}}
    content = formats.seal(json.loads(json.dumps({**plain, **_ENTRIES.get(kind, {}), **entries})))
    msgspec.convert(content, kind)
    return content


def edit_sidecar(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a sidecar such that it is as if it had been written so."""
    content = json.loads(path.read_text())
    change(content)
    path.unlink()  # it may be a hard link
    path.write_text(json.dumps(formats.seal(content)))


def leave_work(folder: Path, step: str) -> Path:
    """Make the work folder that a run leaves which is killed right after its sidecar."""
    run = msgspec.convert(json.loads(sidecar_path(folder, step).read_text()), Provenance)
    work = folder / f".{step}-{identity_of(run.settings, run.inputs)}"
    work.mkdir()
    (work / ".run.json").write_text(json.dumps(msgspec.to_builtins(run)))
    return work


def unfinish(folder: Path, step: str) -> Path:
    """Let a finished output, whose files were written in place, be one of a run that was killed right before its sidecar."""
    work = leave_work(folder, step)
    sidecar_path(folder, step).unlink()
    return work
