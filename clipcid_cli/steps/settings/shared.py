"""The flags every subcommand has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from clipcid_cli.steps.settings.fields import check_ranges, option, plain, setting_of

DEFAULT_WORK = Path("clipcid-work")

_RUN = "How it runs"
_TALK = "What it prints"
_READ = "How data is read"


NO_SPINS = "0"
# About 0.1 ms: it bridges thousands of short parallel sections, and leaves the core to another process otherwise.
BRIEF_SPINS = "10000"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Settings of every step; each step's own dataclass adds to them."""

    # How long an idle OpenMP thread spins before it sleeps (GOMP_SPINCOUNT), where the user has not said.
    openmp_spins: ClassVar[str] = NO_SPINS

    work: Path = option(
        DEFAULT_WORK,
        "Work directory: each step writes its output here, and the next one finds it.",
        group=_RUN,
        operational=True,
    )
    config: Path | None = option(
        None,
        "TOML file with one table per command. Flags and environment variables take precedence; --no-FLAG turns a "
        "switch off.",
        group=_RUN,
        operational=True,
    )
    device: str = option("auto", "Device to compute on.", group=_RUN, choices=("auto", "cpu", "cuda"), operational=True)
    precision: str = option(
        "auto",
        "Floating-point format of the heavy computation; what `auto` chooses is printed.",
        group=_RUN,
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    batch_size: int | None = option(None, "Samples per batch; by default chosen by the step.", group=_RUN, minimum=1)
    workers: int | None = option(
        None,
        "Processes that read and decode data; by default one per core beyond the first, on a CPU at most 8.",
        group=_RUN,
        minimum=0,
        operational=True,
    )
    seed: int = option(0, "Random seed.", group=_RUN, minimum=0)
    overwrite: bool = option(
        False, "Replace the output of an earlier run with other settings or inputs.", group=_RUN, operational=True
    )
    dry_run: bool = option(
        False,
        "Check all inputs and report what would be done and at what cost; write nothing.",
        group=_RUN,
        operational=True,
    )
    json: bool = option(False, "Print the result on stdout as one JSON object.", group=_TALK, operational=True)
    quiet: bool = option(False, "Print only warnings and errors.", group=_TALK, operational=True)
    debug: bool = option(False, "Show the traceback of errors.", group=_TALK, operational=True)

    def __post_init__(self) -> None:
        """Check ranges and choices; subclasses add their checks across fields and call this first."""
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedSettings(SharedSettings):
    """Settings of every step that joins rows by key."""

    keys: str = option(
        "sample",
        "What identifies a sample: `sample` is its webdataset key; `shard` is shard name + `/` + key, for data whose "
        "keys repeat across shards.",
        group=_READ,
        choices=("sample", "shard"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings(KeyedSettings):
    """Settings of every step that reads image-text data."""

    image_column: str = option("filepath", "Column of a csv, tsv or parquet list with the image paths.", group=_READ)
    caption_column: str = option("title", "Column of a list with the captions.", group=_READ)
    key_column: str = option("key", "Column of a list with the keys; without one, the path is the key.", group=_READ)
    max_bad_fraction: float = option(
        0.01,
        "Fail when more than this share of the samples is unusable (unreadable images, missing captions, …).",
        group=_READ,
        minimum=0.0,
        maximum=1.0,
    )

    @property
    def data_flags(self) -> dict[str, Any]:
        """The flags by which data is read, as far as they differ from their defaults: for the command of a fix."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in ("keys", "image_column", "caption_column", "key_column")}
        return {name: value for name, value in given.items() if value != defaults[name]}


def npz_array_option(group: str) -> Any:
    """Declare the flag that names the array of image embeddings in ``.npz`` files, for steps that read embeddings."""
    return option(
        None,
        "Array of image embeddings in .npz files such as DataComp's metadata, for example l14_img; by default the only "
        "one whose name ends in _img.",
        group=group,
        metavar="NAME",
        # As `embeddings`: outputs record the content of the array, not its name.
        operational=True,
    )


def given_flags(settings: SharedSettings) -> dict[str, Any]:
    """Return the flags by which a command makes the same again: those not at their default, as plain JSON values."""
    of_run = {field.name for field in dataclasses.fields(SharedSettings) if setting_of(field).operational}
    return {
        field.name: plain(value)
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != field.default
        and not setting_of(field).positional
        and field.name not in of_run
    }
