"""What `balance` drops beside repeats, against plain computations; what it refuses, a dry run with the same words."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from balance_data import balance, make_rows, read_keep, unit, write_embeddings
from conftest import shard_members, write_tar
from PIL import Image
from sidecars import leave_work

from clipcid_cli.algorithms.sets.representatives import random_scores
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.formats.sidecar import read_sidecar, write_sidecar
from clipcid_cli.steps.balance import filters
from clipcid_cli.steps.cluster import run as run_cluster
from clipcid_cli.steps.embed.run import run as run_embed
from clipcid_cli.steps.runs import run as list_runs
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.runs import RunsSettings

NUM_ROWS = 400
CASES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("good", {"against": ("narrow",), "against_threshold": 0.1}, "have width 16, those in .*good 32"),
    ("good", {"against": ("zeros",), "against_threshold": 0.1}, "All 20 rows of .*zeros are zero or not finite"),
    ("good", {"against": ("pictures.tar",), "against_threshold": 0.1}, "does not record the model to embed it with"),
    ("good", {"near": ("narrow",), "near_keep": 0.5}, r"have width 16.*narrow|narrow have width 16"),
    ("good", {"near": ("zeros",), "near_keep": 0.5}, "All 20 rows of .*zeros are zero or not finite"),
    ("good", {"near": ("empty",), "near_keep": 0.5}, "all empty"),
    ("good", {"max_caption_similarity": -0.99}, r"of none of the \d+ images is in the window to -0.99: they range"),
    ("good", {"max_per_cluster": 2}, "There are no clusters in"),
    ("good", {"max_per_cluster": 2, "clusters": "."}, "holds no finished clusters"),
    ("good", {"write_shards": "s"}, "needs the data itself"),
    ("good", {"write_shards": "s", "data": "no-such-data"}, "There is no data at"),
    ("good", {"select": "resolution"}, "--select resolution needs the data itself"),
    ("good", {"write_uids": "u.npy"}, "Sample '000000' has no uid of DataComp's"),
    ("narrow", {"min_caption_similarity": 0.1}, "embeddings, which are needed for --min-caption-similarity 0.1"),
    ("narrow", {"select": "similarity"}, "no text embeddings, which are needed for --select similarity"),
    ("zeros", {}, "None of the 20 rows of .*zeros is finite"),
    ("text", {}, "cannot be read"),
    ("empty", {}, "all empty"),
)


def make_pairs() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, texts at all angles to them, and captions, some of them empty; two text rows are not usable."""
    rows, generator = make_rows(NUM_ROWS), np.random.default_rng(5)
    texts = unit(rows + generator.random((NUM_ROWS, 1)) * generator.normal(size=rows.shape)).astype(np.float16)
    texts[7], texts[11] = 0.0, np.nan
    return rows, texts, ["" if row % 29 == 0 else f"picture {row}" for row in range(NUM_ROWS)]


def make_clusters(work: Path, embeddings: Path, num_clusters: int) -> Path:
    chosen = {"keep_list": "none", "num_clusters": num_clusters, "device": "cpu"}
    run_cluster(ClusterSettings(work=work, embeddings=(embeddings,), **chosen))
    return work / "clusters"


def test_another_amount_needs_no_search_and_the_forest_of_all_images_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, texts, _ = make_pairs()
    folder, work = write_embeddings(tmp_path / "e", rows, texts=texts), tmp_path / "work"
    with monkeypatch.context() as without:  # what is not asked for is not loaded
        for module in pkgutil.iter_modules(filters.__path__, f"{filters.__name__}."):
            without.setitem(sys.modules, module.name, None)
        for name in ("saved_search", "saved_sets", "merge", "cost_result", "write_data"):
            without.setitem(sys.modules, f"clipcid_cli.steps.balance.{name}", None)
        balance(work, folder, keep=0.5)
    whole = (work / "balance" / "forest.parquet").read_bytes()
    result, _ = balance(work, folder, keep=0.5, min_caption_similarity=0.5)
    assert result["caption_window"]["without"] == 2, "of a folder without captions, texts without direction"
    for again, is_there in (
        ({"keep": 0.7, "min_caption_similarity": 0.5}, True),
        ({"keep": 0.5, "min_caption_similarity": 0.6}, False),
        ({"keep": 0.5}, True),
    ):
        _, told = balance(work, folder, **again)
        assert ("The forest of these embeddings exists" in told) == is_there
        assert (work / "balance" / "forest.parquet").read_bytes() == whole
    assert "dropped_by" not in read_keep(work)
    # What is near targets is compared once for all amounts to keep.
    near = {"near": (str(folder),), "near_keep": 0.4}
    balance(work, folder, keep=0.5, **near)
    assert "All comparisons were made before." in balance(work, folder, keep=0.6, **near)[1]
    # A window without images leaves the result that is there.
    before = {path.name: path.read_bytes() for path in (work / "balance").iterdir() if path.is_file()}
    with pytest.raises(ClipcidError, match=r"is in the window to -0\.99"):
        balance(work, folder, keep=0.5, max_caption_similarity=-0.99)
    assert {path.name: path.read_bytes() for path in (work / "balance").iterdir() if path.is_file()} == before


REAL = Path(__file__).parents[3] / "golden" / "answers"


def read_real(folder: str) -> np.ndarray:
    """Recorded embeddings of drawings, float16 [N, D]."""
    return np.concatenate([np.load(path) for path in sorted((REAL / folder / "img_emb").iterdir())])


def distances_to(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distances of all rows to all others, float32."""
    parts = [rows[at : at + 64].astype(np.float64)[:, None] for at in range(0, len(rows), 64)]
    return np.concatenate([np.sqrt(((part - others.astype(np.float64)) ** 2).sum(-1)) for part in parts]).astype("f4")


@pytest.mark.parametrize("amount", [{"near_keep": 0.25}, {"near_distance": 0.55}, {"near_distance": 1.12}])
def test_of_what_other_filters_leave_the_images_near_a_target_are_balanced(
    tmp_path: Path, amount: dict[str, float]
) -> None:
    rows = read_real("rows")[::3]
    rows[100:140] = rows[300]  # copies are as near as the first of them
    targets = read_real("references")
    keys = [f"target {row}" for row in range(len(targets))]
    halves = [write_embeddings(tmp_path / name, targets[at::2], keys=keys[at::2]) for name, at in (("a", 0), ("b", 1))]
    folder, known = write_embeddings(tmp_path / "e", rows), write_embeddings(tmp_path / "known", rows[:200:5])
    filters = {"against": (str(known),), "against_threshold": 0.05, "near": tuple(map(str, halves)), **amount}
    result, told = balance(tmp_path / "w", folder, threshold=0.4, **filters)
    keep = read_keep(tmp_path / "w")

    is_left = distances_to(rows, rows[:200:5]).min(1) > np.float32(0.05)
    assert (keep["dropped_by"] == "reference").tolist() == (~is_left).tolist()
    by_half = np.stack([distances_to(rows, targets[at::2]).min(1) for at in (0, 1)])
    nearest = by_half.min(0)
    ascending = np.sort(nearest[is_left])
    threshold = np.float32(amount.get("near_distance", ascending[round(0.25 * len(ascending)) - 1]))
    is_near = is_left & (nearest <= threshold)
    assert (keep["dropped_by"] == "far").tolist() == (is_left & ~is_near).tolist()
    place = np.where(by_half[0] <= by_half[1], 0, 1)  # of equally near ones the first
    assert keep["near"].dropna().tolist() == [str(halves[at]) for at in place[is_near]]
    np.testing.assert_array_equal(keep["near_distance"], np.where(is_near, nearest, np.nan))
    which = [distances_to(rows[is_near], targets[at::2]).argmin(1) for at in (0, 1)]
    named = [keys[at::2][which[at][row]] for row, at in enumerate(place[is_near])]
    assert keep["near_key"].dropna().tolist() == named
    assert result["near"] == {
        "threshold": amount.get("near_distance", float(threshold)),
        "kept": is_near.sum(),
        "dropped": (is_left & ~is_near).sum(),
        "references": [
            {
                "name": str(halves[at]),
                "rows": len(targets[at::2]),
                "near": (is_left & (by_half[at] <= threshold)).sum(),
                "nearest": (place[is_near] == at).sum(),
            }
            for at in (0, 1)
        ],
    }
    assert result["searched"] == result["near"]["kept"]
    dropped = dict.fromkeys(("reference", "caption", "far", "repeat", "cluster"), 0)
    assert result["dropped_by"] == dropped | keep["dropped_by"].value_counts().to_dict()
    assert f"{is_near.sum():,} of {is_left.sum():,} images are within" in told
    # Sets are made of what is left alone: as of these rows by themselves.
    balance(tmp_path / "alone", write_embeddings(tmp_path / "left", rows[is_near]), threshold=0.4)
    assert keep["kept"][is_near].tolist() == read_keep(tmp_path / "alone")["kept"].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"near": ("x",), "near_keep": 0.1, "near_distance": 1.0},
            "--near-distance and --near-keep were given together",
        ),
        ({"near": ("x",)}, "--near needs a distance or a share"),
        ({"near_keep": 0.3}, "--near-keep was given without --near"),
    ],
)
def test_targets_need_one_amount(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BalanceSettings(keep=0.5, **given)


def test_a_share_is_found_where_the_sample_promised_too_little(tmp_path: Path) -> None:
    """Copies are sampled once, however many they are."""
    rows, targets = make_rows(NUM_ROWS), make_rows(50, seed=2)
    rows = rows[np.argsort(distances_to(rows, targets).min(1), kind="stable")]
    rows[100:] = rows[390:].repeat(30, axis=0)
    named = {"near": (str(write_embeddings(tmp_path / "t", targets)),), "threshold": 0.1}
    result, told = balance(tmp_path / "w", write_embeddings(tmp_path / "e", rows), near_keep=0.84, **named)
    assert "of the 336 images to keep are within" in told
    distance = np.sort(distances_to(rows, targets).min(1))
    assert result["near"]["threshold"] == distance[335]
    assert result["near"]["kept"] == np.count_nonzero(distance <= distance[335]) == 340, "all as near as the last"
    nearest = f"None of the 400 images is within 0.01 of a target: the nearest of the images is {distance[0]:.4f} away"
    with pytest.raises(ClipcidError, match=nearest):
        balance(tmp_path / "w", tmp_path / "e", near_distance=0.01, **named)


def size_of(row: int) -> tuple[int, int]:
    """Width and height of an image; many have as many pixels as another."""
    return 1 + row * 7 % 11, 1 + row % 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings with captions, their images, and a work directory whose clusters are of all; read-only."""
    folder = tmp_path_factory.mktemp("cap")
    rows, generator = make_rows(NUM_ROWS), np.random.default_rng(4)
    texts = unit(rows + 0.3 * generator.normal(size=rows.shape)).astype(np.float16)
    write_embeddings(folder / "e", rows, 3, texts=texts, captions=[f"picture {row}" for row in range(NUM_ROWS)])
    (folder / "photos").mkdir()
    for row in range(NUM_ROWS):
        Image.new("L", size_of(row)).save(folder / "photos" / f"{row:06d}.png")
    make_clusters(folder / "work", folder / "e", 20)
    return folder


@pytest.mark.parametrize("select", ["central", "random", "first", "resolution", "similarity"])
def test_the_best_of_each_cluster_stay(place: Path, tmp_path: Path, select: str) -> None:
    amounts: dict[str, Any] = {"keep": 0.7, "select": select}
    if select == "resolution":
        amounts["data"] = str(place / "photos")
    if select == "random":
        amounts["min_caption_similarity"] = 0.55
    balance(tmp_path / "whole", place / "e", **amounts)
    capped = {"clusters": place / "work" / "clusters", "max_per_cluster": 6}
    balance(tmp_path / "work", place / "e", **amounts, **capped)
    whole, keep = read_keep(tmp_path / "whole"), read_keep(tmp_path / "work")
    clusters = pd.read_parquet(place / "work" / "clusters" / "clusters.parquet").set_index("key").loc[keep["key"]]
    assert keep["cluster"].tolist() == clusters["cluster"].tolist()
    before, score = whole["kept"], np.zeros(NUM_ROWS)
    if select == "central":
        score = clusters["similarity"].to_numpy()
    elif select == "random":
        balanced = np.flatnonzero(whole["dropped_by"] != "caption")
        score[balanced] = random_scores(np.arange(len(balanced)), 0)
    elif select == "resolution":
        score = np.array([width * height for width, height in map(size_of, range(NUM_ROWS))])
    elif select == "similarity":
        a, b = (
            np.concatenate([np.load(path) for path in sorted((place / "e" / side).glob("*.npy"))]).astype(np.float64)
            for side in ("img_emb", "text_emb")
        )
        score = (a * b).sum(1)
    ranked = pd.DataFrame({"cluster": keep["cluster"], "score": -score, "row": np.arange(NUM_ROWS)})[before]
    best = ranked.sort_values(["score", "row"]).groupby("cluster").head(6)["row"]
    assert np.flatnonzero(keep["kept"]).tolist() == sorted(best)
    assert (keep["dropped_by"] == "cluster").tolist() == (before & ~keep["kept"]).tolist()
    # An image whose set has lost its kept image has no representative.
    names = set(keep["key"][keep["dropped_by"] == "cluster"])
    lost = whole["representative"].isin(names) | whole["representative"].isna()
    assert keep["representative"].isna().tolist() == keep["distance"].isna().tolist() == lost.tolist()
    assert keep["representative"][~lost].tolist() == whole["representative"][~lost].tolist()


def test_of_clusters_of_repaired_rows_the_images_near_the_mean_of_the_stored_rows_stay(
    place: Path, tmp_path: Path
) -> None:
    """The similarities in their table are of rows that `balance` does not read."""
    folder = tmp_path / "clusters"
    shutil.copytree(place / "work" / "clusters", folder)
    sidecar = read_sidecar(folder / "cluster.json", ClusterSidecar)
    assert sidecar is not None
    assert sidecar.space == "stored"
    table = pd.read_parquet(folder / "clusters.parquet")
    labels = table["cluster"].to_numpy()
    table.assign(similarity=-table["similarity"]).to_parquet(folder / "clusters.parquet")
    outputs = [record(folder / each.path, folder) for each in sidecar.outputs]
    repair = FileRecord("repair.npz", 1, "blake2b:1")
    repaired = msgspec.structs.replace(sidecar, outputs=outputs, repair=repair, space="repaired")
    write_sidecar(folder / "cluster.json", repaired)
    result, told = balance(tmp_path / "w", place / "e", keep=1.0, max_per_cluster=6, clusters=folder)
    assert "They were made of repaired rows; which images stay is decided by the stored rows" in told
    assert "--repair none" in told
    rows = make_rows(NUM_ROWS).astype(np.float64)
    means = np.stack([rows[labels == label].mean(0) for label in range(20)])
    score = (rows * unit(means)[labels]).sum(1)
    ranked = pd.DataFrame({"cluster": labels, "score": -score, "row": np.arange(NUM_ROWS)})
    best = ranked.sort_values(["score", "row"]).groupby("cluster").head(6)["row"]
    assert np.flatnonzero(read_keep(tmp_path / "w")["kept"]).tolist() == sorted(best)
    assert result["kept"] == len(best) < NUM_ROWS


def test_clusters_of_other_images_are_refused(place: Path, tmp_path: Path) -> None:
    rows = make_rows(60, seed=9)
    folder = write_embeddings(tmp_path / "e", rows, keys=[f"other{row}" for row in range(60)])
    with pytest.raises(ClipcidError, match="60 images that are kept are in none of the clusters in") as refused:
        balance(tmp_path / "w", folder, keep=1.0, max_per_cluster=2, clusters=place / "work" / "clusters")
    elsewhere = f"clipcid cluster --embeddings {folder} --keep-list none --repair none --work OTHER\n"
    assert refused.value.fix.endswith(f"{elsewhere}Then name them: --clusters OTHER/clusters")
    # Clusters of fewer images than are balanced: a warning before the search, in a dry run as well.
    call = {"keep": 0.5, "max_per_cluster": 2, "clusters": make_clusters(tmp_path / "few", folder, 4)}
    assert "are balanced" not in balance(tmp_path / "y", folder, **call)[1]
    assert "are of 60 images, and 400 are balanced" in balance(tmp_path / "x", place / "e", dry_run=True, **call)[1]


@pytest.fixture
def is_untouched(tmp_path: Path) -> Callable[[], bool]:
    """Tells whether the work directory is as it was when this was asked for first."""
    states: list[dict[Path, int]] = []

    def look() -> bool:
        states.append({path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")})
        return states[0] == states[-1]

    return look


def test_a_dry_run_says_what_each_filter_takes(tmp_path: Path, is_untouched: Callable[[], bool]) -> None:
    rows, texts, captions = make_pairs()
    rows[5] = np.nan
    embeddings = write_embeddings(tmp_path / "e", rows, 3, texts=texts, captions=captions)
    others = make_rows(90, seed=2)
    others[4] = np.inf
    reference, work = str(write_embeddings(tmp_path / "r", others)), tmp_path / "w"
    make_clusters(work, embeddings, 8)
    is_untouched()
    plain, _ = balance(work, embeddings, keep=0.5, dry_run=True)
    assert (plain["against"], plain["caption_window"], plain["clustered_images"]) == (None, None, None)
    assert plain["searched"] == plain["images"] == NUM_ROWS
    window = {"min_caption_similarity": 0.5, "max_caption_similarity": 0.9}
    call = {"keep": 0.5, "against": (reference, reference), "against_threshold": 0.3, "max_per_cluster": 4, **window}
    result, told = balance(work, embeddings, dry_run=True, **call)
    near, _ = balance(work, embeddings, dry_run=True, keep=0.5, near=(reference,), near_keep=0.25)
    assert is_untouched()
    assert (near["searched"], near["near"][0]["pairs"]) == (NUM_ROWS // 4, 90 * NUM_ROWS)
    for one in result["against"]:
        assert one == {
            "name": reference,
            "rows": 90,
            "to_embed": False,
            "embed_seconds": 0.0,
            "pairs": 90 * NUM_ROWS,
        }
    found, _ = balance(tmp_path / "real", embeddings, keep=0.5, **window)
    searched = found["caption_window"]["inside"]
    assert result["caption_window"]["sampled"] == NUM_ROWS - 1
    assert result["clustered_images"] == NUM_ROWS - 3  # without those whose text has no direction
    assert result["caption_window"]["inside"] == searched / (NUM_ROWS - 1)
    assert result["searched"] == searched < NUM_ROWS
    assert result["pairs"] == searched * (searched - 1) // 2
    assert result["memory"]["mapped"] == 2 * 32 * (2 * NUM_ROWS + 2 * 90)  # images, captions, two references
    assert result["disk"] > plain["disk"]
    for line in (
        f"A new search of {searched} of them compares:",
        f"against {reference}: 90 images; 36,000 pairs",
        f"{searched / (NUM_ROWS - 1):.1%} of 399 sampled images are inside the window",
        f"clusters are capped: {work / 'clusters'}, 397 images",
    ):
        assert line in told


def list_outdated(work: Path) -> list[list[str]]:
    return [made.outdated for made in list_runs(RunsSettings(work=work)).made if made.step == "balance"]


def test_references_are_embedded_alike(tmp_path: Path, tiny_model: Path, is_untouched: Callable[[], bool]) -> None:
    write_tar(tmp_path / "0.tar", shard_members(0, 8))
    write_tar(tmp_path / "r.tar", shard_members(0, 3))
    work, like = tmp_path / "w", {"fast_decode": True, "precision": "bf16"}
    made: dict[str, Any] = {"model": str(tiny_model), "text": False, "workers": 0, "device": "cpu", "work": work}
    run_embed(EmbedSettings(data=str(tmp_path / "0.tar"), **like, **made))
    (folder,) = (work / "embeddings").iterdir()
    is_untouched()
    call = {"threshold": 0.001, "against_threshold": 0.0, "workers": 0}
    named = call | {"against": (str(tmp_path / "r.tar"),)}
    result, told = balance(work, folder, dry_run=True, **named)
    assert is_untouched()
    assert "3 images to embed first, about" in told
    (found,) = result["against"]
    assert (found["rows"], found["to_embed"], found["pairs"]) == (3, True, 24)
    result, _ = balance(work, folder, **named)
    assert result["against"]["dropped"] == 3
    (reference,) = (work / "references").iterdir()
    took = json.loads((reference / "embed.json").read_text())["seconds"]
    assert result["seconds"]["embed"] >= sum(took.values()) > 0
    settings, others = (json.loads((each / "embed.json").read_text())["settings"] for each in (reference, folder))
    assert {name: settings[name] for name in like} == like
    assert settings["preprocess"] == others["preprocess"]
    left = leave_work(reference, "embed")
    result, _ = balance(work, folder, dry_run=True, **named)
    assert not result["against"][0]["to_embed"]
    assert left.exists()
    run_embed(EmbedSettings(data=str(tmp_path / "r.tar"), out=tmp_path / "other", **made))
    said = r"other were preprocessed differently \(.*, without --fast-decode\) than those of"
    with pytest.raises(ClipcidError, match=said):
        balance(work, folder, against=(str(tmp_path / "other"),), **call)
    with pytest.raises(ClipcidError, match=said) as refused:
        balance(work, folder, near=(str(tmp_path / "other"),), near_keep=0.5, threshold=0.001)
    assert "(--near DATA)" in refused.value.fix
    assert list_outdated(work) == [[]]
    run_embed(EmbedSettings(data=str(tmp_path / "0.tar"), overwrite=True, **made))
    assert list_outdated(work) == [["other embeddings"]]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of embeddings, of which only `good` can be balanced."""
    place = tmp_path_factory.mktemp("refused")
    rows = make_rows(20)
    write_embeddings(place / "good", rows, texts=rows, captions=[f"picture {row}" for row in range(20)])
    write_embeddings(place / "narrow", make_rows(20, width=16))
    write_embeddings(place / "zeros", np.zeros((20, 32), np.float16))
    write_embeddings(
        place / "repeated", rows, keys=[f"{row % 10}" for row in range(20)], shards=["a"] * 10 + ["b"] * 10
    )
    for name in ("text", "empty"):
        (place / name).mkdir()
    (place / "text" / "img_emb_0.npy").write_text("no array")
    np.save(place / "empty" / "img_emb_0.npy", np.empty((0, 8), np.float16))
    write_tar(place / "pictures.tar", shard_members(0, 2))
    return place


@pytest.mark.parametrize(("folder", "settings", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_a_dry_run_refuses_what_the_run_refuses(
    refusing: Path, tmp_path: Path, folder: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(refusing)
    paths = {
        name: Path(value) for name, value in settings.items() if name in ("clusters", "write_shards", "write_uids")
    }
    told = []
    for is_dry in (True, False):
        work = tmp_path / ("dry" if is_dry else "run")
        with pytest.raises(ClipcidError, match=message) as refused:
            balance(work, refusing / folder, keep=0.5, dry_run=is_dry, max_bad_fraction=1.0, **settings | paths)
        told.append(str(refused.value).replace(str(work), "W"))
    assert told[0] == told[1]
    assert not (tmp_path / "dry").exists()
    assert not (tmp_path / "run" / "balance" / "keep.parquet").exists()


def test_all_images_are_near_a_reference(refusing: Path, tmp_path: Path) -> None:
    itself = (str(refusing / "good"),)
    equal = f"; 20 are equal to one. Is {itself[0]} the data itself?"
    with pytest.raises(
        ClipcidError, match=re.escape(f"All 20 images are within 0.2 of a reference, and would be dropped{equal}")
    ):
        balance(tmp_path, refusing / "good", threshold=0.2, against=itself)
    _, told = balance(tmp_path, refusing / "good", threshold=0.2, near=itself, near_keep=0.5)
    assert f"--near drops nothing: 20 of 20 images are within 0 of a target{equal}" in told


def test_keys_that_repeat_are_refused_until_told_apart(refusing: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="Key '0' belongs to rows 0 and 10") as refused:
        balance(tmp_path, refusing / "repeated", keep=0.5)
    assert "--keys shard" in refused.value.fix
    balance(tmp_path, refusing / "repeated", keep=0.5, keys="shard")
    assert read_keep(tmp_path)["key"].tolist()[::10] == ["a/0", "b/0"]


def test_the_command_that_makes_clusters_names_the_embeddings(refusing: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError) as refused:
        balance(tmp_path / "w", refusing / "repeated", keep=1.0, max_per_cluster=2, keys="shard")
    flags = f"--embeddings {refusing / 'repeated'} --keys shard --keep-list none --repair none --work {tmp_path / 'w'}"
    assert refused.value.fix == f"Give --clusters, or run: clipcid cluster {flags}"
