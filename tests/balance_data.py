"""What tests of `balance` share: embeddings with clusters and copies in clip-retrieval's layout, and a run of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pandas as pd

from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.balance import write
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.compute import begin
from clipcid_cli.steps.balance.plan import make_plan
from clipcid_cli.steps.balance.prepare import prepare
from clipcid_cli.steps.balance.run import run
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.reporting import Reporter, reporting_to
from clipcid_cli.steps.settings.balance import BalanceSettings


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_rows(
    num_rows: int, width: int = 32, seed: int = 0, num_centroids: int | None = None, noise: float = 0.25
) -> np.ndarray:
    """Make unit rows, float16 [num_rows, width], a tenth of them copies of others."""
    generator = np.random.default_rng(seed)
    centroids = generator.normal(size=(num_centroids or num_rows // 3 + 1, width))
    rows = centroids[generator.integers(len(centroids), size=num_rows)]
    rows = rows + noise * generator.random((num_rows, 1)) * generator.normal(size=rows.shape)
    stored = unit(rows).astype(np.float16)
    copied = generator.random(num_rows) < 0.1
    stored[copied] = stored[generator.integers(num_rows, size=int(copied.sum()))]
    return stored


def write_embeddings(
    folder: Path,
    rows: np.ndarray,
    num_files: int = 2,
    keys: list[str] | None = None,
    shards: list[str] | None = None,
    texts: np.ndarray | None = None,
    captions: list[str] | None = None,
) -> Path:
    """Write rows as another tool would: files numbered without zeros, metadata beside them, no sidecar."""
    keys = keys or [f"{row:06d}" for row in range(len(rows))]
    parts = np.array_split(np.arange(len(rows)), num_files)
    for name in ("img_emb", "metadata", *(["text_emb"] if texts is not None else [])):
        (folder / name).mkdir(parents=True)
    for number, part in enumerate(parts):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows[part])
        columns = {"key": [keys[row] for row in part]}
        if shards is not None:
            columns["shard"] = [shards[row] for row in part]
        if captions is not None:
            columns["caption"] = [captions[row] for row in part]
        pd.DataFrame(columns).to_parquet(folder / "metadata" / f"metadata_{number}.parquet")
        if texts is not None:
            np.save(folder / "text_emb" / f"text_emb_{number}.npy", texts[part])
    return folder


def distance_matrix(rows: np.ndarray) -> np.ndarray:
    """Return the distances as docs/method.md#distance defines them, float32 [N, N]."""
    wide = rows.astype(np.float64)
    squared = (wide * wide).sum(1)
    return np.sqrt(np.maximum(0.0, squared[:, None] + squared - 2.0 * wide @ wide.T)).astype(np.float32)


def check_keep_list(keep: pd.DataFrame, rows: np.ndarray) -> None:
    """What is true of every keep list: sets are a partition, one image of each is kept, distances are exact."""
    assert keep["key"].tolist() == [f"{row:06d}" for row in range(len(rows))]
    assert keep.groupby("component")["kept"].sum().eq(1).all()
    assert keep.groupby("component").size().loc[keep["component"]].tolist() == keep["component_size"].tolist()
    assert keep.groupby("component")["key"].transform("min").tolist() == [f"{row:06d}" for row in keep["component"]]
    kept_row = keep["representative"].astype(int).to_numpy()
    assert keep["kept"].to_numpy()[kept_row].all()
    assert (keep["component"].to_numpy()[kept_row] == keep["component"].to_numpy()).all()
    # Of the matrix's rounding only the last bits of float64 remain: float32 distances are the definition's.
    np.testing.assert_array_equal(keep["distance"], distance_matrix(rows)[np.arange(len(rows)), kept_row])


class _Listener(Reporter):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def warn(self, text: str) -> None:
        self.told.append(text)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Give what steps say in the block."""
    listener = _Listener()
    with reporting_to(listener):
        yield listener.told


def balance(work: Path, embeddings: Path, *, with_report: bool = False, **settings: Any) -> tuple[dict[str, Any], str]:
    """Run the step; returns its JSON object and what it said. A report takes as long as all else."""
    report = {} if with_report else {"return_value": {"shown": 0, "unread": [], "why": ""}}
    with heard() as told, patch.object(write, "write_report", wraps=write.write_report, **report):
        result = run(BalanceSettings(work=work, embeddings=embeddings, device="cpu", **settings))
    return msgspec.to_builtins(result), "\n".join(told)


@contextmanager
def begun(work: Path, embeddings: Path, **settings: Any) -> Iterator[BalanceRun]:
    """Begin the step, up to its search."""
    chosen = BalanceSettings(work=work, embeddings=embeddings, device="cpu", precision="fp32", **settings)
    with open_dist_context("cpu") as context:
        plan = make_plan(chosen, prepare(chosen, context))
        with claim_output(context, plan.spec) as output:
            context.on_rank0(output.start)
            yield begin(plan, output, context)


def read_keep(work: Path) -> pd.DataFrame:
    return pd.read_parquet(work / "balance" / "keep.parquet")
