"""Files that are replaced or edited between the steps: no step takes them for what the step before wrote."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from one_process import OneProcess
from sidecars import edit_sidecar, leave_work, unfinish

from clipcid_cli.formats.embeddings.manifest import read_manifest

MODEL = "clipcid-work/embeddings/tiny"
BALANCE = ("balance", "--keep", "0.8")
CLUSTER = ("cluster", "--num-clusters", "3", "--iterations", "2")
SHORT = ("--steps", "1", "--batch-size", "4", "--val-fraction", "0")
DISTILL = ("distill", "--student", "student.json", "--preset", "cid", *SHORT)


@pytest.fixture(scope="module")
def clipcid() -> Iterator[OneProcess]:
    process = OneProcess(patience=60)
    yield process
    process.close()


@pytest.fixture(scope="module")
def chain(clipcid: OneProcess, distill_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after embed, balance and cluster."""
    folder = tmp_path_factory.mktemp("chain") / "place"
    shutil.copytree(distill_prepared, folder)
    for step in (BALANCE, (*CLUSTER, "--overwrite")):
        found = clipcid(*step, cwd=folder)
        assert found.code == 0, found
    return folder


def change_rows(path: Path) -> None:
    rows = np.load(path)
    np.save(path, rows[::-1])


def change_keys(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "key", pc.binary_join_element_wise(table["key"], pa.scalar("x"), "")), path)


def change_distances(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "distance", pc.multiply(table["distance"], pa.scalar(0.5, pa.float32()))), path)


def keep_all(path: Path) -> None:
    table = pq.read_table(path)
    place = table.column_names.index("kept")
    pq.write_table(table.set_column(place, "kept", pa.array([True] * len(table))), path)


def change_labels(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "cluster", pa.array([0] * len(table), pa.int32())), path)


@pytest.mark.parametrize(
    ("file", "change", "step"),
    [
        (f"{MODEL}/img_emb/img_emb_0000.npy", change_rows, BALANCE),
        (f"{MODEL}/img_emb/img_emb_0001.npy", change_rows, (*CLUSTER, "--overwrite")),
        (f"{MODEL}/text_emb/text_emb_0000.npy", change_rows, DISTILL),
        (f"{MODEL}/metadata/metadata_0001.parquet", change_keys, DISTILL),
        ("clipcid-work/clusters/centroids.npy", change_rows, DISTILL),
        ("clipcid-work/clusters/clusters.parquet", change_labels, DISTILL),
        ("clipcid-work/balance/forest.parquet", change_distances, ("balance", "--keep", "0.5")),
        ("clipcid-work/balance/keep.parquet", keep_all, (*CLUSTER, "--overwrite")),
        ("clipcid-work/balance/keep.parquet", keep_all, (*BALANCE, "--write-shards", "out")),
        ("clipcid-work/balance/keep.parquet", keep_all, DISTILL),
    ],
)
def test_a_changed_file_is_refused_and_the_error_says_what_to_run(
    clipcid: OneProcess, chain: Path, tmp_path: Path, file: str, change: Callable[[Path], None], step: tuple[str, ...]
) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    change(place / file)
    found = clipcid(*step, cwd=place)
    assert found.code == 1, found
    assert not found.problems(), found
    assert f"{file.rpartition('/')[2]} has changed since" in found.err
    assert "--overwrite" in found.err or "searched again" in found.err


def test_a_copied_work_directory_is_the_same_one(clipcid: OneProcess, chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place, copy_function=shutil.copyfile)  # other times
    for step in (BALANCE, ("balance", "--keep", "0.5"), (*CLUSTER, "--overwrite"), DISTILL):
        found = clipcid(*step, cwd=place)
        assert found.code == 0, found


def test_an_edited_keep_list_that_is_named_is_taken(clipcid: OneProcess, chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    keep_all(place / "clipcid-work/balance/keep.parquet")
    named = ("--keep-list", "clipcid-work/balance/keep.parquet")
    found = clipcid(*CLUSTER, *named, "--overwrite", "--json", cwd=place)
    assert found.code == 0, found
    assert found.json["images"] == 24


@pytest.mark.parametrize(
    ("gone", "reason"), [("data/00001.tar", "the data has no image"), ("data", "There is no data at")]
)
def test_the_report_is_written_again_once_its_pictures_can_be_read(
    clipcid: OneProcess, chain: Path, tiny_shards: Path, tmp_path: Path, gone: str, reason: str
) -> None:
    place = tmp_path / "place"
    shutil.copytree(tiny_shards, place / "data")
    shutil.copytree(chain / MODEL, place / MODEL)
    edit_sidecar(place / MODEL / "embed.json", lambda sidecar: sidecar["data"].update(spec=str(place / "data")))
    (place / gone).rename(tmp_path / "aside")

    def balance() -> tuple[str, dict[str, Any], int]:
        found = clipcid(*BALANCE, cwd=place)
        assert found.code == 0, found
        folder = place / "clipcid-work/balance"
        recorded = json.loads((folder / "balance.json").read_text())["pictures"]
        return " ".join(found.err.split()), recorded, (folder / "report.html").read_text().count("data:image/webp")

    said, without, num_without = balance()
    missing = len(without["unread"])
    assert f"warning: The report shows {without['shown']} of {without['shown'] + missing} pictures: {reason}" in said
    assert missing > 0
    assert (without["shown"] == 0) == (num_without == 0) == (gone == "data")
    assert "already holds this result" in balance()[0]
    (tmp_path / "aside").rename(place / gone)
    said, whole, number = balance()
    assert "Pictures missing from the report can be read now" in said
    assert whole == {"shown": without["shown"] + missing, "unread": [], "why": ""}
    assert number > num_without
    assert "already holds this result" in balance()[0]


def test_an_edited_index_is_refused_until_it_is_removed(clipcid: OneProcess, chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    (path, *_) = sorted((place / "clipcid-work/index").glob("*/*.arrow"))
    content = bytearray(path.read_bytes())
    place_of_key = content.find(b"000001")
    content[place_of_key : place_of_key + 6] = b"999999"
    path.write_bytes(content)
    found = clipcid(*DISTILL, cwd=place)
    assert found.code == 1, found
    assert not found.problems(), found
    said = " ".join(found.err.split())
    assert f"{path.name} is missing, edited, damaged, or of another version of its shard." in said
    assert "Remove" in said
    shutil.rmtree(path.parent)
    assert clipcid(*DISTILL, cwd=place).code == 0


def test_a_replaced_student_is_refused_unless_it_is_named(clipcid: OneProcess, chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    assert clipcid(*DISTILL, "--name", "small", cwd=place).code == 0
    student = place / "clipcid-work/distill/small/student"
    weights = bytearray((student / "open_clip_model.safetensors").read_bytes())
    weights[-4:] = bytes(4)
    (student / "open_clip_model.safetensors").write_bytes(weights)
    for step in (("eval-zeroshot",), ("export",), (*DISTILL, "--name", "small")):
        found = clipcid(*step, cwd=place)
        assert found.code == 1, found
        assert not found.problems(), found
        assert "open_clip_model.safetensors has changed since" in found.err
        assert "--overwrite" in found.err
    found = clipcid("export", student, "--out", "named", "--dry-run", cwd=place)
    assert found.code == 0, found


def test_edited_metrics_are_refused_and_removed_ones_made_again(
    clipcid: OneProcess, chain: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data, _ = _sources(chain)
    call = ("eval-zeroshot", tiny_model, data, "--task", "retrieval", "--predictions", "--bootstrap", "10")
    first = clipcid(*call, "--json", cwd=tmp_path)
    assert first.code == 0, first
    path = tmp_path / first.json["files"]["metrics"]
    written, rows = path.read_bytes(), tmp_path / first.json["files"]["predictions"]
    predicted = rows.read_bytes()
    compare = ("eval-zeroshot", "--compare", path, path)
    assert clipcid(*compare, cwd=tmp_path).code == 0
    for changed, content in ((path, written.replace(b"0.", b"1.", 1)), (rows, predicted[:-1] + b"X")):
        before = changed.read_bytes()
        changed.write_bytes(content)
        for step in (call, compare):
            found = clipcid(*step, cwd=tmp_path)
            assert found.code == 1, found
            assert not found.problems(), found
            assert f"{changed.name} has changed since" in found.err
            assert "--overwrite" in found.err
        changed.write_bytes(before)
    path.unlink()
    again = clipcid(*call, "--json", cwd=tmp_path)
    assert again.code == 0, again
    assert again.json["metrics"] == first.json["metrics"]
    assert path.read_bytes() == written


def test_zero_and_infinite_rows_of_another_tool_are_skipped_and_counted(
    clipcid: OneProcess, chain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(chain / MODEL, folder)
    (folder / "embed.json").unlink()
    for name, row, value in (("img_emb/img_emb_0000", 2, np.nan), ("text_emb/text_emb_0001", 5, 0)):
        rows = np.load(folder / f"{name}.npy")
        rows[row] = value
        np.save(folder / f"{name}.npy", rows)
    allowed = ("--embeddings", folder, "--max-bad-fraction", "0.1", "--keep-list", "none")
    found = clipcid(*CLUSTER, "--features", "joint", *allowed, "--json", cwd=tmp_path)
    assert found.code == 0, found
    assert json.loads((tmp_path / "clipcid-work/clusters/cluster.json").read_text())["counts"] == {
        "read": 24,
        "used": 22,
        "skipped": {"nan_row": 2},
    }
    shutil.copy(chain / "student.json", tmp_path)
    data = json.loads((chain / MODEL / "embed.json").read_text())["data"]["spec"]
    taught = clipcid(*DISTILL, data, *allowed, "--preset", "clip-kd", "--json", cwd=tmp_path)
    assert taught.code == 0, taught
    assert "2 rows of the embeddings are zero or not finite" in taught.err


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\0" * 1000])
def test_a_resumed_embed_makes_a_damaged_shard_again(
    clipcid: OneProcess, chain: Path, tmp_path: Path, content: bytes
) -> None:
    """The state of a run that was killed after its last shard: a work folder with records of its shards, no sidecar."""
    data, model = _sources(chain)
    command = ("embed", data, "--model", model, "--out", "rows", "--json")
    assert clipcid(*command, cwd=tmp_path).code == 0
    folder = tmp_path / "rows"
    whole = (folder / "img_emb/img_emb_0000.npy").read_bytes()
    work = unfinish(folder, "embed")
    (work / ".shards").mkdir()
    for number, record in enumerate(read_manifest(folder, "")):
        (work / ".shards" / f"{number:04d}.json").write_text(json.dumps(msgspec.to_builtins(record)))
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).rename(work / name)
    (work / "img_emb/img_emb_0000.npy").write_bytes(content)
    found = clipcid(*command, cwd=tmp_path)
    assert found.code == 0, found
    assert "1 of 2 shards are already embedded" in found.err
    assert (folder / "img_emb/img_emb_0000.npy").read_bytes() == whole
    # What a run leaves which is killed right after its sidecar is removed by the next.
    leave_work(folder, "embed")
    assert clipcid(*command, cwd=tmp_path).code == 0
    assert not [path for path in folder.glob(".*") if path.suffix != ".lock"]


def _sources(chain: Path) -> tuple[str, str]:
    sidecar = json.loads((chain / MODEL / "embed.json").read_text())
    return sidecar["data"]["spec"], sidecar["model"]["spec"]


def test_a_folder_or_a_pipe_in_the_place_of_rows_is_refused(clipcid: OneProcess, chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(chain / MODEL, folder)
    (folder / "embed.json").unlink()
    path = folder / "img_emb/img_emb_0000.npy"
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        found = clipcid("balance", "--keep", "0.5", "--embeddings", folder, cwd=tmp_path)
        assert found.code == 1, found
        assert not found.problems(), found
        assert "not a file" in found.err
        if make is os.mkfifo:
            continue
        path.rmdir()
        path.touch()
