"""The start of k-means in few directions: the same bits in any order, exact there, and only where it gains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from balance_data import Listener

from clipcid_cli.algorithms.short_space import ShortSpace
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.steps import lloyd
from clipcid_cli.steps.cluster_rows import ClusterRows, find_rows
from clipcid_cli.steps.lloyd import LloydState, find_short_space, first_centres, run_lloyd, short_iterations
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
            state or LloydState(first_centres(rows, NUM_CLUSTERS, 0), 0, False),
            iterations=12,
            dtype=torch.float32,
            save=lambda state: saved.append(LloydState(state.centres_KD.clone(), state.iterations, state.converged)),
            reporter=listener or Listener(),
        )
    return saved


def objective(values: npt.NDArray[np.float16], centres: torch.Tensor) -> float:
    nearest_N = (torch.from_numpy(values).double() @ centres.double().T).amax(dim=1)
    return float(nearest_N.mean())


def test_short_rows_are_integer_sums_rounded_once() -> None:
    values = cloud(0.8)[:50]
    values[0] *= np.float16(2.0**-20)  # subnormal entries
    short = ShortSpace.of(torch.from_numpy(cloud(0.8)), 64)
    found = short.rows(torch.from_numpy(values))
    row_units = [[int(value) for value in row] for row in values.astype(np.float64) * 2.0**24]
    vector_units = [[int(value) for value in column] for column in (short.vectors_Dd.T * 2.0**16).tolist()]
    for row, short_row in zip(row_units, found.tolist(), strict=True):
        for column, entry in zip(vector_units, short_row, strict=True):
            total = sum(one * other for one, other in zip(row, column, strict=True))
            assert entry == float(np.float16(np.float32(total / 2**40)))


def test_bits_do_not_depend_on_what_is_computed_beside() -> None:
    values = torch.from_numpy(cloud(0.8))
    short = ShortSpace.of(values, 64)
    assert torch.equal(short.rows(values)[1500:1507], short.rows(values[1500:1507]))
    centres = short.centres(values[:1100].float())
    assert torch.equal(centres[1030:1031], short.centres(values[1030:1031].float()))
    assert torch.equal(centres * 2**24, (centres * 2**24).round())
    assert torch.allclose(centres.norm(dim=1), torch.ones(1100), atol=1e-6)


def test_share_and_a_centre_outside_the_directions() -> None:
    random = np.random.default_rng(1)
    flat = unit(np.pad(random.normal(size=(500, 20)), ((0, 0), (0, WIDTH - 20))))
    short = ShortSpace.of(torch.from_numpy(flat), 64)
    assert short.share == pytest.approx(1.0, abs=1e-3)
    outside = torch.zeros(1, WIDTH)
    few = ShortSpace.of(torch.from_numpy(flat), 20)
    outside[0, 200] = 1.0
    assert not few.centres(outside).any()
    assert ShortSpace.of(torch.from_numpy(cloud(0.0)), 64).share < 0.4


def test_used_only_where_it_gains(tmp_path: Path) -> None:
    assert [short_iterations(n) for n in (1, 3, 4, 8, 12, 20, 100)] == [0, 0, 1, 2, 3, 3, 3]
    rows = open_rows(tmp_path, cloud(0.8))
    assert find_short_space(rows, NUM_CLUSTERS) is not None
    assert find_short_space(rows, NUM_CLUSTERS - 1) is None
    assert find_short_space(open_rows(tmp_path / "narrow", cloud(0.8)[:, :192]), NUM_CLUSTERS) is None
    # Where the directions hold little of the length, the start would be a worse one.
    assert find_short_space(open_rows(tmp_path / "ball", cloud(0.0)), NUM_CLUSTERS) is None


def test_directions_do_not_depend_on_threads(tmp_path: Path) -> None:
    rows = open_rows(tmp_path, cloud(0.8))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(find_short_space(rows, NUM_CLUSTERS))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(short is not None and torch.equal(short.vectors_Dd, found[0].vectors_Dd) for short in found)


def test_first_iterations_are_those_of_the_short_rows(tmp_path: Path) -> None:
    values = cloud(0.8)
    rows = open_rows(tmp_path, values)
    short = find_short_space(rows, NUM_CLUSTERS)
    assert short is not None
    states = run(rows)
    exact = torch.from_numpy(values).double()
    before = first_centres(rows, NUM_CLUSTERS, 0)
    for state in states[:4]:
        if state.iterations <= 3:
            similarities = short.rows(torch.from_numpy(values)).double() @ short.centres(before).double().T
        else:
            similarities = exact @ before.double().T
        labels = similarities.argmax(dim=1)  # the first of equals, as k-means takes
        sums = torch.zeros(NUM_CLUSTERS, WIDTH, dtype=torch.float64).index_add_(0, labels, exact)
        filled = torch.bincount(labels, minlength=NUM_CLUSTERS) > 0
        means = torch.nn.functional.normalize(sums, dim=1)
        assert torch.allclose(state.centres_KD[filled].double(), means[filled], atol=2.0**-24)
        before = state.centres_KD


def test_resumed_anywhere_ends_the_same_and_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = cloud(0.8)
    rows = open_rows(tmp_path, values)
    listener = Listener()
    whole = run(rows, listener=listener)
    assert any("The first 3 iterations compare images along 64 of 256 directions" in note for note in listener.told)
    assert [state.iterations for state in whole] == list(range(1, len(whole) + 1))
    for iterations in (1, 2, 3, 5):
        kept = whole[iterations - 1]
        again = run(rows, LloydState(kept.centres_KD.clone(), iterations, False))
        assert torch.equal(again[-1].centres_KD, whole[-1].centres_KD)
    monkeypatch.setattr(lloyd, "_SHORT_ITERATIONS", 0)
    assert objective(values, whole[-1].centres_KD) > 0.995 * objective(values, run(rows)[-1].centres_KD)


def test_nothing_moves_in_few_directions_is_not_the_end(tmp_path: Path) -> None:
    """Rows that differ outside the directions only: short iterations change nothing, those in full do."""
    random = np.random.default_rng(2)
    inside = random.normal(size=(NUM_ROWS // 2, 64))
    outside = random.normal(size=(NUM_ROWS, WIDTH - 64)) * 0.02
    rows = open_rows(tmp_path, unit(np.hstack([np.repeat(inside, 2, axis=0), outside])))
    states = run(rows)
    assert len(states) > 3
    assert not any(state.converged for state in states[:3])
