"""The start of k-means in few directions: the same bits in any order, exact there, and only where it gains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kmeans_data import ArrayRows, beginning, run, unit

from clipcid_cli.algorithms.kmeans.lloyd import Lloyd, LloydState
from clipcid_cli.algorithms.kmeans.subspace import Subspace, find_subspace, subspace_iterations
from clipcid_cli.algorithms.search.centroids import centroids_of_sums

NUM_ROWS, WIDTH, NUM_CLUSTERS = 3000, 256, 1024


def cloud(decay: float) -> npt.NDArray[np.float16]:
    """Rows whose lengths along the axes fall as a power law."""
    random = np.random.default_rng(0)
    return unit(random.normal(size=(NUM_ROWS, WIDTH)) * np.arange(1.0, WIDTH + 1) ** -decay)


def objective(values: npt.NDArray[np.float16], centroids: torch.Tensor) -> float:
    nearest_N = (torch.from_numpy(values).double() @ centroids.double().T).amax(dim=1)
    return float(nearest_N.mean())


def test_projected_rows_are_integer_sums_rounded_to_float32_and_float16() -> None:
    values = cloud(0.8)[:50]
    values[0] *= np.float16(2.0**-20)  # subnormal entries
    subspace = Subspace.of(torch.from_numpy(cloud(0.8)), 64)
    found = subspace.project_rows(torch.from_numpy(values))
    row_units = [[int(value) for value in row] for row in values.astype(np.float64) * 2.0**24]
    vector_units = [[int(value) for value in column] for column in (subspace.vectors_Dd.T * 2.0**16).tolist()]
    for row, projected_row in zip(row_units, found.tolist(), strict=True):
        for column, entry in zip(vector_units, projected_row, strict=True):
            total = sum(one * other for one, other in zip(row, column, strict=True))
            assert entry == float(np.float16(np.float32(total / 2**40)))


def test_bits_do_not_depend_on_what_is_computed_beside() -> None:
    values = torch.from_numpy(cloud(0.8))
    subspace = Subspace.of(values, 64)
    assert torch.equal(subspace.project_rows(values)[1500:1507], subspace.project_rows(values[1500:1507]))
    centroids = subspace.project_centroids(values[:1100].float())
    assert torch.equal(centroids[1030:1031], subspace.project_centroids(values[1030:1031].float()))
    assert torch.equal(centroids * 2**24, (centroids * 2**24).round())
    assert torch.allclose(centroids.norm(dim=1), torch.ones(1100), atol=1e-6)


def test_share_and_a_centroid_outside_the_directions() -> None:
    random = np.random.default_rng(1)
    flat = unit(np.pad(random.normal(size=(500, 20)), ((0, 0), (0, WIDTH - 20))))
    subspace = Subspace.of(torch.from_numpy(flat), 64)
    assert subspace.share == pytest.approx(1.0, abs=1e-3)
    outside = torch.zeros(1, WIDTH)
    few = Subspace.of(torch.from_numpy(flat), 20)
    outside[0, 200] = 1.0
    assert not few.project_centroids(outside).any()
    assert Subspace.of(torch.from_numpy(cloud(0.0)), 64).share < 0.4


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
    subspace = Subspace.of(torch.from_numpy(unit(values)), 64)
    assert subspace.share > 0.6
    assert subspace.low_share < 0.1
    assert find_subspace(ArrayRows(unit(values)), NUM_CLUSTERS) is None
    assert Subspace.of(torch.from_numpy(cloud(0.8)), 64).low_share > 0.5


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
        "subspace = Subspace.of(torch.from_numpy(numpy.load(sys.argv[1])), 64)\n"
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
    subspace = Subspace.of(torch.from_numpy(values), 64)
    products = subspace.vectors_Dd.T @ subspace.vectors_Dd
    used = products.diagonal() > 0.5  # of rows of few directions fewer are found
    assert torch.allclose(products, torch.diag(used.double()), atol=2e-4)
    assert int(used.sum()) >= {"rank 20": 20, "one row": 1}.get(kind, 64)
    assert float(torch.linalg.matrix_norm(subspace.vectors_Dd, 2)) < 1.005


def test_directions_hold_nearly_what_principal_ones_hold() -> None:
    for decay, lost in ((0.0, 0.03), (0.4, 0.01), (0.8, 0.005)):
        rows = torch.from_numpy(cloud(decay))
        principal = torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors.flip(1)
        best = rows.double() @ principal[:, :64]
        most = float(best.square().sum() / rows.double().square().sum())
        assert most - lost < Subspace.of(rows, 64).share < most + 1e-3


def test_first_iterations_are_those_of_the_projected_rows() -> None:
    values = cloud(0.8)
    subspace = find_subspace(ArrayRows(values), NUM_CLUSTERS)
    assert subspace is not None
    exact, start = torch.from_numpy(values).double(), beginning(values, NUM_CLUSTERS)
    projected, before = subspace.project_rows(torch.from_numpy(values)).double(), start.centroids_KD
    for state in run(values, start, subspace=subspace)[:4]:
        if state.iterations <= 3:
            similarities = projected @ subspace.project_centroids(before).double().T
        else:
            similarities = exact @ before.double().T
        labels = similarities.argmax(dim=1)  # the first of equals, as k-means takes
        sums = torch.zeros(NUM_CLUSTERS, WIDTH, dtype=torch.float64).index_add_(0, labels, exact)
        filled = torch.bincount(labels, minlength=NUM_CLUSTERS) > 0
        means = torch.nn.functional.normalize(sums, dim=1)
        assert torch.allclose(state.centroids_KD[filled].double(), means[filled], atol=2.0**-24)
        before = state.centroids_KD


def test_resumed_anywhere_ends_the_same_and_is_as_good() -> None:
    values = cloud(0.8)
    subspace, start = find_subspace(ArrayRows(values), NUM_CLUSTERS), beginning(values, NUM_CLUSTERS)
    whole = run(values, start, subspace=subspace)
    assert [state.iterations for state in whole] == list(range(1, len(whole) + 1))
    for iterations in (1, 2, 3, 5):
        again = run(values, whole[iterations - 1], subspace=subspace)
        assert torch.equal(again[-1].centroids_KD, whole[-1].centroids_KD)
    full = run(values, start)
    assert not torch.equal(full[0].centroids_KD, whole[0].centroids_KD)
    assert objective(values, whole[-1].centroids_KD) > 0.995 * objective(values, full[-1].centroids_KD)


def opposite_pairs() -> tuple[npt.NDArray[np.float16], torch.Tensor]:
    """Rows that differ in pairs outside the directions only, and two equal centroids for each pair: one of them is empty."""
    random = np.random.default_rng(2)
    inside = random.normal(size=(NUM_CLUSTERS // 2, 64))
    inside /= np.linalg.norm(inside, axis=1, keepdims=True)
    outside = random.normal(size=(NUM_CLUSTERS // 2, WIDTH - 64))
    outside *= 0.3 / np.linalg.norm(outside, axis=1, keepdims=True)
    values = np.concatenate([np.hstack([inside, outside]), np.hstack([inside, -outside])] * 2)
    means = torch.from_numpy(np.hstack([inside, np.zeros_like(outside)]))
    return unit(values), centroids_of_sums(torch.cat([means, means]), torch.zeros(NUM_CLUSTERS, WIDTH))


# The directions are the first axes, exactly.
AXES = Subspace(torch.eye(WIDTH, 64, dtype=torch.float64), 0.9, 0.9)


def test_nothing_moves_in_few_directions_is_not_the_end() -> None:
    values, centroids = opposite_pairs()
    states = run(values, LloydState(centroids), subspace=AXES)
    assert torch.equal(states[2].centroids_KD, states[1].centroids_KD), "the last projected iteration moves nothing"
    assert not any(state.converged for state in states[:3])
    assert not torch.equal(states[3].centroids_KD, states[2].centroids_KD)


def test_empty_clusters_get_rows_in_full_iterations_only() -> None:
    values, centroids = opposite_pairs()
    states = run(values, LloydState(centroids), subspace=AXES)
    half = NUM_CLUSTERS // 2  # of equals the smaller number has all rows
    assert torch.equal(states[0].centroids_KD[half:], centroids[half:])
    assert not torch.equal(states[0].centroids_KD[:half], centroids[:half])
    assert not torch.equal(states[3].centroids_KD[half:], centroids[half:])


def test_drift_in_the_subspace_bounds_what_rows_see() -> None:
    """A centroid with little of its length in the space can turn far there while it hardly moves in full."""
    rows = ArrayRows(cloud(0.8))
    subspace = find_subspace(rows, NUM_CLUSTERS)
    assert subspace is not None
    inside_D, other_D = subspace.vectors_Dd[:, 0], subspace.vectors_Dd[:, 1]
    outside_D = torch.linalg.svd(subspace.vectors_Dd).U[:, 200]
    old, new = (
        centroids_of_sums((outside_D + 0.01 * along_D)[None], torch.zeros(1, WIDTH)) for along_D in (inside_D, other_D)
    )
    lloyd = Lloyd(
        rows, old.repeat(NUM_CLUSTERS, 1), torch.float32, (0, NUM_ROWS), 0, lambda tensor: tensor, lambda value: [value]
    )
    assert float(lloyd._distances_moved(old, new)) < 0.02
    lloyd._subspace = subspace
    assert float(lloyd._distances_moved(old, new)) > 1.3
