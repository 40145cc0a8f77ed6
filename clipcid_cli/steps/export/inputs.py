"""What an export is compared with the original on: images, texts, and the classes or captions that are matched with them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    CLASS_NAMES,
    DEFAULT_TEMPLATES,
    MissingSplitError,
    fill_template,
    find_benchmark_folder,
    read_class_names,
    read_templates,
)
from clipcid_cli.formats.data.dataset import ByteRange, Dataset, Sample, open_dataset, open_described
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import read_image
from clipcid_cli.steps.class_names import match_class_names, plain_name
from clipcid_cli.steps.encode import Decoder
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings

# Images, and texts, whose rows are compared at each batch size; predictions are compared on all images.
NUM_COMPARED_ROWS = 16

_FEW_IMAGES, _MANY_IMAGES = 64, 1000

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
    """Class names in order of their labels, their prompt templates, and the files both were read from."""

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    files: tuple[Path, ...] = ()

    @classmethod
    def read(cls, names: Path, templates: Path | None) -> Classes:
        """Read them from text files, without templates with the default one."""
        if templates is None:
            return cls(read_class_names(names), files=(names,))
        return cls(read_class_names(names), read_templates(templates), (names, templates))

    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Return the prompts of each class, C × T."""
        return tuple(tuple(fill_template(template, name) for template in self.templates) for name in self.names)


def find_classes(settings: ExportSettings) -> Classes | None:
    """Read the classes of ``--classnames``; None without it."""
    names, templates = settings.classnames, settings.templates
    if names is not None and names.is_dir():
        folder = find_benchmark_folder(str(names))
        if folder.class_names is None:
            raise ClipcidError(f"{names} has no {CLASS_NAMES}.", "Give a text file with one class name per line.")
        names, templates = folder.class_names, templates or folder.templates
    return None if names is None else Classes.read(names, templates)


def find_data(settings: ExportSettings) -> Dataset | None:
    """Open ``--data``, else the work directory's data; None where there is none."""
    if settings.data is not None:
        try:
            return open_dataset(find_benchmark_folder(settings.data).data)
        except MissingSplitError as error:
            # `export` has no --split.
            raise ClipcidError(error.message, "Give the folder of one of them.") from error
    try:
        return open_described(WorkDirectory(settings.work).find_data())
    except ClipcidError:
        # The data may have been moved since it was embedded, or the model comes from elsewhere; patterns will do.
        return None


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Texts, C × T, among which each image finds its own, and which is its own, int64 [N]: see `ACCURACY` and `RECALL`."""

    measure: str
    prompts: tuple[tuple[str, ...], ...]
    labels: torch.Tensor


@dataclasses.dataclass(frozen=True)
class CheckInputs:
    """What both models are compared on."""

    samples: list[Sample]
    pixels: torch.Tensor  # of the samples after the model's resize and crop, uint8 [N, H, W, 3]
    texts: list[str]  # whose rows are compared, NUM_COMPARED_ROWS
    tokens: torch.Tensor  # of the texts, int64 [NUM_COMPARED_ROWS, L]
    classes: Classes | None  # those of --classnames, which a classifier is made of
    candidates: Candidates | None  # None where the images have neither class nor caption
    source: str  # where they come from, in words
    skips: Skips

    @property
    def compared_pixels(self) -> torch.Tensor:
        """Images whose rows are compared, uint8 [NUM_COMPARED_ROWS, H, W, 3]; fewer images are repeated."""
        return self.pixels[torch.arange(NUM_COMPARED_ROWS) % len(self.pixels)]

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
        if self.candidates is not None:
            content = (self.candidates.measure, self.candidates.prompts, self.candidates.labels.tolist())
            digest.update(repr(content).encode())
        return FileRecord(f"{self.source}#compared", len(self.pixels), f"blake2b:{digest.hexdigest()}")


def read_inputs(
    model: ClipModel,
    dataset: Dataset | None,
    classes: Classes | None,
    settings: ExportSettings,
    reporter: Reporter,
) -> CheckInputs:
    """Read and decode what is compared: from the data, else drawn patterns and shipped sentences.

    Labels number the classes of ``--classnames``, else those of the data, where it has any.
    """
    limit = settings.check_images or (_MANY_IMAGES if settings.data is not None or settings.quantize else _FEW_IMAGES)
    decoder, skips = Decoder.of(model, captions=False), Skips()
    listed = [] if dataset is None else _choose(dataset, limit)
    decoded = decoder(listed)
    for place, reason in decoded.failures.items():
        skips.add(reason, listed[place].key)
    readable = [place for place in range(len(listed)) if place not in decoded.failures]
    if settings.data is not None:
        # Without --data it is what was embedded, which was held to this limit then.
        skips.check(len(listed), settings.max_bad_fraction, settings.data)
        if not readable:
            raise ClipcidError(f"--data {settings.data} holds no readable image.", "Give other data with --data.")
    if dataset is not None and skips.total:
        reporter.warn(f"{skips.total:,} images of {dataset.spec} were skipped:\n{skips.describe()}")
    source, candidates = "drawn patterns and shipped sentences", None
    if dataset is not None and readable:
        source, samples = dataset.spec, [listed[place] for place in readable]
        candidates = find_candidates(samples, dataset, classes or _own_classes(dataset, settings.data))
    else:
        samples = [_draw_pattern(number) for number in range(NUM_COMPARED_ROWS)]
        decoded, readable = decoder(samples), list(range(NUM_COMPARED_ROWS))
    assert decoded.pixels is not None
    pixels = decoded.pixels[readable]
    reporter.note(f"Comparing on {len(pixels):,} images: {source}.")
    captions = [sample.captions[0] for sample in samples[: NUM_COMPARED_ROWS // 2] if sample.captions]
    texts = list(itertools.islice(itertools.cycle([*captions, *SENTENCES]), NUM_COMPARED_ROWS))
    return CheckInputs(samples, pixels, texts, model.tokenizer(texts), classes, candidates, source, skips)


def _choose(dataset: Dataset, limit: int) -> list[Sample]:
    """Return the first samples, or, of labelled data, evenly spaced ones, since it is often sorted by class."""
    samples = (sample.without_image_data() for shard in dataset.shards for sample in shard.stream())
    chosen = list(itertools.islice(samples, limit))
    if not chosen or chosen[0].label is None:
        return chosen
    chosen += samples
    taken = min(limit, len(chosen))
    return [chosen[number * len(chosen) // taken] for number in range(taken)]


def _draw_pattern(number: int) -> Sample:
    """Draw a smooth random picture: a few colours enlarged, so that neighbouring pixels are alike as in a photograph."""
    generator = torch.Generator().manual_seed(number)
    colours = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(colours.numpy()).resize((256, 192), Image.Resampling.BICUBIC).save(file, "PNG")
    return Sample(f"pattern {number}", ByteRange("", data=file.getvalue()))


def find_candidates(samples: Sequence[Sample], dataset: Dataset, classes: Classes | None) -> Candidates | None:
    """Find what images are matched with: their classes, where these have names, else their captions; None without both."""
    if classes is not None and all(sample.label is not None for sample in samples):
        return Candidates(ACCURACY, classes.prompts(), _match_labels(samples, dataset, classes))
    if not all(sample.captions for sample in samples):
        return None
    captions = [sample.captions[0] for sample in samples]
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([numbers[caption] for caption in captions])
    return Candidates(RECALL, tuple((caption,) for caption in numbers), labels)


def _own_classes(dataset: Dataset, spec: str | None) -> Classes | None:
    folder = find_benchmark_folder(spec) if spec is not None else None
    if folder is not None and folder.class_names is not None:
        return Classes.read(folder.class_names, folder.templates)
    return Classes(tuple(map(plain_name, dataset.classes))) if dataset.classes is not None else None


def _match_labels(samples: Sequence[Sample], dataset: Dataset, classes: Classes) -> torch.Tensor:
    labels = torch.tensor([sample.label for sample in samples])
    if dataset.classes is not None:
        labels = torch.tensor(match_class_names(classes.names, dataset.classes).labels)[labels]
    for sample, label in zip(samples, labels.tolist(), strict=True):
        if not 0 <= label < len(classes.names):
            raise ClipcidError(
                f"{dataset.spec}: sample {sample.key} has class {label}, and there are {len(classes.names)} class names "
                f"(0 … {len(classes.names) - 1}).",
                "Give the matching list of class names with --classnames, or other data with --data.",
            )
    return labels
