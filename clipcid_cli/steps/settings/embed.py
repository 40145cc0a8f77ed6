"""Settings of `embed`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.data.addresses import is_written
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
    url_of,
)

DEFAULT_MODEL = "ViT-L-14"
_PART = re.compile(r"(?:auto|(?:auto|(\d{1,9}))/([1-9]\d{0,8}))")
VIEW_KINDS = ("crop", "mix")

# What other steps take from the table or the variables of `embed` where they embed; they read data as their own flags say.
_TAKEN = (
    *("batch_size", "precision", "model", "text", "fast_decode", "text_variants"),
    *("views", "view_kind", "crop_scale", "color_jitter", "gray_probability"),
)
_configured = [dict[str, Any]()]

_embed = group("Embedding")
_parts = group("Parts")
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
        "Output folder; by default embeddings/<model> in the work directory. With --part also the URL of a folder in an "
        "object store, such as s3://bucket/laion.",
        operational=True,
        may_be_url=True,
    )
    part: str | None = _parts(
        None,
        "Embed only this part of the shards, of N parts that are numbered from 0: those whose number is I modulo N. Parts "
        "may run anywhere, at any time, and again. `auto` takes both from SLURM's or SkyPilot's variables, `auto/N` the "
        "number alone, also from Kubernetes'.",
        metavar="I/N",
        operational=True,
    )
    join: Path | None = _parts(
        None,
        "Join the parts that were written to this --out: in place, or from an object store to the local --out.",
        metavar="PLACE",
        operational=True,
        may_be_url=True,
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
        "by the flags above. `mix`: two images, cropped by those flags, are mixed, with a weight of 0.5 to 1 for the "
        "first.",
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
        self._validate_parts()
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
        if self.views:
            self._validate_view_kinds()

    def _validate_view_kinds(self) -> None:
        for kind in self.view_kinds:
            if kind not in VIEW_KINDS:
                raise UsageError(f"--view-kind cannot be {kind!r}.", f"Choose from: {', '.join(VIEW_KINDS)}.")

    def _validate_parts(self) -> None:
        """Refuse a part that is none, and flags that parts and joining do without."""
        if self.part is not None:
            match = _PART.fullmatch(self.part)
            if match is None or (match[1] and int(match[1]) >= int(match[2])):
                raise UsageError(
                    f"--part cannot be {self.part!r}.",
                    "Give the number of the part, from 0, and how many there are: --part 0/8 to --part 7/8, or auto/8.",
                )
            if self.dry_run:
                raise UsageError(
                    "--dry-run estimates what all data takes, not a part of it.",
                    "Omit --part, and an --out that is a URL; a part takes its share.",
                )
            if self.join is not None:
                raise UsageError("--part embeds, --join joins what was embedded.", "Omit one of the two.")
        url = None if self.out is None else url_of(self.out)
        if url is not None:
            self._validate_url("--out", url)
            if self.part is None:
                raise UsageError(
                    f"--out is a URL, {url}, to which only parts are written.",
                    f"Add --part 0/1, then run clipcid embed --join {url}; or give a local path.",
                )
            if self.overwrite:
                raise UsageError("--overwrite removes nothing behind a URL.", "Give another --out.")
        if self.join is not None:
            self._validate_join(self.join)

    def _validate_join(self, place: Path) -> None:
        url = url_of(place)
        if url is not None:
            self._validate_url("--join", url)
        elif self.out is not None:
            raise UsageError("--join joins the parts in a folder in place.", "Omit --out.")
        if self.data is not None or self.dry_run:
            raise UsageError("--join takes no DATA and no --dry-run: the parts record all.", "Omit them.")

    def _validate_url(self, flag: str, url: str) -> None:
        if not is_written(url):
            raise UsageError(f"{flag} is {url}, which is no object store.", "Give s3://, gs://, …, or a local path.")

    @classmethod
    def asked_by(cls, step: ReadingSettings, **chosen: Any) -> EmbedSettings:
        """Return the settings by which another step asks for embeddings: data is read as it reads data."""
        read_so = {field.name: getattr(step, field.name) for field in dataclasses.fields(ReadingSettings)}
        if chosen.get("data") is not None:
            read_so |= step.list_flags(chosen["data"])
        return cls(**read_so | {"batch_size": None, "precision": "auto"} | chosen)

    @property
    def view_kinds(self) -> tuple[str, ...]:
        """The kinds of the views: view v is of kind v modulo their number."""
        return tuple(kind for given in self.view_kind for kind in given.split(",")) or ("crop",)
