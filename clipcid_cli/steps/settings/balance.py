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
        if self.linkage == "star" and self.select != "central":
            raise UsageError(
                f"--select {self.select} cannot be combined with --linkage star, which itself determines the kept image.",
                "Omit one of the two.",
            )
        if self.write_pairs is not None and self.write_pairs.suffix not in PAIR_SUFFIXES:
            raise UsageError(
                f"--write-pairs {self.write_pairs} is neither a .parquet nor a .csv file.",
                f"Use a file name that ends in {' or '.join(PAIR_SUFFIXES)}.",
            )

    @property
    def distance(self) -> float | None:
        """The cut-off as a Euclidean distance; None when a share to keep is given."""
        if self.cosine_distance is not None:
            return math.sqrt(2.0 * self.cosine_distance)
        return self.threshold
