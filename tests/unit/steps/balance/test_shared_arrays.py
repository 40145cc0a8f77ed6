"""Arrays that processes share in a folder."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balance_data import balance, make_rows, write_embeddings
from conftest import process_context
from kmeans_data import Exchange

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.steps.balance import shared_arrays


def test_a_folder_that_not_every_host_has_is_an_error(tmp_path: Path) -> None:
    shared_arrays._write(tmp_path / "one", 0, (np.arange(3),))
    assert shared_arrays._map(tmp_path / "one", 0, 1)[0].tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(ClipcidError, match="not every host has it"):
        shared_arrays._map(tmp_path / "one", 0, 1)


@dataclasses.dataclass(frozen=True)
class ThreadContext(DistContext):
    """A thread that stands in for a process."""

    exchange: Exchange = dataclasses.field(kw_only=True)

    def gather(self, value: Any) -> list[Any]:
        return self.exchange.gather(self.rank, value)

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_processes_join_in_pairs_what_they_have(size: int, tmp_path: Path) -> None:
    exchange = Exchange(size)
    held = [[rank] for rank in range(size)]
    added = [0] * size
    found = [np.empty(0)] * size

    def work(rank: int) -> None:
        def add(arrays: tuple[Any, ...]) -> None:
            held[rank] += arrays[0].tolist()
            added[rank] += 1

        context = ThreadContext(rank, size, rank, torch.device("cpu"), exchange=exchange)
        found[rank] = shared_arrays.reduce_arrays(context, tmp_path, lambda: (np.array(held[rank]),), add)[0]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(each.tolist()) for each in found] == [list(range(size))] * size
    assert max(added) == math.ceil(math.log2(size))  # no process waits for more


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _process(rank: int, folder: Path, results: multiprocessing.Queue[Any]) -> None:
    """Be one of two processes: on one host, then on two."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    left, found = {}, []
    try:
        for local_size in ("2", "1"):
            os.environ["LOCAL_WORLD_SIZE"] = local_size
            place = folder / local_size
            with open_dist_context("cpu") as context:
                for value in (3, 5):
                    found += shared_arrays.publish_arrays(context, place, lambda value=value: (np.full(4, value),))
                    parts = shared_arrays.collect_arrays(context, place, (np.full(2, rank),))
                    assert [part[0].tolist() for part in parts] == ([[0, 0], [1, 1]] if rank == 0 else [])
                context.barrier()
                left[local_size] = len(_files(place))
        assert [array.tolist() for array in found] == [[3] * 4, [5] * 4] * 2
        balance(folder / "work", folder / "embeddings", keep=0.5)
        left["balance"] = len(_files(folder / "work" / "balance" / ".shared"))
        results.put(left)
    finally:
        dist.destroy_process_group()


def test_files_stay_while_another_host_may_read_them(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", make_rows(60))
    context = process_context()
    results = context.Queue()
    workers = [context.Process(target=_process, args=(rank, tmp_path, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    for _ in workers:
        # Two arrays of a file each; none where the processes share a host, and none after a run.
        assert results.get(timeout=10) == {"2": 0, "1": 2, "balance": 0}
