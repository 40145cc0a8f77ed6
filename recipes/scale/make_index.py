"""List data into the index of a work directory, as the first step that needs it does; `embed` finds it there.

    python recipes/scale/make_index.py DATA WORK --workers 1        alone, or under torchrun

Prints the seconds it took as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index


def main() -> None:
    """Make the index."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    with open_dist_context("cpu") as machine:
        began = time.perf_counter()
        dataset = machine.on_rank0(
            lambda: open_dataset(arguments.data, index_root=WorkDirectory(arguments.work).indexes)
        )
        opened = time.perf_counter()
        dataset = ensure_index(dataset, machine, arguments.workers)
        seconds = {"open": opened - began, "index": time.perf_counter() - opened}
        if machine.is_main:
            rounded = {name: round(value, 3) for name, value in seconds.items()}
            print(json.dumps({"images": dataset.estimate_samples(), "seconds": rounded}))


if __name__ == "__main__":
    main()
