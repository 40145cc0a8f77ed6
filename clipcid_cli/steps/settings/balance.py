"""Settings of `balance`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import BRIEF_SPINS, ReadingSettings, npz_array_option

LINKAGES = ("single", "star")
NEIGHBORS = ("exact", "partitioned")
SELECTIONS = ("central", "medoid", "first", "random", "similarity", "resolution")

PAIR_SUFFIXES = (".parquet", ".csv")

_HOW_MUCH = "How much to keep (exactly one)"
_FIRST = "What is dropped first"
_SETS = "Groups and the image kept of each"
_FILES = "Inputs and outputs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceSettings(ReadingSettings):
    """Settings of `balance`."""

    # A tenth faster on 2 cores.
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    data: str | None = argument(
        None,
        "Image-text data: a folder of tar shards, one tar, a pattern such as x/{00000..00099}.tar, a folder of images, or a "
        "csv, tsv or parquet list. By default, the data of the embeddings in the work directory.",
    )
    keep: float | None = option(
        None,
        "Share of the images to keep; the distance cut-off follows from it.",
        group=_HOW_MUCH,
        minimum=0.0,
        maximum=1.0,
        above_minimum=True,
    )
    threshold: float | None = option(
        None,
        "Distance cut-off: images up to this Euclidean distance of unit embeddings are near-duplicates.",
        group=_HOW_MUCH,
        minimum=0.0,
        maximum=2.0,
    )
    cosine_distance: float | None = option(
        None,
        "The cut-off as a cosine distance d, equal to --threshold √(2d).",
        group=_HOW_MUCH,
        minimum=0.0,
        maximum=2.0,
    )
    against: tuple[str, ...] = option(
        (),
        "Images that must not be kept again, such as evaluation sets: a folder of embeddings, or images, which are embedded "
        "with the same model. What lies within --against-threshold of one is dropped first. May be repeated.",
        group=_FIRST,
        metavar="EMB|DATA",
    )
    against_threshold: float | None = option(
        None,
        "Euclidean distance for --against, inclusive; by default that of --threshold or --cosine-distance.",
        group=_FIRST,
        minimum=0.0,
        maximum=2.0,
    )
    min_caption_similarity: float | None = option(
        None,
        "Smallest cosine similarity of an image to its caption: images below are dropped before groups are made, and --keep "
        "is a share of those that remain. Needs text embeddings.",
        group=_FIRST,
        minimum=-1.0,
        maximum=1.0,
    )
    max_caption_similarity: float | None = option(
        None,
        "Largest cosine similarity of an image to its caption, likewise.",
        group=_FIRST,
        minimum=-1.0,
        maximum=1.0,
    )
    linkage: str = option(
        "single",
        "`single`: a chain of near-duplicates is one group, as in the CLIP-CID paper. `star`: every dropped image is "
        "within the cut-off of its kept image.",
        group=_SETS,
        choices=LINKAGES,
    )
    select: str = option(
        "central",
        "Image to keep of each group: nearest to the mean (`central`), smallest sum of distances (`medoid`), first, random, "
        "most similar to its caption, or most pixels.",
        group=_SETS,
        choices=SELECTIONS,
    )
    max_per_cluster: int | None = option(
        None,
        "After repeats are dropped, keep at most so many images of each cluster of `clipcid cluster`, chosen by --select: "
        "nearest to the centroid (`central`), most similar to their captions, …",
        group=_SETS,
        minimum=1,
        metavar="N",
    )
    neighbors: str = option(
        "exact",
        "`exact` compares all pairs of images. `partitioned`, for tens of millions of images, compares only those in or "
        "near the same partition; an audit estimates how many near-duplicates it missed.",
        group=_SETS,
        choices=NEIGHBORS,
    )
    model: str | None = option(
        None,
        "Model to embed the data with if there are no embeddings yet; by default ViT-L-14.",
        group=_FILES,
        metavar="MODEL",
    )
    embeddings: Path | None = option(
        None,
        "Folder of embeddings in clip-retrieval's layout or of .npz files such as DataComp's; by default those in the work "
        "directory.",
        group=_FILES,
        operational=True,
    )
    npz_array: str | None = npz_array_option(_FILES)
    clusters: Path | None = option(
        None,
        "Folder of clusters for --max-per-cluster; by default those in the work directory.",
        group=_FILES,
        operational=True,
    )
    write_keys: Path | None = option(
        None,
        "Also write the keys of the kept images to a text file, one per line.",
        group=_FILES,
        metavar="FILE.txt",
        operational=True,
    )
    write_pairs: Path | None = option(
        None,
        "Also write a table of the dropped images, .parquet or .csv: `from`, the image kept instead (`to`) and their "
        "`distance`.",
        group=_FILES,
        metavar="FILE.parquet",
        operational=True,
    )
    write_uids: Path | None = option(
        None,
        "Also write the uids of the kept samples as a DataComp subset file, ready for its resharder.",
        group=_FILES,
        metavar="FILE.npy",
        operational=True,
    )
    write_shards: Path | None = option(
        None,
        "Also write the kept samples as new tar shards to this folder; members are copied byte for byte.",
        group=_FILES,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check that exactly one amount is given and that the settings can be combined."""
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
        if self.linkage == "star" and self.select != "central":
            raise UsageError(
                f"--select {self.select} cannot be combined with --linkage star, which itself determines the kept image.",
                "Omit one of the two.",
            )
        if self.max_per_cluster is not None and self.select == "medoid":
            raise UsageError(
                "--select medoid chooses one image of a group; it cannot choose several of a cluster.",
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

    @property
    def has_filters(self) -> bool:
        """Whether images are dropped before groups are made."""
        return self.has_window or bool(self.against)

    @property
    def has_window(self) -> bool:
        """Whether images are dropped by how similar they are to their captions."""
        return self.min_caption_similarity is not None or self.max_caption_similarity is not None

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
        if self.cosine_distance is not None:
            return math.sqrt(2.0 * self.cosine_distance)
        return self.threshold
