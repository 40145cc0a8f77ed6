"""`balance` and `cluster` on a GPU, simulated or real: the bytes of a CPU run, in any form of search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from balance_data import make_rows, write_embeddings
from simulation import KINDS, run_all, total

SEARCHES = {
    "exact": ("balance", "--keep", 0.6),
    "fp32": ("balance", "--keep", 0.6, "--precision", "fp32", "--select", "medoid"),
    "star": ("balance", "--keep", 0.6, "--linkage", "star"),
    "partitioned": ("balance", "--keep", 0.8, "--neighbors", "partitioned"),
    "image": ("cluster", "--num-clusters", 40, "--iterations", 5),
    "many": ("cluster", "--num-clusters", 600, "--iterations", 8),
    "joint": ("cluster", "--num-clusters", 40, "--iterations", 5, "--features", "joint"),
}
OUTPUTS = {
    "balance": ("keep.parquet", "forest.parquet", "curve.csv"),
    "cluster": ("centroids.npy",),
}


@pytest.fixture(scope="module", params=KINDS)
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every search on both devices, each in a work directory of its own."""
    place = tmp_path_factory.mktemp("searched")
    rows = make_rows(3000, 48)
    write_embeddings(place / "embeddings", rows, texts=rows[::-1].copy(), captions=["a caption"] * len(rows))
    results = run_all(
        request.param,
        place,
        [
            (*command, "--embeddings", "embeddings", "--work", f"{name}-{device}", "--device", device)
            for name, command in SEARCHES.items()
            for device in ("cpu", "cuda")
        ],
    )
    (place / "inexact.json").write_text(
        json.dumps({name: result["inexact"] for name, result in zip(SEARCHES, results[1::2], strict=True)})
    )
    return place


@pytest.mark.parametrize("name", SEARCHES)
def test_files_have_the_bytes_of_a_cpu_run(name: str, searched: Path) -> None:
    step = str(SEARCHES[name][0])
    folder = "balance" if step == "balance" else "clusters"
    for file in ("keep.parquet",) if name == "partitioned" else OUTPUTS[step]:
        there, here = (searched / f"{name}-{device}" / folder / file for device in ("cpu", "cuda"))
        assert there.read_bytes() == here.read_bytes(), file
    if step == "cluster":
        there, here = (
            pq.read_table(searched / f"{name}-{device}" / folder / "clusters.parquet") for device in ("cpu", "cuda")
        )
        assert there["cluster"].equals(here["cluster"])
        assert np.allclose(there["similarity"], here["similarity"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SEARCHES)
def test_products_are_as_exact_as_proofs_assume(name: str, searched: Path) -> None:
    assert json.loads((searched / "inexact.json").read_text())[name] == {}


# A tile with more near pairs than are queued has those of a CPU.
CROWDED_TILE = """
import numpy as np
import torch
from clipcid_cli.algorithms.near import search
from clipcid_cli.algorithms.near.block import load_block
values = 1 + 0.1 * np.random.default_rng(0).normal(size=(300, 16))
values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)

def near_pairs(device, dtype):
    panel = load_block(values.__getitem__, np.arange(300), torch.device(device), dtype)
    found = search.near_pairs(panel, panel, 0.5, lambda a, b, weight: np.ones(len(a), np.bool_))
    return sorted(pair for part in found for pair in zip(part.a, part.b, part.weight))

here = near_pairs("cpu", torch.float32)
assert len(here) > 16_384
assert near_pairs("cuda", torch.float16) == here
"""


@pytest.mark.parametrize("kind", KINDS)
def test_crowded_searches(kind: str, tmp_path: Path) -> None:
    run_all(kind, tmp_path, [("-c", CROWDED_TILE)])


# Operators that a GPU is given, and waits of the host for it: raising one of these numbers needs a reason.
# A tile has 2,048 rows a side; loading the panels, 2 for 7 tiles, is counted. The 43 operators and 8 waits that were allowed
# before were not fewer: they were for a 26th of the work of the same 7 tiles, 160 operators and 30 waits a tile.
TILE = {"operators": 44.8, "waits": 1.9}
# A product of a block of rows and a part of the centroids, with its largest entries; and an iteration of k-means.
CHUNK = {"operators": 12}
ITERATION = {"operators": 124, "waits": 8}
# What is counted, and how often it is in the larger of two runs beyond the smaller. Tiles of 2,048 rows a side without near
# pairs, nearly all of a large search: loading the two panels more is a part of them. Of k-means, all rows are in one chunk.
BUDGETS = {"tile": (TILE, 4 * 5 // 2 - 2 * 3 // 2), "chunk": (CHUNK, 9), "iteration": (ITERATION, 5)}
# One block of rows and parts of 64 centroids.
CHUNKS = """
import torch
from clipcid_cli.algorithms.near import nearest
nearest._PRODUCT_CENTROIDS = {"cuda": 64}
random = torch.Generator().manual_seed(0)
rows, centroids = (
    torch.nn.functional.normalize(torch.randn(count, 16, generator=random), dim=1).cuda() for count in (256, NUMBER)
)
of = nearest.Integers.from_rows
nearest.nearest(of(rows.half(), torch.float16), of(centroids, torch.float16, one_step=True))
"""


# Notes the largest product that each of the searches makes.
LARGEST = """
import json, pathlib
from clipcid_cli.algorithms.near import nearest, search

def watch(module, name):
    multiply, largest = getattr(module, name), [0]
    def watched(*arguments):
        product = multiply(*arguments)
        largest[0] = max(largest[0], product.nbytes)
        pathlib.Path(f"{module.__name__}.json").write_text(json.dumps(largest[0]))
        return product
    setattr(module, name, watched)

watch(search, "multiply")
watch(nearest, "_multiply")
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What a smaller and a larger run of each kind did, all in one process."""
    place = tmp_path_factory.mktemp("counted")
    commands: list[tuple[object, ...]] = [("-c", LARGEST)]
    for rows in (4096, 8192):
        write_embeddings(place / str(rows), make_rows(rows, 16, num_centroids=2 * rows))
        work = f"work-{rows}"
        commands.append(("balance", "--threshold", 0.02, "--embeddings", rows, "--work", work, "--device", "cuda"))
    write_embeddings(place / "embeddings", make_rows(4096, 16, noise=2.0))
    options = ("--embeddings", "embeddings", "--num-clusters", 64, "--device", "cuda")
    commands += [("cluster", *options, "--iterations", count, "--work", f"work-{count}") for count in (3, 8)]
    dry = ("--dry-run", "--json", "--work", "none")
    balance, cluster = commands[2], commands[-1]
    commands += [(*balance[:-4], "--device", "cuda", *dry), (*cluster[:-2], *dry)]
    # Last, as it leaves `nearest` with other chunks.
    commands += [("-c", CHUNKS.replace("NUMBER", count)) for count in ("128", "704")]
    results = run_all("simulated", place, commands)
    modules = ("search", "nearest")
    largest = [json.loads((place / f"clipcid_cli.algorithms.near.{module}.json").read_text()) for module in modules]
    _, *tiles, few, many, balance, cluster, chunk, chunks = results
    return {
        "tile": tiles,
        "iteration": [few, many],
        "chunk": [chunk, chunks],
        "dry": [balance, cluster],
        "largest": largest,
    }


def test_a_dry_run_counts_the_products_of_a_run(counted: dict[str, list[Any]]) -> None:
    balance, cluster = (json.loads(result["stdout"]) for result in counted["dry"])
    assert balance["memory"]["device"] == 8192 * 16 * 2 + 2 * 2048**2
    assert cluster["gpu_memory_bytes"] == 64 * 16 * (4 + 8 + 2) + 4096 * 16 * (2 + 2 + 2) + 4096 * 64 * 4
    assert counted["largest"] == [2 * 2048**2, 4096 * 64 * 4]


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name: str, counted: dict[str, list[Any]]) -> None:
    budget, number = BUDGETS[name]
    few, many = counted[name]
    for kind, allowed in budget.items():
        assert 0 < (total(many[kind]) - total(few[kind])) / number <= allowed, kind
