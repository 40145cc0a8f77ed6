"""A tiny student, short runs of it, and what they logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from clipcid_cli.algorithms.losses.registry import PRESETS
from clipcid_cli.steps.settings.distill import DistillSettings

STUDENT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
# Losses that no preset has: the runs of one preset have them too.
FURTHER = {"clip-rd": ("mfd=1", "gd=0.001", "afd=1", "siglip=1", "siglip-kd=1")}
SHORT = ("--student", "student.json", "--preset", "cid", "--batch-size", 8, "--val-fraction", 0.2)

FULL_PRESETS = tuple(
    name
    for name, losses in PRESETS.items()
    if losses.keys() - {loss for other in PRESETS if other != name for loss in PRESETS[other]}
)
"""Presets that have a loss which no other has: together they have the losses of all."""


def losses(run: Path) -> list[dict[str, Any]]:
    """Read what training logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    timed = ("samples_per_second", "data_wait_share", "mfu", "seconds_")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]


def student_bytes(run: Path) -> bytes:
    """Read the weights of a run's student."""
    return (run / "student" / "open_clip_model.safetensors").read_bytes()


def train(
    work: Path, data: Path | None = None, *, with_report: bool = False, **settings: Any
) -> tuple[list[dict[str, Any]], str]:
    """Run `distill` in this process; returns its log and what it said. A report takes as long as its steps."""
    from balance_data import heard

    from clipcid_cli.steps.distill import run  # most who need the tiny student train nothing

    given = {"preset": "cid", "name": "run", "batch_size": 8, "workers": 0, "device": "cpu"}
    given |= {"data": data and str(data), "steps": 4, "val_fraction": 0.2}
    report = {} if with_report else {"return_value": ""}
    with heard() as told, patch.object(run, "write_report", wraps=run.write_report, **report):
        result = run.run(DistillSettings(work=work, **given | settings))
    return losses(Path(result.files["train_log"]).parent), "\n".join(told)


def train_presets(folder: Path, name: str, presets: tuple[str, ...] = FULL_PRESETS, **settings: Any) -> None:
    """Train with each preset on the work directory `folder`/clipcid-work; runs are called PRESET-`name`.

    The rate is low: where a gradient is 0 but for rounding, Adam moves a weight by the whole rate either way, and at 1e-3
    sums in another order differed by 1.4e-5 of the gradient's norm after some steps (AVX2).
    """
    for preset in presets:
        given: dict[str, Any] = {"student": str(folder / "student.json"), "steps": 6, "eval_every": 6, "lr": 1e-4}
        given |= {"cluster_towers": "both" if "cluster" in PRESETS[preset] else "auto", "loss": FURTHER.get(preset, ())}
        train(folder / "clipcid-work", preset=preset, name=f"{preset}-{name}", **given | settings)
