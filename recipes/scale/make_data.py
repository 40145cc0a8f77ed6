"""Make image-text data of any size: tar shards of small JPEGs with captions.

    python recipes/scale/make_data.py OUT --pairs 1M --shards 100

Keys are numbered as img2dataset does, number of the shard followed by the number in the shard, and the tars are what any tar
program reads. All shards hold the same images and captions: one is drawn, and the others are its bytes under other keys,
so that a million pairs are written in seconds. A pair takes 2 KiB.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = 512
SIDE = 16
WORDS = (
    *("red", "green", "blue", "dark", "bright", "pale", "round", "square", "small", "large", "soft", "striped", "old"),
    *(
        "wooden",
        "glass",
        "metal",
        "paper",
        "drawing",
        "photo",
        "sketch",
        "of",
        "a",
        "house",
        "tree",
        "car",
        "boat",
        "bridge",
    ),
    *(
        "river",
        "mountain",
        "dog",
        "cat",
        "bird",
        "horse",
        "flower",
        "table",
        "chair",
        "lamp",
        "window",
        "street",
        "at",
        "night",
    ),
)


def main() -> None:
    """Make the data and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=parse_count, required=True, help="number of pairs, such as 250k or 4M")
    parser.add_argument("--shards", type=parse_count, required=True, help="number of shards; divides that of the pairs")
    arguments = parser.parse_args()
    make_data(arguments.out, arguments.pairs, arguments.shards)
    print(f"{arguments.out}: {arguments.pairs:,} pairs in {arguments.shards:,} shards")


def parse_count(text: str) -> int:
    """Read a number such as 250k, 4M or 1.28G."""
    factors = {"k": 10**3, "M": 10**6, "G": 10**9}
    factor = factors.get(text[-1:], 1)
    return round(float(text[:-1] if factor > 1 else text) * factor)


def make_data(folder: Path, pairs: int, shards: int) -> None:
    """Write `shards` tars of as many pairs each; a folder that is there already is taken as it is."""
    if pairs % shards:
        raise SystemExit(f"{pairs:,} pairs cannot be divided evenly among {shards:,} shards.")
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(shards - 1)))
    template = Template(pairs // shards, digits)
    for number in range(shards):
        template.write(partial / f"{number:0{digits}d}.tar", number)
    partial.rename(folder)


class Template:
    """A shard in memory, whose keys begin with the number of the shard."""

    def __init__(self, pairs: int, digits: int) -> None:
        self._digits = digits
        data = io.BytesIO()
        random = np.random.default_rng(0)
        places = max(4, len(str(pairs - 1)))
        with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for place in range(pairs):
                for suffix, content in (("jpg", draw_image(random)), ("txt", write_caption(random))):
                    member = tarfile.TarInfo(f"{'0' * digits}{place:0{places}d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        self._blocks = np.frombuffer(data.getvalue(), dtype=np.uint8).reshape(-1, BLOCK).copy()
        headers = np.flatnonzero((self._blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1))
        if len(headers) != 2 * pairs:
            raise SystemExit("The content of a member looks like a header of a tar.")
        self._headers = headers
        # Of headers with zeros for the shard's number.
        stored = [int(bytes(field), 8) for field in self._blocks[headers, 148:154]]
        self._sums = np.array(stored, dtype=np.int64) - digits * ord("0")

    def write(self, path: Path, number: int) -> None:
        """Write the shard under the keys of another number: names and checksums of its headers change."""
        name = np.frombuffer(f"{number:0{self._digits}d}".encode(), dtype=np.uint8)
        self._blocks[self._headers, : self._digits] = name
        sums = self._sums + int(name.sum())
        for place in range(6):
            self._blocks[self._headers, 148 + place] = ord("0") + (sums >> 3 * (5 - place) & 7)
        self._blocks.tofile(path)


def draw_image(random: np.random.Generator) -> bytes:
    """Draw four colours that run into each other; a JPEG of less than 512 bytes."""
    corners = Image.fromarray(random.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    data = io.BytesIO()
    corners.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG", quality=50, optimize=True)
    return data.getvalue()


def write_caption(random: np.random.Generator) -> bytes:
    """Write a caption of 4 to 12 words."""
    return " ".join(random.choice(WORDS, random.integers(4, 13))).encode()


if __name__ == "__main__":
    main()
