"""The teacher in training: its rows of each batch, stored or computed, in the space that it shares with the student."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids
from clipcid_cli.algorithms.losses.shared_space import SharedSpace, principal_axes, project, second_moment
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.files import atomic_file
from clipcid_cli.formats.fingerprint import FileRecord, hash_json, identity_of
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel, normalize_pixels
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.views import apply_colors
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.clusters import ClusterLookup, validate_width
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.models import cluster_with
from clipcid_cli.steps.repair import MAX_SCALE, teacher_scale
from clipcid_cli.steps.settings.distill import DistillSettings

SAMPLES_AT_ONCE = 256
"""Samples that an online teacher takes at once, whatever the batch; no activations are kept."""

# Cut to the student's width only where that keeps at least this share of the teacher's squared length.
_ENOUGH_LENGTH = 0.98
# Principal axes are found from at most this many evenly spaced rows of each tower.
_AXES_ROWS = 2**20


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher's part of every batch."""

    space: SharedSpace  # where its features and the student's are compared
    scale: float  # exp(logit_scale)
    bias: float | None  # logit_bias; None where it was trained with a softmax
    clusters: ClusterLookup | None  # None where no loss needs them
    # What runs alongside the student, on the same views and captions; None where stored rows come with the batch.
    model: ClipModel | None = None
    precision: Precision | None = None  # number format of the model's products, to which it is cast; None without one
    # What its image features are multiplied by, float32; None where they are taken as they are. Stored rows come with
    # it.
    image_map_DD: Tensor | None = None

    @torch.no_grad()
    def rows(self, batch: TrainingBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return t, u and u of the further texts of a part, unit rows in the shared space, float32 [b, D]."""
        image, text, extra = batch.teacher_image_bD, batch.teacher_text_bD, batch.teacher_extra_eD
        if self.model is not None:
            image, text = self._embed(self.model, batch)
        assert image is not None, "the batch maker has the stored rows"

        def project_text(rows_bD: Tensor | None) -> Tensor | None:
            return None if rows_bD is None else project(rows_bD.float(), self.space.axes)

        return project(image.float(), self.space.axes), project_text(text), project_text(extra)

    def _embed(self, model: ClipModel, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Embed what the student is shown."""
        assert self.precision is not None
        assert batch.teacher_pixels is not None, "the batch maker has the teacher's processor"
        assert batch.teacher_tokens is not None, "likewise"
        images, texts = [], []
        for start in range(0, len(batch), SAMPLES_AT_ONCE):
            part = slice(start, start + SAMPLES_AT_ONCE)
            pixels = batch.teacher_pixels[part]
            if batch.colors is not None:
                pixels = normalize_pixels(apply_colors(pixels, batch.colors[part]), model.info.preprocess)
            images.append(model.encode_images(pixels, self.precision))
            texts.append(model.encode_texts(batch.teacher_tokens[part], self.precision))
        image = torch.cat(images)
        return image if self.image_map_DD is None else image.float() @ self.image_map_DD, torch.cat(texts)


def load_online_model(inputs: Inputs, context: DistContext) -> ClipModel | None:
    """Load the teacher that runs alongside the student, where one does."""
    online = inputs.online
    if online is None:
        return None
    model = context.on_all(lambda: load_model(online, context.device))
    model.module.requires_grad_(False)
    return model


def describe_weights(model: ClipModel) -> FileRecord:
    """Describe an online teacher as an input of the run: its weights, configuration, and what decides pixels and tokens."""
    info = model.info
    config = hash_json(info.config)
    content = f"{info.weights_hash} {config} {info.preprocess_hash} {info.tokenizer} {info.context_length}"
    return FileRecord(f"the teacher {info.spec}", info.parameters, content)


def open_teacher(
    settings: DistillSettings,
    inputs: Inputs,
    model: ClipModel | None,
    student_width: int,
    context: DistContext,
) -> Teacher | None:
    """Make the teacher ready, where a loss needs one; `model` is what `load_online_model` returned."""
    embeddings = inputs.embeddings
    chosen = inputs.clusters
    if model is not None:
        width = model.info.embed_dim
    elif embeddings is not None:
        width = embeddings.width
    else:
        return None
    space = choose_space(settings, width, embeddings, student_width, context)
    clusters = None
    if chosen is not None:
        if model is not None:
            spec = model.info.spec
            validate_width(chosen.files, f"teacher {spec}", width, cluster_with(parse_model(spec), settings))
        centroids = ProjectedCentroids(chosen.files.centroids, space.axes, context.device)
        clusters = ClusterLookup(centroids, inputs.training.column("clusters"), chosen.towers, settings)
    if model is None:
        assert embeddings is not None, "the width is theirs"
        is_recorded = embeddings.model is not None and embeddings.model.logit_scale is not None
        if not is_recorded and any(loss.needs_teacher_scale for loss in settings.loss_entries()):
            reporting.note(f"The embeddings do not record the teacher's logit scale; using {MAX_SCALE:g}.")
        bias = None if embeddings.model is None else embeddings.model.logit_bias
        return Teacher(space, teacher_scale(embeddings), bias, clusters)
    info = model.info
    precision = choose_precision(settings.precision, context.device, "embed", info.parameters)
    model.cast_products(precision)
    reporting.note(
        f"Online teacher: {info.parameters / 1e6:.1f} M parameters, {info.image_size[0]} px, {info.context_length} tokens, "
        f"precision {precision.name} ({precision.reason})."
    )
    image_map = None if embeddings is None else embeddings.image_map
    map_DD = None if image_map is None else torch.from_numpy(image_map.map_DD).to(context.device)
    return Teacher(space, model.logit_scale, model.logit_bias, clusters, model, precision, map_DD)


def choose_space(
    settings: DistillSettings,
    teacher_width: int,
    embeddings: Embeddings | None,
    student_width: int,
    context: DistContext,
) -> SharedSpace:
    """Choose the space in which student and teacher are compared; all processes take the first one's axes.

    For equal widths, and where no loss compares features of the two, it is the teacher's as it is, unless requested
    otherwise; else as requested, but ``pca`` cannot widen, or do without stored embeddings: ``project`` takes its place.
    """
    requested = settings.teacher_space
    if requested == "auto" and all(loss.space == "own" for loss in settings.loss_entries()):
        return SharedSpace(teacher_width)
    if requested != "project" and student_width == teacher_width:
        return SharedSpace(teacher_width)
    by_layer = f"Shared space: the teacher's {teacher_width} dimensions, by a learned layer per student tower."
    if requested == "project" or student_width > teacher_width:
        reporting.note(by_layer)
    elif embeddings is None:
        reporting.note(
            f"{by_layer} There are no stored embeddings to find the axes of --teacher-space pca in (clipcid embed)."
        )
    else:
        axes = context.on_rank0(lambda: principal_axes(_find_second_moment(settings, embeddings), student_width))
        dimensions = f"{student_width} of the teacher's {teacher_width} dimensions"
        if requested == "pca" or axes.kept >= _ENOUGH_LENGTH:
            reporting.note(f"Shared space: {dimensions}, which keep {axes.kept:.1%} of its rows' squared length.")
            basis = axes.basis_Dd.to(context.device)
            return SharedSpace(student_width, dataclasses.replace(axes, basis_Dd=basis))
        reporting.note(
            f"{dimensions} keep only {axes.kept:.1%} of its rows' squared length, so a learned layer per student "
            "tower maps to all of them (--teacher-space pca cuts anyway)."
        )
    return SharedSpace(teacher_width, is_learned=True)


def _find_second_moment(settings: DistillSettings, embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Read the second moment of the teacher's rows that an earlier start kept; compute and keep it where there is none."""
    identity = identity_of({"axes_rows": _AXES_ROWS}, embeddings.fingerprints([Kind.TEXTS]))
    path = WorkDirectory(settings.work).second_moment(identity)
    with suppress(OSError, ValueError, EOFError):
        kept: npt.NDArray[np.float64] = np.load(path, allow_pickle=False)
        return kept
    sides = [embeddings.rows(kind) for kind in (Kind.IMAGES, Kind.TEXTS) if kind in embeddings.kinds]
    stride = -(-embeddings.num_rows // _AXES_ROWS)
    # Rows of another tool that are not finite are left out of training, and here.
    blocks = (np.nan_to_num(block, posinf=0, neginf=0) for side in sides for _, block in side.blocks(stride=stride))
    found = second_moment(blocks, embeddings.width)
    if not settings.dry_run:
        with atomic_file(path, shared=True) as file:  # two runs may keep it at once
            np.save(file, found, allow_pickle=False)
    return found
