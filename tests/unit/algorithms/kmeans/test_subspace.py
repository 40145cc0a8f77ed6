"""The few directions of the start of k-means: the same bits in any order, and only where they gain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kmeans_data import ArrayRows, unit

from clipcid_cli.algorithms.kmeans.subspace import Subspace, find_subspace, subspace_iterations

NUM_ROWS, WIDTH, NUM_CLUSTERS = 3000, 256, 1024


def cloud(decay: float) -> npt.NDArray[np.float16]:
    """Rows whose lengths along the axes fall as a power law."""
    random = np.random.default_rng(0)
    return unit(random.normal(size=(NUM_ROWS, WIDTH)) * np.arange(1.0, WIDTH + 1) ** -decay)


def test_projections_are_integer_sums() -> None:
    values = cloud(0.8)[:50]
    values[0] *= np.float16(2.0**-12)  # most of its entries are rounded away
    subspace = Subspace.of(torch.from_numpy(cloud(0.8)))
    found = subspace.project(torch.from_numpy(values))
    row_units = [[round(value) for value in row] for row in values.astype(np.float64) * 2.0**12]
    vector_units = [[int(value) for value in column] for column in (subspace.vectors_Dd.T * 2.0**11).tolist()]
    for row, projected_row in zip(row_units, found.tolist(), strict=True):
        for column, entry in zip(vector_units, projected_row, strict=True):
            assert entry * 2**23 == sum(one * other for one, other in zip(row, column, strict=True))


def test_bits_do_not_depend_on_what_is_computed_beside() -> None:
    values = torch.from_numpy(cloud(0.8))
    subspace = Subspace.of(values)
    assert torch.equal(subspace.project(values)[1500:1507], subspace.project(values[1500:1507]))
    assert torch.equal(subspace.project(values.float()), subspace.project(values))


def test_share() -> None:
    random = np.random.default_rng(1)
    flat = unit(np.pad(random.normal(size=(500, 20)), ((0, 0), (0, WIDTH - 20))))
    assert Subspace.of(torch.from_numpy(flat)).share == pytest.approx(1.0, abs=2e-3)
    assert Subspace.of(torch.from_numpy(cloud(0.0))).share < 0.4


def test_no_direction_has_much_larger_entries_than_another() -> None:
    """Rows in a cone have most of their length along one principal direction; small integers must serve the others too."""
    cone = cloud(0.4).astype(np.float64) / 2
    cone[:, 0] += 1
    projected = Subspace.of(torch.from_numpy(unit(cone))).project(torch.from_numpy(unit(cone)))
    assert float(projected.abs().max()) < 0.4 * float(projected.norm(dim=1).max())


def test_used_only_where_it_gains() -> None:
    assert [subspace_iterations(n) for n in (1, 3, 4, 8, 12, 20, 100)] == [0, 0, 1, 2, 3, 3, 3]
    rows = ArrayRows(cloud(0.8))
    assert find_subspace(rows, NUM_CLUSTERS) is not None
    assert find_subspace(rows, NUM_CLUSTERS - 1) is None
    assert find_subspace(ArrayRows(cloud(0.8)[:, :192]), NUM_CLUSTERS) is None
    # Where the directions hold little of the length, the start would be a worse one.
    assert find_subspace(ArrayRows(cloud(0.0)), NUM_CLUSTERS) is None


def test_rows_outside_the_directions_forbid_them() -> None:
    """They are served badly, however well the others are: 30 % of the rows share nothing with the rest."""
    random = np.random.default_rng(5)
    values = np.zeros((NUM_ROWS, WIDTH))
    outside = np.arange(NUM_ROWS) % 10 < 3
    values[~outside, :60] = random.normal(size=((~outside).sum(), 60))
    values[outside, 60:] = random.normal(size=(outside.sum(), WIDTH - 60))
    subspace = Subspace.of(torch.from_numpy(unit(values)))
    assert subspace.share > 0.6
    assert subspace.low_share < 0.1
    assert find_subspace(ArrayRows(unit(values)), NUM_CLUSTERS) is None
    assert Subspace.of(torch.from_numpy(cloud(0.8))).low_share > 0.5


@pytest.mark.parametrize("kind", ["cloud", "three equal blocks", "rank 20", "one row"])
def test_directions_are_a_function_of_the_rows(kind: str, tmp_path: Path) -> None:
    """With one thread and three, and with products summed in the order of other processors."""
    if kind == "cloud":
        values = cloud(0.8)
    elif kind == "three equal blocks":  # every eigenvalue three times
        part = unit(np.random.default_rng(0).normal(size=(1365, 96)) * np.arange(1.0, 97) ** -0.8)
        values = np.zeros((3 * len(part), 3 * 96), dtype=np.float16)
        for number in range(3):
            values[number * len(part) : (number + 1) * len(part), number * 96 : (number + 1) * 96] = part
    elif kind == "rank 20":
        random = np.random.default_rng(1)
        values = unit(random.normal(size=(900, 20)) @ random.normal(size=(20, WIDTH)))
    else:
        values = np.repeat(cloud(0.8)[:1], 50, axis=0)
    np.save(tmp_path / "values.npy", values)
    script = (
        "import hashlib, sys, numpy, torch\n"
        "from clipcid_cli.algorithms.kmeans.subspace import Subspace\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "subspace = Subspace.of(torch.from_numpy(numpy.load(sys.argv[1])))\n"
        "print(hashlib.sha256(subspace.vectors_Dd.numpy().tobytes()).hexdigest())\n"
        "print(subspace.share.hex(), subspace.low_share.hex())\n"
    )
    found = set()
    for threads, kernels in ((1, "AVX2"), (3, "AVX2"), (1, "COMPATIBLE")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "values.npy"), str(threads)],
            env=os.environ | {"MKL_CBWR": kernels},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1
    subspace = Subspace.of(torch.from_numpy(values))
    lengths = torch.linalg.svdvals(subspace.vectors_Dd.double())
    used = lengths > 0.5  # of rows of few directions fewer are found
    assert torch.allclose(lengths[used], torch.ones(int(used.sum()), dtype=torch.float64), atol=5e-3)
    assert not bool((lengths[~used] > 5e-3).any())
    assert int(used.sum()) >= {"rank 20": 20, "one row": 1}.get(kind, 64)


def test_directions_hold_nearly_what_principal_ones_hold() -> None:
    for decay, lost in ((0.0, 0.03), (0.4, 0.01), (0.8, 0.005)):
        rows = torch.from_numpy(cloud(decay))
        principal = torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors.flip(1)
        best = rows.double() @ principal[:, :64]
        most = float(best.square().sum() / rows.double().square().sum())
        assert most - lost < Subspace.of(rows).share < most + 1e-3
