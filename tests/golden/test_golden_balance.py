"""Balancing and clustering the recorded rows: the same numbers on every machine, whichever way they are asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from golden import (
    QUICKSTART,
    ROWS,
    SHARDS,
    Arrays,
    ask,
    assert_same,
    check,
    make_place,
    plain,
    read_metadata,
    read_rows,
    read_table,
)
from scipy.cluster.hierarchy import DisjointSet

KEEP = ("--embeddings", "rows", "--keep", 0.563)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("balance"))


@pytest.fixture(scope="module")
def kept(place: Path) -> Arrays:
    """What keeping 56.3 % of the rows writes, in the work directory ``kept``."""
    return balance(place, "kept", *KEEP)


@pytest.fixture(scope="module")
def few_clusters(place: Path) -> Any:
    """The answer of making 16 clusters of all rows, in the work directory ``few``."""
    arguments = ("--embeddings", "rows", "--num-clusters", 16, "--keep-list", "none")
    return ask(place, "cluster", *arguments, "--work", "few")


def balance(place: Path, work: str, *arguments: object, **options: Any) -> dict[str, Any]:
    """Balance, and return the JSON object and what the files hold."""
    answer = ask(place, "balance", *arguments, "--work", work, **options)
    threshold = np.float32(answer["threshold"])
    keep = read_keep_list(place / answer["files"]["keep_list"])
    forest = read_table(place / answer["files"]["forest"])
    assert (np.diff(forest["distance"]) >= 0).all()
    check_curve(pd.read_csv(place / answer["files"]["curve"]), forest, answer)
    # How far beyond the cut-off was searched is not promised, so what lies there is not compared.
    forest = {name: column[forest["distance"] <= threshold] for name, column in forest.items()}
    tables = {"keep": keep, "forest": forest, "sets": read_table(place / answer["files"]["sets"])}
    arrays = {f"{table}.{name}": column for table, columns in tables.items() for name, column in columns.items()}
    return {"json": plain(answer)} | arrays


def check_curve(curve: pd.DataFrame, forest: Arrays, answer: Any) -> None:
    """Count again what the curve says; which points it has depends on how far was searched, and is not compared."""
    distances = curve["distance"].to_numpy(np.float32)
    assert len(curve) <= 1001
    assert (np.diff(distances) > 0).all()
    chosen = curve[distances == np.float32(answer["threshold"])]
    capped = answer["dropped_by"]["cluster"]
    found = [(answer["kept"] + capped, answer["largest_component"])]
    assert list(zip(chosen["kept"], chosen["largest_component"], strict=True)) == found
    np.testing.assert_allclose(curve["keep_ratio"], curve["kept"] / answer["searched"], atol=1e-6)
    if answer["other_linkage"]["linkage"] == "single":
        assert (np.diff(curve["kept"]) <= 0).all()  # stars do not follow from the forest
        return
    sets = DisjointSet(range(answer["images"]))
    largest = [1]
    for a, b in zip(forest["a"].tolist(), forest["b"].tolist(), strict=True):
        assert sets.merge(a, b)
        largest.append(max(largest[-1], sets.subset_size(a)))
    edges = np.searchsorted(forest["distance"], distances, side="right")
    assert len(curve) >= min(400, len(np.unique(forest["distance"])))
    assert curve["kept"].tolist() == (answer["searched"] - edges).tolist()
    assert curve["largest_component"].tolist() == np.array(largest)[edges].tolist()


def read_keep_list(path: Path) -> Arrays:
    """Read a keep list with rows of the input in place of their keys."""
    keep = read_table(path)
    metadata = read_metadata(ROWS)
    assert_same(
        {name: keep.pop(name) for name in ("key", "shard")}, {name: metadata[name] for name in ("key", "shard")}
    )
    keep["representative"] = find_rows(keep["representative"])
    return keep


def find_rows(keys: np.ndarray) -> np.ndarray:
    """Return the row of each key, -1 for none."""
    rows = {key: row for row, key in enumerate(read_metadata(ROWS)["key"])}
    return np.array([rows[key] if key else -1 for key in keys.tolist()])


def test_a_share_is_kept(kept: Arrays) -> None:
    check("balance-keep", kept)


def test_stars(place: Path) -> None:
    check("balance-star", balance(place, "star", *KEEP, "--linkage", "star"))


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_partitioned(place: Path, kept: dict[str, Any], threshold: float | None) -> None:
    """At the cut-off of the exact run partitions are not worth it for so few rows, at 0.4 they are."""
    amount = KEEP if threshold is None else (*KEEP[:2], "--threshold", threshold)
    found = balance(place, f"partitioned-{threshold}", *amount, "--neighbors", "partitioned")
    a, b, distance = (found[f"forest.{name}"] for name in ("a", "b", "distance"))
    rows = read_rows(ROWS, "img_emb").astype(np.float64)
    np.testing.assert_allclose(distance, np.linalg.norm(rows[a] - rows[b], axis=1), atol=2e-7)
    exact = kept["forest.distance"]
    exact = len(exact if threshold is None else exact[exact <= np.float32(threshold)])
    assert 0.998 * exact <= len(distance) <= exact
    check(f"balance-partitioned-{threshold}", {"json": found["json"]})


@pytest.mark.parametrize("select", ["first", "random", "similarity", "medoid", "resolution"])
def test_which_image_is_kept(place: Path, select: str) -> None:
    """The sets of all five are the same; chosen by pixels, the images are looked at."""
    data = (SHARDS,) if select == "resolution" else ()
    seed = ("--seed", 1) if select == "random" else ()
    found = balance(place, select, *data, *KEEP[:2], "--threshold", 0.6, "--select", select, *seed)
    if select != "first":
        found = {name: column for name, column in found.items() if not name.startswith("forest.")}
    check(f"balance-{select}", found)


def test_references_captions_and_lists(place: Path) -> None:
    """The rows of the references are recorded too; the images they were made of give the same but for rounding."""
    amount = (*KEEP[:2], "--keep", 0.8, "--against-threshold", 0.6, "--min-caption-similarity", 0.5)
    lists = ("--write-shards", "shards", "--write-pairs", "pairs.parquet", "--write-keys", "keys.txt")
    found = balance(place, "filtered", SHARDS, *amount, "--against", "references", *lists)
    pairs = read_table(place / "pairs.parquet")
    is_own = pairs.pop("reference") == ""
    near = {"key": "from", "reference_key": "to", "reference_distance": "distance"}
    table = pq.read_table(place / "filtered" / "balance" / "keep.parquet", filters=[("reference", "!=", "")])
    for name, column in near.items():
        assert pairs[column][~is_own].tolist() == table[name].to_pylist()
    pairs = {name: column[is_own] for name, column in pairs.items()}
    pairs |= {name: find_rows(pairs[name]) for name in ("from", "to")}
    check("balance-filtered", found | {f"pairs.{name}": column for name, column in pairs.items()})
    keys = read_metadata(ROWS)["key"][found["keep.kept"]].tolist()
    assert (place / "keys.txt").read_text().splitlines() == keys
    for shard in ("00000.tar", "00001.tar"):
        whole = read_tar(QUICKSTART / "data" / "pairs" / shard)
        wanted = [member for member in whole if member[0]["name"].partition(".")[0] in set(keys)]
        assert 0 < len(wanted) < len(whole)
        assert read_tar(place / "shards" / shard) == wanted

    images = ("--against", "data/retrieval/test", "--model", "teacher")
    again = balance(place, "filtered-images", SHARDS, *amount, *images)
    dropped = [result["json"]["against"]["dropped"] for result in (found, again)]
    assert abs(dropped[0] - dropped[1]) <= 1


def read_tar(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Read the members of a tar: all that their headers say, and their bytes."""
    with tarfile.open(path) as archive:
        return [(dict(member.get_info()), archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def test_at_most_so_many_of_a_cluster(place: Path, few_clusters: Any) -> None:
    found = balance(place, "few", *KEEP, "--max-per-cluster", 9)
    names = ("json", "keep.kept", "keep.cluster", "keep.dropped_by")
    check("balance-capped", {name: found[name] for name in names})


def test_the_rows_as_archives_of_datacomp(place: Path, kept: dict[str, Any]) -> None:
    metadata = read_metadata(ROWS)
    uids = np.array([hashlib.md5(key.encode()).hexdigest() for key in metadata["key"]])
    (place / "datacomp").mkdir()
    images, texts = (read_rows(ROWS, kind) for kind in ("img_emb", "text_emb"))
    for shard in np.unique(metadata["shard"]):
        own = metadata["shard"] == shard
        np.savez(place / "datacomp" / f"{shard}.npz", l14_img=images[own], l14_txt=texts[own])
        table = pd.DataFrame({"uid": uids[own], "text": metadata["caption"][own]})
        table.to_parquet(place / "datacomp" / f"{shard}.parquet")
    arguments = ("--embeddings", "datacomp", "--keep", 0.563, "--write-uids", "uids.npy")
    answer = ask(place, "balance", *arguments, "--work", "uids")
    keep = read_table(place / answer["files"]["keep_list"])
    assert keep["key"].tolist() == uids.tolist()
    for name in ("component", "kept", "distance"):
        assert_same({name: keep[name]}, {name: kept[f"keep.{name}"]})
    assert keep["representative"].tolist() == uids[kept["keep.representative"]].tolist()
    written = np.load(place / "uids.npy", allow_pickle=False)
    expected = sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in uids[kept["keep.kept"]])
    assert (written.dtype, written.tolist()) == (np.dtype("u8,u8"), expected)


def test_a_shard_later(place: Path, kept: Arrays) -> None:
    """The first shard, then both in the same folder: the result is that of both at once."""
    growing = place / "growing"
    for path in sorted(ROWS.glob("*/*_0000.*")):
        (growing / path.parent.name).mkdir(parents=True)
        shutil.copy(path, growing / path.parent.name)
    command = ("balance", "--embeddings", "growing", "--keep", 0.563, "--work", "grown")
    assert ask(place, *command)["images"] == 954
    for path in sorted(ROWS.glob("*/*_0001.*")):
        shutil.copy(path, growing / path.parent.name)
    assert_same(balance(place, "grown", *command[1:-2]), kept)


def test_two_processes(place: Path, kept: Arrays) -> None:
    assert_same(balance(place, "two", *KEEP, processes=2), kept)


def read_clusters(folder: Path) -> Arrays:
    """Read centroids, the cluster of each image, and the arrays of the nearest ones beside the table."""
    table = read_table(folder / "clusters.parquet", ["key", "cluster", "similarity"])
    tops = {path.stem: np.load(path, allow_pickle=False) for path in sorted(folder.glob("*top_*.npy"))}
    found = {"centroids": np.load(folder / "centroids.npy", allow_pickle=False)} | table | tops
    found["key"] = find_rows(found["key"])
    assert (found["top_clusters"][:, 0] == found["cluster"]).all()
    return found


def check_clusters(name: str, answer: Any, found: Arrays) -> None:
    """Compare clusters: of centroids nearly equally near, another may come first on another machine."""
    check(f"{name}-centroids", {"centroids": found["centroids"]})
    others = {
        column: values for column, values in found.items() if column != "centroids" and "top_clusters" not in column
    }
    check(name, {"json": plain(answer)} | others, arrays_within=5e-4)


def test_clusters_of_images_with_captions(place: Path, kept: Arrays) -> None:
    arguments = ("--embeddings", "rows", "--num-clusters", 64, "--features", "joint")
    answer = ask(place, "cluster", *arguments, "--work", "kept")
    found = read_clusters(place / "kept" / "clusters")
    check_clusters("cluster-joint", answer, found)
    keep_list = os.path.join("kept", "balance", "keep.parquet")
    again = ask(place, "cluster", *arguments, "--keep-list", keep_list, "--work", "kept-two", processes=2)
    assert_same(
        {"json": plain(again)} | read_clusters(place / "kept-two" / "clusters"), {"json": plain(answer)} | found
    )


def test_clusters_of_all_images(place: Path, few_clusters: Any) -> None:
    found = read_clusters(place / "few" / "clusters")
    # All 16 clusters of each image are as large as the rest of the net: a part of them will do.
    found |= {name: column[::10] for name, column in found.items() if "top_" in name}
    check_clusters("cluster-all", few_clusters, found)
