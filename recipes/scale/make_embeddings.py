"""Write embeddings of data as `clipcid embed` would leave them before its last shards, but with rows that are drawn.

    python recipes/scale/make_embeddings.py WORK DATA MODEL --left 2

A model encodes some thousand images a second on a CPU; a million rows are drawn in seconds. So a real `clipcid embed` of one
small shard says what the settings of a run are, all shards but the last ones are written by the package's own writer under
these settings and the fingerprints of DATA, and `clipcid embed DATA` then finds itself interrupted: it encodes the shards
that are left, checks the whole and writes ``embed.json``.

Rows are either `random`, or `clustered`: around N/4 centers, which are around 64 topics, at distances that vary evenly, so
that there is something to balance at every cut-off. A caption's row is near its image's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from make_data import make_data

from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.fingerprint import record_together
from clipcid_cli.formats.output import OutputSpec, open_output
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.embed.plan import describe_shards

TOPICS = 64
# Writing a shard is waiting for the disk four times.
THREADS = 8


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path, help="folder of the model; its width is that of the rows")
    parser.add_argument("--kind", choices=["clustered", "random"], default="clustered")
    parser.add_argument("--left", type=int, default=1, help="shards left to clipcid embed")
    parser.add_argument("--seed", type=int, default=0)
    write_embeddings(**vars(parser.parse_args()))


def write_embeddings(work: Path, data: Path, model: Path, kind: str, left: int, seed: int) -> None:
    """Write embeddings of all shards of `data` but the last `left`."""
    example = read_example(work / "example", model)
    folder = WorkDirectory(work).embeddings(parse_model(str(model)).slug)
    dataset = open_dataset(data)
    shards = describe_shards(dataset)
    inputs = [record_together(dataset.spec, shards)]
    with open_output(OutputSpec(folder, "embed", EmbedSidecar, settings=example.settings, inputs=inputs)) as output:
        if output.finished is not None:
            return
        output.begin_work()
        writer = EmbeddingWriter(output.work, example.settings, shards)
        # Shards are equal but for the number that their keys begin with.
        samples = dataset.shards[0].samples()
        captions = [sample.captions[0] for sample in samples]
        digits = len(dataset.shards[0].name)
        places = [sample.key[digits:] for sample in samples]
        rows = Rows(example.model.embed_dim, len(samples) * len(dataset.shards), kind, seed)

        def write(number: int) -> None:
            name = dataset.shards[number].name
            images, texts = rows.draw(number, len(samples))
            made = {Kind.IMAGES: images, Kind.TEXTS: texts}
            keys = [name + place for place in places]
            writer.write(number, ShardRows(len(samples), Skips(), {"laid_on_white": 0}, keys, captions, None, made))

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(write, range(len(dataset.shards) - left)):
                pass


def read_example(folder: Path, model: Path) -> EmbedSidecar:
    """Embed ten pairs with the model and return what the sidecar says."""
    make_data(folder / "data", pairs=10, shards=1)
    command = [str(Path(sys.executable).with_name("clipcid")), "embed", str(folder / "data"), *embed_flags(model)]
    subprocess.run([*command, "--work", str(folder), "--quiet", "--workers", "0"], check=True)
    embeddings = WorkDirectory(folder).embeddings(parse_model(str(model)).slug)
    sidecar = read_sidecar(sidecar_path(embeddings, "embed"), EmbedSidecar)
    assert sidecar is not None  # the command has succeeded
    return sidecar


def embed_flags(model: Path) -> Sequence[str]:
    """Return the flags of `clipcid embed` that decide the plan of a run."""
    return "--model", str(model), "--precision", "fp32", "--batch-size", "256"


class Rows:
    """Unit rows of a data set, drawn shard by shard: the same for a shard whichever thread draws it."""

    def __init__(self, width: int, num_rows: int, kind: str, seed: int) -> None:
        self._width, self._seed = width, seed
        self._centers: np.ndarray | None = None
        if kind == "clustered":
            random = np.random.default_rng(seed)
            topics = unit(random.standard_normal((TOPICS, width), dtype=np.float32))
            centers = unit(random.standard_normal((max(1, num_rows // 4), width), dtype=np.float32))
            self._centers = unit(centers + topics[random.integers(TOPICS, size=len(centers))])

    def draw(self, shard: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a shard's images and of its captions, float16 [count, D] each."""
        random = np.random.default_rng([self._seed, shard])
        images = random.standard_normal((count, self._width), dtype=np.float32)
        if self._centers is not None:
            spread = random.uniform(0.05, 0.8, size=(count, 1)).astype(np.float32) / self._width**0.5
            images = self._centers[random.integers(len(self._centers), size=count)] + spread * images
        images = unit(images)
        texts = images + random.standard_normal(images.shape, dtype=np.float32) / self._width**0.5
        return images.astype(np.float16), unit(texts).astype(np.float16)


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
