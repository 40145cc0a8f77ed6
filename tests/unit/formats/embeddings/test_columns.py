"""Embeddings in columns of parquet files, and arrays with their keys beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from balance_data import balance, read_keep

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import parquet
from clipcid_cli.formats.embeddings import copies
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import unit_rows
from clipcid_cli.steps.open_data import holds_embeddings

WIDTH = 8
KEYS = [f"k{row}" for row in range(60)]
FORMS: dict[str, pa.DataType] = {
    "list": pa.list_(pa.float32()),
    "large": pa.large_list(pa.float64()),
    "half": pa.list_(pa.float16()),
    "fixed": pa.list_(pa.float32(), WIDTH),
    "tensor": pa.fixed_shape_tensor(pa.float32(), (WIDTH,)),
}


def make_rows(seed: int = 0, count: int = 60) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, WIDTH))


def to_column(rows: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    numbers = rows.astype(storage.value_type.to_pandas_dtype())
    column = pa.array([None if np.isnan(row).all() else list(row) for row in numbers], storage)
    return pa.ExtensionArray.from_storage(kind, column) if storage is not kind else column


def write_table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7 if len(columns) > 1 else None)
    return path


def read_keys(embeddings: Embeddings) -> list[str]:
    return [key for file in embeddings.files for key in embeddings.keys_of(file).to_pylist()]


@pytest.mark.parametrize("form", FORMS)
def test_a_column_is_read_as_unit_rows(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_ROWS_AT_ONCE", 5)
    kind, rows, texts = FORMS[form], make_rows(), make_rows(1)
    rows[3] = np.nan
    rows[11] = 0
    columns = {"text_embedding": to_column(texts, kind), "key": KEYS, "caption": [f"caption {key}" for key in KEYS]}
    path = write_table(tmp_path / "e.parquet", image_embedding=to_column(rows, kind), **columns)
    found = open_embeddings(path, work=tmp_path / "work")
    stored = rows.astype((getattr(kind, "storage_type", kind)).value_type.to_pandas_dtype())
    np.testing.assert_array_equal(found.rows(Kind.IMAGES).read(0, 60), unit_rows(stored))
    np.testing.assert_array_equal(
        found.rows(Kind.TEXTS).take(np.array([8])), unit_rows(texts.astype(stored.dtype))[[8]]
    )
    assert found.find_bad_rows(texts=False).tolist() == [3, 11]
    assert read_keys(found) == KEYS
    assert found.captions_of(found.files[0])[1].as_py() == "caption k1"
    assert not list((tmp_path / "work" / ".rows").glob("*.lock"))


def test_a_copy_is_of_the_file_that_is_there(tmp_path: Path) -> None:
    """Another file of the same size and time is copied anew."""
    path = tmp_path / "e.parquet"
    for seed in (0, 1):
        table = pa.table({"emb": to_column(make_rows(seed), FORMS["fixed"])})
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
        os.utime(path, ns=(0, 0))
        found = open_embeddings(path, work=tmp_path / "work").rows(Kind.IMAGES).read(0, 60)
        np.testing.assert_array_equal(found, unit_rows(make_rows(seed).astype(np.float32)))


def test_a_balance_of_files_with_columns(tmp_path: Path) -> None:
    """Files of a folder are shards; a dry run leaves nothing, and a second run reads the copies."""
    rows = np.repeat(make_rows(count=30), 2, axis=0)
    for part in (0, 1):
        some = slice(30 * part, 30 * part + 30)
        write_table(tmp_path / "e" / f"{part}.parquet", emb=to_column(rows[some], FORMS["fixed"]), key=KEYS[some])
    assert holds_embeddings(tmp_path / "e")
    balance(tmp_path / "work", tmp_path / "e", threshold=0.0, dry_run=True)
    assert not (tmp_path / "work").exists()
    result, _ = balance(tmp_path / "work", tmp_path / "e", threshold=0.0)
    keep = read_keep(tmp_path / "work")
    assert (keep["key"].tolist(), keep["kept"].tolist()) == (KEYS, [True, False] * 30)
    assert keep["shard"].tolist() == ["0"] * 30 + ["1"] * 30
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "work" / ".rows").iterdir())]
    assert "already holds this result" in balance(tmp_path / "work", tmp_path / "e", threshold=0.0)[1]
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "work" / ".rows").iterdir())] == stamps
    # Other rows in one of the files.
    write_table(tmp_path / "e" / "1.parquet", emb=to_column(make_rows(5, 30), FORMS["fixed"]), key=KEYS[30:])
    with pytest.raises(ClipcidError, match="made with other settings or inputs"):
        balance(tmp_path / "work", tmp_path / "e", threshold=0.0)
    assert result["kept"] == 30


def test_columns_that_are_no_embeddings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emb = to_column(make_rows(), FORMS["list"])
    two = write_table(tmp_path / "two.parquet", clip=emb, dino=emb, txt_clip=emb)
    with pytest.raises(
        ClipcidError, match="2 columns of image embeddings; its columns of embeddings: clip, dino, txt_clip"
    ) as refused:
        open_embeddings(two)
    assert "--embedding-column clip" in refused.value.fix
    assert open_embeddings(two, array="dino").has_texts
    none = write_table(tmp_path / "none.parquet", key=KEYS, sizes=[[1, 2]] * 60)
    with pytest.raises(ClipcidError, match="has no column of embeddings, lists of floating-point numbers"):
        open_embeddings(none)
    with pytest.raises(ClipcidError, match="has no column other of lists of numbers; it has clip"):
        open_embeddings(two, array="other")
    ragged = write_table(tmp_path / "ragged.parquet", emb=[[1.0, 2.0]] * 59 + [[1.0]])
    with pytest.raises(ClipcidError, match=r"ragged[.]parquet\[emb\] has 1 numbers in row 59, and 2 in the first"):
        open_embeddings(ragged)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_MOST_EXPANDED", 500_000)
        repeated = write_table(tmp_path / "repeated.parquet", emb=[[1.0] * WIDTH] * 60_000)
        message = (
            r"its 60,000 rows of width 8 in column emb would take 960,000 bytes of memory, and the file has [0-9,]+"
        )
        with pytest.raises(ClipcidError, match=message):
            open_embeddings(repeated)
    monkeypatch.setattr(copies, "MAX_WIDTH", 4)
    with pytest.raises(ClipcidError, match="more than 4 in each"):
        open_embeddings(two, array="clip")


@pytest.mark.parametrize("form", ["txt", "parquet", None])
def test_an_array_has_its_keys_beside_it(tmp_path: Path, form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_CHARACTERS_AT_ONCE", 7)
    np.save(tmp_path / "emb.npy", make_rows().astype(np.float32))
    if form == "txt":
        (tmp_path / "emb.keys.txt").write_text("\r\n".join(KEYS), newline="")
    elif form == "parquet":
        write_table(tmp_path / "emb.parquet", key=KEYS)
    for place in (tmp_path / "emb.npy", tmp_path):
        found = open_embeddings(place)
        assert read_keys(found) == (KEYS if form else [f"emb/{row}" for row in range(60)])
        np.testing.assert_array_equal(found.rows(Kind.IMAGES).read(0, 60), unit_rows(make_rows().astype(np.float32)))
    if form == "txt":
        (tmp_path / "emb.keys.txt").write_text("\n".join(KEYS[1:]))
        with pytest.raises(ClipcidError, match=r"emb.keys.txt has 59 lines, and the array beside it 60 rows"):
            open_embeddings(tmp_path / "emb.npy")
        monkeypatch.setattr(copies, "_LONGEST_KEY", 5)
        (tmp_path / "emb.keys.txt").write_text("a key without an end")
        with pytest.raises(ClipcidError, match="a line of more than 5 characters"):
            open_embeddings(tmp_path / "emb.npy")
