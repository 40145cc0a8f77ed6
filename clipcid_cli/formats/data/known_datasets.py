"""The usual suite of data sets by name: where a local copy is expected, how to get it, which metric is customary.

Folders are called as CLIP_benchmark's copies on the Hugging Face hub (``clip-benchmark/wds_…``). A folder of the plain
name with one folder of images per class does as well.

Source: LAION-AI/CLIP_benchmark 1.6.2 (names); Radford et al. 2021 (CLIP), appendix A and table 9 (metrics).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from clipcid_cli.errors import ClipcidError

ACCURACY = "acc1"
PER_CLASS = "mean_per_class_recall"
ELEVEN_POINT = "mean_average_precision_11_point"
RECALL = "image_retrieval_recall@5"


@dataclasses.dataclass(frozen=True)
class KnownDataset:
    """A data set of the usual suite."""

    name: str  # also in tables and metrics files
    folder: str | None  # of CLIP_benchmark's copy
    metric: str = ACCURACY
    class_names: str | None = None  # built-in ones, for a copy without its own; likewise the templates
    templates: str | None = None
    source: str | None = None  # where else to get it


def _imagenet(name: str, folder: str) -> KnownDataset:
    return KnownDataset(name, folder, class_names="imagenet", templates="openai")


KNOWN_DATASETS = {
    known.name: known
    for known in (
        _imagenet("imagenet", "wds_imagenet1k"),
        _imagenet("imagenetv2", "wds_imagenetv2"),
        _imagenet("imagenet-a", "wds_imagenet-a"),
        _imagenet("imagenet-r", "wds_imagenet-r"),
        _imagenet("imagenet-sketch", "wds_imagenet_sketch"),
        KnownDataset("objectnet", "wds_objectnet", templates="openai"),
        KnownDataset("food101", "wds_food101"),
        KnownDataset("cifar10", "wds_vtab-cifar10"),
        KnownDataset("cifar100", "wds_vtab-cifar100"),
        KnownDataset(
            "birdsnap",
            None,
            source="Birdsnap is published as a list of addresses (thomasberg.org): download them into one folder per class",
        ),
        KnownDataset("sun397", "wds_sun397"),
        KnownDataset("cars", "wds_cars"),
        KnownDataset("aircraft", "wds_fgvc_aircraft", metric=PER_CLASS),
        KnownDataset("voc2007", "wds_voc2007_multilabel", metric=ELEVEN_POINT),
        KnownDataset("dtd", "wds_vtab-dtd"),
        KnownDataset("pets", "wds_vtab-pets", metric=PER_CLASS),
        KnownDataset("caltech101", "wds_vtab-caltech101", metric=PER_CLASS),
        KnownDataset("flowers", "wds_vtab-flowers", metric=PER_CLASS),
        KnownDataset("eurosat", "wds_vtab-eurosat"),
        KnownDataset("resisc45", "wds_vtab-resisc45"),
        KnownDataset("mnist", "wds_mnist"),
        KnownDataset("svhn", "wds_vtab-svhn"),
        KnownDataset("stl10", "wds_stl10"),
        KnownDataset("gtsrb", "wds_gtsrb"),
        KnownDataset("country211", "wds_country211"),
        KnownDataset("fer2013", "wds_fer2013"),
        KnownDataset("pcam", "wds_vtab-pcam"),
        KnownDataset("sst2", "wds_renderedsst2"),
        KnownDataset("flickr30k", "wds_flickr30k", metric=RECALL),
        KnownDataset("mscoco", "wds_mscoco_captions", metric=RECALL),
    )
}


def find_known_dataset(name: str, root: Path) -> tuple[KnownDataset, Path] | None:
    """Find the local copy of a data set of the usual suite; None for a name that is not in it.

    Args:
        name: As the user wrote it. A name of the suite means its data set even where a folder has that name too; a path is
            written ``./name``.
    """
    known = KNOWN_DATASETS.get(name)
    if known is None:
        return None
    places = [root / folder for folder in (known.folder, known.name) if folder is not None]
    found = next((place for place in places if place.is_dir()), None)
    if found is not None:
        return known, found
    if known.folder is None:
        expected = ""
        get = f"{known.source}, in {places[-1] / 'test'}."
    else:
        expected = f"{places[0]} (CLIP_benchmark's shards) or "
        get = f"hf download clip-benchmark/{known.folder} --repo-type dataset --local-dir {places[0]}"
    raise ClipcidError(
        f"There is no local copy of {name}: expected in {expected}{places[-1]} (one folder of images per class).",
        f"Name the folder of your copies with --data-root, or get it: {get}"
        + (f"\nThe path of that name is ./{name}." if Path(name).exists() else ""),
    )


def customary_metric(name: str, possible: Sequence[str]) -> str:
    """Return the metric a data set is usually reported by, or the first possible one where that is not known.

    Args:
        name: Its name in the suite, or that of its folder, with or without ``/`` and a split.
    """
    folder = name.partition("/")[0]
    metrics = [known.metric for known in KNOWN_DATASETS.values() if folder in (known.name, known.folder)]
    return next((metric for metric in metrics if metric in possible), possible[0])
