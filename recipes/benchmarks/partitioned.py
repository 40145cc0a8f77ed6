"""How much faster is `balance --neighbors partitioned` than the exact search, and what does it lose?

    python recipes/benchmarks/partitioned.py                          N = 100,000, synthetic rows
    python recipes/benchmarks/partitioned.py --rows 1000000           the real thing; exact takes its time
    python recipes/benchmarks/partitioned.py --rows 1000000 --only partitioned --threshold 0.572
    python recipes/benchmarks/partitioned.py --embeddings DIR         real rows, enlarged by noise

For each N a folder of embeddings is written (or found in --scratch, where an earlier run left it), and both sides read it in
a process of their own, one after another: `clipcid balance --neighbors exact|partitioned --threshold ε`, the real command in
a fresh work directory. ε is that of the asked share to keep, unless --threshold gives it: it is looked up by the partitioned
side with --keep, which counts as neither's time.

Printed: seconds of the search, with the audit and of the whole command, their ratios; images kept and how many more than
exact; the audited rate of kept images that have another kept one within ε, with its 95 % interval; forest edges that were
missed; peak memory above the embeddings' file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from balance import describe_machine, make_rows, measure, size_of, write_rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--keep", type=float, default=0.563, help="share to put the cut-off at")
    parser.add_argument("--threshold", type=float, help="the cut-off instead")
    parser.add_argument("--embeddings", type=Path, help="folder of real embeddings to enlarge; synthetic without")
    parser.add_argument("--scratch", type=Path, help="folder to write the embeddings to, and to find them in again")
    parser.add_argument("--only", choices=["exact", "partitioned"], help="run one side only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(describe_machine(arguments.threads))
    with tempfile.TemporaryDirectory() as scratch:
        for num_rows in arguments.rows:
            folder = (arguments.scratch or Path(scratch)) / f"rows{num_rows}"
            if not folder.exists():
                write_rows(folder, make_rows(num_rows, arguments.embeddings, arguments.seed))
            compare(folder, num_rows, arguments)


def compare(folder: Path, num_rows: int, arguments: argparse.Namespace) -> None:
    """Print the lines of one N."""
    cutoff = arguments.threshold
    if cutoff is None:
        amount = ["--keep", str(arguments.keep), "--neighbors", "partitioned"]
        cutoff = call(folder, amount, arguments.threads)["threshold"]
    print(f"{num_rows:,} rows, cut-off {cutoff:.6g}")
    names = ("neighbors", "search s", "+ audit s", "whole s", "kept", "edges", "MB")
    print(" ".join(f"{name:>11}" for name in names))
    sides: dict[str, dict[str, Any]] = {}
    for side in ("partitioned", "exact") if arguments.only is None else (arguments.only,):
        answer = call(folder, ["--threshold", repr(cutoff), "--neighbors", side], arguments.threads)
        sides[side] = answer
        columns = [
            side,
            f"{answer['seconds']['search']:.1f}",
            f"{answer['seconds']['search'] + answer['seconds'].get('audit', 0.0):.1f}",
            f"{answer['whole']:.1f}",
            f"{answer['kept']:,}",
            f"{answer['images'] - answer['kept']:,}",
            f"{answer['memory'] / 2**20:,.0f}",
        ]
        print(" ".join(f"{column:>11}" for column in columns), flush=True)
    if "partitioned" in sides:
        audit = sides["partitioned"]["audit"]
        print(
            f"audit: {audit['near']:,} of {audit['sampled']:,} sampled kept images have another within the cut-off: "
            f"{audit['rate']:.2e} (95 %: {audit['low']:.2e} to {audit['high']:.2e})"
        )
    if len(sides) == 2:
        exact, parts = sides["exact"], sides["partitioned"]
        search = exact["seconds"]["search"]
        audited = parts["seconds"]["search"] + parts["seconds"]["audit"]
        more = parts["kept"] - exact["kept"]
        print(
            f"exact takes {search / parts['seconds']['search']:.1f} times the time of the search, {search / audited:.1f} "
            f"with the audit, {exact['whole'] / parts['whole']:.1f} of the whole command; {more:,} images more are kept "
            f"({more / exact['kept']:.3%}): so many edges are missed"
        )


def call(folder: Path, amount: list[str], threads: int) -> dict[str, Any]:
    """Run the command in a fresh work directory; its JSON, the wall-clock seconds and the memory above the file."""
    with tempfile.TemporaryDirectory() as work:
        command = ["clipcid", "balance", "--embeddings", str(folder), *amount, "--work", work, "--quiet", "--json"]
        answer, whole, memory = measure(command, threads)
    return {**answer, "whole": whole, "memory": memory - size_of(folder)}


if __name__ == "__main__":
    main()
