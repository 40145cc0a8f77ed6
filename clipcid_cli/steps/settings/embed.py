"""Settings of `embed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.gpu_plan import GpuPlanSettings
from clipcid_cli.steps.settings.shared import (
    AT_LEAST_1,
    AugmentationSettings,
    Range,
    ReadingSettings,
    TrainingDataSettings,
    flag_of,
    given_fields,
    group,
)

DEFAULT_MODEL = "ViT-L-14"
VIEW_KINDS = ("crop", "strong", "mix")

# What other steps take from the table or the variables of `embed` where they embed; they read data as their own flags say.
_TAKEN = (
    *("batch_size", "precision", "model", "text", "fast_decode", "text_variants"),
    *("views", "view_kind", "crop_scale", "color_jitter", "gray_probability"),
)
_configured = [dict[str, Any]()]

_embed = group("Embedding")
_augment = group("Augmentation")


@contextmanager
def embedding_as(given: dict[str, Any]) -> Iterator[None]:
    """Let other steps embed as the table or the variables of `embed` say, whose values are `given`, by field."""
    _configured.append({name: value for name, value in given.items() if name in _TAKEN})
    try:
        yield
    finally:
        _configured.pop()


def configured() -> dict[str, Any]:
    """Return the settings of `embed`, by field, that its table or its variables give to other steps."""
    return _configured[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedSettings(AugmentationSettings, TrainingDataSettings, GpuPlanSettings):
    """Settings of `embed`."""

    model: str | None = _embed(
        None,
        "CLIP model: an architecture, architecture:tag, hf-hub:org/name, or a folder with open_clip_config.json and "
        f"weights. By default {DEFAULT_MODEL}; without DATA the model of the embeddings whose data is taken.",
        metavar="MODEL",
    )
    text: bool = _embed(True, "Also embed the captions.")
    out: Path | None = _embed(
        None,
        "Output folder; by default embeddings/<model> in the work directory.",
        operational=True,
    )
    batch_size: int | None = group("How it runs")(
        None,
        "Images per batch in each process; by default 64 on a CPU, 256 on a GPU. It affects the last bits of the "
        "embeddings.",
        within=AT_LEAST_1,
    )
    fast_decode: bool = _embed(
        False,
        "Decode large JPEGs at reduced resolution, at least twice the model's input size. Faster; pixels differ slightly.",
    )
    views: int = _augment(
        0,
        "Also embed this many augmented views of each image. `clipcid distill` then trains on these views with the "
        "teacher's embedding of each view. A view takes 2 bytes x width + 64 (136 if any is a mixture).",
        within=Range(0),
        metavar="V",
    )
    view_kind: tuple[str, ...] = _augment(
        (),
        "Kinds of the views, in turn; may be repeated, or listed with commas. `crop`, the default: random crops and colors "
        "by the flags above. `strong`: crops of 30% of the area and more, strong colors. `mix`: two images, cropped by "
        "those flags, are mixed, with a weight of 0.5 to 1 for the first.",
        metavar="KIND",
    )
    text_variants: int = _augment(
        0,
        "Also embed this many variants of each image's captions: keywords are dropped and shuffled; prose loses "
        "sentences and clauses. They teach the text tower alone (`clipcid distill --extra-texts`). A variant takes 2 "
        "bytes x width.",
        within=Range(0),
        metavar="V",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views and self.fast_decode:
            raise UsageError(
                "--views needs full-resolution images, which --fast-decode does not decode.", "Omit one of the two."
            )
        if self.text_variants and not self.text:
            raise UsageError("--text-variants embeds captions, --no-text does not.", "Omit one of the two.")
        for field in given_fields(self):
            if not self.views and field.name in ("view_kind", "crop_scale", "color_jitter", "gray_probability"):
                flag = flag_of(field)
                raise UsageError(
                    f"{flag} was given, but no --views.", f"Omit {flag}, or add --views V, the number of views."
                )
        for kind in self.view_kinds:
            if kind not in VIEW_KINDS:
                raise UsageError(f"--view-kind cannot be {kind!r}.", f"Choose from: {', '.join(VIEW_KINDS)}.")

    @classmethod
    def asked_by(cls, step: ReadingSettings, **chosen: Any) -> EmbedSettings:
        """Return the settings by which another step asks for embeddings: data is read as it reads data."""
        read_so = {field.name: getattr(step, field.name) for field in dataclasses.fields(ReadingSettings)}
        return cls(**read_so | {"batch_size": None, "precision": "auto"} | chosen)

    @property
    def view_kinds(self) -> tuple[str, ...]:
        """The kinds of the views: view v is of kind v modulo their number."""
        return tuple(kind for given in self.view_kind for kind in given.split(",")) or ("crop",)
