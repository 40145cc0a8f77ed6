"""The teacher's side of what `distill` reads: embeddings and clusters, checked against teacher and data, joined by key."""

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
from clipcid_cli.formats.results.clusters import CENTROIDS, TABLE, Clusters, open_clusters
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.distill.batches import Usable
from clipcid_cli.steps.distill.stored_views import StoredViews
from clipcid_cli.steps.model_identity import find_difference
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class TeacherInputs:
    """What the teacher left on disk, joined with the data by key.

    Attributes:
        embeddings: Its embeddings; None for an online teacher that left none.
        places: Row of the embeddings of each usable sample; −1 where there is none.
        clusters: Clusters; None when no loss asks.
        cluster_places: Row of the clusters' table of each usable sample; −1 where there is none.
        num_views: Stored views of each image that are replayed, 0 for none.
        all_captions: Whether every caption of a sample is embedded, so that any may be shown.
        online: The teacher that runs beside the student; None where its embeddings teach.
        text_clusters: Whether clusters teach the text tower as well.
    """

    embeddings: Embeddings | None
    places: Rows
    clusters: Clusters | None = None
    cluster_places: Rows | None = None
    num_views: int = 0
    all_captions: bool = False
    online: ModelName | None = None
    text_clusters: bool = False

    @property
    def first_captions(self) -> bool:
        """Whether a sample may only show its first caption: stored embeddings of texts know no other."""
        return (
            self.embeddings is not None and self.embeddings.has_texts and self.online is None and not self.all_captions
        )

    def stored_views(self, seed: int) -> StoredViews | None:
        """Return the stored views for training; None where none are replayed."""
        if self.embeddings is None or not self.num_views:
            return None
        return StoredViews(self.embeddings.view_params(), self.places, seed)

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        """Return how what the student sees is varied: as the stored views were, else as was chosen."""
        if self.embeddings is None or not self.num_views:
            return chosen
        if self.embeddings.sidecar is None:  # another tool's views may have changed anything
            return Augmentation(color_jitter=1.0, gray_probability=1.0)
        made = self.embeddings.sidecar["settings"]
        return Augmentation(made["crop_scale"], made["color_jitter"], made["gray_probability"])

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
    """Tell whether any loss of the run cannot do without the teacher's embeddings of captions."""
    return not all(served_by_one_tower(settings.losses()).values())


def open_teacher(settings: DistillSettings, folder: Path, teacher: ModelName | None, reporter: Reporter) -> Embeddings:
    """Open the teacher's embeddings and check that they are its.

    Args:
        teacher: The teacher, where it was named or runs online.

    Raises:
        ClipcidError: when they are another model's, or lack captions that a loss needs.
    """
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array, WorkDirectory(settings.work).fingerprints)
    reporter.note(f"Embeddings: {folder}, {embeddings.num_rows:,} rows of width {embeddings.width}.")
    if teacher is not None:
        _check_teacher(teacher, embeddings)
    if not embeddings.has_texts and not settings.online_teacher:
        needing = [name for name, served in served_by_one_tower(settings.losses()).items() if not served]
        if needing:
            raise ClipcidError(
                f"{folder} holds embeddings of images alone, and captions are needed by: {', '.join(needing)}.",
                "Run: clipcid embed DATA --text; or use losses that do with one tower: "
                + ", ".join(name for name, served in served_by_one_tower(LOSSES).items() if served),
            )
        reporter.note("They are of images alone: the teacher teaches what it can with those.")
    return embeddings


def named_teacher(settings: DistillSettings) -> ModelName | None:
    """Return the teacher as the user named it; None where the embeddings say who it is."""
    return None if settings.teacher is None else with_default_tag(parse_model(settings.teacher))


def _check_teacher(name: ModelName, embeddings: Embeddings) -> None:
    """Refuse embeddings of another model than the teacher; those of other tools cannot be checked."""
    if embeddings.sidecar is None:
        return
    made_by = embeddings.sidecar["model"]
    difference = find_difference(made_by, name)
    if difference is not None:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} are of {made_by['spec']}, {difference.what} {difference.recorded}; the "
            f"teacher is {name.spec}, {difference.what} {difference.named}.",
            f"Run: clipcid embed DATA --model {name.spec}, or leave --embeddings away.",
        )


def join_teacher(
    settings: DistillSettings,
    embeddings: Embeddings,
    dataset: Dataset,
    usable: Usable,
    wanted: npt.NDArray[np.bool_],
    reporter: Reporter,
) -> TeacherInputs:
    """TiledSearch stored embeddings with the data.

    Raises:
        ClipcidError: when they are of other data.
    """
    _check_keys(embeddings, dataset)
    places = join_keys(usable.keys, embeddings.keys)
    missing = int(np.count_nonzero(wanted & (places < 0)))
    if missing > settings.max_bad_fraction * np.count_nonzero(wanted):
        raise ClipcidError(
            f"{missing:,} of {np.count_nonzero(wanted):,} samples have no embedding in {embeddings.folder}.",
            "Give the data the embeddings were made of, or run: clipcid embed DATA",
        )
    views = embeddings.num_views if settings.views == "stored" else 0
    if views:
        reporter.note(
            f"Views: {views} of each image are stored and replayed; --crop-scale, --color-jitter and --gray-probability "
            "have no part in it (--views none draws views anew)."
        )
    return TeacherInputs(
        embeddings,
        places,
        num_views=views,
        all_captions=_has_all_captions(embeddings, usable, wanted & (places >= 0), places, reporter),
    )


def _check_keys(embeddings: Embeddings, dataset: Dataset) -> None:
    made = None if embeddings.sidecar is None else embeddings.sidecar["settings"]["keys"]
    if made is not None and made != dataset.keys:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with --keys {made}, the data is read with --keys "
            f"{dataset.keys}: they cannot be joined.",
            f"Add --keys {made}.",
        )


def _has_all_captions(
    embeddings: Embeddings, usable: Usable, wanted: npt.NDArray[np.bool_], places: Rows, reporter: Reporter
) -> bool:
    """Tell whether the teacher embedded every caption of every sample.

    Raises:
        ClipcidError: when it embedded several of some, but of a sample another number than it has now.
    """
    counts = usable.caption_counts[wanted]
    several = bool((counts > 1).any())
    if not (several and embeddings.has_texts):
        return False
    if not embeddings.has_further_captions:
        reporter.note("Captions: the first of each sample alone is embedded, and alone is shown.")
        return False
    embedded = embeddings.caption_counts[places[wanted]]
    if (other := np.flatnonzero(embedded != counts)).size:
        key = usable.keys[int(np.flatnonzero(wanted)[other[0]])]
        raise ClipcidError(
            f"Sample {key!r} has {counts[other[0]]} captions, and {embedded[other[0]]} of it are embedded in "
            f"{embeddings.folder}: the data has changed.",
            "Run: clipcid embed DATA --overwrite",
        )
    reporter.note(f"Captions: {counts.sum():,} of {len(counts):,} samples, one drawn anew each epoch.")
    return True


def join_clusters(
    settings: DistillSettings,
    teacher_inputs: TeacherInputs,
    usable: Usable,
    wanted: npt.NDArray[np.bool_],
    reporter: Reporter,
) -> TeacherInputs:
    """Open and join the clusters, where a loss asks for them.

    Raises:
        ClipcidError: when there are none, or they are another teacher's or of other images; the fix remakes them.
    """
    if not any(LOSSES[name].needs_clusters for name in settings.losses()):
        return teacher_inputs
    clusters = open_clusters(settings.clusters or WorkDirectory(settings.work).find_clusters())
    several = bool((usable.caption_counts[wanted] > 1).any()) and not teacher_inputs.first_captions
    text_clusters = _teaches_text(clusters, settings, several)
    embeddings, online = teacher_inputs.embeddings, teacher_inputs.online
    remake = "Run: clipcid cluster" + (f" --embeddings {embeddings.folder}" if embeddings is not None else "")
    remake += " --overwrite"
    made_of = clusters.sidecar.get("model")
    if made_of is not None and online is not None and (difference := find_difference(made_of, online)) is not None:
        raise ClipcidError(
            f"The clusters in {clusters.folder} are of {made_of['spec']}, {difference.what} {difference.recorded}; the "
            f"teacher is {online.spec}, {difference.what} {difference.named}.",
            f"Run: clipcid embed DATA --model {online.spec}, then clipcid cluster --overwrite",
        )
    if embeddings is not None:
        _check_clusters(clusters, embeddings, remake)
    if text_clusters and clusters.captions is None:
        raise ClipcidError(
            f"--cluster-towers both, but the clusters in {clusters.folder} say nothing of captions.",
            f"Embed the captions too, then make the clusters again. {remake}",
        )
    places = join_keys(usable.keys, clusters.keys.tolist())
    missing = int(np.count_nonzero(wanted & (places < 0)))
    if missing:
        raise ClipcidError(
            f"{missing:,} of {np.count_nonzero(wanted):,} samples to train on are not in {clusters.folder}: the clusters "
            "were made from another keep list.",
            remake,
        )
    taught = "both towers" if text_clusters else "the image tower"
    reporter.note(f"Clusters: {clusters.folder}, {len(clusters.centroids):,} centroids, for {taught}.")
    return dataclasses.replace(teacher_inputs, clusters=clusters, cluster_places=places, text_clusters=text_clusters)


def _teaches_text(clusters: Clusters, settings: DistillSettings, several: bool) -> bool:
    """Tell whether the cluster loss teaches the text tower as well.

    [O] By default it does where it can: in recipes/ablation, on drawings that the teacher knew, retrieval was 4.1 (R@1) and
    6.2 points (R@10) worse with the image tower alone (95 %: 1.8…6.2 and 4.4…8.2), hardly better than without the loss.

    Args:
        clusters: What `cluster` wrote.
        several: Whether a sample may show another caption than its first, which is the one whose clusters are known.
    """
    if settings.cluster_towers == "auto":
        return clusters.captions is not None and not settings.freeze_text and not several
    return settings.cluster_towers == "both"


def _check_clusters(clusters: Clusters, embeddings: Embeddings, remake: str) -> None:
    of_model, model = clusters.sidecar.get("model"), (embeddings.sidecar or {}).get("model")
    if of_model is not None and model is not None and of_model["weights_hash"] != model["weights_hash"]:
        raise ClipcidError(
            f"The clusters in {clusters.folder} are of {of_model['spec']}, the embeddings of {model['spec']}.", remake
        )
    if clusters.centroids.shape[1] != embeddings.width:
        raise ClipcidError(
            f"The clusters in {clusters.folder} have width {clusters.centroids.shape[1]}, the embeddings "
            f"{embeddings.width}: they are of another teacher.",
            remake,
        )


def refuse_old_clusters(clusters: Clusters, keep_list: Path) -> None:
    """Refuse clusters of an earlier keep list: those of all images, made without one, fit any."""
    made_from = clusters.sidecar.get("keep_list")
    if made_from is not None and made_from["hash"] != fingerprint_file(keep_list)["hash"]:
        raise ClipcidError(
            f"The clusters in {clusters.folder} were made from another keep list than {keep_list} holds now.",
            f"Run: clipcid cluster --keep-list {keep_list} --overwrite",
        )
