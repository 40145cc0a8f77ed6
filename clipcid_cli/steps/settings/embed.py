"""Settings of `embed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.augmentation import color_jitter_option, crop_scale_option, gray_probability_option
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import ReadingSettings

DEFAULT_MODEL = "ViT-L-14"
_MAKE = "What is made"
_VIEWS = "Augmented views"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedSettings(ReadingSettings):
    """Settings of `embed`."""

    data: str | None = argument(
        None,
        "Images: a folder of tar shards, one tar, a pattern such as laion/{00000..00099}.tar, a folder of images, a csv, "
        "tsv or parquet list. By default the data of the embeddings in the work directory.",
    )
    model: str = option(
        DEFAULT_MODEL,
        "Model to embed with: an architecture, architecture:tag, hf-hub:org/name, or a folder with open_clip_config.json "
        "and weights.",
        group=_MAKE,
    )
    text: bool = option(True, "Embed the captions too.", group=_MAKE)
    out: Path | None = option(
        None, "Folder to write to; by default embeddings/<model> in the work directory.", group=_MAKE, operational=True
    )
    batch_size: int | None = option(
        None,
        "Pictures a batch in each process; by default 64 on a CPU, 256 on a GPU. It decides the last bits of the rows.",
        group="How it runs",
        minimum=1,
    )
    fast_decode: bool = option(
        False,
        "Decode a JPEG at a half, quarter or eighth of its size where that leaves twice the model's; faster, pixels differ "
        "slightly.",
        group=_MAKE,
    )
    views: int = option(
        0,
        "Augmented views of each image to embed beside the image itself, stored with what replays them: `clipcid distill` "
        "then shows the student a view and teaches it what the teacher said of that very view.",
        group=_VIEWS,
        minimum=0,
        metavar="V",
    )
    crop_scale: float = crop_scale_option(_VIEWS, " of a view")
    color_jitter: float = color_jitter_option(_VIEWS, " of a view")
    gray_probability: float = gray_probability_option(_VIEWS, "views")

    def __post_init__(self) -> None:
        """Check what one field alone cannot tell."""
        super().__post_init__()
        if self.views and self.fast_decode:
            raise UsageError(
                "--views are crops of whole images, which --fast-decode does not decode.", "Leave one of the two away."
            )
