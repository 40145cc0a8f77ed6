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
_VIEWS = "Augmented views and captions"
VIEW_KINDS = ("crop", "strong", "mix")


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
    texts: Path | None = option(
        None,
        "Embed this UTF-8 file, a text a line, instead of images: more texts for the student's text tower "
        "(`clipcid distill --extra-texts`).",
        group=_MAKE,
        metavar="FILE",
    )
    out: Path | None = option(
        None,
        "Output folder; by default embeddings/<model> in the work directory, texts/<model> for --texts.",
        group=_MAKE,
        operational=True,
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
        "teacher's embedding of each view. A view takes 2 bytes x width + 64 (136 if any is a mixture).",
        group=_VIEWS,
        minimum=0,
        metavar="V",
    )
    view_kind: tuple[str, ...] = option(
        (),
        "Kinds of the views, in turn; may be repeated, or listed with commas. `crop`, the default: random crops and colors "
        "by the flags below. `strong`: crops of 30% of the area and more, strong colors. `mix`: two images, cropped by "
        "those flags, are mixed, with a weight of 0.5 to 1 for the first.",
        group=_VIEWS,
        metavar="KIND",
    )
    crop_scale: float = crop_scale_option(_VIEWS)
    color_jitter: float = color_jitter_option(_VIEWS)
    gray_probability: float = gray_probability_option(_VIEWS)
    text_variants: int = option(
        0,
        "Also embed this many variants of each image's captions: keywords dropped and shuffled, of prose sentences and "
        "clauses dropped. `clipcid distill` then shows variants too, each with the teacher's embedding of that very text. A "
        "variant takes 2 bytes x width.",
        group=_VIEWS,
        minimum=0,
        metavar="V",
    )

    def __post_init__(self) -> None:
        """Check what involves several fields."""
        super().__post_init__()
        if self.views and self.fast_decode:
            raise UsageError(
                "--views needs full-resolution images, which --fast-decode does not decode.", "Omit one of the two."
            )
        if self.texts is not None and (self.data is not None or self.views or self.text_variants or not self.text):
            raise UsageError(
                "--texts embeds a file of texts alone, without DATA, --views, --text-variants or --no-text.",
                "Give two commands: one for DATA, one for --texts.",
            )
        if self.texts is not None and self.fast_decode:
            raise UsageError("--texts decodes no images, --fast-decode decodes them faster.", "Omit --fast-decode.")
        if self.text_variants and not self.text:
            raise UsageError("--text-variants embeds captions, --no-text does not.", "Omit one of the two.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("view_kind", "crop_scale", "color_jitter", "gray_probability"):
            if not self.views and getattr(self, name) != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
                fix = f"Omit {flag}" + (", or add --views V, the number of views." if self.texts is None else ".")
                raise UsageError(f"{flag} was given, but no --views.", fix)
        for kind in self.view_kinds:
            if kind not in VIEW_KINDS:
                raise UsageError(f"--view-kind cannot be {kind!r}.", f"Choose from: {', '.join(VIEW_KINDS)}.")

    @property
    def view_kinds(self) -> tuple[str, ...]:
        """The kinds of the views: view v is of kind v modulo their number."""
        return tuple(kind for given in self.view_kind for kind in given.split(",")) or ("crop",)
