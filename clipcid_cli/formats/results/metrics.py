"""What an evaluation leaves: metrics files, and what a model predicted for each image.

A metrics file is one JSON object for a model on a data set, in CLIP_benchmark's fields, so that its tools read it. The folder
`eval/` holds nothing else but `sidecars/`, where a sidecar for each says how it was made.

Predictions are parquet, one row per image, compared with other models' rows by key:

| task | columns |
|---|---|
| classification | ``key``, ``label``, ``predicted`` (int32), ``top`` (list int32, up to 5), ``scores`` (list float32, cosines of `top`) |
| multi-label | ``key``, ``labels`` (list int32), ``predicted``, ``top``, ``scores``, ``class_scores`` (list float32, of every class) |
| retrieval | ``key``, ``image_ranks`` (list int64: for each caption, the images before its own), ``text_rank`` (int64: the captions before the first of its own) |
| association | ``key``, ``cue`` (int32), ``associated``, ``chosen`` (bool), ``score`` (float32, cosine of image and cue) |

Of a linear probe, a classification, ``scores`` are its logits.

Shape letters: N images, M captions, C classes, K = min(5, C).

Source: LAION-AI/CLIP_benchmark 1.6.2, cli.py (`eval` writes the metrics files, `build` makes a table of them).
"""  # noqa: E501  # a table

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError
from clipcid_cli.file_names import file_name
from clipcid_cli.formats.files import LARGEST_TEXT, read_regular, reading, write_json, write_parquet, write_text
from clipcid_cli.formats.fingerprint import validate_unchanged
from clipcid_cli.formats.sidecar import AnySidecar, Sidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.skipped import SKIPPED

SIDECARS = "sidecars"
# The table and the report on all pairs of one `eval-zeroshot`.
SUMMARY_TABLE = "results.csv"
SUMMARY_REPORT = "report.html"

CLASSIFICATION = "classification"
MULTI_LABEL = "multilabel"
RETRIEVAL = "retrieval"
ASSOCIATION = "association"

LINEAR_PROBE = "linear_probe"
"""The task of a probe, whose predictions are of a classification."""

_INT = pa.int32()
_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    CLASSIFICATION: {"label": _INT, "predicted": _INT, "top": _INTS, "scores": _FLOATS},
    MULTI_LABEL: {"labels": _INTS, "predicted": _INT, "top": _INTS, "scores": _FLOATS, "class_scores": _FLOATS},
    RETRIEVAL: {"image_ranks": pa.list_(pa.int64()), "text_rank": pa.int64()},
    ASSOCIATION: {"cue": _INT, "associated": pa.bool_(), "chosen": pa.bool_(), "score": pa.float32()},
}
_ABOUT = b"clipcid"
# Of paths, patterns and captions' keys.
_SEPARATORS = "/{},:*"


class LinesRecord(msgspec.Struct):
    """Which class names or templates a score is of: those of other lines are not comparable."""

    source: str  # path of the file, or ``openai``, ``simple``, ``imagenet``, ``default``, ``folder names``, …
    number: int
    hash: str  # what ``b2sum -l 48`` prints of a file with these lines

    def __str__(self) -> str:
        return f"{self.number:,}, {self.source} ({self.hash})"


class EvaluationSidecar(Sidecar, kw_only=True):
    """The sidecar of an evaluation, in ``eval/sidecars/``; of a classification with `prompts`."""

    prompts: dict[str, LinesRecord] | None = None  # by ``class_names`` and ``templates``


class Metrics(msgspec.Struct):
    """CLIP_benchmark's fields."""

    dataset: str
    model: str
    pretrained: Any
    task: str  # ``zeroshot_classification``, ``zeroshot_retrieval`` or ``linear_probe``
    language: Any
    metrics: dict[str, Any]  # null for one that has no value, such as acc5 of four classes


def metrics_stem(dataset: str, model: str, task: str, *variant: str) -> str:
    """Return the name of a metrics file without its suffix, e.g. ``food101_ViT-B-32_zeroshot_classification``."""
    parts = (dataset, model, task, *variant)
    return "_".join(file_name(part, separators=_SEPARATORS) for part in parts)


def find_variant(path: Path, task: str) -> str:
    """Return how the name of a metrics file ends after the task, e.g. ``templates-openai``; empty where it does not."""
    return path.stem.partition(f"_{task}_")[2]


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write a metrics file."""
    write_json(path, msgspec.to_builtins(metrics))


def read_metrics_sidecar(path: Path, kind: type[AnySidecar]) -> AnySidecar | None:
    """Read the sidecar that says how a metrics file was made; None when there is none."""
    return read_sidecar(sidecar_path(path.parent / SIDECARS, path.stem), kind)


def validate_unchanged_metrics(path: Path, fix: str) -> EvaluationSidecar | None:
    """Refuse a metrics file, or its predictions, that differ from what their sidecar records; return that, if any."""
    sidecar = read_metrics_sidecar(path, EvaluationSidecar)
    if sidecar is not None:
        folder = path.parent / SIDECARS
        validate_unchanged(folder, sidecar.outputs, sidecar_path(folder, path.stem), fix)
    return sidecar


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file, ours or CLIP_benchmark's."""
    fields = ", ".join(Metrics.__struct_fields__)
    with reading(path, f"metrics, a JSON object with {fields}", "Run the evaluation again."):
        return msgspec.convert(json.loads(read_regular(path, LARGEST_TEXT)), Metrics)


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as csv; a value that is None or absent is an empty cell. Several processes may do so at once."""
    text = io.StringIO(newline="")
    # Not by pandas, whose import takes a twentieth of a short evaluation's time.
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue(), shared=True)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The rows of a file, a table of ``key`` and the columns of their kind, and what they belong to."""

    kind: str
    model: str
    dataset: str
    num_classes: int
    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    @property
    def keys(self) -> npt.NDArray[np.object_]:
        """Key of each image, text [N]."""
        return self.column("key")

    @property
    def positive(self) -> npt.NDArray[np.bool_]:
        """Whether an image has a class, bool [N, C]; of images that may have several."""
        is_positive = np.zeros((len(self), self.num_classes), dtype=bool)
        is_positive[np.repeat(np.arange(len(self)), self.lengths("labels")), self.flat("labels")] = True
        return is_positive

    def column(self, name: str) -> npt.NDArray[Any]:
        """Copy a column of single values, [N]; Arrow's memory is read-only."""
        return np.array(self.table[name].to_numpy())

    def flat(self, name: str) -> npt.NDArray[Any]:
        """Copy the lists of a column, one after the other."""
        return np.array(self.table[name].combine_chunks().flatten().to_numpy())

    def matrix(self, name: str) -> npt.NDArray[Any]:
        """Copy the lists of a column, which have one length K: [N, K]."""
        return self.flat(name).reshape(len(self), -1)

    def lengths(self, name: str) -> npt.NDArray[np.int64]:
        """Return the lengths of the lists of a column, int64 [N]."""
        return np.array(pc.list_value_length(self.table[name]).to_numpy(), dtype=np.int64)

    def is_consistent(self) -> bool:
        """Tell whether classes are in range and lists of the lengths that the kind has."""
        if self.kind == RETRIEVAL:
            return bool((self.column("text_rank") >= 0).all())
        if self.kind == ASSOCIATION:
            return bool((self.column("cue") >= 0).all())
        if self.kind == CLASSIFICATION:
            classes = np.concatenate([self.column("label"), self.column("predicted"), self.matrix("top").reshape(-1)])
            return bool(((classes >= 0) & (classes < self.num_classes)).all())
        return self.positive.shape == self.matrix("class_scores").shape

    def has_truth_of(self, other: Predictions) -> bool:
        """Tell whether the right answers are the same: classes, or numbers of captions; kind and keys must be."""
        if self.kind == RETRIEVAL:
            return np.array_equal(self.lengths("image_ranks"), other.lengths("image_ranks"))
        column = "label" if self.kind == CLASSIFICATION else "labels"
        return self.num_classes == other.num_classes and bool(self.table[column].equals(other.table[column]))


def predictions_path(metrics: Path) -> Path:
    """Return where the predictions behind a metrics file are."""
    return metrics.parent / SIDECARS / f"{metrics.stem}.predictions.parquet"


def skipped_path(metrics: Path) -> Path:
    """Return where the samples that an evaluation skipped are listed, if any."""
    return metrics.parent / SIDECARS / f"{metrics.stem}.{SKIPPED}"


def write_predictions(
    path: Path, kind: str, model: str, dataset: str, num_classes: int, columns: dict[str, Any]
) -> None:
    """Write the columns of a kind and `key`, lists or arrays."""
    types = {"key": pa.string(), **_COLUMNS[kind]}
    table = pa.table({name: pa.array(columns[name], type=types[name]) for name in types})
    about = {"kind": kind, "model": model, "dataset": dataset, "num_classes": num_classes}
    write_parquet(path, table.replace_schema_metadata({_ABOUT: json.dumps(about).encode()}))


def read_predictions(path: Path, command: str) -> Predictions:
    """Read a file, ordered by key; `command` makes such files, ``clipcid eval-linear``."""
    import pyarrow.parquet as pq  # only --compare needs it

    if not os.path.exists(path):  # pathlib raises where a name is too long
        raise ClipcidError(
            f"There are no predictions for each image: {path} is missing.",
            f"Run {command} for that model and data set again, with --predictions.",
        )
    with reading(path, "predictions of clipcid", f"Remove it and run {command} --predictions."):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[_ABOUT])
        types = {"key": pa.string(), **_COLUMNS[about["kind"]]}
        ordered = table.select(list(types)).cast(pa.schema(types)).sort_by("key")
        predictions = Predictions(about["kind"], about["model"], about["dataset"], int(about["num_classes"]), ordered)
        if any(column.null_count for column in ordered.columns) or not predictions.is_consistent():
            raise ValueError("its columns do not fit together")
        return predictions
