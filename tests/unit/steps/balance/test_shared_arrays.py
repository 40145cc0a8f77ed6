"""Arrays that processes share in a folder."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from balance_data import balance, make_rows, write_embeddings
from conftest import process_context

from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.balance.balance_run import SharedArrays


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
                shared = SharedArrays(context, place)
                for value in (3, 5):
                    found += shared.publish(lambda value=value: (np.full(4, value),))
                    parts = shared.collect((np.full(2, rank),))
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
