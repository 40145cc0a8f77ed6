"""Made-up copies of DataComp's 38 data sets, in the layouts that its download script leaves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from conftest import make_image, write_benchmark

NOUNS = ("dog", "red door", "boat", "apple tree", "old clock", "bus", "mug", "fish", "lamp", "oven", "ice", "umbrella")
# How many numbers of metadata an image has, and below which each lies, where it has any.
METADATA = {
    "wilds-iwildcam": (5, 9, 3, 12, 28, 24, 60, 60, 7),
    "wilds-camelyon17": (3, 4, 2),
    "wilds-fmow": (6, 3, 5),
    "dollar_street": (4, 1000, 4),
    "geode": (3, 20),
}
FEW_CLASSES = {
    "vtab-kitti_closest_vehicle_distance": 4,
    "vtab-pcam": 2,
    "renderedsst2": 2,
    "wilds-camelyon17": 2,
    "wilds-fmow": 3,
    "geode": 3,
}
# So many that the worst of some groups is not without a right answer.
IMAGES = dict.fromkeys(METADATA, 48) | {"wilds-fmow": 72}
FLICKR, COCO = "flickr_1k_test_image_text_retrieval", "mscoco_2014_5k_test_image_text_retrieval"
FOLDERS = [
    "vtab-caltech101",
    "cifar10",
    "vtab-cifar100",
    "vtab-clevr_count_all",
    "vtab-clevr_closest_object_distance",
    "country211",
    "vtab-dtd",
    "vtab-eurosat",
    "fgvc_aircraft",
    "food101",
    "gtsrb",
    "imagenet1k",
    "imagenet_sketch",
    "imagenetv2",
    "imagenet-a",
    "imagenet-o",
    "imagenet-r",
    "vtab-kitti_closest_vehicle_distance",
    "mnist",
    "objectnet",
    "vtab-flowers",
    "vtab-pets",
    "voc2007",
    "vtab-pcam",
    "renderedsst2",
    "vtab-resisc45",
    "cars",
    "stl10",
    "sun397",
    "vtab-svhn",
    "wilds-iwildcam",
    "wilds-camelyon17",
    "wilds-fmow",
    "dollar_street",
    "geode",
]
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_suite(root: Path) -> None:
    """Write all 38."""
    for number, name in enumerate(FOLDERS):
        write_classified(root, name, IMAGES.get(name, 24), seed=number)
    for number, name in enumerate((FLICKR, COCO)):
        write_table(root, name, captioned(24, number), {"image": _IMAGE, "caption": pa.list_(pa.string())})
    write_winogavil(root)


def write_classified(root: Path, name: str, images: int, seed: int) -> Path:
    """Write a folder of shards with a class of each image and, as of WILDS, its metadata."""
    generator = np.random.default_rng(seed)
    classes = NOUNS[: FEW_CLASSES.get(name, 5 + seed % 6)]
    members = []
    for number in range(images):
        key = f"s{number:07d}"
        label = int(generator.integers(len(classes)))
        members += [(f"{key}.cls", str(label).encode()), (f"{key}.png", make_image(1000 * seed + number))]
        if name in METADATA:
            content = io.BytesIO()
            np.save(content, np.array([generator.integers(most) for most in METADATA[name]]))
            members.append((f"{key}.npy", content.getvalue()))
    texts = {"classnames": "\n".join(classes), "zeroshot_classification_templates": "a photo of a {c}.\na {c}.\n"}
    return write_benchmark(root / f"wds_{name}_test", "test", sorted(members), **texts)


def captioned(images: int, seed: int) -> list[dict[str, Any]]:
    """Make images with two captions each."""
    return [
        {
            "image": {"bytes": make_image(90_000 + 500 * seed + number), "path": None},
            "caption": [f"a {NOUNS[number % 12]} with {number} of {NOUNS[(number + step) % 12]}" for step in (1, 5)],
        }
        for number in range(images)
    ]


def write_winogavil(root: Path, most: int = 12) -> Path:
    """Write cues with 5 to 12 candidates, or fewer: some images are in the table, others files of the cache."""
    extracted = root / "hf_cache" / "downloads" / "extracted"
    extracted.mkdir(parents=True)
    rows = []
    for row in range(12):
        count = min((5, 6, 10, 12)[row % 4], most)
        names = [f"{NOUNS[(row + number) % 12]} {number}" for number in range(count)]
        images: list[dict[str, Any]] = []
        for number in range(count):
            image = make_image(70_000 + 100 * row + number)
            path = extracted / f"{row}-{number}.png"
            if number % 2:
                path.write_bytes(image)
            images.append({"bytes": None if number % 2 else image, "path": str(path) if number % 2 else None})
        associated = names[row % 3 :: 2][: 2 + row % 4]
        cue = NOUNS[(row + 7) % 12].title()
        rows.append({"candidates": names, "candidate_images": images, "cue": cue, "associations": associated})
    kinds = {
        "candidates": pa.list_(pa.string()),
        "candidate_images": pa.list_(_IMAGE),
        "cue": pa.string(),
        "associations": pa.list_(pa.string()),
    }
    return write_table(root, "winogavil", rows, kinds)


def write_table(root: Path, name: str, rows: list[dict[str, Any]], kinds: dict[str, pa.DataType]) -> Path:
    """Write a table where `datasets` caches it, in two batches, beside a column that nobody reads."""
    place = root / "hf_cache" / f"nlphuji___{name}" / "TEST" / "1.1.0" / "0a1b" / f"{name}-test.arrow"
    place.parent.mkdir(parents=True)
    table = pa.Table.from_pylist([row | {"ID": number} for number, row in enumerate(rows)])
    table = table.select([*kinds, "ID"]).cast(pa.schema(kinds | {"ID": pa.int64()}))
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=len(rows) // 2)
    return place
