"""What `clipcid balance` drops beside repeats, through the real binary: references, caption window, cap of clusters."""

from __future__ import annotations

import re
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from balance_data import make_rows, write_embeddings
from conftest import Run, start_clipcid, write_tar, write_tiny_model

EVALUATION = Path(__file__).parents[2] / "recipes" / "quickstart" / "data" / "retrieval" / "test"
PAIRS = EVALUATION.parents[1] / "pairs" / "00000.tar"
OUTPUTS = ("keep.parquet", "forest-filtered.parquet", "curve.csv")


def read_outputs(work: Path) -> dict[str, bytes]:
    return {name: (work / "balance" / name).read_bytes() for name in OUTPUTS}


def read_rows(folder: Path) -> np.ndarray:
    (model,) = folder.iterdir()
    return np.concatenate([np.load(path) for path in sorted((model / "img_emb").glob("*.npy"))]).astype(np.float64)


def test_planted_evaluation_images_are_found_and_no_other_near_one_is_missed(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "00000.tar").write_bytes(PAIRS.read_bytes())
    with tarfile.open(EVALUATION / "0.tar") as source:
        planted = [(f"planted-{member.name}", source.extractfile(member).read()) for member in source.getmembers()]
    write_tar(tmp_path / "data" / "00001.tar", planted)
    amounts = ("--model", tiny_model, "--keep", 0.8, "--against", EVALUATION, "--against-threshold", 0.05)
    run = clipcid("balance", "data", *amounts, "--json")
    work = tmp_path / "clipcid-work"
    keep = pd.read_parquet(work / "balance" / "keep.parquet").set_index("key")
    is_planted = keep.index.str.startswith("planted-")
    assert is_planted.sum() == 344
    assert (keep.loc[is_planted, "dropped_by"] == "reference").all()
    assert (keep.loc[is_planted, "reference_distance"] == 0.0).all()
    rows, others = read_rows(work / "embeddings"), read_rows(work / "references")
    assert (len(rows), len(others)) == (len(keep), 344)
    squared = (rows**2).sum(1)[:, None] + (others**2).sum(1) - 2.0 * rows @ others.T
    nearest = np.sqrt(np.maximum(0.0, squared)).astype(np.float32).min(axis=1)
    near = nearest <= np.float32(0.05)
    assert (keep["dropped_by"] == "reference").tolist() == near.tolist()
    assert keep.loc[near, "reference_distance"].tolist() == nearest[near].tolist()
    assert not near.all()
    assert run.json["against"]["dropped"] == near.sum()
    page = (work / "balance" / "report.html").read_text()
    gallery = page[page.index("Images near a reference") : page.index("Images kept at each cut-off")]
    assert gallery.count("data:image/webp;base64,") == 24
    # The embeddings are there; another amount compares nothing again.
    again = clipcid("balance", "--keep", 0.7, *amounts[4:])
    assert re.search(r"Resuming the search: (\d+) of \1 parts are done", " ".join(again.stderr.split()))
    assert "images dropped, within 0.05" in " ".join(again.stderr.split())

    clipcid("cluster", "--keep-list", "none", "--num-clusters", 12)
    # All at once, and the same bytes from two processes.
    more = ("--max-caption-similarity", 0.3, "--max-per-cluster", 3, "--clusters", work / "clusters")
    (model,) = (work / "embeddings").iterdir()
    given = ("--embeddings", model, "--against", next((work / "references").iterdir()), "--against-threshold", 0.05)
    one = clipcid("balance", *given, "--keep", 0.9, *more, "--work", "one", "--json")
    torchrun(2, "balance", *given, "--keep", 0.9, *more, "--work", "two")
    assert read_outputs(tmp_path / "one") == read_outputs(tmp_path / "two")
    keep = pd.read_parquet(tmp_path / "one" / "balance" / "keep.parquet")
    assert set(keep["dropped_by"].dropna()) == {"reference", "caption", "repeat", "cluster"}
    assert keep[keep["kept"]].groupby("cluster").size().max() == 3
    assert one.json["dropped_by"] == keep["dropped_by"].value_counts().to_dict()
    assert one.json["searched"] == (~keep["dropped_by"].isin(["reference", "caption"])).sum()
    assert one.json["kept"] == keep["kept"].sum() == keep["dropped_by"].isna().sum()


def test_killed_while_references_are_compared_the_same_command_goes_on(
    clipcid: Callable[..., Run], tmp_path: Path
) -> None:
    rows = make_rows(6000, width=64)
    folder = write_embeddings(tmp_path / "e", rows)
    other = write_embeddings(tmp_path / "r", make_rows(3000, width=64, seed=1))
    call = ["balance", "--embeddings", str(folder), "--threshold", "0.6", "--against", str(other)]
    clipcid(*call, "--work", "whole")
    process = start_clipcid(*call, "--work", "killed", cwd=tmp_path)
    while process.poll() is None and not list((tmp_path / "killed" / "balance").glob(".references/*/*.npz")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = clipcid(*call, "--work", "killed")
    assert "Resuming the search:" in " ".join(again.stderr.split())
    assert read_outputs(tmp_path / "killed") == read_outputs(tmp_path / "whole")


def test_references_of_another_model_are_refused_before_anything_is_embedded(
    clipcid: Callable[..., Run], tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    clipcid("embed", tiny_shards, "--model", tiny_model, "--no-text", "--out", "references")
    other = write_tiny_model(tmp_path / "other", seed=7)
    amounts = ("--keep", 0.5, "--against", "references", "--against-threshold", 0.1)
    run = clipcid("balance", tiny_shards, "--model", other, *amounts, check=False)
    assert run.returncode == 1
    assert "the images to balance are to be embedded with" in " ".join(run.stderr.split())
    assert not (tmp_path / "clipcid-work" / "embeddings").exists()
