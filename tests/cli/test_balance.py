"""`clipcid balance` from the command line, from embeddings in clip-retrieval's layout."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import check_keep_list, distance_matrix, make_rows, write_embeddings
from conftest import Clipcid, shard_members, write_tar, write_tiny_model
from distill_data import SHORT, STUDENT
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

NUM_ROWS = 300


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def embeddings(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of embeddings."""
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "foreign", rows)


def read_keep(folder: Path, work: str = "clipcid-work") -> pd.DataFrame:
    return pd.read_parquet(folder / work / "balance" / "keep.parquet")


def test_a_share_is_single_linkage(clipcid: Clipcid, embeddings: Path, rows: np.ndarray, tmp_path: Path) -> None:
    result = clipcid("balance", "--embeddings", embeddings, "--keep", 0.563, "--quiet", "--json").json
    keep = read_keep(tmp_path)
    check_keep_list(keep, rows)
    assert (result["images"], result["kept"], result["skipped"]) == (NUM_ROWS, keep["kept"].sum(), {})
    assert abs(result["kept"] - round(0.563 * NUM_ROWS)) <= 1
    assert result["keep_ratio"] == result["kept"] / NUM_ROWS
    assert result["components"] == result["kept"]
    assert result["largest_component"] == keep["component_size"].max()
    tree = linkage(squareform(distance_matrix(rows).astype(np.float64), checks=False), method="single")
    sets = fcluster(tree, np.float64(np.float32(result["threshold"])), criterion="distance")
    assert keep.groupby(sets)["component"].nunique().eq(1).all()
    assert len(np.unique(sets)) == result["components"]
    far = (keep["distance"][~keep["kept"]] > np.float32(result["threshold"])).mean()
    assert np.isclose(result["uncovered_ratio"], far)
    # The central image: nearest to the set's mean, the smaller row of equals.
    for component, members in keep.groupby("component").groups.items():
        wide = rows[members].astype(np.float64)
        central = members[np.argmin(((wide - wide.mean(0)) ** 2).sum(1))]
        assert keep["representative"][component] == f"{central:06d}"

    forest = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "forest.parquet")
    assert (forest["a"] < forest["b"]).all()
    np.testing.assert_array_equal(forest["distance"], np.sort(tree[:, 2])[: len(forest)].astype(np.float32))
    sidecar = json.loads((tmp_path / "clipcid-work" / "balance" / "balance.json").read_text())
    assert sidecar["counts"] == {"read": NUM_ROWS, "used": NUM_ROWS, "skipped": {}}


@pytest.mark.parametrize(
    "amount",
    [
        ("--keep", 0.4, "--linkage", "star", "--against", "r", "--against-threshold", 0.6),
        ("--keep", 0.6, "--neighbors", "partitioned", "--near", "r", "--near-keep", 0.9),
    ],
    ids=["star, against", "partitioned, near"],
)
def test_two_processes_agree(clipcid: Clipcid, torchrun: Clipcid, tmp_path: Path, amount: tuple[object, ...]) -> None:
    write_embeddings(tmp_path / "e", make_rows(3000, width=64), num_files=3)
    write_embeddings(tmp_path / "r", make_rows(1000, width=64, seed=1))
    call = ("balance", "--embeddings", "e", *amount)
    clipcid(*call, "--work", "one")
    torchrun(2, *call, "--work", "two")
    one, two = (
        {path.name: path.read_bytes() for pattern in ("*.parquet", "curve.csv") for path in folder.glob(pattern)}
        for folder in (tmp_path / work / "balance" for work in ("one", "two"))
    )
    assert one.keys() > {"keep.parquet", "sets.parquet", "curve.csv"}
    assert one == two


def test_the_named_column_is_the_key(clipcid: Clipcid, rows: np.ndarray, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "foreign", rows)
    names = iter(range(NUM_ROWS))
    for path in sorted((folder / "metadata").glob("*.parquet")):
        frame = pd.read_parquet(path)
        frame.assign(number=[f"n{next(names)}" for _ in range(len(frame))]).to_parquet(path)
    given = ("--embeddings", folder, "--key-column", "number")
    assert "the key is column number of the metadata" in clipcid("balance", *given, "--keep", 0.563).said
    keep = read_keep(tmp_path)
    assert keep.key.tolist() == [f"n{row}" for row in range(NUM_ROWS)]
    assert clipcid("cluster", *given, "--num-clusters", 4, "--json").json["images"] == keep.kept.sum()
    wrong = clipcid("balance", "--embeddings", folder, "--key-column", "x", "--keep", 0.5, code=1)
    assert "no column 'x'; they have" in wrong.said
    frame = pd.read_parquet(path)
    frame.assign(number=[None, *frame["number"][1:]]).to_parquet(path)
    null = clipcid("balance", *given, "--keep", 0.4, "--work", "null", code=1)
    assert "rows have no key in column number" in null.said


def test_rows_that_are_not_finite_are_counted_and_named(clipcid: Clipcid, rows: np.ndarray, tmp_path: Path) -> None:
    damaged = rows.astype(np.float32)
    damaged[5], damaged[200] = np.nan, 0.0
    damaged[9, 3] = np.inf
    write_embeddings(tmp_path / "nan", damaged)
    call = ("balance", "--embeddings", "nan", "--keep", 0.5)
    run = clipcid(*call, "--json")
    assert (run.json["images"], run.json["skipped"]) == (297, {"nan_row": 3})
    assert "3 × embedding that is zero or not finite: 000005, 000009, 000200" in run.said
    skipped = pd.read_parquet(tmp_path / run.json["files"]["skipped"])
    assert (list(skipped["key"]), set(skipped["reason"])) == (["000005", "000009", "000200"], {"nan_row"})
    assert not set(read_keep(tmp_path)["key"]) & {"000005", "000009", "000200"}
    refused = clipcid(*call, "--max-bad-fraction", 0.005, "--work", "w", code=1)
    assert "3 of 300 samples in nan cannot be used: 1.0%" in refused.said
    assert not (tmp_path / "w" / "balance" / "keep.parquet").exists()


def test_another_result_is_replaced_and_told_apart(clipcid: Clipcid, rows: np.ndarray, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", rows[:200], num_files=1)
    write_embeddings(tmp_path / "eval", make_rows(5, seed=4))
    call = ("balance", "--embeddings", folder, "--threshold", 0.5)
    replaced = "made with other settings or inputs, will be replaced:"
    for _ in range(2):
        assert replaced not in clipcid(*call).said
    told = clipcid(*call, "--against", "eval").said
    assert replaced in told
    assert 'settings.against: null there, ["eval"] now' in told
    np.save(folder / "img_emb" / "img_emb_1.npy", rows[200:])
    keys = pd.DataFrame({"key": [f"{row:06d}" for row in range(200, NUM_ROWS)]})
    keys.to_parquet(folder / "metadata" / "metadata_1.parquet")
    told = clipcid(*call, "--against", "eval").said
    assert f"{replaced} inputs: 1 more shard now" in told


def test_a_list_that_is_there_is_refused_before_the_search(clipcid: Clipcid, embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text("mine\n")
    call = ("balance", "--embeddings", embeddings, "--keep", 0.5, "--write-keys", "k.txt")
    assert "k.txt already exists, and this run would replace it. Add --overwrite" in clipcid(*call, code=1).said
    assert not (tmp_path / "clipcid-work" / "balance" / "forest.parquet").exists()
    clipcid(*call, "--overwrite")
    clipcid(*call)  # of a finished result, with the same content


def test_all_filters_go_together(clipcid: Clipcid, torchrun: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    evaluation = write_tar(tmp_path / "evaluation.tar", shard_members(500, 20))
    write_tar(tmp_path / "data" / "0.tar", [*shard_members(0, 80), *shard_members(500, 20)])
    amounts = ("--model", tiny_model, "--keep", 0.8, "--against", evaluation, "--against-threshold", 0.001)
    run = clipcid("balance", "data", *amounts, "--write-pairs", "pairs.csv", "--json")
    work, keep = tmp_path / "clipcid-work", read_keep(tmp_path)
    assert (keep["dropped_by"][80:] == "reference").all()
    assert (keep["reference_distance"][80:] == 0.0).all()
    assert run.json["against"]["dropped"] == (keep["dropped_by"] == "reference").sum() < len(keep)
    pairs = pd.read_csv(tmp_path / "pairs.csv", dtype={"from": str, "to": str})
    assert pairs["from"].tolist() == keep["key"][keep["dropped_by"].notna()].tolist()
    assert pairs["to"].tolist() == keep["reference_key"].fillna(keep["representative"])[~keep["kept"]].tolist()
    assert (pairs["reference"].dropna() == str(evaluation)).sum() == run.json["against"]["dropped"]
    page = (work / "balance" / "report.html").read_text()
    gallery = page[page.index("Images near a reference") : page.index("Images kept at each cut-off")]
    assert gallery.count("data:image/webp;base64,") == 24
    # The embeddings are there; another amount compares nothing again.
    assert "All comparisons were made before." in clipcid("balance", "--keep", 0.7, *amounts[4:]).said

    clipcid("cluster", "--keep-list", "none", "--num-clusters", 8)
    (model,), (references,) = (list((work / kind).iterdir()) for kind in ("embeddings", "references"))
    filters = ("--against", references, "--against-threshold", 0.001, "--max-caption-similarity", 0.1)
    given = ("--embeddings", model, "--keep", 0.9, *filters, "--max-per-cluster", 3, "--clusters", work / "clusters")
    one = clipcid("balance", *given, "--work", "one", "--json").json
    torchrun(2, "balance", *given, "--work", "two")
    for name in ("keep.parquet", "forest-filtered.parquet", "curve.csv"):
        assert (tmp_path / "one" / "balance" / name).read_bytes() == (tmp_path / "two" / "balance" / name).read_bytes()
    keep = read_keep(tmp_path, "one")
    assert set(keep["dropped_by"].dropna()) == {"reference", "caption", "repeat", "cluster"}
    assert keep[keep["kept"]].groupby("cluster").size().max() == 3
    assert one["dropped_by"] == keep["dropped_by"].value_counts().to_dict()
    assert one["searched"] == (~keep["dropped_by"].isin(["reference", "caption"])).sum()
    assert one["kept"] == keep["kept"].sum() == keep["dropped_by"].isna().sum()


def test_new_shards_replace_no_others(clipcid: Clipcid, torchrun: Clipcid, tiny_shards: Path, tmp_path: Path) -> None:
    rows = make_rows(24, seed=3)
    rows[1::2] = rows[::2]
    shards = ["00000"] * 14 + ["00001"] * 10
    write_embeddings(tmp_path / "e", rows, keys=[f"{row:06d}" for row in range(24)], shards=shards)
    arguments = ("balance", tiny_shards, "--embeddings", "e", "--threshold", 0.0, "--write-shards")
    result, keep = clipcid(*arguments, "out", "--json").json, read_keep(tmp_path)
    assert 0 < result["kept"] <= 12
    sizes = {f"{shard}.tar": int(count) for shard, count in keep.groupby("shard")["kept"].sum().items()}
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == sizes
    for name, kept in keep.groupby("shard")["kept"]:
        assert json.loads((tmp_path / "out" / f"{name}_stats.json").read_text()) == {
            "count": len(kept),
            "successes": int(kept.sum()),
            "dropped": int((~kept).sum()),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": int(kept.sum()), "repeat": int((~kept).sum())},
        }
    assert "already holds these shards" in clipcid(*arguments, "out").stderr
    whole = (tmp_path / "out" / "00000.tar").read_bytes()
    (tmp_path / "out" / "00000.tar").unlink()
    assert "out/00000.tar is missing, although" in clipcid(*arguments, "out", code=1).said
    clipcid(*arguments, "out", "--overwrite")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == whole
    torchrun(2, *arguments, "two")
    for name in ("00000.tar", "00001.tar", "sizes.json", "00000_stats.json", "00001_stats.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    # Another keep list: refused before the search, then replaced; a folder of other tars is never touched.
    changed = ("balance", tiny_shards, "--embeddings", "e", "--keep", 1.0, "--write-shards", "out")
    result = json.loads((tmp_path / "clipcid-work" / "balance" / "balance.json").read_text())
    refused = clipcid(*changed, code=1)
    assert "out already holds shards, and this run would replace them. Add --overwrite" in refused.said
    assert json.loads((tmp_path / "clipcid-work" / "balance" / "balance.json").read_text()) == result
    clipcid(*changed, "--overwrite")
    assert "would overwrite the data itself" in clipcid("balance", "out", *changed[2:], "--overwrite", code=1).said
    with tarfile.open(tmp_path / "out" / "00000.tar") as found, tarfile.open(tiny_shards / "00000.tar") as source:
        assert found.getnames() == source.getnames()
    shutil.copytree(tiny_shards, tmp_path / "fewer")
    write_tar(tmp_path / "fewer" / "00001.tar", shard_members(14, 9))
    refused = clipcid("balance", "fewer", *changed[2:-1], "less", code=1)
    assert "fewer/00001.tar holds 9 of its 10 samples to keep, and 9 samples in total" in refused.said
    assert not list(tmp_path.glob("less/0*"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.tar").write_bytes(b"precious")
    for target in (tiny_shards, tmp_path / "foreign"):
        refused = clipcid(*arguments, target, code=1)
        assert "that --write-shards did not write" in refused.said
    assert (tmp_path / "foreign" / "mine.tar").read_bytes() == b"precious"


def test_too_few_captions_name_the_command_that_needs_none(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*shard_members(0, 6), *shard_members(6, 6, captions=False)])
    call = ("balance", "data", "--model", tiny_model, "--keep", 0.5, "--work", "w")
    refused = clipcid(*call, code=1)
    found = re.search(r"clipcid (embed .* --no-text --overwrite)", refused.said)
    assert found is not None, refused
    clipcid(*shlex.split(found[1]))
    clipcid(*call, "--quiet")
    assert len(read_keep(tmp_path, "w")) == 12


def test_the_table_of_embed_says_how_balance_embeds(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "data/0.tar", shard_members(0, 6))
    (tmp_path / "c.toml").write_text(
        f'[embed]\nmodel = "{tiny_model}"\nviews = 2\nbatch-size = 3\n[balance]\nkeep = 0.5\n'
    )
    call = ("balance", "data", "--config", "c.toml", "--max-bad-fraction", 0.5)
    clipcid(*call, env={"CLIPCID_EMBED_TEXT_VARIANTS": "1"})
    made = json.loads(Path("clipcid-work/embeddings/tiny/embed.json").read_text())["settings"]
    assert (made["views"], made["text_variants"], made["batch_size"]) == (2, 1, 3)
    (tmp_path / "c.toml").write_text("[embed]\nviewz = 2\n")
    assert "[embed] has an unknown key 'viewz'" in clipcid(*call, "--keep", 0.5, code=2).said


def test_shards_that_were_added_are_told_and_taken_in(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "data/0.tar", shard_members(0, 6))
    clipcid("balance", "data", "--model", tiny_model, "--keep", 0.5)
    assert "not embedded yet" not in clipcid("balance", "--keep", 0.5).said
    write_tar(tmp_path / "data/1.tar", shard_members(6, 4))
    told = clipcid("balance", "--keep", 0.5, "--write-shards", "grown").said
    assert [path.name for path in (tmp_path / "grown").glob("*.tar")] == ["0.tar"]
    assert f"{tmp_path}/data has 1 shard that is not embedded yet. To include them, name the data" in told
    again = clipcid("balance", "data", "--keep", 0.5)
    assert "made with other settings or inputs, will be replaced: inputs: 1 more shard now" in again.said
    assert len(read_keep(tmp_path)) == 10

    # Other pictures and captions under the keys that were embedded.
    others = [(key, content) for (key, _), (_, content) in zip(shard_members(0, 6), shard_members(20, 6), strict=True)]
    write_tar(tmp_path / "data/0.tar", others)
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    student = ("distill", *SHORT, "--preset", "clip-kd", "--steps", 2)
    named = ("distill", "data", *student[1:])
    for command in (("balance", "--keep", 0.5, "--write-shards", "changed"), student, named):
        refused = clipcid(*command, code=1).said
        assert f"{tmp_path}/data has changed since clipcid-work/embeddings/tiny was made from it: " in refused
        assert "changed or gone: 0.tar. Run embed again with --overwrite." in refused
        assert "from which the embeddings were made" not in refused
    assert not (tmp_path / "changed").exists()
    told = clipcid("balance", "--keep", 0.4).said
    assert "changed or gone: 0.tar. The keep list is of the images as they were embedded. Run embed again" in told
    pictures = re.search(r"The report shows (\d+) of (\d+) pictures: shard 0 has changed since it was embedded\.", told)
    assert pictures, told
    assert 0 < int(pictures[1]) < int(pictures[2])
    assert "already holds this result" in clipcid("balance", "--keep", 0.4).said


def test_references_of_another_model(clipcid: Clipcid, tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> None:
    clipcid("embed", tiny_shards, "--model", tiny_model, "--no-text", "--out", "references")
    other = write_tiny_model(tmp_path / "other", seed=7)
    amounts = ("--keep", 0.5, "--against", "references", "--against-threshold", 0.1)
    run = clipcid("balance", tiny_shards, "--model", other, *amounts, code=1)
    assert "the images to balance are to be embedded with" in run.said
    assert not (tmp_path / "clipcid-work" / "embeddings").exists()
