"""Settings of `embed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.augmentation import color_jitter_option, crop_scale_option, gray_probability_option
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import ReadingSettings

DEFAULT_MODEL = "ViT-L-14"
_MAKE = "Embedding"
_VIEWS = "Augmented views"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedSettings(ReadingSettings):
    """Settings of `embed`."""

    data: str | None = argument(
        None,
        "Images and captions: a folder of tar shards, one tar, a pattern such as laion/{00000..00099}.tar, a folder of "
        "images, or a csv, tsv or parquet list. By default, the data of the embeddings in the work directory.",
    )
    model: str = option(
        DEFAULT_MODEL,
        "CLIP model: an architecture, architecture:tag, hf-hub:org/name, or a folder with open_clip_config.json and "
        "weights.",
        group=_MAKE,
        metavar="MODEL",
    )
    text: bool = option(True, "Also embed the captions.", group=_MAKE)
    out: Path | None = option(
        None, "Output folder; by default embeddings/<model> in the work directory.", group=_MAKE, operational=True
    )
    batch_size: int | None = option(
        None,
        "Images per batch in each process; by default 64 on a CPU, 256 on a GPU. It affects the last bits of the "
        "embeddings.",
        group="How it runs",
        minimum=1,
    )
    fast_decode: bool = option(
        False,
        "Decode large JPEGs at reduced resolution, at least twice the model's input size. Faster; pixels differ slightly.",
        group=_MAKE,
    )
    views: int = option(
        0,
        "Also embed this many augmented views of each image. `clipcid distill` then trains on these views with the "
        "teacher's embedding of each view.",
        group=_VIEWS,
        minimum=0,
        metavar="V",
    )
    crop_scale: float = crop_scale_option(_VIEWS)
    color_jitter: float = color_jitter_option(_VIEWS)
    gray_probability: float = gray_probability_option(_VIEWS)

    def __post_init__(self) -> None:
        """Check what involves several fields."""
        super().__post_init__()
        if self.views and self.fast_decode:
            raise UsageError(
                "--views needs full-resolution images, which --fast-decode does not decode.", "Omit one of the two."
            )
