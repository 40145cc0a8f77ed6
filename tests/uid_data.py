"""What tests of rows with DataComp's uids share: the uids, shards whose attributes hold them, and a run of `balance`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import balance_data
import numpy as np
from conftest import make_image, write_tar


def make_uid(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


NUM_ROWS = 60
UIDS = [make_uid(row) for row in range(NUM_ROWS)]


def balance(work: Path, embeddings: Path, **settings: Any) -> dict[str, Any]:
    return balance_data.balance(work, embeddings, **{"keep": 0.5} | settings)[0]


def write_data(folder: Path, uids: list[str | None]) -> Path:
    """Write shards whose attributes hold uids, as img2dataset writes them for DataComp's pool."""
    for number, part in enumerate(np.array_split(np.arange(NUM_ROWS), 2)):
        members: list[tuple[str, bytes]] = []
        for row in part.tolist():
            members.append((f"{row:06d}.png", make_image(0)))
            members.append((f"{row:06d}.json", json.dumps({"uid": uids[row]} if uids[row] else []).encode()))
        write_tar(folder / f"{number:08d}.tar", members)
    return folder


def datacomp_subset(uids: list[str]) -> np.ndarray:
    """Make a subset as DataComp's README says."""
    found = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    found.sort()
    return found
