"""Does the repair of a teacher follow noise? Judged on stored rows whose truth is known: minutes on one core.

    python repair.py WORK PHOTOGRAPHS > repair.md

WORK is the work directory of run.sh and PHOTOGRAPHS that of photographs.sh. Each line of the table is one kind of rows,
with three draws and divisions into folds. What is right is measured on images that no repair was fitted to: withheld
drawings find their captions, photographs of the test part the names of their classes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import inputs
import numpy as np
import plan
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from photographs import FOREIGN
from torch import Tensor
from torch.nn.functional import normalize

from clipcid_cli.algorithms.repair import Pairs, Repair, fit_repair

SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Rows:
    """A teacher's rows of pairs, and the images and texts that tell how often it is right.

    Attributes:
        scale: The teacher's logit scale.
        test_texts: Rows of texts; `own` is the place of each test image's.
    """

    scale: float
    images: Tensor
    texts: Tensor
    captions: Tensor
    test_images: Tensor
    test_texts: Tensor
    own: Tensor

    def right(self, repair: Repair) -> tuple[float, float]:
        """Return how often the nearest text is a test image's own, as the teacher is and as it is taught."""
        moved = self.test_images if repair.map_DD is None else normalize(self.test_images @ repair.map_DD)
        before, after = (
            float(((images @ self.test_texts.T).argmax(dim=1) == self.own).double().mean())
            for images in (self.test_images, moved)
        )
        return before, after

    def some(self, places: Tensor) -> Rows:
        """Return these with the pairs at some places alone."""
        images, texts, captions = self.images[places], self.texts[places], self.captions[places]
        return dataclasses.replace(self, images=images, texts=texts, captions=captions)

    def exchanged(self, share: float, draw: torch.Generator) -> Rows:
        """Return these with the captions of a share of the pairs exchanged with one another."""
        order = torch.randperm(len(self.images), generator=draw)
        chosen = order[: round(share * len(order))]
        places = torch.arange(len(order))
        places[chosen] = chosen[torch.randperm(len(chosen), generator=draw)]
        return dataclasses.replace(self, texts=self.texts[places], captions=self.captions[places])

    def mapped(self, map_DD: Tensor) -> Rows:
        """Return these with another teacher's images: x → norm(xA)."""
        images, test_images = normalize(self.images @ map_DD), normalize(self.test_images @ map_DD)
        return dataclasses.replace(self, images=images, test_images=test_images)


def cases(rows: Rows, draw: torch.Generator) -> Iterator[tuple[str, Rows]]:
    """Yield kinds of rows with what is made of them."""
    yield "as they are", rows
    for share in (*plan.NOISE, 1.0):
        yield f"{share:.0%} of the captions exchanged", rows.exchanged(share, draw)
    order = torch.randperm(len(rows.images), generator=draw)
    yield "300 pairs", rows.some(order[:300])
    width = rows.images.shape[1]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    yield "images rotated", rows.mapped(rotation)
    yield "images half rotated", rows.mapped(torch.eye(width) + rotation)
    half = len(order) // 2
    repair = fit(rows.some(order[:half]), seed=0)
    if repair.map_DD is not None:
        repaired = rows.mapped(repair.map_DD).some(order[half:])
        yield "repaired by the other half", repaired
        for share in (*plan.NOISE, 1.0):
            yield f"repaired by the other half, {share:.0%} exchanged", repaired.exchanged(share, draw)


def fit(rows: Rows, seed: int) -> Repair:
    """Fit and judge a repair."""
    return fit_repair(Pairs(rows.images, rows.texts, rows.captions), rows.scale, seed)


def embed(data: Path, teacher: Path, work: Path) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Embed pairs and return unit rows of images and texts, captions and keys."""
    inputs.clipcid("embed", data, "--model", teacher, "--work", work)
    folder = work / "embeddings" / "teacher"
    images, texts = (
        np.concatenate([np.load(path).astype(np.float32) for path in sorted(folder.glob(f"{kind}/*"))])
        for kind in ("img_emb", "text_emb")
    )
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("metadata/*")))
    rows = (normalize(torch.from_numpy(of_one)) for of_one in (images, texts))
    return *rows, table["caption"].to_pylist(), table["key"].to_pylist()


def read(teacher: Path, pairs: Path, test: Path, work: Path, *, by_class: bool) -> Rows:
    """Return a teacher's rows of pairs, and of a test whose texts are its captions, or the classes that begin its keys."""
    images, texts, captions, _ = embed(pairs, teacher, work / "pairs")
    test_images, test_texts, test_captions, test_keys = embed(test, teacher, work / "test")
    names = [key.split("/")[0] for key in test_keys] if by_class else test_captions
    _, own = np.unique(names, return_inverse=True)
    of_each = [test_texts[torch.from_numpy(own == number)].mean(dim=0) for number in range(own.max() + 1)]
    sidecar = json.loads((work / "pairs" / "embeddings" / "teacher" / "embed.json").read_text(encoding="utf-8"))
    return Rows(
        scale=sidecar["model"]["logit_scale"],
        images=images,
        texts=texts,
        captions=torch.from_numpy(np.unique(captions, return_inverse=True)[1]),
        test_images=test_images,
        test_texts=normalize(torch.stack(of_each)),
        own=torch.from_numpy(own),
    )


def teachers(work: Path, photographs: Path) -> Iterator[tuple[str, Rows]]:
    """Yield the teachers with what they are judged on."""
    withheld = work / "sets" / "report-drawings-retrieval" / "test" / "0.tar"
    yield "the quickstart's, drawings", read(inputs.TEACHER, work / "pairs", withheld, work / "judged", by_class=False)
    report = photographs / "sets" / "report-photographs-classes"
    test = photographs / "test.csv"
    subprocess.run([sys.executable, FOREIGN / "captions.py", report.resolve(), test], check=True)
    pairs = photographs / "captions.csv"
    yield "the foreign, photographs", read(FOREIGN / "teacher", pairs, test, photographs / "judged", by_class=True)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print("| teacher | rows | z, smallest … largest | repaired | right before | right after |")
    print(f"|{'---|' * 6}")
    for name, rows in teachers(Path(sys.argv[1]), Path(sys.argv[2])):
        found: dict[str, list[tuple[Repair, tuple[float, float]]]] = {}
        for seed in range(SEEDS):
            for case, made in cases(rows, torch.Generator().manual_seed(seed)):
                repair = fit(made, seed)
                found.setdefault(case, []).append((repair, made.right(repair)))
        for case, results in found.items():
            scores = [z(repair) for repair, _ in results]
            taken = sum(repair.map_DD is not None for repair, _ in results)
            before, after = np.mean([right for _, right in results], axis=0)
            print(
                f"| {name} | {case} | {min(scores):.1f} … {max(scores):.1f} | {taken} of {len(results)} "
                f"| {before:.1%} | {after:.1%} |",
                flush=True,
            )


def z(repair: Repair) -> float:
    """Return the gain in standard errors."""
    before, after = repair.log_rank
    return (before - after) / repair.standard_error if repair.steps else 0.0


if __name__ == "__main__":
    main()
