"""How a setting is declared: a field that says how it is spelled, checked and explained; and what several commands have.

The command line, environment variables, the configuration file, the generated reference and the sidecars all read the same
field, so a default, a range or a help text is written once.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from clipcid_cli.errors import DEFAULT_WORK, UsageError
from clipcid_cli.formats.data.addresses import without_query
from clipcid_cli.runtime.libraries import NO_SPINS

_KEY = "clipcid"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # of which a Path keeps one slash
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_TEXT_LISTS = (".csv", ".tsv")
# How the names of lists end that are read by a flag.
_LISTS = {"list_root": (*_TEXT_LISTS, ".parquet"), "list_separator": _TEXT_LISTS, "list_encoding": _TEXT_LISTS}

# About 0.1 ms: it bridges thousands of short parallel sections, and leaves the core to another process otherwise.
BRIEF_SPINS = "10000"


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. NaN and infinity are in no range."""

    minimum: float
    maximum: float = math.inf
    min_open: bool = False  # whether the minimum itself is refused, as for a fraction that may not be 0

    def __contains__(self, value: float) -> bool:
        is_above = self.minimum < value if self.min_open else self.minimum <= value
        return is_above and value <= self.maximum and math.isfinite(value)

    def __str__(self) -> str:  # as click writes it
        if self.maximum == math.inf:
            return f"x{'>' if self.min_open else '>='}{self.minimum:g}"
        return f"{self.minimum:g}{'<' if self.min_open else '<='}x<={self.maximum:g}"


FRACTION = Range(0, 1)
AT_LEAST_1 = Range(1)
ABOVE_0 = Range(0, min_open=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one field beside its name, type and default."""

    help: str
    group: str = "Options"  # heading under which ``--help`` lists it
    flag: str | None = None  # where it is not spelled as the field
    positional: bool = False
    choices: tuple[str, ...] | None = None
    within: Range | None = None  # every number has one
    metavar: str | None = None
    # Whether it leaves the outputs' content as it is (number of workers, verbosity, …): it then never makes one stale.
    operational: bool = False
    may_be_url: bool = False  # of a path
    may_have_suffix: bool = False  # of a whole number: whether 250k, 4M and 1.28G are numbers


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002  # the word click and every reader use for it
    """Declare a flag, see `Setting`. The field's type says how it is parsed: ``tuple[str, ...]`` may be repeated."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, **more)})


def group(heading: str) -> Callable[..., Any]:
    """Return `option` for the flags under one heading of the help page."""
    return functools.partial(option, group=heading)


def argument(default: Any, help: str) -> Any:  # noqa: A002
    """Declare a positional argument; one of type ``tuple[str, ...]`` takes all that are left."""
    return option(default, help, positional=True)


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Return what was declared for a field of a settings dataclass."""
    setting = field.metadata[_KEY]
    assert isinstance(setting, Setting)
    return setting


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return the spelling of a field on the command line, e.g. ``--num-clusters`` (or ``DATA`` when positional)."""
    setting = setting_of(field)
    if setting.positional:
        return field.name.upper()
    return setting.flag or "--" + field.name.replace("_", "-")


def given_fields(settings: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields that are not at their default."""
    return [field for field in dataclasses.fields(settings) if getattr(settings, field.name) != field.default]


def validate_values(settings: Any) -> None:
    """Check every number, choice and name of a settings object against what its fields declare.

    click checks the command line already, but for NaN; this also covers settings made in Python.
    """
    for field in dataclasses.fields(settings):
        setting = setting_of(field)
        flag = flag_of(field)
        value = getattr(settings, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path) and any("\ud800" <= letter <= "\udfff" for letter in str(item)):
                # Linux allows any bytes, which Python keeps as lone surrogates.
                raise UsageError(
                    f"{flag} is {str(item)!a}, which is not UTF-8.",
                    "Rename the folder or file: parquet files can only be opened by names that are text.",
                )
            url = url_of(item) if isinstance(item, Path) and not setting.may_be_url else None
            if url is not None:
                raise UsageError(
                    f"{flag} is a URL, {url}: only data is read from URLs; folders and files must be on a disk.",
                    "Give a local path, or that of a mounted bucket.",
                )
            if isinstance(item, str) and not item and field.name != "data":  # as data it is refused with its forms
                raise UsageError(f"{flag} is empty.", f"If a shell variable holds it, set that; or omit {flag}.")
            if isinstance(item, str | Path) and "\0" in str(item):
                raise UsageError(
                    f"{flag} holds a NUL character: {str(item)!a}.", "Remove it: no name of a file has one."
                )
            if setting.choices is not None and item is not None and item not in setting.choices:
                raise UsageError(f"{flag} cannot be {item!r}.", f"Choose one of: {', '.join(setting.choices)}.")
            if setting.within is not None and item is not None and item not in setting.within:
                raise UsageError(
                    f"{flag} {item:g} is not in the range {setting.within}.", f"Give {flag} a value in that range."
                )


def url_of(path: Path) -> str | None:
    """Return the URL that was given as a path; None of a path."""
    match = _URL.match(str(path))
    return None if match is None else f"{match[1]}://{str(path)[match.end() :]}"


def output_settings(settings: Any) -> dict[str, Any]:
    """Return the settings that decide what a step writes, as plain JSON values, for its sidecar."""
    return {
        field.name: plain(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if not setting_of(field).operational and field.name not in settings.omitted
    }


def plain(value: Any) -> Any:
    """Turn paths and tuples into what JSON knows."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


_run = group("How it runs")
_talk = group("What it prints")
_read = group("How data is read")
_input = group("Inputs")
_augment = group("Augmentation")

EMBEDDINGS_HELP = (
    "Folder of embeddings in clip-retrieval's layout, of .npz files such as DataComp's, or of parquet files with a column "
    "of them, or one such file; by default those in the work directory."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Settings of every step; each step's own dataclass adds to them."""

    # How long an idle OpenMP thread spins before it sleeps (GOMP_SPINCOUNT), where the user has not said.
    openmp_spins: ClassVar[str] = NO_SPINS
    omitted: ClassVar[tuple[str, ...]] = ()  # settings of every step that have no effect on this one, and no flag
    writes_work: ClassVar[bool] = True  # whether the step writes to the work directory

    work: Path = _run(
        DEFAULT_WORK, "Work directory: each step writes its output here, and the next one finds it.", operational=True
    )
    trust_work: bool = _run(
        False,
        "Write to a work directory that belongs to another user, or has a linked folder that leads out of it.",
        operational=True,
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
class TrustSettings(SharedSettings):
    """Settings of every step that reads samples: what is allowed to data that someone else made."""

    # Operational: it opens what would be an error. No record of an earlier run gives the permission again.
    allow_scheme: tuple[str, ...] = _read(
        (),
        "Scheme that the cells of a list may use beside http and https, such as s3; may be repeated. It is read with your "
        "credentials.",
        metavar="SCHEME",
        operational=True,
    )
    # Operational, for it makes no earlier output stale; embeddings record it where it is not the default.
    max_sample_bytes: int = _read(
        64 * 2**20,
        "Skip samples with a file, image or caption, larger than this.",
        within=AT_LEAST_1,
        metavar="BYTES",
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.allow_scheme:
            if not _SCHEME.fullmatch(name):
                raise UsageError(
                    f"--allow-scheme takes the name of a scheme in lower case, and {name!r} is none.",
                    "Give it as --allow-scheme s3, for addresses such as s3://bucket/image.jpg.",
                )

    @property
    def trust(self) -> dict[str, Any]:
        """What data is opened with."""
        return {"schemes": self.allow_scheme, "max_sample_bytes": self.max_sample_bytes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings(TrustSettings, KeyedSettings):
    """Settings of every step that reads image-text data."""

    image_column: str = _read("filepath", "Column of a csv, tsv or parquet list with the image paths.")
    caption_column: str = _read("title", "Column of a list with the captions.")
    list_root: Path | None = _read(
        None, "Folder that relative paths in a list are in; by default that of the list.", metavar="DIR"
    )
    list_separator: str | None = _read(
        None,
        "What separates the cells of a csv or tsv list, such as `;`; by default a comma, tab or semicolon, as its header "
        "has.",
        metavar="TEXT",
    )
    list_encoding: str | None = _read(
        None,
        "Encoding of a csv or tsv list, such as `latin-1`; by default UTF-8, or UTF-16 where it is marked as such.",
    )
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
                f"Give --caption-key alone, repeated for several captions: --caption-key {self.caption_column}",
            )
        try:
            codecs.lookup(self.list_encoding or "utf-8")
        except LookupError as error:
            raise UsageError(
                f"--list-encoding {self.list_encoding} is no encoding that Python knows.",
                "Give utf-8, utf-16, latin-1, …",
            ) from error

    @property
    def named_data(self) -> tuple[str, ...]:
        """All data that the command names and reads by these flags."""
        return ()

    def list_flags(self, data: str) -> dict[str, Any]:
        """Return the flags of lists for data that the command names: those that can only mean other data of it are None."""
        flags = dict.fromkeys(_LISTS)
        for flag, endings in _LISTS.items():
            if getattr(self, flag) is None:
                continue
            are_lists = {name: without_query(name).lower().endswith(endings) for name in (*self.named_data, data)}
            if are_lists[data] or not any(are_lists.values()):
                flags[flag] = getattr(self, flag)
        return flags

    @property
    def data_flags(self) -> dict[str, Any]:
        """The flags by which data is read, as far as they differ from their defaults: for the command of a fix."""
        of_data = (
            *("keys", "image_column", "caption_column", "caption_key", "caption_lines", "key_column"),
            *("list_root", "list_separator", "list_encoding", "allow_scheme", "max_sample_bytes"),
        )
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

    @property
    def named_data(self) -> tuple[str, ...]:
        return () if self.data is None else (self.data,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingsSettings(KeyedSettings):
    """Settings of every step that reads embeddings."""

    npz_array: str | None = _input(
        None,
        "Array of image embeddings in .npz files, for example l14_img; by default the only one whose name ends in _img.",
        metavar="NAME",
        operational=True,  # outputs record the content of the array, not its name
    )
    embedding_column: str | None = _input(
        None,
        "Column of image embeddings in parquet files, lists of numbers; by default the only one that is not of texts.",
        metavar="NAME",
        operational=True,
    )

    @property
    def array_name(self) -> str | None:
        """Name of the array, or of the column, of the image embeddings; None for the one that is found."""
        return self.embedding_column or self.npz_array


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
    def named_embeddings(self) -> Path | None:
        """The embeddings that were named, of several the first."""
        return next(iter(self.embeddings), None)

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
