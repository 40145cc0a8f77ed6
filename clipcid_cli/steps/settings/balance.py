"""Settings of `balance`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.balance.linkages import LINKAGES
from clipcid_cli.steps.settings.gpu_plan import GpuPlanSettings
from clipcid_cli.steps.settings.shared import (
    AT_LEAST_1,
    BRIEF_SPINS,
    EMBEDDINGS_HELP,
    EmbeddingsSettings,
    Range,
    TrainingDataSettings,
    group,
)

NEIGHBORS = ("exact", "partitioned")
SELECTIONS = ("central", "medoid", "first", "random", "similarity", "resolution")

PAIR_SUFFIXES = (".parquet", ".csv")

_DISTANCE = Range(0, 2)
_COSINE = Range(-1, 1)

_amount = group("How much to keep (exactly one)")
_first = group("What is dropped first")
_sets = group("Sets and the image kept of each")
_input = group("Inputs")
_output = group("Further outputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceSettings(EmbeddingsSettings, TrainingDataSettings, GpuPlanSettings):
    """Settings of `balance`."""

    # A tenth faster on 2 cores.
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    # What decides the output by its value; what inputs hold does so, too.
    decisive: ClassVar = (
        "keep",
        "threshold",
        "cosine_distance",
        "linkage",
        "select",
        "neighbors",
        "max_per_cluster",
        "min_caption_similarity",
        "max_caption_similarity",
    )

    keep: float | None = _amount(
        None, "Share of the images to keep; the distance cut-off follows from it.", within=Range(0, 1, min_open=True)
    )
    threshold: float | None = _amount(
        None,
        "Distance cut-off: images up to this Euclidean distance of unit embeddings are near-duplicates.",
        within=_DISTANCE,
    )
    cosine_distance: float | None = _amount(
        None, "The cut-off as a cosine distance d, equal to --threshold √(2d).", within=_DISTANCE
    )
    against: tuple[str, ...] = _first(
        (),
        "Images that must not be kept again, such as evaluation sets: a folder of embeddings, or images, which are embedded "
        "with the same model. Images within --against-threshold of one are dropped first. May be repeated.",
        metavar="EMB|DATA",
    )
    against_threshold: float | None = _first(
        None,
        "Euclidean distance for --against, inclusive; by default that of --threshold or --cosine-distance.",
        within=_DISTANCE,
    )
    near: tuple[str, ...] = _first(
        (),
        "Images to stay close to, such as the training images of a benchmark: a folder of embeddings, or images, which are "
        "embedded with the same model. Of what the other filters leave, only images near one are kept. May be repeated.",
        metavar="EMB|DATA",
    )
    near_distance: float | None = _first(
        None, "Largest Euclidean distance from an image of --near, inclusive.", within=_DISTANCE
    )
    near_keep: float | None = _first(
        None,
        "Share of the images to keep that is nearest to those of --near; the distance follows from it.",
        within=Range(0, 1, min_open=True),
    )
    min_caption_similarity: float | None = _first(
        None,
        "Smallest cosine similarity of an image to its caption: images below it are dropped before sets are made, "
        "and --keep is a share of the rest. Needs text embeddings.",
        within=_COSINE,
    )
    max_caption_similarity: float | None = _first(
        None,
        "Largest cosine similarity of an image to its caption: images above it are dropped likewise.",
        within=_COSINE,
    )
    linkage: str = _sets(
        "single",
        " ".join(f"`{name}`: {linkage.help}" for name, linkage in LINKAGES.items()),
        choices=tuple(LINKAGES),
    )
    select: str = _sets(
        "central",
        "Image to keep of each set: nearest to the mean (`central`), smallest sum of distances (`medoid`), first, random, "
        "most similar to its caption, or most pixels.",
        choices=SELECTIONS,
    )
    max_per_cluster: int | None = _sets(
        None,
        "After repeats are dropped, keep at most this many images of each cluster of `clipcid cluster`, chosen by --select: "
        "nearest to the centroid (`central`), most similar to their captions, …",
        within=AT_LEAST_1,
    )
    neighbors: str = _sets(
        "exact",
        "`exact` compares all pairs of images. `partitioned`, for ten million images and more, compares only those "
        "in or near the same partition; an audit estimates how many near-duplicates it missed.",
        choices=NEIGHBORS,
    )
    embeddings: Path | None = _input(None, EMBEDDINGS_HELP, operational=True)
    model: str | None = _input(
        None, "Model to embed the data with if there are no embeddings yet; by default ViT-L-14.", metavar="MODEL"
    )
    clusters: Path | None = _input(
        None, "Folder of clusters for --max-per-cluster; by default those in the work directory.", operational=True
    )
    write_keys: Path | None = _output(
        None, "The keys of the kept images as a text file, one per line.", metavar="FILE.txt", operational=True
    )
    write_pairs: Path | None = _output(
        None,
        "A table of the dropped images, .parquet or .csv: `from`, the image kept instead (`to`) and their `distance`; with "
        "--against also images dropped for those of a `reference`.",
        metavar="FILE.parquet",
        operational=True,
    )
    write_uids: Path | None = _output(
        None,
        "The uids of the kept samples as a DataComp subset file, ready for its resharder.",
        metavar="FILE.npy",
        operational=True,
    )
    write_shards: Path | None = _output(
        None,
        "Folder for the kept samples as new tar shards; members are copied byte for byte.",
        metavar="DIR",
        operational=True,
    )
    write_data: Path | None = _output(
        None,
        "Folder for the kept samples in the form of the data: tar shards, parquet files, a list, or a folder of images.",
        metavar="DIR",
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = {"--keep": self.keep, "--threshold": self.threshold, "--cosine-distance": self.cosine_distance}
        given = [flag for flag, value in amounts.items() if value is not None]
        if len(given) != 1:
            raise UsageError(
                f"{' and '.join(given)} were given together." if given else "No amount to keep was given.",
                "Give exactly one of --keep, --threshold and --cosine-distance, for example --keep 0.563.",
            )
        if self.against and self.reference_distance is None:
            raise UsageError(
                "--against needs a distance, and that of --keep is only known when repeats have been searched.",
                "Add --against-threshold E, for example 0.2.",
            )
        if self.against_threshold is not None and not self.against:
            raise UsageError("--against-threshold was given without --against.", "Add --against EMB, or omit it.")
        self._check_near()
        if LINKAGES[self.linkage].chooses and self.select != "central":
            raise UsageError(
                f"--select {self.select} cannot be combined with --linkage {self.linkage}, which itself determines the kept "
                "image.",
                "Omit one of the two.",
            )
        if self.max_per_cluster is not None and self.select == "medoid":
            raise UsageError(
                "--select medoid chooses one image of a set; it cannot choose several of a cluster.",
                "Use --select central with --max-per-cluster.",
            )
        if self.clusters is not None and self.max_per_cluster is None:
            raise UsageError("--clusters was given without --max-per-cluster.", "Add --max-per-cluster N, or omit it.")
        low, high = self.min_caption_similarity, self.max_caption_similarity
        if low is not None and high is not None and low > high:
            raise UsageError(
                f"--min-caption-similarity {low:g} is above --max-caption-similarity {high:g}: no image is in between.",
                "Give a smaller minimum or a larger maximum.",
            )
        if self.write_pairs is not None and self.write_pairs.suffix not in PAIR_SUFFIXES:
            raise UsageError(
                f"--write-pairs {self.write_pairs} is neither a .parquet nor a .csv file.",
                f"Use a file name that ends in {' or '.join(PAIR_SUFFIXES)}.",
            )

        if self.write_shards is not None and self.write_data is not None:
            raise UsageError(
                "--write-shards and --write-data both write the kept samples.",
                "Give one of them: --write-data writes tars where the data is tars.",
            )

    def _check_near(self) -> None:
        amounts = {"--near-distance": self.near_distance, "--near-keep": self.near_keep}
        given = [flag for flag, value in amounts.items() if value is not None]
        if given and not self.near:
            raise UsageError(f"{given[0]} was given without --near.", "Add --near EMB, or omit it.")
        if self.near and len(given) != 1:
            raise UsageError(
                "--near-distance and --near-keep were given together."
                if given
                else "--near needs a distance or a share.",
                "Give exactly one of --near-distance and --near-keep, for example --near-keep 0.3.",
            )

    @property
    def named_references(self) -> list[tuple[str, str]]:
        """What images are compared with before sets are made: the flag and the name of each."""
        return [*(("--against", name) for name in self.against), *(("--near", name) for name in self.near)]

    @property
    def named_data(self) -> tuple[str, ...]:
        return (*super().named_data, *(name for _, name in self.named_references))

    @property
    def has_filters(self) -> bool:
        """Whether images are dropped before sets are made."""
        return self.has_window or bool(self.named_references)

    @property
    def has_window(self) -> bool:
        """Whether images are dropped by how similar they are to their captions."""
        return self.min_caption_similarity is not None or self.max_caption_similarity is not None

    @property
    def writes_samples(self) -> bool:
        """Whether the kept samples themselves are written."""
        return self.write_shards is not None or self.write_data is not None

    @property
    def reads_texts(self) -> bool:
        """Whether images are compared with their captions."""
        return self.has_window or self.select == "similarity"

    @property
    def reads_sizes(self) -> bool:
        """Whether the sizes of images decide which of them are kept."""
        return self.select == "resolution" and (self.keep != 1.0 or self.max_per_cluster is not None)

    @property
    def reference_distance(self) -> float | None:
        """The distance for `against`; None where there is none."""
        return self.distance if self.against_threshold is None else self.against_threshold

    @property
    def forest_kind(self) -> str:
        """Which kind of forest is searched, see `forest_path`."""
        return f"{self.neighbors}-filtered" if self.has_filters else self.neighbors

    @property
    def distance(self) -> float | None:
        """The cut-off as a Euclidean distance; None when a share to keep is given."""
        return self.threshold if self.cosine_distance is None else math.sqrt(2.0 * self.cosine_distance)
