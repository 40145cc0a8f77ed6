"""What an export and the original are compared on: images, texts, and where there are any their classes or captions."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.intervals import Array
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    DEFAULT_TEMPLATES,
    MissingSplitError,
    fill_template,
    find_benchmark_folder,
    hash_lines,
    match_class_names,
    plain_name,
    read_class_names,
    read_templates,
)
from clipcid_cli.formats.data.dataset import Dataset, open_dataset, open_described
from clipcid_cli.formats.data.index import RepeatedKeyError
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.embeddings.sidecar import recorded_data
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.metrics import CLASSIFICATION
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import read_image
from clipcid_cli.steps import reporting
from clipcid_cli.steps.encode import Decoder
from clipcid_cli.steps.evaluate.prompts import find_class_names
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.settings.export import ExportSettings

# Images, and texts, whose rows are compared at each batch size.
COMPARED_ROWS = 16
_FEW_IMAGES, _MANY_IMAGES = 64, 1000
_PATTERNS = "drawn patterns and shipped sentences"

# Of so many classes the names are said.
_SHOWN_CLASSES = 20

# Share of the images that must have a class, or a caption, so that only these are compared.
_LEAST_USABLE = 0.1

# The fraction of images that find their own text: among the classes, or among the captions of all images.
ACCURACY, RECALL = "acc1", "text_retrieval_recall@1"

SENTENCES = (
    "a photo of a cat.",
    "A painting of two ships in a storm",
    "red",
    "the letter Ü, and 3.14159",
    "graffiti on a wall that says: don't look up!",
    "an aerial view of a harbour at low tide, with small boats lying on their sides in the mud",
    "日本の秋",
    "smiling face with heart-shaped eyes 😍",
)


@dataclasses.dataclass(frozen=True)
class Classes:
    """Class names in order of their labels, their prompt templates, and what both were read from."""

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    files: tuple[Path, ...] = ()
    folder: Path | None = None  # whose folders the classes are

    @classmethod
    def read(cls, names: Path, templates: Path | None) -> Classes:
        """Read them from text files, without templates with the default one."""
        if templates is None:
            return cls(read_class_names(names), files=(names,))
        return cls(read_class_names(names), read_templates(templates), (names, templates))

    def fingerprints(self) -> list[FileRecord]:
        """Identify the files, and names that are in no file."""
        files = [record(path) for path in self.files]
        if self.folder is None:
            return files
        return [*files, FileRecord(f"{self.folder}#classes", len(self.names), f"blake2b:{hash_lines(self.names)}")]

    def prompts(self) -> list[list[str]]:
        """Return the prompts of each class, C × T."""
        return [[fill_template(template, name) for template in self.templates] for name in self.names]


def find_classes(settings: ExportSettings) -> Classes | None:
    """Read the classes of ``--classnames``, of a folder without a list of names those of its folders; None without it."""
    names, templates = settings.classnames, settings.templates
    if names is not None and not names.exists():
        raise ClipcidError(
            f"--classnames {names} cannot be read: there is no such file or folder.",
            "Give a text file with one class name per line, or a folder that has a folder of images per class.",
        )
    if names is None or not names.is_dir():
        return None if names is None else Classes.read(names, templates)
    folder = find_benchmark_folder(str(names))
    templates = templates or folder.templates
    if folder.class_names is not None:
        return Classes.read(folder.class_names, templates)
    found, _, _ = find_class_names(None, folder, open_data(str(names), settings))
    listed = ", ".join(found[:_SHOWN_CLASSES]) + (", …" if len(found) > _SHOWN_CLASSES else "")
    reporting.note(f"Classes: {listed}")
    if templates is None:
        return Classes(found, folder=names)
    return Classes(found, read_templates(templates), (templates,), names)


def find_data(settings: ExportSettings) -> Dataset | None:
    """Open ``--data``, else the work directory's data; None where there is none."""
    if settings.data is not None:
        return open_data(settings.data, settings)
    try:
        return open_described(recorded_data(WorkDirectory(settings.work).find_embeddings()), **settings.trust)
    except ClipcidError:
        # The data may have been moved since it was embedded, or the model comes from elsewhere; patterns will do.
        return None


def open_data(spec: str, settings: ExportSettings) -> Dataset:
    """Open data that the user has named, also a CLIP_benchmark folder."""
    try:
        data = find_benchmark_folder(spec).data
    except MissingSplitError as error:
        # `export` has no --split.
        raise ClipcidError(error.message, "Give the folder of one of them.") from error
    try:
        return open_dataset(data, **settings.trust)
    except RepeatedKeyError:  # nothing is joined by keys, so they need no flag
        return open_dataset(data, "shard", **settings.trust)


@dataclasses.dataclass(frozen=True)
class CheckInputs:
    """What both models are compared on."""

    samples: list[Sample]
    pixels: torch.Tensor  # of the samples after the model's resize and crop, uint8 [N, H, W, 3]
    texts: list[str]  # whose rows are compared, COMPARED_ROWS
    tokens: torch.Tensor  # of the texts, int64 [COMPARED_ROWS, L]
    classes: Classes | None  # those of --classnames, which a classifier is made of
    # Which class each image has, where it has one; else each caption is a class. None where there are no captions either.
    task: ZeroshotTask | None
    measure: str  # what the accuracy of `task` is called: `ACCURACY`, or of captions `RECALL`
    source: str  # where they come from, in words
    skips: Skips

    @property
    def compared_pixels(self) -> torch.Tensor:
        """Images whose rows are compared, uint8 [COMPARED_ROWS, H, W, 3]; fewer images are repeated."""
        return self.pixels[torch.arange(COMPARED_ROWS) % len(self.pixels)]

    @property
    def prompts(self) -> list[list[str]]:
        """Texts of each class, or each caption, C × T; none where there is no task."""
        return [] if self.task is None else [self.task.prompts(name) for name in self.task.class_names]

    @cached_property
    def labels(self) -> Array:
        """Which of the classes or captions each image has, int64 [N]; there is a task."""
        assert self.task is not None
        return self.task.labels(self.samples).numpy()

    def read_images(self) -> Iterator[Image.Image]:
        """Decode the images again, whole."""
        for sample in self.samples:
            image = read_image(sample.image)
            assert isinstance(image, Image.Image), "it was readable a moment ago"
            yield image

    def fingerprint(self) -> FileRecord:
        """Identify these inputs, so that a later run knows whether it compares on the same ones."""
        digest = hashlib.blake2b(self.pixels.numpy().tobytes(), digest_size=16)
        digest.update(repr(self.texts).encode())
        if self.task is not None:
            digest.update(repr((self.measure, self.prompts, self.labels.tolist())).encode())
        return FileRecord(f"{self.source}#compared", len(self.pixels), f"blake2b:{digest.hexdigest()}")


def read_inputs(
    model: ClipModel,
    dataset: Dataset | None,
    classes: Classes | None,
    settings: ExportSettings,
) -> CheckInputs:
    """Read and decode what is compared: from the data, else drawn patterns and shipped sentences.

    Labels number the classes of ``--classnames``, else those of the data, where it has any.
    """
    decoder, skips = Decoder.from_model(model, captions=False), Skips()
    listed = [] if dataset is None else choose_samples(dataset, _limit_images(settings))
    decoded = decoder(listed)
    for place, reason in decoded.failures.items():
        skips.add(reason, listed[place].key)
    readable = {place: sample for place, sample in enumerate(listed) if place not in decoded.failures}
    if dataset is not None and (settings.data is not None or readable):  # else patterns are drawn
        skips.check(len(listed), settings.max_bad_compared, settings.data or dataset.spec)
    if settings.data is not None:
        _validate_any(readable, settings.data)
    source, task, measure = _PATTERNS, None, ACCURACY
    if dataset is not None and readable:
        source = dataset.spec
        readable, task, measure = _find_task(readable, dataset, classes or _own_classes(dataset, settings.data), skips)
    else:
        readable = {seed: _draw_pattern(seed) for seed in range(COMPARED_ROWS)}
        decoded = decoder([*readable.values()])
    if dataset is not None and skips.total:
        reporting.warn(f"Images of {dataset.spec} skipped: {skips.total:,}\n{skips.describe()}")
    assert decoded.pixels is not None
    pixels = decoded.pixels[[*readable]]
    samples = [*readable.values()]
    reporting.note(f"Comparing on {len(pixels):,} images: {source}.")
    captions = [sample.captions[0] for sample in samples[: COMPARED_ROWS // 2] if sample.captions]
    texts = list(itertools.islice(itertools.cycle([*captions, *SENTENCES]), COMPARED_ROWS))
    return CheckInputs(samples, pixels, texts, model.tokenizer(texts), classes, task, measure, source, skips)


def validate_data(dataset: Dataset | None, classes: Classes | None, settings: ExportSettings) -> None:
    """Refuse, without decoding an image, data and classes that an export would refuse once it has read them."""
    listed = [] if dataset is None else choose_samples(dataset, _limit_images(settings))
    samples = dict(enumerate(listed))
    if settings.data is not None:
        _validate_any(samples, settings.data)
    source, task = _PATTERNS, None
    if dataset is not None and samples:
        source = dataset.spec
        samples, task, _ = _find_task(samples, dataset, classes or _own_classes(dataset, settings.data), Skips())
    if task is not None:
        task.labels([*samples.values()])  # which refuses one that has no name
    _validate_task([*samples.values()], task, source, settings)


def _limit_images(settings: ExportSettings) -> int:
    many = settings.data is not None or settings.quantize
    return settings.check_images or (_MANY_IMAGES if many else _FEW_IMAGES)


def _validate_any(samples: Mapping[int, Sample], spec: str) -> None:
    if not samples:
        raise ClipcidError(f"--data {spec} holds no readable image.", "Give other data with --data.")


def choose_samples(dataset: Dataset, limit: int) -> list[Sample]:
    """Return the first samples, or, of labelled data, evenly spaced ones, since it is often sorted by class."""
    samples = (sample.without_image_data() for shard in dataset.shards for sample in shard.stream())
    chosen = list(itertools.islice(samples, limit))
    if not chosen or chosen[0].label is None:
        return chosen
    chosen += samples
    taken = min(limit, len(chosen))
    return [chosen[place * len(chosen) // taken] for place in range(taken)]


def _draw_pattern(seed: int) -> Sample:
    """Draw a smooth random picture: a few colours enlarged, so that neighbouring pixels are alike as in a photograph."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(colours.numpy()).resize((256, 192), Image.Resampling.BICUBIC).save(file, "PNG")
    return Sample(f"pattern {seed}", ByteRange("", data=file.getvalue()))


def _own_classes(dataset: Dataset, spec: str | None) -> Classes | None:
    folder = find_benchmark_folder(spec) if spec is not None else None
    if folder is not None and folder.class_names is not None:
        return Classes.read(folder.class_names, folder.templates)
    return Classes(tuple(map(plain_name, dataset.classes))) if dataset.classes is not None else None


def _find_task(
    samples: dict[int, Sample], dataset: Dataset, classes: Classes | None, skips: Skips
) -> tuple[dict[int, Sample], ZeroshotTask | None, str]:
    """Find what the images are classified by, and what its accuracy is called: their classes, else their captions.

    Images without a class, or a caption, are left out and counted, unless nearly all are.
    """
    labelled = {place: sample for place, sample in samples.items() if sample.label is not None}
    if classes is not None and len(labelled) >= _LEAST_USABLE * len(samples):
        _count_others(samples, labelled, "no_label", skips)
        label_of = None if dataset.classes is None else match_class_names(classes.names, dataset.classes).labels
        task = ZeroshotTask(dataset.spec, CLASSIFICATION, dataset, classes.names, classes.templates, label_of=label_of)
        return labelled, task, ACCURACY
    captioned = {place: sample for place, sample in samples.items() if sample.captions}
    if len(captioned) < _LEAST_USABLE * len(samples):
        return samples, None, ACCURACY
    _count_others(samples, captioned, "no_caption", skips)
    captions = dict.fromkeys(sample.captions[0] for sample in captioned.values())
    labels = {caption: label for label, caption in enumerate(captions)}
    numbered = {
        place: dataclasses.replace(sample, label=labels[sample.captions[0]]) for place, sample in captioned.items()
    }
    return numbered, ZeroshotTask(dataset.spec, CLASSIFICATION, dataset, tuple(labels), ("{c}",)), RECALL


def _count_others(samples: dict[int, Sample], used: dict[int, Sample], reason: str, skips: Skips) -> None:
    for place, sample in samples.items():
        if place not in used:
            skips.add(reason, sample.key)


def validate_measurable(inputs: CheckInputs, settings: ExportSettings) -> None:
    """Refuse 8 bits where their loss cannot be measured, and warn where too few images measure it."""
    _validate_task(inputs.samples, inputs.task, inputs.source, settings)


def _validate_task(samples: list[Sample], task: ZeroshotTask | None, source: str, settings: ExportSettings) -> None:
    count, max_drop = len(samples), settings.max_accuracy_drop
    if settings.quantize and task is not None and 0 < max_drop < 1 / count:
        reporting.warn(
            f"What quantization loses is measured on {count:,} images, so one image is {100 / count:.2f} points, more than "
            f"the {100 * max_drop:.2f} allowed. Compare on at least {math.ceil(1 / max_drop):,} images, better on many more "
            "(--data, --check-images)."
        )
    if "int8" in settings.quantize and task is None:
        captioned = sum(bool(sample.captions) for sample in samples)
        missing = f"there are neither captions nor classes in {source}"
        names = ""
        if captioned:
            missing = f"of {count:,} images in {source} only {captioned:,} have a caption"
        elif any(sample.label is not None for sample in samples):
            missing = f"there are neither captions nor names of classes in {source}"
            names = "; or give the names of the classes with --classnames: a file with one class name per line"
        elif settings.classnames is not None:
            names = "; --classnames does not say which image has which class"
        raise ClipcidError(
            f"--quantize int8 needs images with classes or captions, to measure its loss of accuracy; {missing}.",
            f"Name some with --data: a CLIP_benchmark folder, a folder of images per class, or shards with captions{names}.",
        )
