"""A teacher of random weights: what it says of images does not matter, only how many numbers it says."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch

from clipcid_cli.formats.models.open_clip_folder import write_model_folder

STUDENT = Path(__file__).with_name("student.json")


def write_teacher(folder: Path, width: int) -> Path:
    """Write a model folder, unless it is there: the student's architecture, with embeddings of another width."""
    if not folder.exists():
        config = json.loads(STUDENT.read_text()) | {"embed_dim": width}
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        preprocess = {
            "size": config["vision_cfg"]["image_size"],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        write_model_folder(folder, config, preprocess, model.state_dict())
    return folder
