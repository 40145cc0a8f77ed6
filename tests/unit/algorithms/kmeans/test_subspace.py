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
from balance_data import Listener

from clipcid_cli.algorithms.kmeans.kmeans import centroids_of_sums
from clipcid_cli.algorithms.kmeans.leading_coordinates import principal_directions
from clipcid_cli.algorithms.kmeans.subspace import Subspace
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.steps.cluster import lloyd
from clipcid_cli.steps.cluster.lloyd import LloydState, find_subspace, first_centroids, run_lloyd, subspace_iterations
from clipcid_cli.steps.cluster.rows import ClusterRows, find_rows
from clipcid_cli.steps.settings.cluster import ClusterSettings

NUM_ROWS, WIDTH, NUM_CLUSTERS = 3000, 256, 1024


def unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def cloud(decay: float) -> npt.NDArray[np.float16]:
    """Rows whose lengths along the axes fall as a power law."""
    random = np.random.default_rng(0)
    return unit(random.normal(size=(NUM_ROWS, WIDTH)) * np.arange(1.0, WIDTH + 1) ** -decay)


def open_rows(folder: Path, values: npt.NDArray[np.float16]) -> ClusterRows:
    (folder / "emb" / "img_emb").mkdir(parents=True)
    np.save(folder / "emb" / "img_emb" / "img_emb_0.npy", values)
    return find_rows(ClusterSettings(embeddings=folder / "emb", keep_list="none", work=folder), Listener())


def run(rows: ClusterRows, state: LloydState | None = None, listener: Listener | None = None) -> list[LloydState]:
    """Return the states after each of at most 12 iterations."""
    saved: list[LloydState] = []
    with open_machine("cpu") as machine:
        run_lloyd(
            rows,
            machine,
            state or LloydState(first_centroids(rows, NUM_CLUSTERS, 0), 0, False),
            iterations=12,
            dtype=torch.float32,
            save=lambda state: saved.append(LloydState(state.centroids_KD.clone(), state.iterations, state.converged)),
            reporter=listener or Listener(),
        )
    return saved


def objective(values: npt.NDArray[np.float16], centroids: torch.Tensor) -> float:
    nearest_N = (torch.from_numpy(values).double() @ centroids.double().T).amax(dim=1)
    return float(nearest_N.mean())


def test_short_rows_are_integer_sums_rounded_to_float32_and_float16() -> None:
    values = cloud(0.8)[:50]
    values[0] *= np.float16(2.0**-20)  # subnormal entries
    short = Subspace.of(torch.from_numpy(cloud(0.8)), 64)
    found = short.rows(torch.from_numpy(values))
    row_units = [[int(value) for value in row] for row in values.astype(np.float64) * 2.0**24]
    vector_units = [[int(value) for value in column] for column in (short.vectors_Dd.T * 2.0**16).tolist()]
    for row, short_row in zip(row_units, found.tolist(), strict=True):
        for column, entry in zip(vector_units, short_row, strict=True):
            total = sum(one * other for one, other in zip(row, column, strict=True))
            assert entry == float(np.float16(np.float32(total / 2**40)))


def test_bits_do_not_depend_on_what_is_computed_beside() -> None:
    values = torch.from_numpy(cloud(0.8))
    short = Subspace.of(values, 64)
    assert torch.equal(short.rows(values)[1500:1507], short.rows(values[1500:1507]))
    centroids = short.centroids(values[:1100].float())
    assert torch.equal(centroids[1030:1031], short.centroids(values[1030:1031].float()))
    assert torch.equal(centroids * 2**24, (centroids * 2**24).round())
    assert torch.allclose(centroids.norm(dim=1), torch.ones(1100), atol=1e-6)


def test_share_and_a_centroid_outside_the_directions() -> None:
    random = np.random.default_rng(1)
    flat = unit(np.pad(random.normal(size=(500, 20)), ((0, 0), (0, WIDTH - 20))))
    short = Subspace.of(torch.from_numpy(flat), 64)
    assert short.share == pytest.approx(1.0, abs=1e-3)
    outside = torch.zeros(1, WIDTH)
    few = Subspace.of(torch.from_numpy(flat), 20)
    outside[0, 200] = 1.0
    assert not few.centroids(outside).any()
    assert Subspace.of(torch.from_numpy(cloud(0.0)), 64).share < 0.4


def test_used_only_where_it_gains(tmp_path: Path) -> None:
    assert [subspace_iterations(n) for n in (1, 3, 4, 8, 12, 20, 100)] == [0, 0, 1, 2, 3, 3, 3]
    rows = open_rows(tmp_path, cloud(0.8))
    assert find_subspace(rows, NUM_CLUSTERS) is not None
    assert find_subspace(rows, NUM_CLUSTERS - 1) is None
    assert find_subspace(open_rows(tmp_path / "narrow", cloud(0.8)[:, :192]), NUM_CLUSTERS) is None
    # Where the directions hold little of the length, the start would be a worse one.
    assert find_subspace(open_rows(tmp_path / "ball", cloud(0.0)), NUM_CLUSTERS) is None


def test_rows_outside_the_directions_forbid_them(tmp_path: Path) -> None:
    """They are served badly, however well the others are: 30 % of the rows share nothing with the rest."""
    random = np.random.default_rng(5)
    values = np.zeros((NUM_ROWS, WIDTH))
    outside = np.arange(NUM_ROWS) % 10 < 3
    values[~outside, :60] = random.normal(size=((~outside).sum(), 60))
    values[outside, 60:] = random.normal(size=(outside.sum(), WIDTH - 60))
    short = Subspace.of(torch.from_numpy(unit(values)), 64)
    assert short.share > 0.6
    assert short.low_share < 0.1
    assert find_subspace(open_rows(tmp_path, unit(values)), NUM_CLUSTERS) is None
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
        "short = Subspace.of(torch.from_numpy(numpy.load(sys.argv[1])), 64)\n"
        "print(hashlib.sha256(short.vectors_Dd.numpy().tobytes()).hexdigest(), short.share.hex(), short.low_share.hex())\n"
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
    short = Subspace.of(torch.from_numpy(values), 64)
    products = short.vectors_Dd.T @ short.vectors_Dd
    used = products.diagonal() > 0.5  # of rows of few directions fewer are found
    assert torch.allclose(products, torch.diag(used.double()), atol=2e-4)
    assert int(used.sum()) >= {"rank 20": 20, "one row": 1}.get(kind, 64)
    assert float(torch.linalg.matrix_norm(short.vectors_Dd, 2)) < 1.005


def test_directions_hold_nearly_what_principal_ones_hold() -> None:
    for decay, lost in ((0.0, 0.03), (0.4, 0.01), (0.8, 0.005)):
        rows = torch.from_numpy(cloud(decay))
        best = rows.double() @ principal_directions(rows)[:, :64]
        most = float(best.square().sum() / rows.double().square().sum())
        assert most - lost < Subspace.of(rows, 64).share < most + 1e-3


def test_first_iterations_are_those_of_the_short_rows(tmp_path: Path) -> None:
    values = cloud(0.8)
    rows = open_rows(tmp_path, values)
    short = find_subspace(rows, NUM_CLUSTERS)
    assert short is not None
    states = run(rows)
    exact = torch.from_numpy(values).double()
    before = first_centroids(rows, NUM_CLUSTERS, 0)
    for state in states[:4]:
        if state.iterations <= 3:
            similarities = short.rows(torch.from_numpy(values)).double() @ short.centroids(before).double().T
        else:
            similarities = exact @ before.double().T
        labels = similarities.argmax(dim=1)  # the first of equals, as k-means takes
        sums = torch.zeros(NUM_CLUSTERS, WIDTH, dtype=torch.float64).index_add_(0, labels, exact)
        filled = torch.bincount(labels, minlength=NUM_CLUSTERS) > 0
        means = torch.nn.functional.normalize(sums, dim=1)
        assert torch.allclose(state.centroids_KD[filled].double(), means[filled], atol=2.0**-24)
        before = state.centroids_KD


def test_resumed_anywhere_ends_the_same_and_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = cloud(0.8)
    rows = open_rows(tmp_path, values)
    listener = Listener()
    whole = run(rows, listener=listener)
    assert any("The first 3 iterations compare images along 64 of 256 directions" in note for note in listener.told)
    assert [state.iterations for state in whole] == list(range(1, len(whole) + 1))
    for iterations in (1, 2, 3, 5):
        kept = whole[iterations - 1]
        again = run(rows, LloydState(kept.centroids_KD.clone(), iterations, False))
        assert torch.equal(again[-1].centroids_KD, whole[-1].centroids_KD)
    monkeypatch.setattr(lloyd, "_SHORT_ITERATIONS", 0)
    assert objective(values, whole[-1].centroids_KD) > 0.995 * objective(values, run(rows)[-1].centroids_KD)


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


@pytest.fixture
def first_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directions are the first axes, exactly."""
    axes = Subspace(torch.eye(WIDTH, 64, dtype=torch.float64), 0.9, 0.9)
    monkeypatch.setattr(lloyd, "find_subspace", lambda *given: axes)


@pytest.mark.usefixtures("first_axes")
def test_nothing_moves_in_few_directions_is_not_the_end(tmp_path: Path) -> None:
    values, centroids = opposite_pairs()
    states = run(open_rows(tmp_path, values), LloydState(centroids.clone(), 0, False))
    assert torch.equal(states[2].centroids_KD, states[1].centroids_KD), "the last short iteration moves nothing"
    assert not any(state.converged for state in states[:3])
    assert not torch.equal(states[3].centroids_KD, states[2].centroids_KD)


@pytest.mark.usefixtures("first_axes")
def test_empty_clusters_get_rows_in_full_iterations_only(tmp_path: Path) -> None:
    values, centroids = opposite_pairs()
    states = run(open_rows(tmp_path, values), LloydState(centroids.clone(), 0, False))
    half = NUM_CLUSTERS // 2  # of equals the smaller number has all rows
    assert torch.equal(states[0].centroids_KD[half:], centroids[half:])
    assert not torch.equal(states[0].centroids_KD[:half], centroids[:half])
    assert not torch.equal(states[3].centroids_KD[half:], centroids[half:])


def test_movements_in_the_space_bound_what_rows_see(tmp_path: Path) -> None:
    """A centroid with little of its length in the space can turn far there while it hardly moves in full."""
    rows = open_rows(tmp_path, cloud(0.8))
    short = find_subspace(rows, NUM_CLUSTERS)
    assert short is not None
    inside_D, other_D = short.vectors_Dd[:, 0], short.vectors_Dd[:, 1]
    outside_D = torch.linalg.svd(short.vectors_Dd).U[:, 200]
    old, new = (
        centroids_of_sums((outside_D + 0.01 * along_D)[None], torch.zeros(1, WIDTH)) for along_D in (inside_D, other_D)
    )
    with open_machine("cpu") as machine:
        search = lloyd._Lloyd(rows, machine, torch.float32, old.repeat(NUM_CLUSTERS, 1), True, Listener())
        assert float(search._distances_moved(old, new)) < 0.02
        search.short = short
        assert float(search._distances_moved(old, new)) > 1.3
