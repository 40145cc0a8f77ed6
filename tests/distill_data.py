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
    return [
        {name: value for name, value in line.items() if name not in ("samples_per_second", "data_wait_share")}
        for line in lines
    ]


def student_bytes(run: Path) -> bytes:
    """Read the weights of a run's student."""
    return (run / "student" / "open_clip_model.safetensors").read_bytes()


def train(
    folder: Path, name: str, presets: tuple[str, ...] = FULL_PRESETS, *, with_report: bool = False, **settings: Any
) -> None:
    """Train with each preset on the work directory `folder`/clipcid-work; runs are called PRESET-`name`.

    They write no report unless asked to: it takes as long as their steps.

    The rate is low: where a gradient is 0 but for rounding, Adam moves a weight by the whole rate either way, and at 1e-3
    sums in another order differed by 1.4e-5 of the gradient's norm after some steps (AVX2).
    """
    from clipcid_cli.steps.distill import run  # most who need the tiny student train nothing

    for preset in presets:
        chosen: dict[str, Any] = {"steps": 6, "batch_size": 8, "workers": 0, "val_fraction": 0.2, "eval_every": 6}
        towers = "both" if "cluster" in PRESETS[preset] else "auto"
        chosen |= {"lr": 1e-4, "cluster_towers": towers, "loss": FURTHER.get(preset, ())}
        asked = DistillSettings(
            work=folder / "clipcid-work",
            student=str(folder / "student.json"),
            preset=preset,
            name=f"{preset}-{name}",
            **chosen | settings,
        )
        report = {} if with_report else {"return_value": ""}
        with patch.object(run, "write_report", wraps=run.write_report, **report):
            run.run(asked)
