"""Several teachers as one: their embeddings, joined by key, and what is said of those that differ."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from clipcid_cli.algorithms.losses.registry import TEACHER_BIAS, LossEntry
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.combined import CombinedEmbeddings
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.steps import reporting
from clipcid_cli.steps.embeddings import advise_keys, compare_keys
from clipcid_cli.steps.settings.shared import KeptSettings


def join_teachers(settings: KeptSettings, teachers: Sequence[Embeddings], work: Path | None) -> CombinedEmbeddings:
    """Join the embeddings of several teachers, and say what is missing of which; `work` is as of `open_embeddings`."""
    combined = CombinedEmbeddings(teachers, settings.teacher_weights, work)
    weights = ", ".join(f"{weight:.3g}" for weight in combined.weights)
    reporting.note(f"Teachers: {len(teachers)}, joined by key to rows of width {combined.width}; weights {weights}.")
    for teacher, lacking in zip(teachers, combined.lacking, strict=True):
        if lacking == combined.num_rows:
            first = next(file for file in combined.files if file.rows)
            compared = compare_keys(combined.keys_of(first)[0].as_py(), teacher)
            raise ClipcidError(
                f"{teacher.folder} has none of the {lacking:,} keys of {combined.folder}. {compared}",
                f"{advise_keys(teacher)}Give embeddings of the same data.",
            )
        if lacking:
            reporting.note(
                f"{teacher.folder} lacks {lacking:,} of the {combined.num_rows:,} keys of {combined.folder}."
            )
    silent = [str(teacher.folder) for teacher in teachers if not teacher.has_texts]
    if silent and combined.has_texts:
        reporting.note(f"Without captions, and so with zeros in rows of texts: {', '.join(silent)}.")
    left = frozenset[Kind]().union(*(teacher.kinds for teacher in teachers)) - combined.kinds
    if left:
        reporting.note(f"Not used, since not all teachers have the same: {', '.join(sorted(left))}.")
    return combined


def note_missing_bias(losses: Collection[LossEntry], teachers: Sequence[Embeddings]) -> None:
    """Say which losses do without the teachers' logit biases, since only some of those with captions have one."""
    models = [teacher.model for teacher in teachers if teacher.has_texts]
    has_bias = [model is not None and model.logit_bias is not None for model in models]
    if all(has_bias) or not any(has_bias):
        return
    for loss in losses:
        if TEACHER_BIAS in loss.reads:
            reporting.note(f"{loss.name} takes the softmax of the teachers: not all of them have a logit bias.")
