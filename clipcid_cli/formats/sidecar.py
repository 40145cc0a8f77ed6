"""Sidecars: ``<step>.json`` beside an output, as types. A damaged or edited one is refused where it is read.

Entries that steps look into are attributes. Settings, counts and results, which are compared or given back as they are,
stay JSON values, and what is read of them is checked (`Sidecar.shapes`). Entries that a type does not name are ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.reading import reading

FORMAT_VERSION = 2

Kind = TypeVar("Kind", bound="Sidecar")

_Number = int | float
_Seconds = dict[str, _Number]
_Skipped = dict[str, int]
_Some = Annotated[int, msgspec.Meta(ge=1)]  # shares of it are shown
_Numbers = Annotated[list[_Number], msgspec.Meta(min_length=1)]


def _shape(**entries: Any) -> Any:
    """Return the type of an object with these entries, and perhaps others; of one that may be absent, type and default."""
    fields = ((name, *(kind if isinstance(kind, tuple) else (kind,))) for name, kind in entries.items())
    return msgspec.defstruct("Shape", fields, kw_only=True)


def _list_of(kind: Any) -> Any:
    return list[kind]


def _by_name(kind: Any) -> Any:
    return dict[str, kind]


class Run(msgspec.Struct, kw_only=True):
    """What decides an output: the settings, as JSON values, and the contents of the inputs."""

    settings: dict[str, Any]
    inputs: list[FileRecord]


class Sidecar(Run, kw_only=True):
    """What every sidecar holds.

    Attributes:
        outputs: The files that it stands for, relative to its folder.
        counts: Numbers of samples or rows read, used and skipped by reason.
        seconds: Time by phase.
        shapes: By the name of an entry that stays as it is, the type of what is read of it.
    """

    format_version: int
    tool: str
    tool_version: str
    step: str
    outputs: list[FileRecord] = []
    counts: dict[str, Any]
    seconds: _Seconds

    shapes: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        """Check the entries that stay as they are."""
        for name, shape in self.shapes.items():
            try:
                msgspec.convert(getattr(self, name), shape)
            except msgspec.ValidationError as error:
                raise ValueError(f"{error} of its entry {name!r}") from error

    def files(self, folder: Path) -> set[str]:
        """Return the files that a later output, where it lacks them, removes; relative to the sidecar's `folder`."""
        return {each.path for each in self.outputs}


class DataSpec(msgspec.Struct):
    """What opens data again: its name, ``--keys``, and the columns of a list."""

    spec: str
    keys: str
    image: str
    caption: str
    key: str


class ModelRecord(msgspec.Struct, kw_only=True):
    """The model that made embeddings: the fields of `ModelInfo`, and its scale of cosines."""

    spec: str
    weights_hash: str
    slug: str = ""
    architecture: str | None = None
    tag: str | None = None
    preprocess: dict[str, Any] = {}
    context_length: int = 0
    embed_dim: int = 0
    image_size: tuple[int, int] = (0, 0)
    parameters: int = 0
    tokenizer: str = ""
    config: dict[str, Any]
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        """Check the towers of the configuration."""
        msgspec.convert(self.config, _shape(text_cfg=dict[str, Any], vision_cfg=dict[str, Any]))


class EmbedMade(msgspec.Struct):
    """Settings of `embed`; those with a default are recorded where there are views or text variants."""

    text: bool
    keys: str
    fast_decode: bool
    precision: str
    batch_size: int
    preprocess: str
    views: int = 0
    view_kind: tuple[str, ...] = ("crop",)
    crop_scale: float = 0.9
    color_jitter: float = 0.0
    gray_probability: float = 0.0
    text_variants: int = 0
    seed: int = 0


class RowsSidecar(Sidecar, kw_only=True):
    """That of a folder of embeddings, whose manifest names the files."""

    model: ModelRecord

    def files(self, folder: Path) -> set[str]:
        """Return the files of the manifest too."""
        from clipcid_cli.formats.parquet import read_rows  # few commands need it

        path, fix = folder / "manifest.parquet", "Make the embeddings again."
        shards = read_rows(path, fix, ["files"])
        with reading(path, "a manifest of embeddings", fix):
            recorded = {file["path"] for shard in shards for file in shard["files"].values() if file is not None}
        return super().files(folder) | recorded


class EmbedSidecar(RowsSidecar, kw_only=True):
    """``embed.json``."""

    images_per_second: float | None
    data: DataSpec
    run: dict[str, Any] = {}

    shapes = {"settings": EmbedMade, "counts": _shape(images=int, skipped=_Skipped)}

    @property
    def made(self) -> EmbedMade:
        """What is read of the settings."""
        return msgspec.convert(self.settings, EmbedMade)


class TextsSidecar(RowsSidecar, kw_only=True):
    """``texts.json``, of `embed --texts`."""

    texts_per_second: float | None

    shapes = {"settings": _shape(precision=str, batch_size=int), "counts": _shape(texts=int, skipped=_Skipped)}


class ForestSidecar(Sidecar, kw_only=True):
    """``forest.json``: the distance up to which the forest is complete."""

    cutoff: float

    shapes = {"counts": _shape(images=int)}


class Pictures(msgspec.Struct):
    """The pictures of a report: how many are shown, shard and key of those that could not be read, and why not."""

    shown: int
    unread: list[tuple[str, str]]
    why: str


class BalanceSidecar(Sidecar, kw_only=True):
    """``balance.json``; the embeddings are named relative to the work directory."""

    embeddings: str
    flags: dict[str, Any]
    pictures: Pictures
    result: dict[str, Any]

    shapes = {
        "result": _shape(
            images=_Some,
            searched=_Some,
            kept=int,
            keep_ratio=_Number,
            threshold=_Number | None,
            components=int,
            largest_component=int,
            uncovered_ratio=_Number,
            other_linkage=_shape(linkage=str, kept=int, uncovered_ratio=_Number) | None,
            audit=_shape(near=int, sampled=int, kept=int, rate=_Number, low=_Number, high=_Number) | None,
            dropped_by=_shape(reference=int, caption=int, repeat=int, cluster=int),
            against=_shape(dropped=int, threshold=_Number, references=_list_of(_shape(name=str, nearest=int))) | None,
            caption_window=_shape(inside=int, below=int, above=int, without=int) | None,
            cluster_cap=_shape(most=int, clusters=int, capped=int, dropped=int) | None,
            skipped=_Skipped,
            seconds=_Seconds,
        )
    }


class ClusterSidecar(Sidecar, kw_only=True):
    """``cluster.json``.

    Attributes:
        embeddings: Relative to the work directory.
        keep_list: None where all images were clustered.
        model: None for embeddings of another tool.
        temperatures: By tower, τ_T of the soft labels.
    """

    embeddings: str
    keep_list: FileRecord | None
    flags: dict[str, Any]
    model: ModelRecord | None
    num_nearest: int
    temperatures: dict[str, float]
    result: dict[str, Any]

    shapes = {
        "counts": _shape(skipped=_Skipped),
        "temperatures": _shape(image=float),
        "result": _shape(images=_Some, clusters=int, objective=_Number, iterations=int, seconds=_Seconds),
    }


class LossWeight(msgspec.Struct):
    """What is read of the weight of a loss."""

    value: _Number


class DistillMade(msgspec.Struct):
    """What is read of the settings of `distill`."""

    losses: dict[str, LossWeight]
    val_fraction: float
    ema: float | None = None


class AppliedKeepList(msgspec.Struct):
    """A keep list that training applied, and how many of its images it keeps."""

    path: str
    kept: int
    images: _Some


class DistillSidecar(Sidecar, kw_only=True):
    """``distill.json``; without a keep list all samples were used."""

    model: dict[str, Any]
    data: DataSpec
    keep_list: AppliedKeepList | None
    result: dict[str, Any]

    shapes = {
        "settings": DistillMade,
        "counts": _shape(read=int, used=int),
        "result": _shape(
            steps=int,
            samples=int,
            samples_per_second=_Number,
            losses=dict[str, _Number],
            metrics=dict[str, _Number],
        ),
    }

    @property
    def made(self) -> DistillMade:
        """What is read of the settings."""
        return msgspec.convert(self.settings, DistillMade)


_LINES = _shape(source=str, number=int, hash=str)


class EvaluationSidecar(Sidecar, kw_only=True):
    """One in ``eval/sidecars/``; of a classification it says where class names and templates are from."""

    prompts: dict[str, Any] | None = None

    shapes = {"prompts": _shape(class_names=_LINES, templates=_LINES) | None}


_CALIBRATION = _shape(temperature=_Number, expected_calibration_error=_Number, images=int)


class ZeroshotSidecar(EvaluationSidecar, kw_only=True):
    """One of `eval-zeroshot`."""

    images_per_second: float
    customary: str
    intervals: dict[str, tuple[float, float]]
    calibration: dict[str, Any] | None
    per_class: list[dict[str, Any]]
    examples: list[dict[str, Any]]

    shapes = EvaluationSidecar.shapes | {
        "settings": _shape(multi_label=bool, templates=list[str], precision=str, batch_size=int),
        "counts": _shape(images=int, skipped=_Skipped),
        "calibration": _shape(all=_CALIBRATION, before=_CALIBRATION | None, after=_CALIBRATION | None) | None,
        "per_class": _list_of(_shape(images=int, value=_Number | None)),  # of a class without images it is null
        "examples": _list_of(_shape(key=str, label=str, predicted=str, path=str, offset=int, size=int | None)),
    }


class LinearSidecar(EvaluationSidecar, kw_only=True):
    """One of `eval-linear`."""

    result: dict[str, Any]
    solution: dict[str, Any]
    sweep: list[dict[str, Any]]

    shapes = {
        "result": _shape(
            metric=str,
            c=_Number,
            validation_score=_Number,
            sweep=_shape(c=_Numbers, score=_Numbers),
            shots=_list_of(
                _shape(
                    shots=int,
                    images=int,
                    c=_Numbers,
                    metrics=_by_name(_shape(mean=_Number | None, std=_Number | None)),
                )
            ),
            images=int,
            train_images=int,
            validation_images=int,
            classes=int,
        )
    }


_ROWS = (_shape(max_difference=_Number, min_cosine=_Number) | msgspec.UnsetType, msgspec.UNSET)


class ExportSidecar(Sidecar, kw_only=True):
    """``export.json``; `written` names all files."""

    model: dict[str, Any]
    written: list[str]
    parity: dict[str, Any]

    shapes = {
        "parity": _by_name(
            _shape(
                precision=str,
                bytes=int,
                images_per_second=_Number,
                agreement=(_Number | None, None),
                image=_ROWS,
                text=_ROWS,
                dense=_ROWS,
                zeroshot=_shape(
                    measure=str,
                    images=int,
                    agreement=_Number,
                    value=_Number,
                    pytorch=_Number,
                    drop=_Number,
                    gated=bool,
                )
                | None,
            )
        )
    }

    def files(self, folder: Path) -> set[str]:
        """Return the files of the export."""
        return set(self.written)


def sidecar_path(folder: Path, step: str) -> Path:
    """Return the path of the sidecar of a step's output."""
    return folder / f"{step}.json"


def read_sidecar(path: Path, kind: type[Kind], fix: str | None = None) -> Kind | None:
    """Read a sidecar; None when there is none.

    Args:
        fix: What to do about one that is damaged, or of an earlier version.
    """
    if not path.exists():
        return None
    with reading(path, "a sidecar of clipcid", fix or "Remove it, or choose another folder."):
        content = json.loads(path.read_bytes())  # msgspec's own parser refuses names of files that are not UTF-8
        version = msgspec.convert(content["format_version"], int)
        if version < FORMAT_VERSION:
            raise ClipcidError(
                f"{path} was written by an earlier clipcid, in format version {version}; this one has {FORMAT_VERSION}.",
                fix or "Make the output again: give its command with --overwrite.",
            )
        if version > FORMAT_VERSION:
            raise ClipcidError(
                f"{path} has format version {version}; this clipcid {__version__} knows up to {FORMAT_VERSION}.",
                "Upgrade clipcid, or choose another folder.",
            )
        return msgspec.convert(content, kind)


def make_sidecar(kind: type[Kind], step: str, run: Run, entries: dict[str, Any]) -> Kind:
    """Return the sidecar of a run, as `read_sidecar` will."""
    content = {"format_version": FORMAT_VERSION, "tool": "clipcid", "tool_version": __version__, "step": step}
    seconds = {phase: round(value, 3) for phase, value in entries["seconds"].items()}
    content |= {"settings": run.settings, "inputs": run.inputs, **entries, "seconds": seconds}
    assert content.keys() <= {*kind.__struct_fields__}, content.keys() - {*kind.__struct_fields__}
    return msgspec.convert(msgspec.to_builtins(content, enc_hook=lambda number: number.item()), kind)  # NumPy's numbers
