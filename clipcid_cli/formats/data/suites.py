"""The 38 data sets whose mean DataComp ranks models by: what each is called, where its copy lies, by what it counts.

A copy is a folder as DataComp's download script names it (``wds_vtab-pets_test``), as CLIP_benchmark's hub does
(``wds_vtab-pets``) or by the plain name (``pets``). Three come from the hub's library `datasets`, in ``hf_cache/``.

Source: mlfoundations/datacomp, tasklist.yml, evaluate.py and aggregate_scores.py (commit 4a8df19): names, metrics, groups.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from clipcid_cli.formats.data.benchmark import ACCURACY, JACCARD, KNOWN_DATASETS, PER_CLASS

MEAN_RECALL = "mean_recall@1"
"""The mean of image and text recall at 1."""

_CACHE = "hf_cache"


@dataclasses.dataclass(frozen=True)
class SuiteDataset:
    """A data set of a suite."""

    title: str  # in tables, and as the suite itself names it
    name: str  # in metrics files: of a known data set its name
    folder: str  # the suite's name of its copy
    metric: str = ACCURACY

    @property
    def folders(self) -> list[str]:
        """The names that its folder may have, the first that is there being taken."""
        known = KNOWN_DATASETS.get(self.name)
        others = [self.folder.removesuffix("_test")] if known is None else [known.folder, known.name]
        return list(dict.fromkeys([self.folder, *(name for name in others if name is not None)]))

    @property
    def cached(self) -> str | None:
        """How names of the files begin that `datasets` caches; None where it is no data set of that library."""
        return f"{self.folder}-test" if self.folder in _OF_LIBRARY else None


class SuiteFolder(NamedTuple):
    """What a folder holds of a suite: where its data sets are, and which are missing."""

    copies: list[tuple[SuiteDataset, Path]]
    missing: list[SuiteDataset]


_FLICKR = "flickr_1k_test_image_text_retrieval"
_COCO = "mscoco_2014_5k_test_image_text_retrieval"
_WINOGAVIL = "winogavil"
_OF_LIBRARY = {_FLICKR, _COCO, _WINOGAVIL}

DATACOMP = (
    SuiteDataset("Caltech-101", "caltech101", "wds_vtab-caltech101_test", PER_CLASS),
    SuiteDataset("CIFAR-10", "cifar10", "wds_cifar10_test"),
    SuiteDataset("CIFAR-100", "cifar100", "wds_vtab-cifar100_test"),
    SuiteDataset("CLEVR Counts", "clevr-counts", "wds_vtab-clevr_count_all_test"),
    SuiteDataset("CLEVR Distance", "clevr-distance", "wds_vtab-clevr_closest_object_distance_test"),
    SuiteDataset("Country211", "country211", "wds_country211_test"),
    SuiteDataset("Describable Textures", "dtd", "wds_vtab-dtd_test"),
    SuiteDataset("EuroSAT", "eurosat", "wds_vtab-eurosat_test"),
    SuiteDataset("FGVC Aircraft", "aircraft", "wds_fgvc_aircraft_test", PER_CLASS),
    SuiteDataset("Food-101", "food101", "wds_food101_test"),
    SuiteDataset("GTSRB", "gtsrb", "wds_gtsrb_test"),
    SuiteDataset("ImageNet 1k", "imagenet", "wds_imagenet1k_test"),
    SuiteDataset("ImageNet Sketch", "imagenet-sketch", "wds_imagenet_sketch_test"),
    SuiteDataset("ImageNet v2", "imagenetv2", "wds_imagenetv2_test"),
    SuiteDataset("ImageNet-A", "imagenet-a", "wds_imagenet-a_test"),
    SuiteDataset("ImageNet-O", "imagenet-o", "wds_imagenet-o_test"),
    SuiteDataset("ImageNet-R", "imagenet-r", "wds_imagenet-r_test"),
    SuiteDataset("KITTI Vehicle Distance", "kitti", "wds_vtab-kitti_closest_vehicle_distance_test"),
    SuiteDataset("MNIST", "mnist", "wds_mnist_test"),
    SuiteDataset("ObjectNet", "objectnet", "wds_objectnet_test"),
    SuiteDataset("Oxford Flowers-102", "flowers", "wds_vtab-flowers_test", PER_CLASS),
    SuiteDataset("Oxford-IIIT Pet", "pets", "wds_vtab-pets_test", PER_CLASS),
    # Its objects, cut out: one class each, unlike `voc2007`.
    SuiteDataset("Pascal VOC 2007", "voc2007-objects", "wds_voc2007_test"),
    SuiteDataset("PatchCamelyon", "pcam", "wds_vtab-pcam_test"),
    SuiteDataset("Rendered SST2", "sst2", "wds_renderedsst2_test"),
    SuiteDataset("RESISC45", "resisc45", "wds_vtab-resisc45_test"),
    SuiteDataset("Stanford Cars", "cars", "wds_cars_test"),
    SuiteDataset("STL-10", "stl10", "wds_stl10_test"),
    SuiteDataset("SUN397", "sun397", "wds_sun397_test"),
    SuiteDataset("SVHN", "svhn", "wds_vtab-svhn_test"),
    SuiteDataset("Flickr", "flickr30k", _FLICKR, MEAN_RECALL),
    SuiteDataset("MSCOCO", "mscoco", _COCO, MEAN_RECALL),
    SuiteDataset("WinoGAViL", "winogavil", _WINOGAVIL, JACCARD),
    SuiteDataset("iWildCam", "iwildcam", "wds_wilds-iwildcam_test", KNOWN_DATASETS["iwildcam"].metric),
    SuiteDataset("Camelyon17", "camelyon17", "wds_wilds-camelyon17_test"),
    SuiteDataset("FMoW", "fmow", "wds_wilds-fmow_test", KNOWN_DATASETS["fmow"].metric),
    SuiteDataset("Dollar Street", "dollar-street", "wds_dollar_street_test", KNOWN_DATASETS["dollar-street"].metric),
    SuiteDataset("GeoDE", "geode", "wds_geode_test", KNOWN_DATASETS["geode"].metric),
)

DATACOMP_GROUPS = {
    "ImageNet": ("ImageNet 1k",),
    "ImageNet dist. shifts": (
        "ImageNet Sketch",
        "ImageNet v2",
        "ImageNet-A",
        "ImageNet-O",
        "ImageNet-R",
        "ObjectNet",
    ),
    "VTAB": (
        "Caltech-101",
        "CIFAR-100",
        "CLEVR Counts",
        "CLEVR Distance",
        "Describable Textures",
        "EuroSAT",
        "KITTI Vehicle Distance",
        "Oxford Flowers-102",
        "Oxford-IIIT Pet",
        "PatchCamelyon",
        "RESISC45",
        "SVHN",
        "SUN397",
    ),
    "Retrieval": ("Flickr", "MSCOCO", "WinoGAViL"),
}


def find_suite(root: Path) -> SuiteFolder:
    """Find the copies of DataComp's data sets below a folder."""
    copies, missing = list[tuple[SuiteDataset, Path]](), list[SuiteDataset]()
    for dataset in DATACOMP:
        place = next((root / name for name in dataset.folders if (root / name).is_dir()), None)
        if place is None and dataset.cached is not None:
            # nlphuji___<name>/<configuration>/<version>/<hash>/<name>-test.arrow, or …-test-00000-of-00002.arrow
            tables = root.glob(f"{_CACHE}/*___{dataset.folder}/**/{dataset.cached}*.arrow")
            place = next((table.parent for table in sorted(tables)), None)
        if place is None:
            missing.append(dataset)
        else:
            copies.append((dataset, place))
    return SuiteFolder(copies, missing)
