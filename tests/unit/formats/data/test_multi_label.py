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


def test_vectors_in_a_tar_as_clip_benchmark_writes_them(tmp_path: Path) -> None:
    vectors = [np.array([0, 1, 0, 1.0], np.float32), np.zeros(4, np.int64), np.array([True, False, False, False])]
    members = [
        member
        for number, vector in enumerate(vectors)
        for member in ((f"{number}.npy", npy(vector)), (f"{number}.png", make_image(number)))
    ]
    assert classes_of(write_tar(tmp_path / "0.tar", members)) == [(1, 3), (), (0,)]


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


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_lists_of_numbers(tmp_path: Path, suffix: str) -> None:
    cells = [[3, 1], [], [2]] if suffix == "parquet" else ["3 1", "", "2"]
    frame = pd.DataFrame({"filepath": ["a.png", "b.png", "c.png"], "label": cells})
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert classes_of(path) == [(1, 3), (), (2,)]
    samples = open_dataset(path).shards[0].samples()
    assert [sample.label for sample in samples] == [None, None, None]


def test_a_list_with_one_class_each_stays_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("filepath,label\na.png,2\nb.png,\nc.png,1.0\n")
    samples = open_dataset(tmp_path / "list.csv").shards[0].samples()
    assert [(sample.label, sample.labels) for sample in samples] == [(2, None), (None, None), (1, None)]
    assert classes_of(tmp_path / "list.csv") == [(2,), None, (1,)]


@pytest.mark.parametrize("cell", ["cat", "1.5", "1 x"])
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path: Path, cell: str) -> None:
    (tmp_path / "list.csv").write_text(f"filepath,label\na.png,{cell}\n")
    with pytest.raises(ClipcidError, match="other than integers"):
        open_dataset(tmp_path / "list.csv")


def test_a_number_of_no_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("filepath,label\na.png,0 4\n")
    with pytest.raises(ClipcidError, match="has class 4; there are 4 class names"):
        classes_of(tmp_path / "list.csv")
