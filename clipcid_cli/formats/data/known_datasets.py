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
MEAN_AVERAGE_PRECISION = "mean_average_precision"
ELEVEN_POINT = "mean_average_precision_11_point"
RECALL = "image_retrieval_recall@5"


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is known of a data set by its name.

    Attributes:
        name: Its name here, in tables and metrics files.
        folder: Folder of CLIP_benchmark's copy; None where there is none.
        metric: Name of the customary metric.
        class_names: Built-in class names for a copy that brings none.
        templates: Built-in templates for a copy that brings none.
        source: Where else to get it.
    """

    name: str
    folder: str | None
    metric: str = ACCURACY
    class_names: str | None = None
    templates: str | None = None
    source: str | None = None


def _imagenet(name: str, folder: str) -> Preset:
    return Preset(name, folder, class_names="imagenet", templates="openai")


PRESETS = {
    preset.name: preset
    for preset in (
        _imagenet("imagenet", "wds_imagenet1k"),
        _imagenet("imagenetv2", "wds_imagenetv2"),
        _imagenet("imagenet-a", "wds_imagenet-a"),
        _imagenet("imagenet-r", "wds_imagenet-r"),
        _imagenet("imagenet-sketch", "wds_imagenet_sketch"),
        Preset("objectnet", "wds_objectnet", templates="openai"),
        Preset("food101", "wds_food101"),
        Preset("cifar10", "wds_vtab-cifar10"),
        Preset("cifar100", "wds_vtab-cifar100"),
        Preset(
            "birdsnap",
            None,
            source="Birdsnap is published as a list of addresses (thomasberg.org): download them into one folder per class",
        ),
        Preset("sun397", "wds_sun397"),
        Preset("cars", "wds_cars"),
        Preset("aircraft", "wds_fgvc_aircraft", metric=PER_CLASS),
        Preset("voc2007", "wds_voc2007_multilabel", metric=ELEVEN_POINT),
        Preset("dtd", "wds_vtab-dtd"),
        Preset("pets", "wds_vtab-pets", metric=PER_CLASS),
        Preset("caltech101", "wds_vtab-caltech101", metric=PER_CLASS),
        Preset("flowers", "wds_vtab-flowers", metric=PER_CLASS),
        Preset("eurosat", "wds_vtab-eurosat"),
        Preset("resisc45", "wds_vtab-resisc45"),
        Preset("mnist", "wds_mnist"),
        Preset("svhn", "wds_vtab-svhn"),
        Preset("stl10", "wds_stl10"),
        Preset("gtsrb", "wds_gtsrb"),
        Preset("country211", "wds_country211"),
        Preset("fer2013", "wds_fer2013"),
        Preset("pcam", "wds_vtab-pcam"),
        Preset("sst2", "wds_renderedsst2"),
        Preset("flickr30k", "wds_flickr30k", metric=RECALL),
        Preset("mscoco", "wds_mscoco_captions", metric=RECALL),
    )
}


def find_known_dataset(name: str, root: Path) -> tuple[Preset, Path] | None:
    """Find the local copy of a data set that is named by its preset.

    Args:
        name: What the user named. The name of a preset is one whatever lies beside it; ``./name`` is a path.
        root: Folder of the local copies.

    Returns:
        The preset and its folder; None when the name is no preset's.

    Raises:
        ClipcidError: when there is no copy, naming where it is expected and how to get it.
    """
    preset = PRESETS.get(name)
    if preset is None:
        return None
    places = [root / folder for folder in (preset.folder, preset.name) if folder is not None]
    found = next((place for place in places if place.is_dir()), None)
    if found is not None:
        return preset, found
    expected = f"{places[0]} (CLIP_benchmark's shards) or " if preset.folder is not None else ""
    get = (
        f"hf download clip-benchmark/{preset.folder} --repo-type dataset --local-dir {places[0]}"
        if preset.folder is not None
        else f"{preset.source}, in {places[-1] / 'test'}."
    )
    raise ClipcidError(
        f"There is no local copy of {name}: expected in {expected}{places[-1]} (one folder of images per class).",
        f"Name the folder of your copies with --data-root, or get it: {get}"
        + (f"\nThe path of that name is ./{name}." if Path(name).exists() else ""),
    )


def customary_metric(name: str, possible: Sequence[str]) -> str:
    """Return the metric a data set is usually reported by.

    Args:
        name: Name of the data set: a preset's, or that of its folder, with or without ``/`` and a split.
        possible: The metrics its task has; the first is that of data which is not known or has another task here.
    """
    folder = name.partition("/")[0]
    known = next((preset.metric for preset in PRESETS.values() if folder in (preset.name, preset.folder)), None)
    return known if known is not None and known in possible else possible[0]
