"""Files that are replaced or edited between the steps: no step takes them for what the step before wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_clipcid
from sidecars import edit_sidecar, leave_work, unfinish

from clipcid_cli.formats.embeddings.manifest import ShardRecord, read_manifest
from clipcid_cli.formats.journal import record_journal

MODEL = "clipcid-work/embeddings/tiny"
BALANCE = ("balance", "--keep", "0.8")
CLUSTER = ("cluster", "--num-clusters", "3", "--iterations", "2")
SHORT = ("--steps", "1", "--batch-size", "4", "--val-fraction", "0")
DISTILL = ("distill", "--student", "student.json", "--preset", "cid", *SHORT)


@pytest.fixture(scope="module")
def chain(distill_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after embed, balance and cluster."""
    folder = tmp_path_factory.mktemp("chain") / "place"
    shutil.copytree(distill_prepared, folder)
    for step in (BALANCE, (*CLUSTER, "--overwrite")):
        run_clipcid(*step, cwd=folder)
    return folder


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def keep_all(path: Path) -> None:
    table = pq.read_table(path)
    place = table.column_names.index("kept")
    pq.write_table(table.set_column(place, "kept", pa.array([True] * len(table))), path)


@pytest.mark.parametrize(
    ("file", "step"),
    [
        (f"{MODEL}/img_emb/img_emb_0000.npy", BALANCE),
        (f"{MODEL}/img_emb/img_emb_0001.npy", (*CLUSTER, "--overwrite")),
        (f"{MODEL}/text_emb/text_emb_0000.npy", DISTILL),
        (f"{MODEL}/metadata/metadata_0001.parquet", DISTILL),
        ("clipcid-work/clusters/centroids.npy", DISTILL),
        ("clipcid-work/clusters/clusters.parquet", DISTILL),
        ("clipcid-work/balance/forest.parquet", ("balance", "--keep", "0.5")),
        ("clipcid-work/balance/keep.parquet", (*CLUSTER, "--overwrite")),
        ("clipcid-work/balance/keep.parquet", (*BALANCE, "--write-shards", "out")),
        ("clipcid-work/balance/keep.parquet", DISTILL),
    ],
)
def test_a_changed_file_is_refused_and_the_error_says_what_to_run(
    chain: Path, tmp_path: Path, file: str, step: tuple[str, ...]
) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    flip_bit(place / file)
    refused(place, step, f"{file.rpartition('/')[2]} has changed since")


def refused(place: Path, step: tuple[object, ...], reason: str) -> None:
    """Run a step that must end with one error, which says the reason and what to run."""
    found = run_clipcid(*step, cwd=place, check=False)
    assert found.returncode == 1, found
    assert not found.problems(), found
    said = found.said
    assert reason in said, found
    assert any(way in said for way in ("--overwrite", "searched again", "Remove")), found


def test_a_copied_work_directory_is_the_same_one(chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place, copy_function=shutil.copyfile)  # other times
    for step in (BALANCE, ("balance", "--keep", "0.5"), (*CLUSTER, "--overwrite"), DISTILL):
        run_clipcid(*step, cwd=place)


@pytest.mark.parametrize("step", [(*CLUSTER, "--overwrite"), DISTILL], ids=["cluster", "distill"])
def test_a_keep_list_that_is_gone_does_not_mean_all_images(chain: Path, tmp_path: Path, step: tuple[str, ...]) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    (place / "clipcid-work/balance/keep.parquet").unlink()
    refused(
        place,
        step,
        "keep.parquet is missing, although clipcid-work/balance/balance.json says it was written.",
    )
    found = run_clipcid(*CLUSTER, "--keep-list", "none", "--overwrite", "--json", cwd=place)
    assert found.json["images"] == 24


def test_an_edited_keep_list_that_is_named_is_taken(chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    keep_all(place / "clipcid-work/balance/keep.parquet")
    named = ("--keep-list", "clipcid-work/balance/keep.parquet")
    found = run_clipcid(*CLUSTER, *named, "--overwrite", "--json", cwd=place)
    assert found.json["images"] == 24


@pytest.mark.parametrize(
    ("gone", "reason"), [("data/00001.tar", "the data has no image"), ("data", "There is no data at")]
)
def test_the_report_is_written_again_once_its_pictures_can_be_read(
    chain: Path, tiny_shards: Path, tmp_path: Path, gone: str, reason: str
) -> None:
    place = tmp_path / "place"
    shutil.copytree(tiny_shards, place / "data")
    shutil.copytree(chain / MODEL, place / MODEL)
    edit_sidecar(place / MODEL / "embed.json", lambda sidecar: sidecar["data"].update(spec=str(place / "data")))
    (place / gone).rename(tmp_path / "aside")

    def balance() -> tuple[str, dict[str, Any], int]:
        found = run_clipcid(*BALANCE, cwd=place)
        folder = place / "clipcid-work/balance"
        recorded = json.loads((folder / "balance.json").read_text())["pictures"]
        return found.said, recorded, (folder / "report.html").read_text().count("data:image/webp")

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


def test_a_damaged_forest_is_made_again_by_overwrite(chain: Path, tmp_path: Path) -> None:
    place = shutil.copytree(chain, tmp_path / "place")
    forest = place / "clipcid-work/balance/forest.parquet"
    whole = forest.read_bytes()
    forest.write_bytes(b"")
    assert "The forest is not as it was written" in run_clipcid(*BALANCE, "--overwrite", cwd=place).said
    assert forest.read_bytes() == whole
    assert "already holds this result" in run_clipcid(*BALANCE, "--overwrite", cwd=place).said
    # One that is longer than what was searched, by a sidecar that records no files.
    table = pq.read_table(forest)
    pq.write_table(table.set_column(2, table.schema.field(2), pa.array([1.0] * len(table), pa.float32())), forest)
    edit_sidecar(forest.with_suffix(".json"), lambda sidecar: sidecar.pop("outputs"))
    refused(place, ("balance", "--keep", "0.7"), "with ascending distances up to 0.")


def test_an_edited_index_is_refused_until_it_is_removed(chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    (path,) = (each for each in (place / "clipcid-work/index").glob("*/*.arrow") if b"000001" in each.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"000001", b"999999", 1))
    reason = f"{path.name} is missing, edited, damaged, or of another version of its shard."
    refused(place, DISTILL, reason)
    shutil.rmtree(path.parent)
    run_clipcid(*DISTILL, cwd=place)


def test_a_replaced_student_is_refused_unless_it_is_named(chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(chain, place)
    run_clipcid(*DISTILL, "--name", "small", cwd=place)
    student = place / "clipcid-work/distill/small/student"
    weights = bytearray((student / "open_clip_model.safetensors").read_bytes())
    weights[-4:] = bytes(4)
    (student / "open_clip_model.safetensors").write_bytes(weights)
    for step in (("eval-zeroshot",), ("export",), (*DISTILL, "--name", "small")):
        refused(place, step, "open_clip_model.safetensors has changed since")
    run_clipcid("export", student, "--out", "named", "--dry-run", cwd=place)


def test_edited_metrics_are_refused_and_removed_ones_made_again(chain: Path, tiny_model: Path, tmp_path: Path) -> None:
    data, _ = _sources(chain)
    call = ("eval-zeroshot", tiny_model, data, "--task", "retrieval", "--predictions", "--bootstrap", "10")
    first = run_clipcid(*call, "--json", cwd=tmp_path)
    path, rows = (tmp_path / first.json["files"][name] for name in ("metrics", "predictions"))
    compare = ("eval-zeroshot", "--compare", path, path)
    run_clipcid(*compare, cwd=tmp_path)
    written = path.read_bytes()
    for changed, content in ((path, written.replace(b"0.", b"1.", 1)), (rows, rows.read_bytes()[:-1] + b"X")):
        before = changed.read_bytes()
        changed.write_bytes(content)
        for step in (call, compare):
            refused(tmp_path, step, f"{changed.name} has changed since")
        changed.write_bytes(before)
    path.unlink()
    again = run_clipcid(*call, "--json", cwd=tmp_path)
    assert again.json["metrics"] == first.json["metrics"]
    assert path.read_bytes() == written


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\0" * 1000])
def test_a_resumed_embed_makes_a_damaged_shard_again(chain: Path, tmp_path: Path, content: bytes) -> None:
    """The state of a run that was killed after its last shard: a work folder with records of its shards, no sidecar."""
    data, model = _sources(chain)
    command = ("embed", data, "--model", model, "--out", "rows", "--json")
    run_clipcid(*command, cwd=tmp_path)
    folder = tmp_path / "rows"
    whole = (folder / "img_emb/img_emb_0000.npy").read_bytes()
    work = unfinish(folder, "embed")
    done = record_journal(work / ".shards", ShardRecord)
    for number, record in enumerate(read_manifest(folder, "")):
        done.append(f"{number:04d}", record)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).rename(work / name)
    (work / "img_emb/img_emb_0000.npy").write_bytes(content)
    found = run_clipcid(*command, cwd=tmp_path)
    assert "1 of 2 shards are already embedded" in found.stderr
    assert (folder / "img_emb/img_emb_0000.npy").read_bytes() == whole
    # What a run leaves which is killed right after its sidecar is removed by the next.
    leave_work(folder, "embed")
    run_clipcid(*command, cwd=tmp_path)
    assert not [path for path in folder.glob(".*") if path.suffix != ".lock"]


def _sources(chain: Path) -> tuple[str, str]:
    sidecar = json.loads((chain / MODEL / "embed.json").read_text())
    return sidecar["data"]["spec"], sidecar["model"]["spec"]
