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
_SETS = "Sets and the image that stands for each"
_FILES = "What is read and written"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceSettings(ReadingSettings):
    """Settings of `balance`."""

    # A tenth faster on 2 cores.
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    data: str | None = argument(
        None,
        "Image-text data: a folder of tar shards, a tar, a pattern such as x/{00000..00099}.tar, a folder of images, a csv, "
        "tsv or parquet list. By default what the work directory's embeddings were made of.",
    )
    keep: float | None = option(
        None,
        "Share of the images to keep; the cut-off follows from it.",
        group=_HOW_MUCH,
        minimum=0.0,
        maximum=1.0,
        above_minimum=True,
    )
    threshold: float | None = option(
        None,
        "Euclidean distance of unit embeddings up to which two images are repeats.",
        group=_HOW_MUCH,
        minimum=0.0,
        maximum=2.0,
    )
    cosine_distance: float | None = option(
        None, "The same as a cosine distance d: a threshold of √(2d).", group=_HOW_MUCH, minimum=0.0, maximum=2.0
    )
    linkage: str = option(
        "single",
        "`single`: chains of repeats are one set, as in the CLIP-CID paper. `star`: every dropped image is within the "
        "cut-off of the kept one.",
        group=_SETS,
        choices=LINKAGES,
    )
    select: str = option(
        "central",
        "Image kept of each set: nearest to the set's mean, smallest sum of distances, first, random, most similar to its "
        "caption, most pixels.",
        group=_SETS,
        choices=SELECTIONS,
    )
    neighbors: str = option(
        "exact",
        "`exact`: all pairs of images are compared. `partitioned`, for ten millions and more: only those in one partition "
        "of similar images or near its border; some repeats may stay, and an audit says how many.",
        group=_SETS,
        choices=NEIGHBORS,
    )
    model: str | None = option(
        None, "Model to embed with where there are no embeddings yet; ViT-L-14 by default.", group=_FILES, metavar="M"
    )
    embeddings: Path | None = option(
        None,
        "Folder of embeddings to balance, of clip-retrieval's layout or of DataComp's .npz; by default the work "
        "directory's.",
        group=_FILES,
        operational=True,
    )
    npz_array: str | None = npz_array_option(_FILES)
    write_keys: Path | None = option(
        None,
        "Text file to write the kept keys to, one a line.",
        group=_FILES,
        metavar="FILE.txt",
        operational=True,
    )
    write_pairs: Path | None = option(
        None,
        "Table to write the dropped images to: `from`, the image kept instead `to`, and their `distance`; .parquet or .csv.",
        group=_FILES,
        metavar="FILE.parquet",
        operational=True,
    )
    write_uids: Path | None = option(
        None,
        "File to write the kept samples' uids to, in DataComp's form of a subset: its resharder takes it as it is.",
        group=_FILES,
        metavar="FILE.npy",
        operational=True,
    )
    write_shards: Path | None = option(
        None,
        "Folder to write new shards to: the tar members of the kept samples, copied byte for byte.",
        group=_FILES,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check that exactly one amount is given and that what was asked for goes together."""
        super().__post_init__()
        amounts = {"--keep": self.keep, "--threshold": self.threshold, "--cosine-distance": self.cosine_distance}
        given = [flag for flag, value in amounts.items() if value is not None]
        if len(given) != 1:
            raise UsageError(
                f"{' and '.join(given)} were given together." if given else "Nothing says how much to keep.",
                "Give exactly one of --keep, --threshold and --cosine-distance, for example --keep 0.563.",
            )
        if self.linkage == "star" and self.select != "central":
            raise UsageError(
                f"--select {self.select} does not go with --linkage star, which keeps the image all others are near to.",
                "Leave out one of the two.",
            )
        if self.write_pairs is not None and self.write_pairs.suffix not in PAIR_SUFFIXES:
            raise UsageError(
                f"--write-pairs {self.write_pairs} is neither parquet nor csv.",
                f"End the name in {' or '.join(PAIR_SUFFIXES)}.",
            )

    @property
    def distance(self) -> float | None:
        """The cut-off as a Euclidean distance; None when a share to keep is given."""
        if self.cosine_distance is not None:
            return math.sqrt(2.0 * self.cosine_distance)
        return self.threshold
