"""What `distill` reads: data, keep list, the teacher's embeddings and clusters, found and checked against each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.clusters_file import CENTROIDS, TABLE, Clusters, open_clusters
from clipcid_cli.formats.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.embeddings import Embeddings, open_embeddings
from clipcid_cli.formats.keep_list import KeepList, read_keep_list
from clipcid_cli.formats.key_join import join_keys
from clipcid_cli.formats.output import fingerprint_file
from clipcid_cli.formats.work import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.model_names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.embed import ensure_embeddings, is_of
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import NO_KEEP_LIST, DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL
from clipcid_cli.steps.training_data import Selection, Usable, find_usable

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What the teacher left on disk, joined with the data by key.

    Attributes:
        embeddings: Its embeddings.
        places: Row of the embeddings of each usable sample; −1 where there is none.
        clusters: Clusters; None when no loss asks.
        cluster_places: Row of the clusters' table of each usable sample; −1 where there is none.
    """

    embeddings: Embeddings
    places: Rows
    clusters: Clusters | None
    cluster_places: Rows | None


@dataclasses.dataclass(frozen=True)
class AppliedKeepList:
    """A keep list as a run found it.

    Attributes:
        path: Where it lay.
        kept: Number of images it keeps.
        images: Number of images it knows.
    """

    path: Path
    kept: int
    images: int

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values, for the sidecar."""
        return {"path": str(self.path), "kept": self.kept, "images": self.images}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that a run reads.

    Attributes:
        dataset: The data.
        usable: Its samples with image and caption.
        training: Those to train on.
        held_out: Those to evaluate on.
        keep_list: The keep list that was applied; None for all samples.
        teaching: The teacher's side; None when no loss asks.
        fingerprints: Size and hash of each input file.
    """

    dataset: Dataset
    usable: Usable
    training: Selection
    held_out: Selection
    keep_list: AppliedKeepList | None
    teaching: Teaching | None
    fingerprints: list[dict[str, Any]]


def find_embeddings(settings: DistillSettings, machine: Machine, reporter: Reporter) -> Path | None:
    """Find the teacher's embeddings, and make them where there are none; None when no loss asks for them.

    Without ``--teacher`` the work directory's embeddings say who it is.

    Raises:
        ClipcidError: when they can neither be found nor made.
    """
    if not settings.needs_teacher:
        return None
    if settings.embeddings is not None:
        return settings.embeddings
    teacher = settings.teacher
    if teacher is None:
        try:
            return machine.on_main(WorkDirectory(settings.work).find_embeddings)
        except ClipcidError:
            if settings.data is None or any((settings.work / "embeddings").glob("*/embed.json")):
                raise
        teacher = DEFAULT_MODEL
        reporter.note(f"Teacher: {teacher}, the default.")
    return ensure_embeddings(settings, machine, reporter, data=settings.data, model=teacher, text=True)


def find_inputs(settings: DistillSettings, embeddings_folder: Path | None, reporter: Reporter) -> Inputs:
    """Find, open and join the inputs, saying which were taken.

    Args:
        settings: Settings of the step.
        embeddings_folder: What `find_embeddings` found.
        reporter: Who is told.

    Raises:
        ClipcidError: when one is missing or they are not of one data set and one teacher; the fix names the command.
    """
    work = WorkDirectory(settings.work)
    embeddings = None if embeddings_folder is None else _open_embeddings(settings, embeddings_folder, reporter)
    dataset = _open_data(settings, work, embeddings, reporter)
    usable = find_usable(dataset, settings.max_bad_fraction)
    fingerprints = dataset.fingerprints()
    wanted, held_out = usable.split(settings.val_fraction)
    path, keep_list = _find_keep_list(settings, work), None
    if path is None:
        reporter.note("Keep list: none, all samples are used.")
    else:
        keep = read_keep_list(path)
        wanted &= _apply_keep_list(path, keep, usable, settings.max_bad_fraction, reporter)
        fingerprints.append(fingerprint_file(path))
        keep_list = AppliedKeepList(path, keep.num_kept, len(keep.keys))
    teaching = None
    if embeddings is not None:
        teaching = _join_teacher(settings, work, embeddings, usable, wanted, reporter)
        wanted &= teaching.places >= 0
        if keep_list is not None and teaching.clusters is not None:
            _refuse_old_clusters(teaching.clusters, keep_list.path)
        fingerprints += _fingerprint_teacher(teaching)
    return Inputs(
        dataset,
        usable,
        usable.selection.narrow(wanted),
        usable.selection.narrow(held_out),
        keep_list,
        teaching,
        fingerprints,
    )


def _open_data(
    settings: DistillSettings, work: WorkDirectory, embeddings: Embeddings | None, reporter: Reporter
) -> Dataset:
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        return open_dataset(settings.data, settings.keys, columns)
    dataset = open_described(work.find_data(None if embeddings is None else embeddings.folder))
    reporter.note(f"Data: {dataset.spec}, which the embeddings were made of.")
    return dataset


def _open_embeddings(settings: DistillSettings, folder: Path, reporter: Reporter) -> Embeddings:
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array)
    reporter.note(f"Embeddings: {folder}, {embeddings.num_rows:,} rows of width {embeddings.width}.")
    if settings.teacher is not None:
        _check_teacher(with_default_tag(parse_model(settings.teacher)), embeddings)
    if not embeddings.has_texts:
        embeddings.texts()  # raises, and says which command makes them
    return embeddings


def _check_teacher(name: ModelName, embeddings: Embeddings) -> None:
    """Refuse embeddings of another model than the teacher; those of other tools cannot be checked."""
    if embeddings.sidecar is None:
        return
    made_by = embeddings.sidecar["model"]
    if not is_of(made_by, name):
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} are of {made_by['spec']} ({made_by['weights_hash']}), "
            f"the teacher is {name.spec}.",
            f"Run: clipcid embed DATA --model {name.spec}, or leave --embeddings away.",
        )


def _find_keep_list(settings: DistillSettings, work: WorkDirectory) -> Path | None:
    if settings.keep_list is None:
        return work.find_keep_list()
    return None if settings.keep_list == NO_KEEP_LIST else Path(settings.keep_list)


def _apply_keep_list(
    path: Path, keep: KeepList, usable: Usable, max_bad_fraction: float, reporter: Reporter
) -> npt.NDArray[np.bool_]:
    places = join_keys(usable.keys, keep.keys)
    known = places >= 0
    missing = int(np.count_nonzero(~known))
    if missing > max_bad_fraction * len(places):
        raise ClipcidError(
            f"Keep list {path} does not know {missing:,} of the {len(places):,} samples of the data: it is of other data.",
            "Give the data it was made of, another --keep-list, or --keep-list none to train on all.",
        )
    kept: npt.NDArray[np.bool_] = known & keep.kept[np.maximum(places, 0)]
    reporter.note(f"Keep list: {path}, {np.count_nonzero(kept):,} of {len(kept):,} samples kept.")
    return kept


def _join_teacher(
    settings: DistillSettings,
    work: WorkDirectory,
    embeddings: Embeddings,
    usable: Usable,
    wanted: npt.NDArray[np.bool_],
    reporter: Reporter,
) -> Teaching:
    places = join_keys(usable.keys, embeddings.keys)
    missing = int(np.count_nonzero(wanted & (places < 0)))
    if missing > settings.max_bad_fraction * np.count_nonzero(wanted):
        raise ClipcidError(
            f"{missing:,} of {np.count_nonzero(wanted):,} samples have no embedding in {embeddings.folder}.",
            "Give the data the embeddings were made of, or run: clipcid embed DATA",
        )
    if not any(LOSSES[name].needs_clusters for name in settings.losses()):
        return Teaching(embeddings, places, None, None)
    clusters = open_clusters(settings.clusters or work.find_clusters())
    reporter.note(f"Clusters: {clusters.folder}, {len(clusters.centroids):,} centres.")
    return Teaching(
        embeddings, places, clusters, _join_clusters(settings, embeddings, clusters, usable, wanted & (places >= 0))
    )


def _join_clusters(
    settings: DistillSettings,
    embeddings: Embeddings,
    clusters: Clusters,
    usable: Usable,
    wanted: npt.NDArray[np.bool_],
) -> Rows:
    remake = f"Run: clipcid cluster --embeddings {embeddings.folder} --overwrite"
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
    if settings.cluster_towers == "both" and clusters.captions is None:
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
    return places


def _refuse_old_clusters(clusters: Clusters, keep_list: Path) -> None:
    """Refuse clusters of an earlier keep list: those of all images, made without one, fit any."""
    made_from = clusters.sidecar.get("keep_list")
    if made_from is not None and made_from["hash"] != fingerprint_file(keep_list)["hash"]:
        raise ClipcidError(
            f"The clusters in {clusters.folder} were made from another keep list than {keep_list} holds now.",
            f"Run: clipcid cluster --keep-list {keep_list} --overwrite",
        )


def _fingerprint_teacher(teaching: Teaching) -> list[dict[str, Any]]:
    # The rows themselves, not their sidecar: the same rows embedded again at another speed are the same input.
    found = teaching.embeddings.fingerprints(texts=True)
    if teaching.clusters is not None:
        found += [fingerprint_file(teaching.clusters.folder / name) for name in (TABLE, CENTROIDS)]
    return found
