"""`clipcid balance` from the command line, from embeddings in clip-retrieval's layout."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import check_keep_list, distance_matrix, make_rows, write_embeddings
from conftest import Run, shard_members, start_clipcid, write_tar
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

NUM_ROWS = 300
OUTPUTS = ("keep.parquet", "forest.parquet", "curve.csv")


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def embeddings(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of embeddings."""
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "foreign", rows)


def read_other_linkage(work: Path) -> object:
    return json.loads((work / "balance" / "balance.json").read_text())["result"]["other_linkage"]


def read_outputs(work: Path) -> dict[str, bytes]:
    return {name: (work / "balance" / name).read_bytes() for name in OUTPUTS}


def test_the_named_column_is_the_key(clipcid: Callable[..., Run], rows: np.ndarray, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "foreign", rows)
    names = iter(range(NUM_ROWS))
    for path in sorted((folder / "metadata").glob("*.parquet")):
        frame = pd.read_parquet(path)
        frame.assign(number=[f"n{next(names)}" for _ in range(len(frame))]).to_parquet(path)
    given = ("--embeddings", folder, "--key-column", "number")
    said = clipcid("balance", *given, "--keep", 0.563).stderr
    assert re.search(r"the key is column number of\s+the metadata", said)
    keep = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "keep.parquet")
    assert keep.key.tolist() == [f"n{row}" for row in range(NUM_ROWS)]
    assert clipcid("cluster", *given, "--num-clusters", 4, "--json").json["images"] == keep.kept.sum()
    wrong = clipcid("balance", "--embeddings", folder, "--key-column", "x", "--keep", 0.5, check=False)
    assert wrong.returncode == 1
    assert "no column 'x'; they have" in " ".join(wrong.stderr.split())
    frame = pd.read_parquet(path)
    frame.assign(number=[None, *frame["number"][1:]]).to_parquet(path)
    null = clipcid("balance", *given, "--keep", 0.4, "--work", "null", check=False)
    assert null.returncode == 1
    assert "rows have no key in column number" in " ".join(null.stderr.split())


def test_keep_ratio_gives_the_partition_of_single_linkage(
    clipcid: Callable[..., Run], embeddings: Path, rows: np.ndarray, tmp_path: Path
) -> None:
    result = clipcid("balance", "--embeddings", embeddings, "--keep", 0.563, "--json").json
    keep = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "keep.parquet")
    check_keep_list(keep, rows)
    assert (result["images"], result["kept"]) == (NUM_ROWS, keep["kept"].sum())
    assert abs(result["kept"] - round(0.563 * NUM_ROWS)) <= 1
    assert result["keep_ratio"] == result["kept"] / NUM_ROWS
    assert result["components"] == result["kept"]
    assert result["largest_component"] == keep["component_size"].max()
    assert result["skipped"] == {}
    assert set(result["seconds"]) == {"embed", "search", "write"}
    tree = linkage(squareform(distance_matrix(rows).astype(np.float64), checks=False), method="single")
    sets = fcluster(tree, np.float64(np.float32(result["threshold"])), criterion="distance")
    assert keep.groupby(sets)["component"].nunique().eq(1).all()
    assert len(np.unique(sets)) == result["components"]
    dropped = keep[~keep["kept"]]
    far = (dropped["distance"] > np.float32(result["threshold"])).mean()
    assert np.isclose(result["uncovered_ratio"], far)
    # The central image: nearest to the set's mean, the smaller row of equals.
    for component, members in keep.groupby("component").groups.items():
        wide = rows[members].astype(np.float64)
        central = members[np.argmin(((wide - wide.mean(0)) ** 2).sum(1))]
        assert keep["representative"][component] == f"{central:06d}"

    forest = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "forest.parquet")
    assert (forest["a"] < forest["b"]).all()
    assert forest["distance"].is_monotonic_increasing
    np.testing.assert_array_equal(forest["distance"], np.sort(tree[:, 2])[: len(forest)].astype(np.float32))
    curve = pd.read_csv(tmp_path / "clipcid-work" / "balance" / "curve.csv")
    at_cutoff = curve[np.isclose(curve["distance"], result["threshold"], atol=1e-7)]
    assert (at_cutoff["kept"].item(), at_cutoff["largest_component"].item()) == (
        result["kept"],
        result["largest_component"],
    )
    sidecar = json.loads((tmp_path / "clipcid-work" / "balance" / "balance.json").read_text())
    assert sidecar["counts"] == {"read": NUM_ROWS, "used": NUM_ROWS, "skipped": {}}
    assert "<svg" in (tmp_path / result["files"]["report"]).read_text()


def test_a_set_of_more_than_a_hundredth_is_warned_of(binary: Callable[..., Run], embeddings: Path) -> None:
    run = binary("balance", "--embeddings", embeddings, "--threshold", 1.0, "--quiet", "--json")
    assert run.json["largest_component"] > 3
    assert f"One group holds {run.json['largest_component']} of 300 images" in " ".join(run.stderr.split())


def test_rows_that_are_not_finite_are_counted_and_named(
    clipcid: Callable[..., Run], rows: np.ndarray, tmp_path: Path
) -> None:
    damaged = rows.astype(np.float32)
    damaged[5], damaged[200] = np.nan, 0.0
    damaged[9, 3] = np.inf
    write_embeddings(tmp_path / "nan", damaged)
    run = clipcid("balance", "--embeddings", "nan", "--keep", 0.5, "--json")
    assert (run.json["images"], run.json["skipped"]) == (297, {"nan_row": 3})
    assert "3 × embedding that is zero or not finite: 000005, 000009, 000200" in " ".join(run.stderr.split())
    keep = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "keep.parquet")
    assert len(keep) == 297
    assert not set(keep["key"]) & {"000005", "000009", "000200"}
    refused = clipcid(
        "balance", "--embeddings", "nan", "--keep", 0.5, "--max-bad-fraction", 0.005, "--work", "w", check=False
    )
    assert refused.returncode == 1
    assert "3 of 300 samples in nan cannot be used: 1.0%" in " ".join(refused.stderr.split())
    assert "000005, 000009, 000200" in refused.stderr
    assert not (tmp_path / "w" / "balance" / "keep.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--keep", "0"], 2, "0.0 is not in the range 0<x<=1"),
        (["--keep", "1.5"], 2, "1.5 is not in the range 0<x<=1"),
        (["--keep", "56.3"], 2, "56.3 is not in the range 0<x<=1. Did you mean 0.563?"),
        (["--keep", "nan"], 2, "nan is not in the range 0<x<=1"),
        (["--threshold", "-1"], 2, "-1.0 is not in the range 0<=x<=2"),
        ([], 2, "No amount to keep was given"),
        (["--keep", "0.5", "--threshold", "0.1"], 2, "--keep and --threshold were given together"),
        (["--keep", "0.5", "--linkage", "star", "--select", "first"], 2, "cannot be combined with --linkage star"),
        (["--keep", "0.5", "--embeddings", "nowhere"], 1, "nowhere contains no embeddings"),
        (
            ["a.tar", "--keep", "0.5", "--against", "b", "--against-threshold", "0.1"],
            1,
            "--against b: There is no data",
        ),
        (
            ["/etc/passwd", "/etc/hosts", "/etc/group", "--keep", "0.5"],
            2,
            "Got 2 more arguments than DATA, such as /etc/hosts",
        ),
        (["a.tar", "b.tar", "c.tar", "--keep", "0.5"], 2, "Got unexpected extra arguments (b.tar c.tar)"),
    ],
)
def test_what_cannot_be_balanced_is_one_clear_error(
    clipcid: Callable[..., Run], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    run = clipcid("balance", *arguments, check=False)
    assert (run.returncode, run.stdout) == (code, "")
    assert message in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "clipcid-work" / "balance" / "keep.parquet").exists()


def test_two_and_three_processes_write_the_same_bytes(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], tmp_path: Path
) -> None:
    write_embeddings(tmp_path / "e", make_rows(5000, width=64), num_files=3)
    for linkage_name in ("single", "star"):
        arguments = ("--embeddings", "e", "--keep", 0.4, "--linkage", linkage_name)
        clipcid("balance", *arguments, "--work", f"one-{linkage_name}")
        for processes in (2, 3) if linkage_name == "single" else (2,):
            work = f"{linkage_name}-{processes}"
            torchrun(processes, "balance", *arguments, "--work", work)
            assert read_outputs(tmp_path / work) == read_outputs(tmp_path / f"one-{linkage_name}")
            assert (
                read_other_linkage(tmp_path / work) == read_other_linkage(tmp_path / f"one-{linkage_name}") is not None
            )


@pytest.mark.parametrize("after", [".balance-*/.search/*/*.npz", "forest.json"])
def test_killed_and_given_again_writes_the_same_bytes(
    clipcid: Callable[..., Run], embeddings: Path, tmp_path: Path, after: str
) -> None:
    arguments = ["balance", "--embeddings", str(embeddings), "--keep", "0.5"]
    clipcid(*arguments, "--work", "whole")
    process = start_clipcid(*arguments, "--work", "killed", cwd=tmp_path)
    while process.poll() is None and not list((tmp_path / "killed" / "balance").glob(after)):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    clipcid(*arguments, "--work", "killed")
    assert read_outputs(tmp_path / "killed") == read_outputs(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "balance").glob(".balance-*"))


def test_a_result_is_replaced_by_one_of_other_settings_or_more_data_and_it_says_how_they_differ(
    clipcid: Callable[..., Run], rows: np.ndarray, tmp_path: Path
) -> None:
    folder = write_embeddings(tmp_path / "e", rows[:200], num_files=1)
    write_embeddings(tmp_path / "eval", make_rows(5, seed=4))
    call = ("balance", "--embeddings", folder, "--threshold", 0.5)
    replaced = "of other settings or inputs, will be replaced:"
    assert replaced not in clipcid(*call).stderr
    assert replaced not in clipcid(*call).stderr
    told = clipcid(*call, "--against", "eval").stderr
    assert replaced in " ".join(told.split())
    assert 'settings.against: null there, [["eval"' in told
    np.save(folder / "img_emb" / "img_emb_1.npy", rows[200:])
    keys = pd.DataFrame({"key": [f"{row:06d}" for row in range(200, NUM_ROWS)]})
    keys.to_parquet(folder / "metadata" / "metadata_1.parquet")
    told = " ".join(clipcid(*call, "--against", "eval").stderr.split())
    assert re.search(rf"{replaced} input \S*img_emb: \d+ bytes .* there, \d+ bytes .* now", told)


def test_a_list_that_is_there_is_refused_before_the_search(
    clipcid: Callable[..., Run], embeddings: Path, tmp_path: Path
) -> None:
    (tmp_path / "k.txt").write_text("mine\n")
    call = ("balance", "--embeddings", embeddings, "--keep", 0.5, "--write-keys", "k.txt")
    refused = clipcid(*call, check=False)
    assert refused.returncode == 1
    assert "k.txt already exists, and this run would replace it. Add --overwrite" in " ".join(refused.stderr.split())
    assert not (tmp_path / "clipcid-work" / "balance" / "forest.parquet").exists()
    clipcid(*call, "--overwrite")
    clipcid(*call)  # of a finished result, with the same content


def tar_names(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


@pytest.fixture
def shard_embeddings(tiny_shards: Path, tmp_path: Path) -> Path:
    """Embeddings of the tiny shards: pairs of samples are near, so that half of them go."""
    rows = make_rows(24, seed=3)
    rows[1::2] = rows[::2]
    shards = ["00000"] * 14 + ["00001"] * 10
    return write_embeddings(tmp_path / "e", rows, keys=[f"{row:06d}" for row in range(24)], shards=shards)


def test_new_shards_hold_the_kept_samples_byte_for_byte(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], tiny_shards: Path, shard_embeddings: Path, tmp_path: Path
) -> None:
    arguments = ("balance", tiny_shards, "--embeddings", shard_embeddings, "--threshold", 0.0, "--write-shards")
    result = clipcid(*arguments, "out", "--json").json
    keep = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "keep.parquet")
    kept = set(keep[keep["kept"]]["key"])
    assert 0 < len(kept) == result["kept"] <= 12
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        f"{shard}.tar": int(count) for shard, count in keep.groupby("shard")["kept"].sum().items()
    }
    for name, rows in keep.groupby("shard")["kept"]:
        assert json.loads((tmp_path / "out" / f"{name}_stats.json").read_text()) == {
            "count": len(rows),
            "successes": int(rows.sum()),
            "dropped": int((~rows).sum()),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": int(rows.sum()), "repeat": int((~rows).sum())},
        }
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(tiny_shards / name) as before, tarfile.open(tmp_path / "out" / name) as after:
            expected = [member for member in before.getmembers() if member.name[:6] in kept]
            assert [member.get_info() for member in after.getmembers()] == [member.get_info() for member in expected]
            for member in expected:
                assert after.extractfile(member.name).read() == before.extractfile(member).read()
    report = (tmp_path / "clipcid-work" / "balance" / "report.html").read_text()
    assert report.count("data:image/webp;base64,") >= 12
    assert "already holds these shards" in clipcid(*arguments, "out").stderr
    whole = (tmp_path / "out" / "00000.tar").read_bytes()
    (tmp_path / "out" / "00000.tar").unlink()
    missing = clipcid(*arguments, "out", check=False)
    assert missing.returncode == 1
    assert "out/00000.tar is missing, which" in " ".join(missing.stderr.split())
    clipcid(*arguments, "out", "--overwrite")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == whole
    torchrun(2, *arguments, "two")
    for name in ("00000.tar", "00001.tar", "sizes.json", "00000_stats.json", "00001_stats.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    # Another keep list: refused, then replaced; a folder of other tars is never touched.
    changed = ("balance", tiny_shards, "--embeddings", shard_embeddings, "--keep", 1.0, "--write-shards", "out")
    assert clipcid(*changed, check=False).returncode == 1
    clipcid(*changed, "--overwrite")
    assert tar_names(tmp_path / "out" / "00000.tar") == tar_names(tiny_shards / "00000.tar")
    for target, message in (
        (tiny_shards, "would overwrite the data"),
        (tmp_path / "foreign", "that --write-shards did not write"),
    ):
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign" / "mine.tar").write_bytes(b"precious")
        refused = clipcid(*arguments, target, check=False)
        assert refused.returncode == 1
        assert message in " ".join(refused.stderr.split())
    assert (tmp_path / "foreign" / "mine.tar").read_bytes() == b"precious"


def test_datacomps_archives_in_and_datacomps_subset_out(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], rows: np.ndarray, tmp_path: Path
) -> None:
    uids = [hashlib.md5(bytes([row % 256, row // 256])).hexdigest() for row in range(NUM_ROWS)]
    (tmp_path / "pool").mkdir()
    for number, part in enumerate(np.array_split(np.arange(NUM_ROWS), 2)):
        stem = tmp_path / "pool" / uids[number]
        np.savez(f"{stem}.npz", b32_img=rows[part], l14_img=rows[part][:, ::-1], l14_txt=rows[part])
        pd.DataFrame({"uid": np.array(uids)[part], "text": "words"}).to_parquet(f"{stem}.parquet")
    call = ("balance", "--embeddings", "pool", "--keep", 0.5)
    refused = clipcid(*call, check=False)
    assert refused.returncode == 1
    assert "contains 2 arrays of image embeddings: b32_img, l14_img" in " ".join(refused.stderr.split())
    names = {"uids": "u.npy", "pairs": "p.parquet", "keys": "k.txt"}
    asked = [word for name, file in names.items() for word in (f"--write-{name}", file)]
    result = clipcid(*call, "--npz-array", "l14_img", *asked, "--json").json
    assert {name: result["files"][name] for name in names} == names

    keep = pd.read_parquet(tmp_path / result["files"]["keep_list"])
    kept = keep[keep["kept"]]["key"].tolist()
    subset = np.load(tmp_path / "u.npy", allow_pickle=False)
    assert subset.dtype == np.dtype("u8,u8")
    assert subset.tolist() == sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in kept)
    assert (tmp_path / "k.txt").read_text() == "".join(f"{key}\n" for key in kept)
    pairs = pd.read_parquet(tmp_path / "p.parquet")
    assert pairs["from"].tolist() == keep[~keep["kept"]]["key"].tolist()
    assert keep.set_index("key").loc[pairs["from"], "representative"].tolist() == pairs["to"].tolist()

    before = {file: (tmp_path / file).read_bytes() for file in names.values()}
    for file in before:
        (tmp_path / file).unlink()
    torchrun(2, *call, "--npz-array", "l14_img", *asked, "--work", "two")
    assert {file: (tmp_path / file).read_bytes() for file in before} == before


def test_what_is_not_embedded_yet_is_embedded_first(
    clipcid: Callable[..., Run], tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = clipcid("balance", tiny_shards, "--model", tiny_model, "--keep", 0.9, "--json")
    keep = pd.read_parquet(tmp_path / "clipcid-work" / "balance" / "keep.parquet")
    assert (run.json["images"], run.json["kept"]) == (24, 22)
    assert keep["shard"].tolist() == ["00000"] * 14 + ["00001"] * 10
    # Images 3 and 20 are the same picture.
    assert keep["component"][20] == 3
    assert keep["distance"][20] == 0.0
    assert "data:image/webp;base64," in (tmp_path / run.json["files"]["report"]).read_text()
    again = clipcid("balance", "--threshold", 0.0, "--json")
    assert (again.json["kept"], again.json["seconds"]["embed"] < 1.0) == (23, True)
    assert "Embeddings: " in again.stderr


def test_too_few_captions_name_the_command_that_needs_none(
    clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*shard_members(0, 6), *shard_members(6, 6, captions=False)])
    call = ("balance", "data", "--model", tiny_model, "--keep", 0.5, "--work", "w")
    refused = clipcid(*call, check=False)
    assert refused.returncode == 1
    found = re.search(r"clipcid (embed .* --no-text --overwrite)", " ".join(refused.stderr.split()))
    assert found is not None, refused
    clipcid(*shlex.split(found[1]))
    clipcid(*call, "--quiet")
    assert len(pd.read_parquet(tmp_path / "w" / "balance" / "keep.parquet")) == 12


def test_without_a_hub_the_error_says_how_to_name_a_model(clipcid: Callable[..., Run], tiny_shards: Path) -> None:
    run = clipcid("balance", tiny_shards, "--keep", 0.5, check=False)
    assert run.returncode == 1
    assert "ViT-L-14" in run.stderr
    assert "folder" in run.stderr
    assert "Traceback" not in run.stderr


def test_nothing_to_balance_names_the_command_that_makes_it(clipcid: Callable[..., Run]) -> None:
    run = clipcid("balance", "--keep", 0.5, check=False)
    assert run.returncode == 1
    assert "clipcid embed" in run.stderr
    assert "--embeddings" in run.stderr
