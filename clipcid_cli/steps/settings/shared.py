"""The flags that several subcommands have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from clipcid_cli.errors import DEFAULT_WORK, UsageError
from clipcid_cli.runtime.libraries import NO_SPINS
from clipcid_cli.steps.settings.fields import (
    ABOVE_0,
    AT_LEAST_1,
    FRACTION,
    Range,
    argument,
    given_fields,
    group,
    plain,
    setting_of,
    validate_values,
)

# About 0.1 ms: it bridges thousands of short parallel sections, and leaves the core to another process otherwise.
BRIEF_SPINS = "10000"

_run = group("How it runs")
_talk = group("What it prints")
_read = group("How data is read")
_input = group("Inputs")
_augment = group("Augmentation")

EMBEDDINGS_HELP = (
    "Folder of embeddings in clip-retrieval's layout, or of .npz files such as DataComp's; by default those in the work "
    "directory."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Settings of every step; each step's own dataclass adds to them."""

    # How long an idle OpenMP thread spins before it sleeps (GOMP_SPINCOUNT), where the user has not said.
    openmp_spins: ClassVar[str] = NO_SPINS

    work: Path = _run(
        DEFAULT_WORK, "Work directory: each step writes its output here, and the next one finds it.", operational=True
    )
    config: Path | None = _run(
        None,
        "TOML file with one table per command. Flags and environment variables take precedence; --no-FLAG turns a "
        "switch off.",
        operational=True,
    )
    device: str = _run("auto", "Device to compute on.", choices=("auto", "cpu", "cuda"), operational=True)
    precision: str = _run(
        "auto",
        "Floating-point format of the heavy computation; what `auto` chooses is printed.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    batch_size: int | None = _run(None, "Samples per batch; by default chosen by the step.", within=AT_LEAST_1)
    workers: int | None = _run(
        None,
        "Processes that read and decode data; by default one per core beyond the first, on a CPU at most 8.",
        within=Range(0),
        operational=True,
    )
    seed: int = _run(0, "Random seed.", within=Range(0))
    overwrite: bool = _run(
        False, "Replace the output of an earlier run with other settings or inputs.", operational=True
    )
    dry_run: bool = _run(
        False, "Check all inputs and report what would be done and at what cost; write nothing.", operational=True
    )
    json: bool = _talk(False, "Print the result on stdout as one JSON object.", operational=True)
    quiet: bool = _talk(False, "Print only warnings and errors.", operational=True)
    debug: bool = _talk(False, "Show the traceback of errors.", operational=True)

    def __post_init__(self) -> None:
        """Check ranges and choices; subclasses add their checks across fields and call this first."""
        validate_values(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedSettings(SharedSettings):
    """Settings of every step that joins rows by key."""

    keys: str = _read(
        "sample",
        "What identifies a sample: `sample` is its webdataset key; `shard` is shard name + `/` + key, for data whose "
        "keys repeat across shards.",
        choices=("sample", "shard"),
    )
    key_column: str = _read(
        "key",
        "Column with the keys of a list, or of the metadata of another tool's embeddings. Without one, the key is the image "
        "path in a list; in embeddings `image_path`, else `uid`, else file and row.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings(KeyedSettings):
    """Settings of every step that reads image-text data."""

    image_column: str = _read("filepath", "Column of a csv, tsv or parquet list with the image paths.")
    caption_column: str = _read("title", "Column of a list with the captions.")
    caption_key: tuple[str, ...] = _read(
        (),
        "Where the captions are, if not in the .txt of tars or the --caption-column of a list: an extension such as "
        "`syn.txt`, a field of the .json such as `json:recaption`, or a column. May be repeated: all are captions.",
        metavar="KEY",
    )
    caption_lines: bool = _read(
        False,
        "Each line of a .txt is a caption, as always in CLIP_benchmark folders; by default the whole text is one.",
    )
    max_bad_fraction: float = _read(
        0.01,
        "Fail when more than this share of the samples is unusable (unreadable images, missing captions, …).",
        within=FRACTION,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caption_key and self.caption_column != ReadingSettings.caption_column:
            raise UsageError(
                "--caption-column and --caption-key both say where the captions are.",
                f"Give --caption-key alone, and for several captions again: --caption-key {self.caption_column}",
            )

    @property
    def data_flags(self) -> dict[str, Any]:
        """The flags by which data is read, as far as they differ from their defaults: for the command of a fix."""
        of_data = ("keys", "image_column", "caption_column", "caption_key", "caption_lines", "key_column")
        return {field.name: getattr(self, field.name) for field in given_fields(self) if field.name in of_data}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingDataSettings(ReadingSettings):
    """Settings of every step that takes the collection of images and captions itself."""

    data: str | None = argument(
        None,
        "Images and captions: a folder of tar shards or of parquet files with images, one such file, a pattern such as "
        "laion/{00000..00099}.tar, a folder of images, or a csv, tsv or parquet list. By default, the data of the "
        "embeddings in the work directory.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingsSettings(KeyedSettings):
    """Settings of every step that reads embeddings."""

    npz_array: str | None = _input(
        None,
        "Array of image embeddings in .npz files, for example l14_img; by default the only one whose name ends in _img.",
        metavar="NAME",
        operational=True,  # outputs record the content of the array, not its name
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptSettings(EmbeddingsSettings):
    """Settings of every step that learns from the embeddings of kept images."""

    embeddings: tuple[Path, ...] = _input(
        (),
        f"{EMBEDDINGS_HELP} May be repeated: several teachers, joined by key.",
        operational=True,
    )
    teacher_weight: tuple[float, ...] = _input(
        (),
        "Weight of each of several teachers, in their order; by default equal.",
        within=ABOVE_0,
        metavar="X",
        operational=True,  # outputs record it beside the rows
    )
    keep_list: str | None = _input(
        None,
        "Keep list of `clipcid balance`: use only its kept images, or all with `none`. By default, the work directory's if "
        "there is one.",
        metavar="FILE",
        operational=True,
    )
    repair: str = _input(
        "auto",
        "`auto` repairs how the teacher pairs images with captions, by a linear map of its image embeddings, if that "
        "clearly improves held-out pairs; `none` leaves the teacher as it is.",
        choices=("auto", "none"),
        operational=True,  # outputs record the map that was used
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = len(self.teacher_weight)
        if weights not in (0, self.num_teachers):
            raise UsageError(
                f"--teacher-weight was given {weights} times, for {self.num_teachers} teachers.",
                "Give one for each teacher, in their order, or none.",
            )

    @property
    def num_teachers(self) -> int:
        return max(1, len(self.embeddings))

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        """The weight of each teacher; they add up to 1."""
        weights = self.teacher_weight or (1.0,) * self.num_teachers
        return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationSettings(SharedSettings):
    """Settings of every step that augments images."""

    crop_scale: float = _augment(
        0.9,
        "Smallest share of the image area that a random crop keeps; 1 disables cropping.",
        within=Range(0, 1, min_open=True),
    )
    color_jitter: float = _augment(
        0.0, "Strength of random changes in brightness, contrast and saturation.", within=FRACTION
    )
    gray_probability: float = _augment(0.0, "Probability of converting an image to grayscale.", within=FRACTION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ReadingSettings):
    """Settings of both evaluations."""

    model: str | None = argument(
        None,
        "Model to evaluate: a folder, architecture:tag or hf-hub:org/name. By default, the newest student in the work "
        "directory.",
    )
    data_root: Path = _read(Path("data"), "Folder with copies of the data sets given by name.", operational=True)


def given_flags(settings: SharedSettings) -> dict[str, Any]:
    """Return the flags by which a command makes the same again: those not at their default, as plain JSON values."""
    of_run = {field.name for field in dataclasses.fields(SharedSettings) if setting_of(field).operational}
    return {
        field.name: plain(getattr(settings, field.name))
        for field in given_fields(settings)
        if not setting_of(field).positional and field.name not in of_run
    }
