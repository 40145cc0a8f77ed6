"""What a teacher provides on disk: its embeddings, checked against teacher and data, and joined with the data by key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.losses.registry import LOSSES, served_by_one_tower
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.key_join import join_keys
from clipcid_cli.formats.output import fingerprint_file
from clipcid_cli.formats.results.clusters import CENTROIDS, TABLE, Clusters
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.distill.batches import StoredViews
from clipcid_cli.steps.distill.samples import UsableSamples
from clipcid_cli.steps.model_identity import find_mismatch
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class TeacherInputs:
    """What the teacher provides, joined with the data by key.

    Attributes:
        embeddings: Its stored embeddings; None for an online teacher without any.
        embedding_rows: Row of the embeddings of each usable sample; −1 where there is none.
        clusters: Clusters; None where no loss needs them.
        cluster_rows: Row of the clusters' table of each usable sample; −1 where there is none.
        num_views: Stored views of each image that are replayed, 0 for none.
        all_captions: Whether every caption of a sample is embedded, so that any may be shown.
        online: The teacher that runs alongside the student; None where stored embeddings teach.
        text_clusters: Whether clusters teach the text tower as well.
    """

    embeddings: Embeddings | None
    embedding_rows: Rows
    clusters: Clusters | None = None
    cluster_rows: Rows | None = None
    num_views: int = 0
    all_captions: bool = False
    online: ModelName | None = None
    text_clusters: bool = False

    @property
    def first_captions(self) -> bool:
        """Whether a sample may only show its first caption, the only one that is embedded."""
        return (
            self.embeddings is not None and self.embeddings.has_texts and self.online is None and not self.all_captions
        )

    def stored_views(self, seed: int) -> StoredViews | None:
        """Return the stored views for training; None where none are replayed."""
        if self.embeddings is None or not self.num_views:
            return None
        return StoredViews(self.embeddings.view_params(), self.embedding_rows, seed)

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        """Return how images are augmented: as the stored views were, else as chosen."""
        if self.embeddings is None or not self.num_views:
            return chosen
        if self.embeddings.sidecar is None:  # another tool's views may have changed anything
            return Augmentation(color_jitter=1.0, gray_probability=1.0)
        views = self.embeddings.sidecar["settings"]
        return Augmentation(views["crop_scale"], views["color_jitter"], views["gray_probability"])

    def fingerprints(self) -> list[dict[str, Any]]:
        """Describe the files a run reads, for its sidecar."""
        found: list[dict[str, Any]] = []
        if self.embeddings is not None:
            # The rows themselves, not their sidecar: the same rows embedded again at another speed are the same input.
            found += self.embeddings.fingerprints(texts=True, further=self.all_captions, views=self.num_views > 0)
        if self.clusters is not None:
            found += [fingerprint_file(self.clusters.folder / name) for name in (TABLE, CENTROIDS)]
        return found


def needs_teacher_texts(settings: DistillSettings) -> bool:
    """Tell whether any loss of the run needs the teacher's embeddings of captions."""
    return not all(served_by_one_tower(settings.losses()).values())


def open_teacher(settings: DistillSettings, folder: Path, teacher: ModelName | None, reporter: Reporter) -> Embeddings:
    """Open the teacher's embeddings and check that the teacher made them.

    Args:
        teacher: The teacher, where it was named or runs online.

    Raises:
        ClipcidError: when another model made them, or they lack captions that a loss needs.
    """
    cache = None if settings.dry_run else WorkDirectory(settings.work).fingerprints
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array, cache)
    reporter.note(f"Embeddings: {folder}, {embeddings.num_rows:,} rows of width {embeddings.width}.")
    if teacher is not None:
        _check_teacher(teacher, embeddings)
    if not embeddings.has_texts and not settings.online_teacher:
        needing = [name for name, served in served_by_one_tower(settings.losses()).items() if not served]
        if needing:
            raise ClipcidError(
                f"{folder} holds embeddings of images only, and captions are needed by: {', '.join(needing)}.",
                "Run: clipcid embed DATA --text; or use losses that need one tower only: "
                + ", ".join(name for name, served in served_by_one_tower(LOSSES).items() if served),
            )
        reporter.note("They are of images only: losses use the teacher's image tower alone.")
    return embeddings


def named_teacher(settings: DistillSettings) -> ModelName | None:
    """Return the teacher as the user named it; None where the embeddings name it."""
    return None if settings.teacher is None else with_default_tag(parse_model(settings.teacher))


def _check_teacher(name: ModelName, embeddings: Embeddings) -> None:
    """Refuse embeddings of another model than the teacher's; those of other tools cannot be checked."""
    if embeddings.sidecar is None:
        return
    model = embeddings.sidecar["model"]
    difference = find_mismatch(model, name)
    if difference is not None:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} are of {model['spec']}, {difference.what} {difference.recorded}; the "
            f"teacher is {name.spec}, {difference.what} {difference.named}.",
            f"Run: clipcid embed DATA --model {name.spec}, or omit --embeddings.",
        )


def join_teacher(
    settings: DistillSettings,
    embeddings: Embeddings,
    dataset: Dataset,
    usable: UsableSamples,
    selected: npt.NDArray[np.bool_],
    reporter: Reporter,
) -> TeacherInputs:
    """Join stored embeddings with the data.

    Args:
        selected: Which of the usable samples the run trains on, bool [N].

    Raises:
        ClipcidError: when they are of other data.
    """
    _check_keys(embeddings, dataset)
    rows = join_keys(usable.keys, embeddings.keys)
    missing = int(np.count_nonzero(selected & (rows < 0)))
    if missing > settings.max_bad_fraction * np.count_nonzero(selected):
        raise ClipcidError(
            f"{missing:,} of {np.count_nonzero(selected):,} samples have no embedding in {embeddings.folder}.",
            "Give the data that was embedded, or run: clipcid embed DATA",
        )
    views = embeddings.num_views if settings.views == "stored" else 0
    if views:
        reporter.note(
            f"Views: {views} of each image are stored and replayed; --crop-scale, --color-jitter and --gray-probability "
            "have no effect (--views none draws views anew)."
        )
    return TeacherInputs(
        embeddings,
        rows,
        num_views=views,
        all_captions=_has_all_captions(embeddings, usable, selected & (rows >= 0), rows, reporter),
    )


def _check_keys(embeddings: Embeddings, dataset: Dataset) -> None:
    keys = None if embeddings.sidecar is None else embeddings.sidecar["settings"]["keys"]
    if keys is not None and keys != dataset.keys:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with --keys {keys}, the data is read with --keys "
            f"{dataset.keys}: they cannot be joined.",
            f"Add --keys {keys}.",
        )


def _has_all_captions(
    embeddings: Embeddings, usable: UsableSamples, selected: npt.NDArray[np.bool_], rows: Rows, reporter: Reporter
) -> bool:
    """Tell whether the teacher embedded every caption of every sample.

    Raises:
        ClipcidError: when it embedded several captions of a sample, but not as many as the sample has now.
    """
    counts = usable.caption_counts[selected]
    several = bool((counts > 1).any())
    if not (several and embeddings.has_texts):
        return False
    if not embeddings.has_further_captions:
        reporter.note("Captions: only the first of each sample is embedded, so only the first is shown.")
        return False
    embedded = embeddings.caption_counts[rows[selected]]
    if (other := np.flatnonzero(embedded != counts)).size:
        key = usable.keys[int(np.flatnonzero(selected)[other[0]])]
        raise ClipcidError(
            f"Sample {key!r} has {counts[other[0]]} captions, but {embedded[other[0]]} were embedded in "
            f"{embeddings.folder}: the data has changed.",
            "Run: clipcid embed DATA --overwrite",
        )
    reporter.note(f"Captions: {counts.sum():,} of {len(counts):,} samples, one drawn in each epoch.")
    return True
