"""The whole chain from parquet files with images in them, and from captions that are elsewhere than in a .txt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STUDENT, make_caption, make_image, run_clipcid, write_tar

DISTILL = ("--student", "student.json", "--preset", "clip-kd", "--batch-size", 8, "--epochs", 2, "--val-fraction", 0.2)
# The flags that name the captions of either form.
KEYS = {
    "tars": ("--caption-key", "txt", "--caption-key", "json:recaption"),
    "parquet": ("--caption-key", "text", "--caption-key", "recaption"),
}


def write_samples(folder: Path) -> None:
    """Write the same samples as tars and as parquet files, those of even numbers with two further captions."""
    features = {"label": {"names": ["red_door", "boat"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (folder / "parquet").mkdir()
    for shard in range(4):
        numbers = range(10 * shard, 10 * shard + 10)
        further = [[f"again {number}", f"anew {number}"] if number % 2 == 0 else [] for number in numbers]
        members = []
        for number, captions in zip(numbers, further, strict=True):
            attributes = {"recaption": captions} if captions else {}
            members += [
                (f"{number:04d}.png", make_image(number)),
                (f"{number:04d}.txt", make_caption(number).encode()),
                (f"{number:04d}.syn.txt", f"synthetic {number}".encode()),
                (f"{number:04d}.json", json.dumps(attributes).encode()),
            ]
        write_tar(folder / "tars" / f"{shard:05d}.tar", members)
        columns = {
            "image": [{"bytes": make_image(number), "path": None} for number in numbers],
            "key": [f"{number:04d}" for number in numbers],
            "text": [make_caption(number) for number in numbers],
            "recaption": further,
            "label": [number % 2 for number in numbers],
        }
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, folder / "parquet" / f"{shard:05d}.parquet", row_group_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with tars and parquet files of the same samples, and embeddings of both."""
    folder = tmp_path_factory.mktemp("captions")
    write_samples(folder)
    (folder / "student.json").write_text(json.dumps(STUDENT))
    for data, flags in KEYS.items():
        run = run_clipcid("embed", data, "--model", tiny_model, "--work", f"of-{data}", *flags, cwd=folder)
        assert f"Samples without a caption: 20 of {flags[-1]}." in run.said
    return folder


def arrays(work: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(work)): np.load(path) for path in (work / "embeddings").rglob("*.npy")}


def test_rows_are_those_of_the_same_samples_in_tars(place: Path) -> None:
    tars, parquet = arrays(place / "of-tars"), arrays(place / "of-parquet")
    assert tars.keys() == parquet.keys()
    assert all(np.array_equal(tars[name], parquet[name]) for name in tars)
    sizes = [len(rows) for name, rows in sorted(tars.items()) if "captions_emb" in name]
    assert sizes == [10, 10, 10, 10]  # two further captions of every second sample
    counts = json.loads((place / "of-tars" / "embeddings" / "tiny" / "embed.json").read_text())["counts"]
    assert counts["without_caption"] == {"json:recaption": 20}


def test_a_student_learns_the_same_from_both(place: Path, tmp_path: Path) -> None:
    found = []
    for data, flags in KEYS.items():
        call = ("distill", data, *DISTILL, "--work", f"of-{data}", "--name", "one", *flags)
        run = run_clipcid(*call, cwd=place, env={"CLIPCID_CACHE": str(tmp_path / "cache")})
        assert "one drawn in each epoch" in run.said
        found.append(json.loads((place / f"of-{data}" / "distill" / "one" / "distill.json").read_text())["result"])
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["metrics"] == found[1]["metrics"]


def test_other_keys_of_captions_are_refused_by_name(place: Path, tiny_model: Path) -> None:
    call = ("embed", "tars", "--model", tiny_model, "--work")
    other = run_clipcid(*call, "of-tars", "--caption-key", "syn.txt", cwd=place, code=1)
    assert "caption_key: " in other.stderr
    other = run_clipcid("distill", "tars", *DISTILL, "--work", "of-tars", cwd=place, code=1)
    assert "Give --caption-key txt --caption-key json:recaption" in other.said
    misspelt = ("--caption-key", "json:recap", "--dry-run")
    warned = run_clipcid(*call, "typo", "--caption-key", "txt", *misspelt, cwd=place)
    assert "None of the first 10 samples has a caption json:recap" in warned.said
    alone = run_clipcid(*call, "typo", *misspelt, cwd=place, code=1)
    assert "no sample of the first shard has a caption json:recap." in alone.said


def test_classes_of_parquet_files_are_evaluated_and_balance_shows_their_images(place: Path, tiny_model: Path) -> None:
    run = run_clipcid("eval-zeroshot", tiny_model, "parquet", "--work", "eval", "--json", cwd=place)
    assert "the 2 class names are taken from the parquet metadata" in run.said
    assert run.json["metrics"]["acc1"] >= 0
    (page,) = (place / "eval").rglob("*.html")
    assert "data:image/" in page.read_text()
    run_clipcid("balance", "--keep", 0.5, "--select", "resolution", "--work", "of-parquet", cwd=place)
    assert "data:image/" in (place / "of-parquet" / "balance" / "report.html").read_text()
    written = ("--write-shards", "new", "--work", "of-parquet")
    assert "does not consist of tars" in run_clipcid("balance", "--keep", 0.5, *written, cwd=place, code=1).said
    shutil.rmtree(place / "of-parquet" / "balance")
