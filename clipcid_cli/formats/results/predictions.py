"""What a model said of each image, as parquet: one row an image, joined with other models' by key.

| task | columns |
|---|---|
| classification | ``key``, ``label``, ``predicted`` (int32), ``top`` (list int32, up to 5), ``scores`` (list float32, cosines of `top`) |
| multi-label | ``key``, ``labels`` (list int32), ``predicted``, ``top``, ``scores``, ``class_scores`` (list float32, of every class) |
| retrieval | ``key``, ``image_ranks`` (list int64: for each caption, the images before its own), ``text_rank`` (int64: the captions before the first of its own) |
"""  # noqa: E501  # a table

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_parquet
from clipcid_cli.formats.results.metrics import SIDECARS

CLASSIFICATION, MULTI_LABEL, RETRIEVAL = "classification", "multilabel", "retrieval"

_INT, _FLOATS, _INTS = pa.int32(), pa.list_(pa.float32()), pa.list_(pa.int32())
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    CLASSIFICATION: {"label": _INT, "predicted": _INT, "top": _INTS, "scores": _FLOATS},
    MULTI_LABEL: {"labels": _INTS, "predicted": _INT, "top": _INTS, "scores": _FLOATS, "class_scores": _FLOATS},
    RETRIEVAL: {"image_ranks": pa.list_(pa.int64()), "text_rank": pa.int64()},
}
_ABOUT = b"clipcid"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The rows of a file and what they are of.

    Attributes:
        kind: ``classification``, ``multilabel`` or ``retrieval``.
        dataset: Name of the data set.
        num_classes: Number of classes; 0 for retrieval.
        table: ``key`` and the columns of the kind.
    """

    kind: str
    model: str
    dataset: str
    num_classes: int
    table: pa.Table


def predictions_path(metrics: Path) -> Path:
    """Return where the predictions behind a metrics file lie."""
    return metrics.parent / SIDECARS / f"{metrics.stem}.predictions.parquet"


def make_predictions(kind: str, model: str, dataset: str, num_classes: int, columns: dict[str, Any]) -> Predictions:
    """Put columns (`key` and those of the kind, as lists or arrays) into a table."""
    types = {"key": pa.string(), **_COLUMNS[kind]}
    table = pa.table({name: pa.array(columns[name], type=types[name]) for name in types})
    return Predictions(kind, model, dataset, num_classes, table)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write a file."""
    about = {name: getattr(predictions, name) for name in ("kind", "model", "dataset", "num_classes")}
    write_parquet(path, predictions.table.replace_schema_metadata({_ABOUT: json.dumps(about).encode()}))


def read_predictions(path: Path) -> Predictions:
    """Read a file, ordered by key.

    Raises:
        ClipcidError: when there is none, or it is something else.
    """
    import pyarrow.parquet as pq  # not for the runs that read none

    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise ClipcidError(
            f"There are no predictions for each image: {path} is missing.",
            "Run eval-zeroshot for that model and data set again, with --predictions.",
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise ClipcidError(
            f"{path} cannot be read: {error}.", "Remove it and run eval-zeroshot --predictions."
        ) from error
    try:
        about = json.loads(table.schema.metadata[_ABOUT])
        ordered = table.select(["key", *_COLUMNS[about["kind"]]]).sort_by("key")
        return Predictions(about["kind"], about["model"], about["dataset"], about["num_classes"], ordered)
    except (KeyError, TypeError, ValueError) as error:
        raise ClipcidError(
            f"{path} is not a file of predictions of clipcid.", "Name a metrics file, eval/*.json, of eval-zeroshot."
        ) from error
