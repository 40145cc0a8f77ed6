"""``embed.json``: what `embed` records of a folder of embeddings, whose manifest names the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import reading
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import DataSpec, Sidecar, read_sidecar, run_again, sidecar_path
from clipcid_cli.records import ModelRecord


class EmbedMade(msgspec.Struct):
    """Settings of `embed`; those with a default are recorded where there are views or text variants."""

    text: bool
    keys: str
    fast_decode: bool
    precision: str
    batch_size: int
    preprocess: str
    caption_lines: bool = False
    caption_key: tuple[str, ...] = ()
    views: int = 0
    view_kind: tuple[str, ...] = ("crop",)
    crop_scale: float = 0.9
    color_jitter: float = 0.0
    gray_probability: float = 0.0
    text_variants: int = 0
    seed: int = 0


class EmbedFacts(msgspec.Struct, kw_only=True):
    """What the sidecar says of model, data and machine."""

    model: ModelRecord
    data: DataSpec
    missing_fraction: float | None  # of truncated data
    device: str
    pillow: str


class EmbedSidecar(Sidecar, kw_only=True):
    """``embed.json``, of a folder of embeddings whose manifest names the files."""

    model: ModelRecord
    images_per_second: float | None
    data: DataSpec
    machine: dict[str, Any] = msgspec.field(name="run", default_factory=dict)

    @property
    def made(self) -> EmbedMade:
        """What is read of the settings."""
        return msgspec.convert(self.settings, EmbedMade)

    def records(self, folder: Path) -> list[FileRecord]:
        """Return what is recorded of the files of the manifest too."""
        from clipcid_cli.formats.parquet import read_rows  # few commands need it

        path = folder / "manifest.parquet"
        fix = "Embed again."
        shards = read_rows(path, fix, ["files"])
        with reading(path, "a manifest of embeddings", fix):
            files = [file for shard in shards for file in shard["files"].values() if file is not None]
            return self.outputs + msgspec.convert(files, list[FileRecord])


COPY = "Or copy the rows to another folder, without embed.json, and name that one."
"""What to do with embeddings that were changed, beside to make them anew."""


def read_embed_sidecar(folder: Path) -> EmbedSidecar | None:
    """Read the sidecar of a folder of embeddings; None when there is none."""
    return read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar, run_again("embed", None, COPY))


def recorded_data(folder: Path) -> DataSpec:
    """Return the data that embeddings were made from, as they record it."""
    sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
    if sidecar is None:
        raise ClipcidError(
            f"{folder} does not record which data it was made from.",
            "Give the data as the first argument (a folder of shards, …).",
        )
    return sidecar.data
