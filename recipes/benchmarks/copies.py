"""Does one placeholder image, a hundred thousand times, slow `balance` down? Times with many copies beside times without.

    python recipes/benchmarks/copies.py             100,000 and 200,000 rows, width 512, about 5 minutes on 2 cores
    python recipes/benchmarks/copies.py --scale 0.1

- identical: 100,000 rows that differ, without and with 100,000 copies of one image among them.
- near: 200,000 rows, without and with 20,000 near copies of one image among them: noise of 1e-3, none identical.

Each is balanced by the real command at one cut-off; `search` is `seconds.search`. See balance.py for how rows are made.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from balance import call_clipcid, describe_machine, make_rows, unit, write_rows

CUTOFF = 0.5


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="rows, as a share of those above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, in turn; medians are printed")
    arguments = parser.parse_args()
    print(describe_machine(arguments.threads))
    few, many, near = (int(arguments.scale * number) for number in (100_000, 200_000, 20_000))
    generator = np.random.default_rng(1)
    plain = make_rows(many, None, seed=0)
    copies = np.concatenate([plain[:few], np.repeat(plain[:1], many - few, axis=0)])
    noisy = unit(plain[:1].astype(np.float32) + 1e-3 * generator.standard_normal((near, plain.shape[1]), np.float32))
    hot = np.concatenate([plain[: many - near], noisy.astype(np.float16)])
    generator.shuffle(copies)
    generator.shuffle(hot)
    with tempfile.TemporaryDirectory() as scratch:
        for name, before, after in (("identical", plain[:few], copies), ("near", plain, hot)):
            folders = [Path(scratch) / name / side for side in ("without", "with")]
            for folder, rows in zip(folders, (before, after), strict=True):
                write_rows(folder, rows)
            seconds: list[list[float]] = [[], []]
            for _ in range(arguments.repeat):
                for times, folder in zip(seconds, folders, strict=True):
                    times.append(call_clipcid(folder, ["--threshold", str(CUTOFF)], arguments.threads)["seconds"])
            without, with_copies = map(median, seconds)
            print(
                f"{name:>9}: {len(before):,} rows without, search {without:.2f} s; {len(after):,} rows with "
                f"{len(after) - len(before) or near:,} copies, {with_copies:.2f} s: {with_copies / without:.2f} times",
                flush=True,
            )


if __name__ == "__main__":
    main()
