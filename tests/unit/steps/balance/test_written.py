"""What `balance` writes beside its keep list: report, uids and new shards; where their samples are found."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import balance_data
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from balance_data import make_rows, write_embeddings
from conftest import make_image, write_tar
from PIL import Image
from uid_data import NUM_ROWS, UIDS, balance, datacomp_subset, write_data

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.steps.balance import changes, pictures
from clipcid_cli.steps.balance.changes import count_words
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.samples import SampleFinder, read_uid
from clipcid_cli.steps.data_index import index_alone
from clipcid_cli.steps.settings.balance import BalanceSettings

VOCABULARY = [
    "Red",
    "red",
    "façade",
    "the",
    "of",
    "x",
    "boat",
    "boats",
    "don't",
    "2012",
    "Straße",
    "with",
    "лес",
    "ab1cd",
]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two read-only shards of 30 samples, whose attributes hold uids."""
    return write_data(tmp_path_factory.mktemp("data") / "pool", UIDS)


def test_uids_come_from_metadata_or_from_attributes(rows: np.ndarray, data: Path, tmp_path: Path) -> None:
    """Keys are numbers, as img2dataset gives them; the uids lie beside them in one of two places."""
    folder = write_embeddings(tmp_path / "e", rows)
    with pytest.raises(ClipcidError, match="Sample '000000' has no uid of DataComp's") as refused:
        balance(tmp_path / "w", folder, write_uids=tmp_path / "u.npy")
    assert "--write-keys" in refused.value.fix
    assert not (tmp_path / "w" / "balance").exists(), "that was said before the search"

    result = balance(tmp_path / "w", folder, data=str(data), write_uids=tmp_path / "u.npy")
    keep = pd.read_parquet(result["files"]["keep_list"])
    expected = datacomp_subset([UIDS[row] for row in np.flatnonzero(keep["kept"])])
    assert np.array_equal(np.load(tmp_path / "u.npy"), expected)
    last = int(np.flatnonzero(keep["kept"])[-1])
    lacking = write_data(tmp_path / "lacking", [None if row == last else uid for row, uid in enumerate(UIDS)])
    with pytest.raises(ClipcidError, match=f"Sample '{last:06d}' has no uid"):
        balance(tmp_path / "w", folder, data=str(lacking), write_uids=tmp_path / "v.npy")

    for number, part in enumerate(np.array_split(np.arange(NUM_ROWS), 2)):
        path = folder / "metadata" / f"metadata_{number}.parquet"
        pd.read_parquet(path).assign(uid=[UIDS[row] for row in part]).to_parquet(path)
    balance(tmp_path / "m", folder, keys="shard", write_uids=tmp_path / "m.npy")
    assert (tmp_path / "m.npy").read_bytes() == (tmp_path / "u.npy").read_bytes()
    # Files that were renamed since, where their names are in the keys.
    for path in sorted(folder.rglob("*_1.*")):
        path.rename(path.with_name(path.name.replace("_1.", "_7.")))
    with pytest.raises(ClipcidError, match=r"has keys that .*e does not have"):
        balance(tmp_path / "m", folder, keys="shard", write_uids=tmp_path / "n.npy")
    assert not (tmp_path / "n.npy").exists()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def tar_keys(folder: Path) -> list[str]:
    """List the keys of the shards of a folder, in order."""
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [name.removesuffix(".png") for name in archive.getnames() if name.endswith(".png")]
    return names


@pytest.mark.parametrize("keys", [None, UIDS], ids=["keys", "uids"])
def test_samples_are_found_by_key_or_uid(rows: np.ndarray, data: Path, tmp_path: Path, keys: list[str] | None) -> None:
    """clip-retrieval records keys, DataComp's metadata uids, and neither the tar that a row came from."""
    folder = write_embeddings(tmp_path / "e", rows, num_files=3, keys=keys)
    result = balance(tmp_path / "w", folder, data=str(data), write_shards=tmp_path / "out")
    kept = pd.read_parquet(result["files"]["keep_list"])["kept"].to_numpy()
    assert tar_keys(tmp_path / "out") == [f"{row:06d}" for row in np.flatnonzero(kept)]
    sizes = {f"{number:08d}.tar": int(part.sum()) for number, part in enumerate(np.array_split(kept, 2))}
    assert list(read_json(tmp_path / "out" / "sizes.json").items()) == list(sizes.items())
    stats = read_json(tmp_path / "out" / "00000001_stats.json")
    assert stats["status_dict"] == {"success": sizes["00000001.tar"], "repeat": 30 - sizes["00000001.tar"]}


def test_other_data_is_refused_and_missing_samples_are_said(rows: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", rows, keys=[f"other/{row}" for row in range(NUM_ROWS)])
    with pytest.raises(ClipcidError, match="Of the 30 images kept, none are in the 2 shards"):
        balance(tmp_path / "w", folder, data=str(data), write_shards=tmp_path / "none")
    # A pool as it was downloaded lacks some of what the metadata name.
    names = [f"gone/{row}" if row < 10 else f"{row:06d}" for row in range(NUM_ROWS)]
    folder = write_embeddings(tmp_path / "part", rows, keys=names)
    with pytest.raises(ClipcidError, match=r"8 of the 30 images kept are not in the data: 26\.7%") as refused:
        balance(tmp_path / "v", folder, data=str(data), write_shards=tmp_path / "out")
    assert refused.value.fix.endswith("--max-bad-fraction 0.267")
    result = balance(tmp_path / "v", folder, data=str(data), write_shards=tmp_path / "out", max_bad_fraction=0.267)
    assert result["shards"] == {"written": 22, "not_written": 8}
    keep = pd.read_parquet(result["files"]["keep_list"])
    counts = read_json(tmp_path / "out" / "write-shards.json")["counts"]
    assert counts["missing"] == keep["kept"][:10].sum() > 0
    assert counts["samples"] == keep["kept"][10:].sum()
    assert read_json(tmp_path / "out" / "00000000_stats.json")["status_dict"]["not_in_keep_list"] == 10


def test_shards_that_are_gone_are_named_before_any_is_copied(rows: np.ndarray, data: Path, tmp_path: Path) -> None:
    shards = [f"{int(row >= NUM_ROWS // 2):08d}" for row in range(NUM_ROWS)]
    folder = write_embeddings(tmp_path / "e", rows, shards=shards)
    settings = {"data": str(data / "00000001.tar"), "write_shards": tmp_path / "out"}
    with pytest.raises(
        ClipcidError, match=r"17 of the 30 .* not in the data \(shards that it lacks: 00000000\)"
    ) as refused:
        balance(tmp_path / "w", folder, **settings)
    assert not (tmp_path / "out").exists()
    assert refused.value.fix.endswith("--max-bad-fraction 0.567")
    for _ in range(2):  # written, and there already
        result, told = balance_data.balance(tmp_path / "w", folder, keep=0.5, max_bad_fraction=0.6, **settings)
        assert result["shards"] == {"written": 13, "not_written": 17}
    assert "already holds these shards" in told


@pytest.mark.parametrize(("copies", "is_said"), [(9, False), (10, True)])
def test_a_few_copies_are_no_chain(tmp_path: Path, copies: int, is_said: bool) -> None:
    distinct = np.unique(make_rows(NUM_ROWS), axis=0)
    folder = write_embeddings(tmp_path / "e", np.concatenate([np.repeat(distinct[:1], copies, axis=0), distinct[1:20]]))
    result, told = balance_data.balance(tmp_path / "w", folder, threshold=0.0)
    assert result["largest_component"] == copies
    assert (f"One set holds {copies} of" in told) == is_said


def test_a_shard_that_keeps_nothing_has_statistics_and_no_tar(data: Path, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", np.repeat(make_rows(1), NUM_ROWS, axis=0))
    balance(tmp_path / "w", folder, data=str(data), threshold=0.0, keep=None, write_shards=tmp_path / "out")
    assert read_json(tmp_path / "out" / "sizes.json") == {"00000000.tar": 1}
    assert not (tmp_path / "out" / "00000001.tar").exists()
    stats = read_json(tmp_path / "out" / "00000001_stats.json")
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (30, 0, {"repeat": 30})


def test_samples_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", UIDS)
    plain = open_dataset(data, index_root=tmp_path / "index")
    rows = (3, 0, 31, 30, 999, NUM_ROWS - 1)
    keys = [f"{row:06d}" for row in rows]
    shards = [plain.shards[int(row >= NUM_ROWS // 2)].name for row in rows]
    expected = SampleFinder(plain, 0).find(shards, keys)
    assert [read_uid(sample) for sample in expected] == [UIDS[3], UIDS[0], UIDS[31], UIDS[30], None, UIDS[-1]]
    indexed = index_alone(plain, 0)

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was listed")

    monkeypatch.setattr(Shard, "stream", refuse)
    monkeypatch.setattr(Shard, "samples", refuse)
    foreign = ["another tool's file"] * len(keys)
    for dataset in (plain, indexed):
        for names in (shards, foreign):
            assert SampleFinder(dataset, 0).find(names, keys) == expected


def test_a_report_lists_no_large_data_for_another_tools_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", UIDS)
    settings = BalanceSettings(keep=0.5, data=str(data), work=tmp_path / "work", workers=0)
    unread: Any = None  # the keys are given
    plan = BalancePlan(settings=settings, embeddings=unread, spec=unread, seconds={})
    monkeypatch.setattr(pictures, "_MAX_LISTED", 1)
    gallery = pictures.ReportPictures(plan)
    assert gallery.read(["0.parquet"], ["000003"]) == [""]
    assert "has no index yet" in gallery.unread["0.parquet", "000003"]
    assert gallery.data is not None
    index_alone(gallery.data, 0)
    assert pictures.ReportPictures(plan).read(["0.parquet"], ["000003"])[0].startswith("data:")


def test_it_tells_what_moved_and_loads_nothing(tmp_path: Path) -> None:
    """Three images of class `ant` are one picture, one of them is kept; `bee` and `cat` keep both of theirs."""
    sizes = {"ant": 3, "bee": 2, "cat": 2}
    keys = [f"{name}/{number}" for name, count in sizes.items() for number in range(count)]
    for number, key in enumerate(keys):
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 90, 120)).save(tmp_path / "photos" / f"{key}.png")
    rows = np.unique(make_rows(300), axis=0)[[0, 0, 0, 1, 2, 3, 4]]
    captions = [f"A {key[:3].upper()}, the" for key in keys]
    folder = write_embeddings(tmp_path / "e", rows, keys=keys, captions=captions)
    reports = {}
    for name, data in (("classes", str(tmp_path / "photos")), ("words", None)):
        balance(tmp_path / name, folder, threshold=0.0, keep=None, data=data, with_report=True)
        page = reports[name] = (tmp_path / name / "balance" / "report.html").read_text()
        assert "Changes in composition</h2>" in page
        risen, fallen = page.split("Largest decreases")
        assert [risen.count(f'class="name">{word}<') for word in ("bee", "cat", "ant")] == [1, 1, 0]
        assert 'class="name">ant<' in fallen
        assert "42.86 → 20.00 %<br><small>3 → 1</small>" in fallen
        assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import|<link|<script""", page)
    assert "each of 3 classes, among the 7 images and the 5 kept ones" in reports["classes"]
    assert "whose caption has the word" in reports["words"]
    assert reports["classes"].count("data:image/webp") == 3 + 2 * 2  # the set, and the pairs that join it
    assert "not shown: it is not recorded which data" in " ".join(reports["words"].split())


def test_shards_whose_index_knows_no_class_are_not_listed_for_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = write_tar(
        tmp_path / "labelled.tar", [("a.png", make_image(0)), ("a.cls", b"3"), ("b.png", make_image(1))]
    )
    index_of_labelled = index_alone(open_dataset(labelled, index_root=tmp_path / "index"), 0).index
    assert index_of_labelled is not None
    assert [record.with_labels for record in index_of_labelled.records] == [1]
    dataset = index_alone(open_dataset(data, index_root=tmp_path / "index"), 0)
    embeddings = open_embeddings(write_embeddings(tmp_path / "e", make_rows(3), captions=["a red boat"] * 3))
    numbers = np.arange(3, dtype=np.int32)
    rows = BalanceRows(embeddings.rows(Kind.IMAGES), numbers, numbers, Edges.empty())
    monkeypatch.setattr(Shard, "samples", Mock(side_effect=AssertionError))
    assert changes.compare_classes(dataset, embeddings, rows, np.ones(3, np.bool_)).kind == "word"


@pytest.mark.parametrize("at_once", [7, 2**16])
def test_words_are_counted_once_an_image(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_CAPTIONS_AT_ONCE", at_once)
    generator = np.random.default_rng(0)
    captions = [", ".join(generator.choice(VOCABULARY, generator.integers(0, 7))) for _ in range(500)]
    kept = generator.random(500) < 0.4
    found = count_words(pa.array(captions, pa.large_string()), kept)
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for caption, is_kept in zip(captions, kept, strict=True):
        words = {word for word in re.findall(r"[^\W\d_]+", caption.lower()) if len(word) >= 3} - {"the", "with"}
        before.update(words)
        after.update(words if is_kept else ())
    assert found["name"].tolist() == sorted(before) == ["boat", "boats", "don", "façade", "red", "straße", "лес"]
    assert found["before"].tolist() == [before[name] for name in found["name"]]
    assert found["after"].tolist() == [after[name] for name in found["name"]]
