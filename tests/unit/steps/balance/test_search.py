"""The step `balance`, run in this process on small embeddings and on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance_data import balance, check_keep_list, distance_matrix, make_rows, read_keep, write_embeddings
from PIL import Image

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import save_arrays
from clipcid_cli.steps.balance import chunks, sets

NUM_ROWS = 300


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def embeddings(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of embeddings."""
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "foreign", rows)


def read_bytes(work: Path, name: str) -> bytes:
    return (work / "balance" / name).read_bytes()


def test_another_keep_ratio_reuses_the_forest_and_a_smaller_one_extends_it(embeddings: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    _, said = balance(work, embeddings, keep=0.6)
    assert "forest of these embeddings" not in said
    forest = read_bytes(work, "forest.parquet")
    _, said = balance(work, embeddings, keep=0.7)
    assert "forest of these embeddings exists" in said
    assert read_bytes(work, "forest.parquet") == forest
    balance(tmp_path / "fresh", embeddings, keep=0.7)
    assert read_bytes(work, "keep.parquet") == read_bytes(tmp_path / "fresh", "keep.parquet")

    smaller, said = balance(work, embeddings, keep=0.05)
    assert smaller["kept"] == 15
    assert "forest of these embeddings" not in said
    assert len(read_bytes(work, "forest.parquet")) > len(forest)
    balance(tmp_path / "small", embeddings, keep=0.05)
    assert read_bytes(work, "keep.parquet") == read_bytes(tmp_path / "small", "keep.parquet")

    again, said = balance(work, embeddings, keep=0.05)
    assert "already holds this result" in said
    assert again == smaller


def test_a_killed_search_does_not_rely_on_a_forest_that_has_been_lost(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = list[Path]()

    def save_some(path: Path, arrays: dict[str, Any]) -> None:
        if len(saves) == 20:
            raise KeyboardInterrupt
        saves.append(path)
        save_arrays(path, arrays)

    for name in ("_MAX_PANEL", "_MIN_PANEL"):
        monkeypatch.setattr(planning, name, 30)
    monkeypatch.setattr(chunks.SavePace, "is_due", lambda pace: True)
    balance(tmp_path / "killed", embeddings, threshold=0.3)
    with monkeypatch.context() as stopped:
        stopped.setattr(chunks, "save_arrays", save_some)
        with pytest.raises(KeyboardInterrupt):
            balance(tmp_path / "killed", embeddings, threshold=0.5)
    for path in (tmp_path / "killed/balance").glob("forest*"):
        path.unlink()
    balance(tmp_path / "killed", embeddings, threshold=0.5)
    balance(tmp_path / "new", embeddings, threshold=0.5)
    for name in ("keep.parquet", "forest.parquet"):
        assert read_bytes(tmp_path / "killed", name) == read_bytes(tmp_path / "new", name)


def test_threshold_and_cosine_distance_are_the_same_cutoff(embeddings: Path, rows: np.ndarray, tmp_path: Path) -> None:
    by_cosine, _ = balance(tmp_path / "c", embeddings, cosine_distance=0.02)
    by_distance, _ = balance(tmp_path / "t", embeddings, threshold=0.2)
    assert by_cosine["threshold"] == by_distance["threshold"] == 0.2
    for name in ("keep.parquet", "forest.parquet", "curve.csv"):
        assert read_bytes(tmp_path / "c", name) == read_bytes(tmp_path / "t", name)
    check_keep_list(read_keep(tmp_path / "c"), rows)


def test_keeping_everything_merges_nothing(embeddings: Path, tmp_path: Path) -> None:
    result, _ = balance(tmp_path, embeddings, keep=1.0)
    assert (result["kept"], result["threshold"], result["largest_component"], result["uncovered_ratio"]) == (
        300,
        None,
        1,
        0.0,
    )
    assert read_keep(tmp_path)["kept"].all()


def test_copies_beyond_the_target_all_go_and_it_is_said(tmp_path: Path) -> None:
    rows = make_rows(50, num_centroids=50)[np.arange(200) % 50]
    result, said = balance(tmp_path, write_embeddings(tmp_path / "copies", rows), keep=0.5)
    distinct = len(np.unique(rows, axis=0))
    assert (result["kept"], result["threshold"]) == (distinct, 0.0)
    assert f"{distinct} images are kept, {100 - distinct} fewer than requested" in said
    check_keep_list(read_keep(tmp_path), rows)


def test_ties_at_the_cutoff_all_merge_and_it_is_said(tmp_path: Path) -> None:
    turned = 0.8 * np.eye(24) + 0.6 * np.roll(np.eye(24), 1, axis=1)
    rows = np.concatenate([np.eye(24), turned]).astype(np.float16)
    result, said = balance(tmp_path, write_embeddings(tmp_path / "ties", rows), keep=0.9)
    assert result["kept"] < round(0.9 * 48)
    assert f"Pairs tie at the cut-off {result['threshold']:.6g}, and all of them merge" in said
    check_keep_list(read_keep(tmp_path), rows)


def test_the_other_linkage_is_what_a_run_with_it_gives(
    embeddings: Path, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, _ = balance(tmp_path / "single", embeddings, keep=0.2)
    star, _ = balance(tmp_path / "star", embeddings, threshold=single["threshold"], linkage="star")
    for one, other, name in ((single, star, "star"), (star, single, "single")):
        assert one["other_linkage"] == {
            "linkage": name,
            "kept": other["kept"],
            "uncovered_ratio": other["uncovered_ratio"],
        }
    # docs/method.md#star-cover, row by row: rows by number of neighbours, each kept that none kept before it covers.
    near = distance_matrix(rows) <= np.float32(single["threshold"])
    covered, kept = np.zeros(NUM_ROWS, bool), 0
    for row in sorted(range(NUM_ROWS), key=lambda row: (-near[row].sum(), row)):
        if not covered[row]:
            kept, covered = kept + 1, covered | near[row]
    assert star["kept"] == kept > single["kept"]
    assert (star["uncovered_ratio"], single["uncovered_ratio"] > 0.0) == (0.0, True)
    report = (tmp_path / "single" / "balance" / "report.html").read_text()
    assert "star" in report[report.index("<svg") : report.index("</svg>")]
    assert "not computed" not in report

    for limit in ("_MAX_COMPARED", "_MAX_FOUND"):
        with monkeypatch.context() as patch:
            patch.setattr(sets, limit, 20)
            result, said = balance(tmp_path / limit, embeddings, keep=0.2)
        assert (result["other_linkage"], result["kept"]) == (None, single["kept"])
        assert "What --linkage star would keep at this cut-off is not computed:" in said
        assert "not computed" in (tmp_path / limit / "balance" / "report.html").read_text()


def test_report_tells_what_moved_and_loads_nothing(rows: np.ndarray, tmp_path: Path) -> None:
    """Three images of class `ant` are one picture, one of them is kept; `bee` and `cat` keep both of theirs."""
    sizes = {"ant": 3, "bee": 2, "cat": 2}
    keys = [f"{name}/{number}" for name, count in sizes.items() for number in range(count)]
    for number, key in enumerate(keys):
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 90, 120)).save(tmp_path / "photos" / f"{key}.png")
    distinct = rows[np.unique(rows, axis=0, return_index=True)[1]]
    folder = write_embeddings(
        tmp_path / "e",
        distinct[[0, 0, 0, 1, 2, 3, 4]],
        keys=keys,
        captions=[f"A {key[:3].upper()}, the" for key in keys],
    )
    reports = {}
    for name, data in (("classes", str(tmp_path / "photos")), ("words", None)):
        balance(tmp_path / name, folder, threshold=0.0, data=data)
        reports[name] = (tmp_path / name / "balance" / "report.html").read_text()
        for title in (
            "kept at each cut-off",
            "Sizes of the groups",
            "Changes in composition",
            "largest groups",
            "Input",
        ):
            assert f"{title}</h2>" in reports[name]
        risen, fallen = reports[name].split("Largest decreases")
        assert [risen.count(f'class="name">{word}<') for word in ("bee", "cat", "ant")] == [1, 1, 0]
        assert 'class="name">ant<' in fallen
        assert "42.86 → 20.00 %<br><small>3 → 1</small>" in fallen
        outside = re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import|<link|<script""", reports[name])
        assert outside == []
    assert "each of 3 classes, among the 7 images and the 5 kept ones" in reports["classes"]
    assert "whose caption has the word" in reports["words"]
    assert reports["classes"].count("data:image/webp") == 3 + 2 * 2  # the set, and the pairs that join it
    assert "not shown: it is not recorded which data" in " ".join(reports["words"].split())


def test_other_images_can_stand_for_a_set(rows: np.ndarray, tmp_path: Path) -> None:
    texts = make_rows(NUM_ROWS, seed=9)
    captions = ["" if row % 7 == 0 else f"caption {row}" for row in range(NUM_ROWS)]
    folder = write_embeddings(tmp_path / "e", rows, texts=texts, captions=captions)
    similarity = (rows.astype(np.float64) * texts.astype(np.float64)).sum(1)
    similarity[[caption == "" for caption in captions]] = -np.inf
    distances = distance_matrix(rows).astype(np.float64)
    chosen = {}
    for select, seed in (("first", 0), ("medoid", 0), ("similarity", 0), ("random", 0), ("random", 1)):
        balance(tmp_path, folder, keep=0.5, select=select, seed=seed)
        keep = read_keep(tmp_path)
        check_keep_list(keep, rows)
        chosen[select, seed] = tuple(keep["representative"].astype(int))
        for members in keep.groupby("component").groups.values():
            expected = {
                "first": members[0],
                "medoid": members[np.argmin(distances[np.ix_(members, members)].sum(1))],
                "similarity": members[np.argmax(similarity[members])],
            }.get(select)
            assert expected is None or chosen[select, seed][members[0]] == expected
    assert len(set(chosen.values())) == 5


def test_captions_without_a_usable_embedding_come_last_and_are_counted(tmp_path: Path) -> None:
    rows = np.repeat(make_rows(1), 5, axis=0)
    texts = np.stack([rows[0] * np.float16("nan"), rows[0] * 0, -rows[0], rows[0], rows[0]])
    captions = ["a", "b", "c", "d", ""]
    folder = write_embeddings(tmp_path / "e", rows[:3], 1, texts=texts[:3], captions=captions[:3])
    _, said = balance(tmp_path / "bad", folder, threshold=0.0, select="similarity")
    assert read_keep(tmp_path / "bad")["representative"].unique().tolist() == ["000002"]
    assert "2 text embeddings of images in groups are zero or not finite" in said
    assert "000000, 000001" in said
    folder = write_embeddings(tmp_path / "f", rows[2:], 1, texts=texts[2:], captions=captions[2:])
    _, said = balance(tmp_path / "good", folder, threshold=0.0, select="similarity")
    assert read_keep(tmp_path / "good")["representative"].unique().tolist() == ["000001"]
    assert "zero or not finite" not in said


def test_the_image_with_most_pixels_can_stand_for_a_set(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(20, 10), (30, 10), (30, 10), (40, 40), (50, 50)]):
        Image.new("RGB", size).save(tmp_path / "photos" / f"{number}.png")
    rows = make_rows(5, num_centroids=5, noise=0.0)[[0, 0, 0, 1, 1]]
    folder = write_embeddings(tmp_path / "e", rows, keys=["0", "1", "2", "3", "4"])
    balance(tmp_path, folder, data=str(tmp_path / "photos"), threshold=0.0, select="resolution")
    assert read_keep(tmp_path)["representative"].tolist() == ["1", "1", "1", "4", "4"]
    # The data is needed only where something is to be chosen.
    _, said = balance(tmp_path, folder, threshold=0.0, select="resolution")
    assert "already holds this result" in said
    result, _ = balance(tmp_path, folder, keep=1.0, select="resolution")
    assert result["kept"] == 5
    with pytest.raises(ClipcidError, match="--select resolution needs the data itself"):
        balance(tmp_path, folder, keep=0.8, select="resolution")


def test_other_embeddings_are_refused_until_overwrite(embeddings: Path, rows: np.ndarray, tmp_path: Path) -> None:
    balance(tmp_path, embeddings, keep=0.5)
    other = write_embeddings(tmp_path / "other", rows[::-1].copy())
    with pytest.raises(ClipcidError, match="made with other settings or inputs") as refused:
        balance(tmp_path, other, keep=0.5)
    assert "--overwrite" in refused.value.fix
    balance(tmp_path, other, keep=0.5, overwrite=True)
    balance(tmp_path / "fresh", other, keep=0.5)
    for name in ("keep.parquet", "forest.parquet", "curve.csv"):
        assert read_bytes(tmp_path, name) == read_bytes(tmp_path / "fresh", name)


@pytest.mark.parametrize(
    ("folder", "settings", "message"),
    [
        ("text", {}, "cannot be read"),
        ("empty", {}, "all without rows"),
        ("nan", {}, "None of the 4 rows"),
        ("good", {"select": "similarity"}, "contains no text embeddings"),
        ("good", {"select": "resolution"}, "needs the data itself"),
        ("good", {"write_shards": Path("out")}, "needs the data itself"),
        ("good", {"write_shards": Path("out"), "data": "no-such-data"}, "There is no data at"),
    ],
)
def test_what_cannot_be_balanced_is_refused(
    rows: np.ndarray, tmp_path: Path, folder: str, settings: dict[str, Any], message: str
) -> None:
    write_embeddings(tmp_path / "good", rows[:20])
    write_embeddings(tmp_path / "nan", np.full((4, 8), np.nan, np.float16))
    for name in ("text", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "img_emb_0.npy").write_text("no array")
    np.save(tmp_path / "empty" / "img_emb_0.npy", np.empty((0, 8), np.float16))
    with pytest.raises(ClipcidError, match=message):
        balance(tmp_path, tmp_path / folder, keep=0.5, max_bad_fraction=1.0, **settings)
    assert not (tmp_path / "balance" / "keep.parquet").exists()


def test_dry_run_writes_nothing(embeddings: Path, tmp_path: Path) -> None:
    result, said = balance(tmp_path / "w", embeddings, keep=0.5, dry_run=True)
    assert (result["images"], result["pairs"]) == (NUM_ROWS, NUM_ROWS * (NUM_ROWS - 1) // 2)
    assert "exact: 44,850 pairs" in said
    assert "partitioned: " in said
    assert {**result["exact"], "neighbors": "exact"}.items() <= result.items()
    assert result["flop"] == 2 * 32 * result["pairs"]
    assert result["memory"]["mapped"] == NUM_ROWS * 32 * 2
    assert result["memory"]["resident"] > 0
    assert result["disk"] > 0
    parts, _ = balance(tmp_path / "w", embeddings, threshold=0.5, neighbors="partitioned", dry_run=True)
    assert {**parts["partitioned"], "neighbors": "partitioned"}.items() <= parts.items()
    for cost in (parts["exact"], parts["partitioned"]):
        assert cost["pairs"] > 0
        assert 0.0 < cost["seconds"] < 60.0
    assert not (tmp_path / "w").exists()
