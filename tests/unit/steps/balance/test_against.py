"""Images near a reference are dropped first: all of them, by the nearest one, against a comparison of all pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from balance_data import balance, make_rows, read_keep, write_embeddings
from conftest import make_image, shard_members, write_tar

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.steps.balance import chunks
from clipcid_cli.steps.embed.run import run as run_embed
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

NUM_ROWS = 700


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distances as docs/method.md#distance defines them, float32 [M, N]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2.0 * a @ b.T
    return np.sqrt(np.maximum(0.0, squared)).astype(np.float32)


@pytest.fixture
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture
def others(rows: np.ndarray) -> list[np.ndarray]:
    """Two references: images of the same kinds, copies and near copies of rows among them; one row is not finite."""
    generator = np.random.default_rng(1)
    found = [make_rows(90, seed=2), make_rows(60, seed=3)]
    for part in found:
        part[:30] = rows[generator.integers(NUM_ROWS, size=30)]
        near = rows[generator.integers(NUM_ROWS, size=30)] + 0.03 * generator.normal(size=(30, rows.shape[1]))
        part[30:60] = near / np.linalg.norm(near, axis=1, keepdims=True)
    found[1][5] = found[0][7]  # of equally near references the first is named
    found[0][80] = np.nan
    return found


def test_all_near_images_are_dropped_by_the_nearest_reference(
    tmp_path: Path, rows: np.ndarray, others: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_PANEL", 64)
    folder = write_embeddings(tmp_path / "e", rows)
    names = [
        str(write_embeddings(tmp_path / f"r{number}", part, keys=[f"{number}/{row}" for row in range(len(part))]))
        for number, part in enumerate(others)
    ]
    for limit in (0.0, 0.15, 0.6):
        work = tmp_path / f"w{limit}"
        result, told = balance(work, folder, keep=0.6, against=tuple(names), against_threshold=limit)
        keep = read_keep(work)
        matrices = [np.nan_to_num(distances(rows, part), nan=np.inf) for part in others]
        is_near = [matrix <= np.float32(limit) for matrix in matrices]
        drop = is_near[0].any(1) | is_near[1].any(1)
        assert (keep["dropped_by"] == "reference").tolist() == drop.tolist()
        assert 30 <= drop.sum() < NUM_ROWS
        nearest = np.stack([matrix.min(1) for matrix in matrices], axis=1)
        owner = nearest.argmin(1)
        for row in np.flatnonzero(drop):
            expected = matrices[owner[row]][row].argmin()
            assert keep["reference"][row] == names[owner[row]]
            assert keep["reference_key"][row] == f"{owner[row]}/{expected}"
            assert keep["reference_distance"][row] == nearest[row].min()
        assert keep.loc[~drop, ["reference", "reference_key", "reference_distance"]].isna().all(axis=None)
        assert result["against"] == {
            "threshold": limit,
            "dropped": drop.sum(),
            "references": [
                {"name": name, "rows": count, "near": near.any(1).sum(), "nearest": (drop & (owner == number)).sum()}
                for number, (name, near, count) in enumerate(zip(names, is_near, (89, 60), strict=True))
            ],
        }
        assert "1 rows of" in told or "zero or not finite" in told
        alone = write_embeddings(tmp_path / f"alone{limit}", rows[~drop], keys=keep["key"][~drop].tolist())
        expected, _ = balance(tmp_path / f"other{limit}", alone, keep=0.6)
        assert (result["kept"], result["threshold"]) == (expected["kept"], expected["threshold"])
        there = read_keep(tmp_path / f"other{limit}")
        assert keep["key"][keep["kept"]].tolist() == there["key"][there["kept"]].tolist()
    assert "Images near a reference" in (work / "balance" / "report.html").read_text()


def test_what_is_saved_is_not_compared_again_unless_it_is_damaged(
    tmp_path: Path, rows: np.ndarray, others: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_PANEL", 64)
    monkeypatch.setattr(chunks.SavePace, "is_due", lambda pace: True)
    folder = write_embeddings(tmp_path / "e", rows)
    call = {"against": (str(write_embeddings(tmp_path / "r", others[1])),), "against_threshold": 0.3}
    balance(tmp_path / "w", folder, keep=0.6, **call)
    whole = read_keep(tmp_path / "w")
    written, save = list[Path](), chunks.save_arrays

    def count_and_save(path: Path, arrays: dict[str, Any]) -> None:
        if ".references" in path.parts:
            written.append(path)
        save(path, arrays)

    monkeypatch.setattr(chunks, "save_arrays", count_and_save)
    _, told = balance(tmp_path / "w", folder, keep=0.7, **call)
    assert not written
    assert "Resuming the search:" in told
    parts = sorted((tmp_path / "w" / "balance" / ".references").glob("*/*.npz"))
    assert len(parts) > 4
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    balance(tmp_path / "w", folder, keep=0.6, **call)
    assert len(written) == 2
    pd.testing.assert_frame_equal(read_keep(tmp_path / "w"), whole)
    balance(tmp_path / "w", folder, keep=0.6)
    assert "reference" not in read_keep(tmp_path / "w")
    assert not (tmp_path / "w" / "balance" / ".references").exists()


def test_reference_images_are_embedded_as_the_others_were(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", shard_members(0, 8))
    write_tar(tmp_path / "r.tar", shard_members(0, 3))
    shared: dict[str, Any] = {"model": str(tiny_model), "text": False, "workers": 0, "device": "cpu", "work": tmp_path}
    like = {"fast_decode": True, "precision": "bf16"}
    run_embed(EmbedSettings(data=str(tmp_path / "data"), out=tmp_path / "e", **like, **shared), Reporter())
    call = {"threshold": 0.001, "against_threshold": 0.0, "workers": 0}
    result, _ = balance(tmp_path, tmp_path / "e", against=(str(tmp_path / "r.tar"),), **call)
    assert result["against"]["dropped"] == 3
    (folder,) = (tmp_path / "references").iterdir()
    made = [json.loads((place / "embed.json").read_text())["settings"] for place in (folder, tmp_path / "e")]
    assert {name: made[0][name] for name in like} == like
    assert made[0]["preprocess"] == made[1]["preprocess"]
    run_embed(EmbedSettings(data=str(tmp_path / "r.tar"), out=tmp_path / "other", **shared), Reporter())
    with pytest.raises(
        ClipcidError, match=r"other were preprocessed otherwise \(.*, without --fast-decode\) than those of"
    ):
        balance(tmp_path, tmp_path / "e", against=(str(tmp_path / "other"),), **call)


def write_pictures(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(make_image(1))
    np.save(folder / "pictures" / "1.npy", np.zeros(3))  # a label of it; no embeddings
    return folder / "pictures"


def test_what_cannot_be_compared_is_refused(tmp_path: Path, rows: np.ndarray) -> None:
    folder = write_embeddings(tmp_path / "e", rows)
    narrow = str(write_embeddings(tmp_path / "narrow", make_rows(20, width=16)))
    with pytest.raises(ClipcidError, match=r"have width 16, those in .*e 32"):
        balance(tmp_path / "w", folder, keep=0.5, against=(narrow,), against_threshold=0.1)
    with pytest.raises(ClipcidError, match="All 700 images are dropped before repeats are searched"):
        balance(tmp_path / "w", folder, threshold=0.2, against=(str(folder),))
    with pytest.raises(ClipcidError, match="does not record the model to embed it with"):
        balance(tmp_path / "w", folder, threshold=0.2, against=(str(write_pictures(tmp_path)),))
    with pytest.raises(UsageError, match="--against needs a distance"):
        BalanceSettings(keep=0.5, against=("x",))
    with pytest.raises(UsageError, match="--against-threshold was given without --against"):
        BalanceSettings(keep=0.5, against_threshold=0.1)
