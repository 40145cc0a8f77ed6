"""Searches are resumed from what is saved, at whatever moment they were stopped and whatever of it is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from balance_data import Listener, begun, distance_matrix, make_rows, write_embeddings

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.plan import triangle
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.balance import chunks
from clipcid_cli.steps.balance.chunks import Search, run_chunks
from clipcid_cli.steps.reporting import Progress

NUM_ROWS = 400
NUM_JOBS = 10 * 11 // 2
CUTOFF = 0.9


class StoppedAfter(Listener, Progress):
    """Listens to a search, and stops it after a number of jobs."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.jobs, self._most = 0, most

    def advance(self, amount: float = 1) -> None:
        if self.jobs == self._most:
            raise KeyboardInterrupt
        self.jobs += 1

    @contextmanager
    def progress(self, label: str, total: float | None, unit: str) -> Iterator[Progress]:  # type: ignore[override]
        yield self


@pytest.fixture(autouse=True)
def small_panels_saved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MIN_PANEL", 40)
    monkeypatch.setattr(planning, "_MAX_PANEL", 40)
    monkeypatch.setattr(chunks.SavePace, "is_due", lambda pace: True)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.unique(make_rows(NUM_ROWS + 100), axis=0)[:NUM_ROWS]


def search(rows: np.ndarray, work: Path, listener: StoppedAfter, cutoff: float = CUTOFF) -> Edges:
    if not (work / "e").exists():
        write_embeddings(work / "e", rows)
    with begun(work, work / "e", listener, threshold=CUTOFF) as run:
        listener.told.clear()
        plan = triangle(np.arange(NUM_ROWS), run.rows_in_memory)
        assert len(plan) == plan.num_chunks == NUM_JOBS
        return run_chunks(run, Search("search", plan, run.rows.read, cutoff, lambda: ForestSink(NUM_ROWS)))


def expect(rows: np.ndarray) -> Edges:
    distances = distance_matrix(rows)
    a, b = np.triu_indices(NUM_ROWS, 1)
    near = distances[a, b] <= np.float32(CUTOFF)
    return ForestSink(NUM_ROWS, Edges(a[near], b[near], distances[a, b][near])).result()


def assert_same(found: Edges, expected: Edges) -> None:
    for name in ("a", "b", "weight"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_it_ends_with_the_same_result_however_often_it_is_stopped(rows: np.ndarray, tmp_path: Path) -> None:
    done = 0
    for stop in (1, 3, 0, 20, 5, 10**6):
        listener = StoppedAfter(stop)
        if done + stop < NUM_JOBS:
            with pytest.raises(KeyboardInterrupt):
                search(rows, tmp_path, listener)
        else:
            assert_same(search(rows, tmp_path, listener), expect(rows))
        assert listener.told == ([f"Resuming the search: {done} of {NUM_JOBS} parts are done."] if done else [])
        done += listener.jobs
    assert done == NUM_JOBS


def test_parts_that_are_lost_damaged_or_edited_are_searched_again(rows: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(rows, tmp_path, StoppedAfter(40))
    parts = sorted(tmp_path.rglob(".search/*/*.npz"), key=lambda path: path.stat().st_size)[-5:]
    parts[0].unlink()
    for path, size in ((parts[1], 0), (parts[2], 200)):
        path.write_bytes(path.read_bytes()[:size])
    for path, edit in ((parts[3], lambda array: array[::-1]), (parts[4], lambda array: array[:-1])):
        with np.load(path) as saved:
            arrays = dict(saved)
        np.savez(path, **arrays | {"b": edit(arrays["b"])})
    listener = StoppedAfter(10**6)
    assert_same(search(rows, tmp_path, listener), expect(rows))
    assert listener.jobs == NUM_JOBS - 40 + 5


def test_what_is_saved_is_of_one_search_alone(rows: np.ndarray, tmp_path: Path) -> None:
    search(rows, tmp_path, StoppedAfter(10**6), cutoff=0.5)
    listener = StoppedAfter(10**6)
    assert_same(search(rows, tmp_path, listener), expect(rows))
    assert (listener.jobs, listener.told) == (NUM_JOBS, [])


def test_a_save_holds_only_what_is_new(rows: np.ndarray, tmp_path: Path) -> None:
    search(rows, tmp_path, StoppedAfter(10**6))
    saved = [np.load(path) for path in tmp_path.rglob(".search/*/*.npz")]
    assert len(saved) == NUM_JOBS
    assert sum(len(each["a"]) for each in saved) < 3 * NUM_ROWS
    assert sorted(chunk for each in saved for chunk in each["chunks"].tolist()) == list(range(NUM_JOBS))


def test_results_that_can_no_longer_be_read_are_an_error(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = chunks.save_arrays

    def damage(path: Path, arrays: dict[str, object]) -> None:
        save(path, arrays)
        path.write_bytes(path.read_bytes()[:-100])

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "save_arrays", damage)
        with pytest.raises(ClipcidError, match=r"results of (\d+) of \1 parts cannot be read"):
            search(rows, tmp_path, StoppedAfter(10**6))
    assert_same(search(rows, tmp_path, StoppedAfter(10**6)), expect(rows))
