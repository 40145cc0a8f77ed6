"""At most so many images of a cluster, after repeats were dropped: against pandas on the written files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from balance_data import Listener, balance, make_rows, read_keep, write_embeddings
from PIL import Image
from rich.console import Console

from clipcid_cli.algorithms.sets.representatives import best_of_groups, random_scores
from clipcid_cli.commands.balance import show
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.balance.run import run
from clipcid_cli.steps.cluster.run import run as run_cluster
from clipcid_cli.steps.settings.balance import SELECTIONS, BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings

NUM_ROWS = 500


def size_of(row: int) -> tuple[int, int]:
    """Width and height of an image; many have as many pixels as another."""
    return 1 + row * 7 % 11, 1 + row % 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings with captions, their images, and a work directory whose clusters are of all; read-only."""
    folder = tmp_path_factory.mktemp("cap")
    rows, generator = make_rows(NUM_ROWS), np.random.default_rng(4)
    texts = rows + 0.3 * generator.normal(size=rows.shape)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float16)
    captions = [f"picture {row}" for row in range(NUM_ROWS)]
    write_embeddings(folder / "e", rows, 3, texts=texts, captions=captions)
    (folder / "photos").mkdir()
    for row in range(NUM_ROWS):
        Image.new("L", size_of(row)).save(folder / "photos" / f"{row:06d}.png")
    run_cluster(
        ClusterSettings(work=folder / "work", embeddings=folder / "e", keep_list="none", num_clusters=20, device="cpu"),
        Listener(),
    )
    return folder


@pytest.mark.parametrize("select", sorted(set(SELECTIONS) - {"medoid"}))
@pytest.mark.parametrize("more", [{}, {"min_caption_similarity": 0.55}])
def test_the_best_of_each_cluster_stay(place: Path, tmp_path: Path, select: str, more: dict) -> None:
    call = {"keep": 0.7, "select": select, "clusters": place / "work" / "clusters", **more}
    if select == "resolution":
        call["data"] = str(place / "photos")
    amounts = {name: value for name, value in call.items() if name != "clusters"}
    uncapped, _ = balance(tmp_path / "whole", place / "e", **amounts)
    result, _ = balance(tmp_path / "work", place / "e", **call, max_per_cluster=6)
    whole, keep = read_keep(tmp_path / "whole"), read_keep(tmp_path / "work")
    clusters = pd.read_parquet(place / "work" / "clusters" / "clusters.parquet").set_index("key")
    assert keep["cluster"].tolist() == clusters.loc[keep["key"], "cluster"].tolist()
    for name in ("key", "component", "component_size"):
        pd.testing.assert_series_equal(keep[name], whole[name])
    before = whole["kept"]
    if select == "central":
        score = clusters.loc[keep["key"], "similarity"].to_numpy()
    elif select == "random":
        balanced = np.flatnonzero(whole["dropped_by"] != "caption") if more else np.arange(NUM_ROWS)
        score = np.zeros(NUM_ROWS)
        score[balanced] = random_scores(np.arange(len(balanced)), 0)
    elif select == "first":
        score = np.zeros(NUM_ROWS)
    elif select == "resolution":
        score = np.array([width * height for width, height in map(size_of, range(NUM_ROWS))])
    else:
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
    sizes = keep["cluster"][before].value_counts()
    assert result["cluster_cap"] == {
        "most": 6,
        "clusters": len(sizes),
        "capped": (sizes > 6).sum(),
        "dropped": (sizes - 6).clip(lower=0).sum(),
        "largest": sizes.max(),
    }
    assert 0 < result["cluster_cap"]["dropped"] == uncapped["kept"] - result["kept"]
    assert result["kept"] == keep["kept"].sum()
    assert result["keep_ratio"] == result["kept"] / NUM_ROWS
    assert (result["components"], result["threshold"]) == (uncapped["components"], uncapped["threshold"])
    sidecar = json.loads((tmp_path / "work" / "balance" / "balance.json").read_text())
    assert sidecar["result"]["cluster_cap"] == result["cluster_cap"]
    page = (tmp_path / "work" / "balance" / "report.html").read_text()
    assert "Sizes of the clusters" in page
    framed, kept_keys = re.findall(r'<figure class="kept" title="([^"]+)"', page), set(keep["key"][keep["kept"]])
    assert set(framed) <= kept_keys
    assert f'<th>single (chosen)</th><td class="n">{uncapped["kept"]}</td>' in page
    assert "Sizes of the clusters" not in (tmp_path / "whole" / "balance" / "report.html").read_text()


def test_what_is_said_of_the_kept_images_is_of_those_that_the_cap_leaves(place: Path, tmp_path: Path) -> None:
    call = {"threshold": 0.4, "clusters": place / "work" / "clusters", "max_per_cluster": 6}
    result, _ = balance(tmp_path / "w", place / "e", **call, neighbors="partitioned", min_caption_similarity=0.4)
    assert result["audit"]["kept"] == result["kept"] < result["components"]
    screen = io.StringIO()
    show(msgspec.convert(result, BalanceResult), Console(file=screen, width=200))
    assert "would be kept at this cut-off before clusters are capped" in screen.getvalue()
    dropped = result["components"] - result["kept"]
    assert f"{dropped} of the {result['components']} images kept before are dropped" in screen.getvalue()
    left = result["searched"]
    assert (
        f"{NUM_ROWS - left} outside the window of caption similarity, {left - result['components']} repeats among the "
        f"{left} left, {dropped} in clusters of too many"
    ) in screen.getvalue()
    page = " ".join((tmp_path / "w" / "balance" / "report.html").read_text().split())
    assert f"<b>{dropped}</b> in clusters of too many images." in page
    assert f"share of the {left} searched" in page


def test_where_nothing_is_dropped_screen_and_report_say_so(place: Path, tmp_path: Path) -> None:
    call = {"clusters": place / "work" / "clusters", "max_per_cluster": NUM_ROWS}
    for keep, on_screen, on_page in (
        (1.0, "dropped none ", "<p>No image is dropped.</p>"),
        (0.7, "dropped 150 repeats ", "in this order: <b>150</b> repeats.</p>"),
    ):
        result, _ = balance(tmp_path / "w", place / "e", keep=keep, **call)
        screen = io.StringIO()
        show(msgspec.convert(result, BalanceResult), Console(file=screen, width=200))
        told = " ".join(screen.getvalue().split())
        assert on_screen in told
        assert "of the dropped repeats are farther from their kept image" in told
        page = " ".join((tmp_path / "w" / "balance" / "report.html").read_text().split())
        assert on_page in page
        assert "of the dropped repeats farther than" in page


def test_groups_of_any_size() -> None:
    generator = np.random.default_rng(0)
    for most in (1, 3, 100):
        labels, scores = generator.integers(9, size=200), generator.integers(5, size=200).astype(np.float64)
        frame = pd.DataFrame({"label": labels, "score": -scores, "row": np.arange(200)}).sort_values(["score", "row"])
        expected = sorted(frame.groupby("label").head(most)["row"])
        assert np.flatnonzero(best_of_groups(scores, labels, most)).tolist() == expected
    assert best_of_groups(np.empty(0), np.empty(0, np.int64), 2).tolist() == []


def test_clusters_of_other_images_are_refused(place: Path, tmp_path: Path) -> None:
    rows = make_rows(60, seed=9)
    folder = write_embeddings(tmp_path / "e", rows, keys=[f"other{row}" for row in range(60)])
    balance(tmp_path / "w", folder, keep=1.0)
    with pytest.raises(ClipcidError, match="60 images that are kept are in none of the clusters in"):
        balance(tmp_path / "w", folder, keep=1.0, max_per_cluster=2, clusters=place / "work" / "clusters")
    # Clusters of fewer images than are balanced: a warning before the search, in a dry run as well.
    few = ClusterSettings(work=tmp_path / "few", embeddings=folder, keep_list="none", num_clusters=4, device="cpu")
    run_cluster(few, Listener())
    call = {"keep": 0.5, "max_per_cluster": 2, "clusters": tmp_path / "few" / "clusters"}
    for dry_run in (True, False):
        assert "are balanced" not in balance(tmp_path / "y", folder, dry_run=dry_run, **call)[1]
    assert "are of 60 images, and 500 are balanced" in balance(tmp_path / "x", place / "e", dry_run=True, **call)[1]
    said = Listener()
    with pytest.raises(ClipcidError, match="images that are kept are in none of the clusters in"):
        run(BalanceSettings(work=tmp_path / "x", embeddings=place / "e", device="cpu", **call), said)
    assert "are of 60 images, and 500 are balanced" in "\n".join(said.told)
    assert (tmp_path / "w" / "balance" / "balance.json").exists()
    assert "already holds this result" in balance(tmp_path / "w", folder, keep=1.0)[1]
    with pytest.raises(ClipcidError, match="There are no clusters in") as error:
        balance(tmp_path / "w", folder, keep=1.0, max_per_cluster=2, keys="shard")
    flags = f"--embeddings {folder} --keys shard --keep-list none --work {tmp_path / 'w'}"
    assert error.value.fix == f"Give --clusters, or run: clipcid cluster {flags}"
    with pytest.raises(ClipcidError, match="holds no finished clusters") as error:
        balance(tmp_path / "w", folder, keep=1.0, max_per_cluster=2, keys="shard", clusters=tmp_path)
    assert error.value.fix == f"Give --clusters DIR, or run: clipcid cluster {flags}"
    damaged = tmp_path / "clusters"
    damaged.mkdir()
    for path in (place / "work" / "clusters").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "clusters.parquet").write_bytes(b"PAR1")
    with pytest.raises(ClipcidError, match=r"clusters\.parquet has changed since"):
        balance(tmp_path / "w", place / "e", keep=1.0, max_per_cluster=2, clusters=damaged)
    with pytest.raises(UsageError, match="--select medoid chooses one image of a group"):
        BalanceSettings(keep=0.5, max_per_cluster=3, select="medoid")
    with pytest.raises(UsageError, match="--clusters was given without --max-per-cluster"):
        BalanceSettings(keep=0.5, clusters=Path("x"))
