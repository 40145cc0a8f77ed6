"""Make what `run.sh --check` reads: shards, a teacher of random weights, and two names that stand for the shipped data.

    python recipes/paper/check.py FOLDER

What is there already is left as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "scale"))

from make_data import make_data  # noqa: E402
from tiny_teacher import write_teacher  # noqa: E402


def main() -> None:
    """Make what is not there yet."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder / "shards", pairs=2000, shards=2)
    write_teacher(folder / "teacher", width=32)
    for name in ("food101", "pets"):
        link = folder / "data" / name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(ROOT / "recipes" / "quickstart" / "data" / "classification")


if __name__ == "__main__":
    main()
