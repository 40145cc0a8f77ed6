"""Settings of `embed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import ReadingSettings

DEFAULT_MODEL = "ViT-L-14"
_MAKE = "What is made"


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
        "Samples a batch in each process; by default 64 on a CPU, 256 on a GPU. It decides the last bits of the rows.",
        group="How it runs",
        minimum=1,
    )
    fast_decode: bool = option(
        False,
        "Decode a JPEG at a half, quarter or eighth of its size where that leaves twice the model's; faster, pixels differ "
        "slightly.",
        group=_MAKE,
    )
