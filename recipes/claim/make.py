"""Make image-text pairs that repeat as the web's do: python make.py SOURCES OUT [--pairs N] [--size PIXELS] [--seed N].

SOURCES is a folder of shards whose captions are a name and keywords, as the quickstart's, or of one folder of photographs
per class. What is made, and after which published figure, is in README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from scipy.optimize import brentq
from scipy.special import zeta

sys.path.append(str(Path(__file__).resolve().parent.parent / "ablation"))
import inputs

# Of LAION-2B-en's images a third are duplicates (Webster et al. 2023): a picture is there 1 / (1 − 1/3) times on average.
DUPLICATES = 1 / 3
# Choices of ours. Share of pairs with another picture's caption; of repeats with other words, and with a watermark.
WRONG, REWORDED, WATERMARKED = 0.1, 0.5, 0.3
# Of a repeat: the most that is cut off each side, the least that its sides are scaled by, the range of its JPEG quality.
MAX_CROP, MIN_SCALE, QUALITY = 0.04, 0.6, (40, 90)
# Of a scene of two pictures: the side of the larger one, of the smaller one.
LARGE, SMALL = 0.65, 0.45
SHARDS = 8


@dataclasses.dataclass(frozen=True)
class Picture:
    """Something that is seen once or many times.

    Attributes:
        concepts: What it shows: base emoji, or classes.
        words: Its caption's parts, the name first.
    """

    image: Image.Image
    concepts: tuple[str, ...]
    words: tuple[str, ...]


def main() -> None:
    """Make the pairs and say what they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64, help="pixels of a picture's side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = np.random.default_rng(given.seed)
    is_shards = any(given.sources.glob("*.tar"))
    sources = list((read_drawings if is_shards else read_photographs)(given.sources, given.size))
    counts = multiplicities(given.pairs)
    pictures = sources + [scene(sources, draw) for _ in range(len(counts) - len(sources))]
    chosen = [pictures[number] for number in draw.permutation(len(pictures))[: len(counts)]]
    samples, truth = make_pairs(chosen, counts, draw)
    write(given.out, samples, truth, draw)
    print(
        f"{len(samples):,} pairs of {len(counts):,} pictures, {len(pictures) - len(sources):,} of them scenes of two; one"
        f" is seen {counts.max()} times, {np.mean(counts == 1):.1%} are seen once (exponent {exponent(DUPLICATES):.3f})"
    )


def exponent(duplicates: float) -> float:
    """Return the a of P(k) ∝ k^-a, k = 1, 2, …, at which this share of all copies are not the first of theirs.

    A picture has ζ(a − 1) / ζ(a) copies on average, and 1 − duplicates of the copies are first ones.
    """
    return float(brentq(lambda a: zeta(a - 1) / zeta(a) - 1 / (1 - duplicates), 2.05, 6.0))


def multiplicities(pairs: int) -> np.ndarray:
    """Return how often each picture is seen, int64 [pictures], descending: as the law says of each k, drawn by no chance."""
    law = exponent(DUPLICATES)
    pictures = round(pairs * (1 - DUPLICATES))
    seen_often = np.round(pictures * zeta(law, np.arange(1, pairs)) / zeta(law))
    return np.sum(seen_often[seen_often > 0][:, None] > np.arange(pictures), axis=0)


def read_drawings(folder: Path, size: int) -> Iterator[Picture]:
    """Read the pictures of shards with captions and the quickstart's `.json`."""
    for shard in sorted(folder.glob("*.tar")):
        for sample in inputs.read_samples(shard).values():
            image = Image.open(io.BytesIO(sample.members[".webp"])).convert("RGB").resize((size, size))
            yield Picture(image, (sample.about["base"],), tuple(sample.members[".txt"].decode().split(", ")))


def read_photographs(folder: Path, size: int) -> Iterator[Picture]:
    """Read the middle square of each photograph of one folder per class."""
    for path in sorted(folder.glob("*/*.jpg")):
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))
        name = path.parent.name
        yield Picture(square, (name,), (f"a photo of a {name.replace('_', ' ')}",))


def scene(sources: list[Picture], draw: np.random.Generator) -> Picture:
    """Put two sources into one picture: the larger into an upper corner, the smaller into the opposite lower one."""
    first, second = (sources[number] for number in draw.choice(len(sources), 2, replace=False))
    size = first.image.width
    large, small = round(LARGE * size), round(SMALL * size)
    canvas = Image.new("RGB", (size, size), "white")
    left = bool(draw.integers(2))
    canvas.paste(first.image.resize((large, large)), (0 if left else size - large, 0))
    canvas.paste(second.image.resize((small, small)), (size - small if left else 0, size - small))
    name = f"{first.words[0]} and {second.words[0]}"
    return Picture(canvas, first.concepts + second.concepts, (name, *first.words[1:]))


def make_pairs(
    pictures: list[Picture], counts: np.ndarray, draw: np.random.Generator
) -> tuple[dict[str, inputs.Sample], pa.Table]:
    """Copy each picture as often as it is seen; samples by key, and a row for each: key, picture, concepts, is_wrong."""
    samples: dict[str, inputs.Sample] = {}
    rows = []
    for number, (picture, count) in enumerate(zip(pictures, counts.tolist(), strict=True)):
        for copy in range(count):
            key = f"{number:05d}-{copy:04d}"
            is_wrong = bool(draw.random() < WRONG)
            words = pictures[draw.integers(len(pictures))].words if is_wrong else picture.words
            if copy and draw.random() < REWORDED:
                words = reworded(words, draw)
            image = repeated(picture.image, draw) if copy else as_jpeg(picture.image, QUALITY[1])
            samples[key] = inputs.Sample({".jpg": image, ".txt": ", ".join(words).encode()})
            rows.append({"key": key, "picture": number, "concepts": list(picture.concepts), "is_wrong": is_wrong})
    return samples, pa.Table.from_pylist(rows)


def reworded(words: tuple[str, ...], draw: np.random.Generator) -> tuple[str, ...]:
    """Keep the name, and some of the keywords in another order."""
    keywords = draw.permutation(len(words) - 1)[: draw.integers(len(words))]
    return (words[0], *(words[1 + number] for number in keywords))


def repeated(image: Image.Image, draw: np.random.Generator) -> bytes:
    """Crop an image a little, scale it down, put a watermark on some, and compress it again."""
    size = image.width
    left, top, right, bottom = (round(cut) for cut in draw.uniform(0, MAX_CROP * size, 4))
    image = image.crop((left, top, size - right, size - bottom))
    scale = draw.uniform(MIN_SCALE, 1)
    image = image.resize((round(scale * image.width), round(scale * image.height)))
    if draw.random() < WATERMARKED:
        place = (draw.uniform(0, image.width / 4), draw.uniform(0, image.height / 2))
        ImageDraw.Draw(image, "RGBA").text(place, "example", fill=(128, 128, 128, 120), font_size=image.width / 7)
    return as_jpeg(image, int(draw.integers(*QUALITY)))


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    """Compress an image."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write(out: Path, samples: dict[str, inputs.Sample], truth: pa.Table, draw: np.random.Generator) -> None:
    """Write shards in a random order, and the truth beside their folder."""
    out.mkdir(parents=True)
    for number, keys in enumerate(np.array_split(draw.permutation(list(samples)), SHARDS)):
        inputs.write_shard(out / f"{number:05d}.tar", {key: samples[key] for key in keys.tolist()})
    pq.write_table(truth, out.with_suffix(".parquet"))


if __name__ == "__main__":
    main()
