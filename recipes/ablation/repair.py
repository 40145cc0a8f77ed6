"""Does the repair of a teacher follow noise, or small gains? Judged on rows whose truth is known: half an hour on one core.

    python repair.py WORK PHOTOGRAPHS [--flickr ROWS] [--real FOLDER] > repair.md

WORK is the work directory of run.sh and PHOTOGRAPHS that of photographs.sh. Each line of the table is one kind of rows,
with three draws and divisions into folds. What is right is measured on images that no repair was fitted to: withheld
drawings find their captions, photographs of the test part the names of their classes.

ROWS is a folder of embeddings of Flickr8k by the foreign teacher (`clipcid embed`), whose repair is tried on the photographs
of PHOTOGRAPHS. FOLDER has rows of OpenAI's ViT-B/32: of 100 photographs with five captions each (image_embeddings.npy,
text_embeddings.npy and metadata.csv of Chia213/Search-Engine), of 500 CIFAR-10 photographs (cifar_image_embeddings.pt and
cifar_image_labels.npy of infinitiveaman/clip-cifar10-search), and of the names of COCO's classes (coco.npy, Detic's
coco_clip_a+cname.npy). Its repair is tried on the CIFAR photographs of the eight classes that COCO has too.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
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

from clipcid_cli.algorithms.pairing import Pairs
from clipcid_cli.algorithms.repair import RULE, Rule, fit_repair
from clipcid_cli.records import Repair

SEEDS = 3
HEADING = """Made by `repair.py` on {date}. *z*: the gain in standard errors, smallest … largest of the draws; *rank*, *R@1*:
of held-out pairs, as the teacher is → repaired; *significant*: draws whose gain is 3 standard errors or more; *repaired*:
draws that the rule takes; then how many test images find their own text: as the teacher is, if every significant repair
were taken, and by the rule. This is what it printed; there is no log beside it.
"""
# Every significant gain is taken, to show what the rule spares.
SIGNIFICANT = Rule(rank_falls_by=1.0, recall_rises_by=0.0)
# Places of COCO's classes that CIFAR-10 has too, and CIFAR-10's numbers of them.
COCO = (4, 2, 14, 15, 16, 17, 8, 7)
CIFAR = (0, 1, 2, 3, 5, 7, 8, 9)


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

    def right(self, map_DD: Tensor | None) -> tuple[float, float]:
        """Return how often the nearest text is a test image's own, as the teacher is and with a repair's map, if any."""
        moved = self.test_images if map_DD is None else normalize(self.test_images @ map_DD)
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
    _, map_DD = fit(rows.some(order[:half]), seed=0)
    if map_DD is not None:
        repaired = rows.mapped(map_DD).some(order[half:])
        yield "repaired by the other half", repaired
        for share in (*plan.NOISE, 1.0):
            yield f"repaired by the other half, {share:.0%} exchanged", repaired.exchanged(share, draw)


Cases = Callable[[Rows, torch.Generator], Iterator[tuple[str, Rows]]]


def plain_cases(rows: Rows, draw: torch.Generator) -> Iterator[tuple[str, Rows]]:
    """Yield rows as they are, and with captions exchanged."""
    yield "as they are", rows
    for share in plan.NOISE:
        yield f"{share:.0%} of the captions exchanged", rows.exchanged(share, draw)


def real_cases(rows: Rows, draw: torch.Generator) -> Iterator[tuple[str, Rows]]:
    """Yield rows of several captions an image, and the same with images told apart, so that folds are of captions alone."""
    yield "as they are", rows
    told_apart = normalize(rows.images + 1e-5 * torch.randn(rows.images.shape, generator=draw))
    yield "folds by captions alone", dataclasses.replace(rows, images=told_apart)


def fit(rows: Rows, seed: int) -> tuple[Repair, Tensor | None]:
    """Fit and judge a repair, which is taken where the gain is significant."""
    return fit_repair(Pairs(rows.images, rows.texts, rows.captions), rows.scale, seed, SIGNIFICANT)


def gain(repair: Repair) -> float:
    """Return the gain in log-rank."""
    before, after = repair.log_rank
    return before - after


def is_taken(repair: Repair) -> bool:
    """Tell whether `cluster` and `distill` take a repair."""
    return repair.repaired and RULE.is_large(gain(repair), repair.recall_at_1)


def number(texts: list[str]) -> Tensor:
    """Number texts, equal ones alike."""
    return torch.from_numpy(np.unique(texts, return_inverse=True)[1])


def read_rows(folder: Path) -> tuple[Tensor, Tensor, Tensor, list[str], list[str], float]:
    """Return unit rows of images and texts, numbers of the captions, captions, keys, and the model's logit scale."""
    images, texts = (
        np.concatenate([np.load(path).astype(np.float32) for path in sorted(folder.glob(f"{kind}/*"))])
        for kind in ("img_emb", "text_emb")
    )
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("metadata/*")))
    rows = (normalize(torch.from_numpy(of_one)) for of_one in (images, texts))
    scale = json.loads((folder / "embed.json").read_text(encoding="utf-8"))["model"]["logit_scale"]
    captions = table["caption"].to_pylist()
    return *rows, number(captions), captions, table["key"].to_pylist(), scale


def read(teacher: Path, pairs: Path, test: Path, work: Path, *, by_class: bool) -> Rows:
    """Return a teacher's rows of pairs, and of a test whose texts are its captions, or the classes that begin its keys."""
    inputs.clipcid("embed", pairs, "--model", teacher, "--work", work / "pairs")
    images, texts, captions, _, _, scale = read_rows(work / "pairs" / "embeddings" / "teacher")
    inputs.clipcid("embed", test, "--model", teacher, "--work", work / "test")
    test_images, test_texts, _, test_captions, test_keys, _ = read_rows(work / "test" / "embeddings" / "teacher")
    names = [key.split("/")[0] for key in test_keys] if by_class else test_captions
    _, own = np.unique(names, return_inverse=True)
    of_each = [test_texts[torch.from_numpy(own == number)].mean(dim=0) for number in range(own.max() + 1)]
    return Rows(
        scale=scale,
        images=images,
        texts=texts,
        captions=captions,
        test_images=test_images,
        test_texts=normalize(torch.stack(of_each)),
        own=torch.from_numpy(own),
    )


def with_flickr(folder: Path, photographs: Rows) -> Rows:
    """Return the foreign teacher's rows of Flickr8k, with the test of its photographs."""
    images, texts, captions, _, _, scale = read_rows(folder)
    return dataclasses.replace(photographs, images=images, texts=texts, captions=captions, scale=scale)


def read_real(folder: Path) -> Rows:
    """Read rows of OpenAI's ViT-B/32, with a test of other photographs."""
    images, texts, classes = (
        normalize(torch.from_numpy(np.load(folder / name)).float())
        for name in ("image_embeddings.npy", "text_embeddings.npy", "coco.npy")
    )
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    labels = np.load(folder / "cifar_image_labels.npy").astype(np.int64)
    has_name = torch.from_numpy(np.isin(labels, CIFAR))
    own = torch.from_numpy(np.searchsorted(CIFAR, labels))
    test_images = torch.load(folder / "cifar_image_embeddings.pt", weights_only=True).float()
    return Rows(
        scale=100.0,
        images=images,
        texts=texts,
        captions=number(captions),
        test_images=normalize(test_images)[has_name],
        test_texts=classes[list(COCO)],
        own=own[has_name],
    )


def teachers(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows, Cases]]:
    """Yield the teachers with what they are judged on, and what is made of their rows."""
    work, photographs = arguments.work, arguments.photographs
    if arguments.real:
        yield "ViT-B/32, Flickr8k (right: CIFAR-10)", read_real(arguments.real), real_cases
    withheld = work / "sets" / "report-drawings-retrieval" / "test" / "0.tar"
    rows = read(inputs.TEACHER, work / "pairs", withheld, work / "judged", by_class=False)
    yield "the quickstart's, drawings", rows, cases
    report = photographs / "sets" / "report-photographs-classes"
    test = photographs / "test.csv"
    subprocess.run([sys.executable, FOREIGN / "captions.py", report.resolve(), test], check=True)
    pairs = photographs / "captions.csv"
    rows = read(FOREIGN / "teacher", pairs, test, photographs / "judged", by_class=True)
    if arguments.flickr:
        yield "the foreign, Flickr8k (right: photographs)", with_flickr(arguments.flickr, rows), plain_cases
    yield "the foreign, photographs", rows, cases


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--flickr", type=Path)
    parser.add_argument("--real", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    arguments = read_arguments()
    torch.set_num_threads(1)
    print(HEADING.format(date=datetime.date.today()))
    print("| teacher | rows | z | rank | R@1 | significant | repaired | right | if significant | by the rule |")
    print(f"|{'---|' * 10}")
    for name, rows, make in teachers(arguments):
        results: dict[str, list[tuple[Repair, tuple[float, float]]]] = {}
        for seed in range(SEEDS):
            for case, made in make(rows, torch.Generator().manual_seed(seed)):
                repair, map_DD = fit(made, seed)
                results.setdefault(case, []).append((repair, made.right(map_DD)))
        for case, of_case in results.items():
            print(f"| {name} | {case} | {describe(of_case)} |", flush=True)


def describe(results: list[tuple[Repair, tuple[float, float]]]) -> str:
    """Return a line's cells: of the draws the range of z, means, and how many are repaired."""
    repairs = [repair for repair, _ in results]
    scores = [gain(repair) / repair.standard_error if repair.steps else 0.0 for repair in repairs]
    rank_before, rank_after = np.exp(np.mean([repair.log_rank for repair in repairs], axis=0))
    recall_before, recall_after = np.mean([repair.recall_at_1 for repair in repairs], axis=0)
    significant = sum(repair.repaired for repair in repairs)
    taken = list(map(is_taken, repairs))
    right, if_significant = np.mean([rights for _, rights in results], axis=0)
    now = np.mean([rights[is_one] for (_, rights), is_one in zip(results, taken, strict=True)])
    cells = [
        f"{min(scores):.1f} … {max(scores):.1f}",
        f"{rank_before:.2f} → {rank_after:.2f}",
        f"{recall_before:.1%} → {recall_after:.1%}",
        f"{significant} of {len(repairs)}",
        f"{sum(taken)} of {len(repairs)}",
        *(f"{share:.1%}" for share in (right, if_significant, now)),
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
