"""Images with several classes, as tars and lists store them."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_image, write_tar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.samples import read_classes


def npy(values: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def classes_of(path: Path, num_classes: int = 4) -> list[tuple[int, ...] | None]:
    return [read_classes(sample, num_classes) for shard in open_dataset(path).shards for sample in shard.samples()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy([0, 1, 0]), r"int64 \[3\], not zeros and ones for 4 classes"),
        (npy([0, 1, 2, 0]), "not zeros and ones"),
        (b"not numpy", "cannot be read"),
        (npy(np.array([{}], dtype=object)), "cannot be read"),
    ],
    ids=["length", "values", "no npy", "pickle"],
)
def test_vectors_that_say_something_else_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.npy", content), ("a.png", make_image(0))])
    with pytest.raises(ClipcidError, match=message):
        classes_of(path)


def test_lists_of_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame({"filepath": ["a.png", "b.png", "c.png"], "label": ["3 1", "", "2"]})
    frame.to_csv(tmp_path / "list.csv", index=False)
    frame.assign(label=[[3, 1], [], [2]]).to_parquet(tmp_path / "list.parquet")
    for suffix in ("csv", "parquet"):
        path = tmp_path / f"list.{suffix}"
        assert classes_of(path) == [(1, 3), (), (2,)]
        assert [sample.label for sample in open_dataset(path).shards[0].samples()] == [None, None, None]
    (tmp_path / "list.csv").write_text("filepath,label\na.png,2\nb.png,\nc.png,1.0\n")
    assert [sample.label for sample in open_dataset(tmp_path / "list.csv").shards[0].samples()] == [2, None, 1]
    assert classes_of(tmp_path / "list.csv") == [(2,), None, (1,)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("cat", "other than integers"),
        ("1.5", "other than integers"),
        ("1 x", "other than integers"),
        ("0 4", "has class 4; there are 4 class names"),
    ],
)
def test_labels_of_no_class_are_refused(tmp_path: Path, cell: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(f"filepath,label\na.png,{cell}\n")
    with pytest.raises(ClipcidError, match=message):
        classes_of(tmp_path / "list.csv")
