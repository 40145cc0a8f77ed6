"""What an export is compared with the original on, and how close it must be: rows, predictions, size, speed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from PIL import Image

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.algorithms.metrics.parity import RowDifference, compare_rows
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    CLASS_NAMES,
    DEFAULT_TEMPLATES,
    MissingSplitError,
    fill_template,
    find_benchmark_folder,
    match_class_names,
    plain_name,
    read_class_names,
    read_templates,
)
from clipcid_cli.formats.data.dataset import Dataset, open_dataset, open_described
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.embeddings.sidecar import recorded_data
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.models.export_sidecar import Latency, Parity, PredictionParity, RowParity
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import read_image
from clipcid_cli.runtime.models.tower_modules import DenseImageTower
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps import reporting
from clipcid_cli.steps.encode import Decoder
from clipcid_cli.steps.settings.export import ExportSettings

Batch = TypeVar("Batch")

# Images, and texts, whose rows are compared at each batch size; all images are compared in batches, and in int8 alone.
_COMPARED_ROWS = 16
# One sample, two, an odd number, and more than a vector register holds.
_BATCH_SIZES = (1, 2, 5, _COMPARED_ROWS)
_IMAGE_BATCH, _TEXT_BATCH = 32, 64
_FEW_IMAGES, _MANY_IMAGES = 64, 1000
# Images that are timed one by one.
_TIMED_SINGLY = 32

# The fraction of images that find their own text: among the classes, or among the captions of all images.
ACCURACY, RECALL = "acc1", "text_retrieval_recall@1"

_FP32 = Precision("fp32", "exports are compared in full precision")

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

# Largest differences allowed on unit rows. fp32: the order of summation. fp16, bf16: weights rounded to 11 or 8 bits in
# every layer. int8: only what is broken; its limit is the measured loss of accuracy.
_LIMITS = {
    "fp32": RowDifference(max_difference=1e-4, min_cosine=0.99999),
    "fp16": RowDifference(max_difference=5e-3, min_cosine=0.9999),
    "bf16": RowDifference(max_difference=2e-2, min_cosine=0.999),
    "int8": RowDifference(max_difference=math.inf, min_cosine=0.9),
}
# Largest difference allowed of the cosine of an image with a class of a classifier, or with a text of the search. fp32: of
# the classifier about one byte in 10,000 is resized to a neighbouring value. int8 is judged by its predictions.
_COSINE_LIMITS = {"fp32": 1e-3, "fp16": 5e-3, "int8": math.inf}

# Name of the search of images in `parity.json`.
SEARCH = "search"

# Outputs that are compared row by row, by their names in `parity.json`.
_OUTPUTS = {"image": "the image encoder", "text": "the text encoder", "dense": "the grid of patches"}


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
            raise ClipcidError(
                f"{names} has no {CLASS_NAMES}.",
                "Give a text file with one class name per line. Of a folder per class it is written by: "
                f"ls {shlex.quote(str(names))} > {CLASS_NAMES}",
            )
        names, templates = folder.class_names, templates or folder.templates
    return None if names is None else Classes.read(names, templates)


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
        return open_dataset(find_benchmark_folder(spec).data, **settings.trust)
    except MissingSplitError as error:
        # `export` has no --split.
        raise ClipcidError(error.message, "Give the folder of one of them.") from error


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
    texts: list[str]  # whose rows are compared, _COMPARED_ROWS
    tokens: torch.Tensor  # of the texts, int64 [_COMPARED_ROWS, L]
    classes: Classes | None  # those of --classnames, which a classifier is made of
    candidates: Candidates | None  # None where the images have neither class nor caption
    source: str  # where they come from, in words
    skips: Skips

    @property
    def compared_pixels(self) -> torch.Tensor:
        """Images whose rows are compared, uint8 [_COMPARED_ROWS, H, W, 3]; fewer images are repeated."""
        return self.pixels[torch.arange(_COMPARED_ROWS) % len(self.pixels)]

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
) -> CheckInputs:
    """Read and decode what is compared: from the data, else drawn patterns and shipped sentences.

    Labels number the classes of ``--classnames``, else those of the data, where it has any.
    """
    limit = settings.check_images or (_MANY_IMAGES if settings.data is not None or settings.quantize else _FEW_IMAGES)
    decoder, skips = Decoder.from_model(model, captions=False), Skips()
    listed = [] if dataset is None else choose_samples(dataset, limit)
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
        reporting.warn(f"Images of {dataset.spec} skipped: {skips.total:,}\n{skips.describe()}")
    source = "drawn patterns and shipped sentences"
    candidates = None
    if dataset is not None and readable:
        source = dataset.spec
        samples = [listed[place] for place in readable]
        candidates = find_candidates(samples, dataset, classes or _own_classes(dataset, settings.data))
    else:
        samples = [_draw_pattern(seed) for seed in range(_COMPARED_ROWS)]
        readable = list(range(_COMPARED_ROWS))
        decoded = decoder(samples)
    assert decoded.pixels is not None
    pixels = decoded.pixels[readable]
    reporting.note(f"Comparing on {len(pixels):,} images: {source}.")
    captions = [sample.captions[0] for sample in samples[: _COMPARED_ROWS // 2] if sample.captions]
    texts = list(itertools.islice(itertools.cycle([*captions, *SENTENCES]), _COMPARED_ROWS))
    return CheckInputs(samples, pixels, texts, model.tokenizer(texts), classes, candidates, source, skips)


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


def find_candidates(samples: Sequence[Sample], dataset: Dataset, classes: Classes | None) -> Candidates | None:
    """Find what images are matched with: their classes, where these have names, else their captions; None without both."""
    if classes is not None and all(sample.label is not None for sample in samples):
        return Candidates(ACCURACY, classes.prompts(), _match_labels(samples, dataset, classes))
    if not all(sample.captions for sample in samples):
        return None
    captions = [sample.captions[0] for sample in samples]
    classes_of = {caption: label for label, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([classes_of[caption] for caption in captions])
    return Candidates(RECALL, tuple((caption,) for caption in classes_of), labels)


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


def validate_measurable(inputs: CheckInputs, settings: ExportSettings) -> None:
    """Refuse 8 bits where their loss cannot be measured, and warn where too few images measure it."""
    count, max_drop = len(inputs.pixels), settings.max_accuracy_drop
    if settings.quantize and inputs.candidates is not None and 0 < max_drop < 1 / count:
        reporting.warn(
            f"What quantization loses is measured on {count:,} images, so one image is {100 / count:.2f} points, more than "
            f"the {100 * max_drop:.2f} allowed. Compare on at least {math.ceil(1 / max_drop):,} images, better on many more "
            "(--data, --check-images)."
        )
    if "int8" in settings.quantize and inputs.candidates is None:
        raise ClipcidError(
            "--quantize int8 needs images with classes or captions, to measure its loss of accuracy; "
            f"there are neither captions nor names of classes in {inputs.source}.",
            "Name some with --data: a CLIP_benchmark folder, a folder of images per class, or shards with captions; or give "
            "the names of the classes with --classnames: a file with one class name per line.",
        )


def open_towers(model: ClipModel, *, dense: bool = False) -> Towers:
    """Return the towers of the original, or of a form that open_clip loads, as they are evaluated."""
    towers = Towers.from_model(model, _FP32, _TEXT_BATCH)
    if not dense:
        return towers
    patches = DenseImageTower(model.module)
    encode_patches = torch.inference_mode()(lambda pixels: patches(model.normalize(pixels))[1])
    return dataclasses.replace(towers, dense=encode_patches)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model, the original or an export, makes of the inputs."""

    rows: dict[str, torch.Tensor]  # by output, of _COMPARED_ROWS samples in batches of each size, one after another
    images: torch.Tensor  # rows of all images, in batches
    alone: torch.Tensor  # rows of the first images, or of all, computed one by one
    nearest: torch.Tensor | None  # the most similar candidate of each image, int64 [N], where there are candidates
    images_per_second: float  # of the image encoder, from the bytes of cropped images, by the median batch
    latency: Latency  # of the same, from one image


def evaluate(towers: Towers, inputs: CheckInputs, alone: int = _TIMED_SINGLY) -> Outputs:
    """Run a model on the inputs, and on so many of the images one by one."""
    pixels = inputs.compared_pixels
    compared = {
        "image": (towers.images, pixels),
        "text": (towers.texts, inputs.tokens),
        "dense": (towers.dense, pixels),
    }
    rows = {
        output: torch.cat([encode(batch) for size in _BATCH_SIZES for batch in torch.split(samples, size)])
        for output, (encode, samples) in compared.items()
        if encode is not None
    }
    images, seconds = run_timed(towers.images, torch.split(inputs.pixels, _IMAGE_BATCH))
    single_images, seconds_of_one = run_timed(towers.images, torch.split(inputs.pixels[:alone], 1))
    nearest = None
    if inputs.candidates is not None:
        weights = class_weights(towers.encode_prompts(inputs.candidates.prompts))
        nearest = (images @ weights.T).argmax(dim=1)
    return Outputs(rows, images, single_images, nearest, rate_of(seconds), latency_of(seconds_of_one))


def run_timed(compute: Callable[[Batch], torch.Tensor], batches: Iterable[Batch]) -> tuple[torch.Tensor, list[float]]:
    """Compute rows of images, batch after batch, and tell the seconds an image of each batch."""
    rows, seconds = list[torch.Tensor](), list[float]()
    for batch in batches:
        trial = time_trial(partial(compute, batch), warm_up=int(not rows))  # the first also pays for buffers
        rows.append(trial.result)
        seconds.append(trial.seconds / len(trial.result))
    return torch.cat(rows), seconds


def rate_of(seconds: Sequence[float]) -> float:
    """Return the images per second of the median batch."""
    return round(1 / statistics.median(seconds), 2)


def latency_of(seconds: Sequence[float]) -> Latency:
    """Return the latency of images that were computed one by one."""
    median, slow = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
    return Latency(round(1000 * float(median), 2), round(1000 * float(slow), 2))


class Checker:
    """Compares exports with the original model, in fp32 on the CPU."""

    def __init__(self, model: ClipModel, inputs: CheckInputs, settings: ExportSettings) -> None:
        self.model = model
        self.inputs = inputs
        self.settings = settings
        self.original = open_towers(model, dense=settings.dense)

    @cached_property
    def expected(self) -> Outputs:
        return evaluate(self.original, self.inputs)

    def check(self, name: str, kind: str, towers: Towers, files: Sequence[Path], *, gated: bool = False) -> Parity:
        """Compare an export with the model: its entry in `parity.json`; one that is over a limit is an error.

        Args:
            kind: Number format of its weights, `files`: it determines the limits.
            gated: Whether a loss of accuracy over the limit is an error.
        """
        # In int8 a row depends on the rest of its batch, and many users have batches of one.
        alone = len(self.inputs.pixels) if kind == "int8" else _TIMED_SINGLY
        outputs = evaluate(towers, self.inputs, alone)
        rows = {output: self._compare_rows(name, output, outputs) for output in outputs.rows}
        parity = Parity(
            precision=kind,
            image=rows["image"],
            text=rows["text"],
            dense=rows.get("dense"),
            bytes=sum(path.stat().st_size for path in files),
            images_per_second=outputs.images_per_second,
            latency_ms=outputs.latency,
            zeroshot=self.compare_predictions(outputs.nearest, gated=gated),
        )
        self.validate(name, parity)
        return parity

    def _compare_rows(self, name: str, output: str, outputs: Outputs) -> RowParity:
        """Compare an output's rows of the compared samples; of the image encoder also its rows of all images."""
        ours, theirs = self.expected.rows[output], outputs.rows[output]
        if ours.shape != theirs.shape:
            raise ClipcidError(f"{name}: {_OUTPUTS[output]} makes {[*theirs.shape[1:]]}, PyTorch {[*ours.shape[1:]]}.")
        samples = _COMPARED_ROWS
        batch_sizes: tuple[int, ...] = _BATCH_SIZES
        if output == "image":
            images = self.expected.images
            ours = torch.cat([ours, images, images[: len(outputs.alone)]])
            theirs = torch.cat([theirs, outputs.images, outputs.alone])
            samples = len(images)
            batch_sizes = (*_BATCH_SIZES, _IMAGE_BATCH)
        # Rows are of unit length, patches of a length that varies with the model.
        longest = ours.norm(dim=-1).amax()
        return RowParity(
            batch_sizes=batch_sizes,
            samples=samples,
            **compare_rows(*((rows / longest).flatten(0, -2) for rows in (ours, theirs)))._asdict(),
            shape=None if ours.ndim == 2 else ["batch", *ours.shape[1:]],
        )

    def compare_predictions(self, nearest: torch.Tensor | None, *, gated: bool) -> PredictionParity | None:
        """Compare an export's predictions, as in `Outputs`, with the model's; None where there are no candidates."""
        candidates, expected = self.inputs.candidates, self.expected.nearest
        if candidates is None or nearest is None or expected is None:
            return None
        value, before = (float((side == candidates.labels).double().mean()) for side in (nearest, expected))
        return PredictionParity(
            measure=candidates.measure,
            images=len(nearest),
            candidates=len(candidates.prompts),
            agreement=float((nearest == expected).double().mean()),
            value=value,
            pytorch=before,
            drop=before - value,
            gated=gated,
        )

    def warn_near_chance(self) -> None:
        """Say where the original answers so little better than a guess that no loss by quantization could be seen."""
        candidates, expected = self.inputs.candidates, self.expected.nearest
        if not self.settings.quantize or candidates is None or expected is None:
            return
        labels = candidates.labels
        right = float((expected == labels).double().mean())
        guess = float(torch.bincount(labels).max()) / len(labels)
        chance = guess + 2 * math.sqrt(guess * (1 - guess) / len(labels))  # two standard deviations
        if right - self.settings.max_accuracy_drop <= chance:
            reporting.warn(
                f"The check of quantized files can hardly fail here: {candidates.measure} of the model itself is "
                f"{right:.1%} on {len(labels):,} images, and a guess would reach {guess:.1%}. Compare on images that the "
                "model knows (--data), or lower --max-accuracy-drop."
            )

    def validate(self, name: str, parity: Parity) -> None:
        """Raise when an export's entry in `parity.json`, of this run or an earlier one, is over a limit of this run."""
        kind, spec = parity.precision, self.model.info.spec
        limit = self.limit(kind)
        for output, words in _OUTPUTS.items():
            rows: RowParity | None = getattr(parity, output)
            if rows is None or (rows.max_difference <= limit.max_difference and rows.min_cosine >= limit.min_cosine):
                continue
            allowed = f" (allowed {limit.max_difference:.0e})" if math.isfinite(limit.max_difference) else ""
            raise ClipcidError(
                f"{name}: {words} differs from {spec} by up to {rows.max_difference:.2e}{allowed}, cosine down to "
                f"{rows.min_cosine:.7f} (allowed {limit.min_cosine}). Nothing was written.",
                "Omit this number format, or allow more with --max-difference."
                if kind != "fp32"
                else "Allow more with --max-difference, or check the model: its values may overflow.",
            )
        cosine = parity.max_cosine_difference
        if cosine is not None and not cosine <= _COSINE_LIMITS[kind]:  # nor when it is no number
            what, flag = ("text", "--search-images") if name == SEARCH else ("class", "--classnames")
            raise ClipcidError(
                f"{name}: a cosine of image and {what} differs by {cosine:.2e} from {spec} (allowed "
                f"{_COSINE_LIMITS[kind]:.0e}). Nothing was written.",
                f"Omit {flag}." if kind == "fp32" else f"Omit --quantize {kind}.",
            )
        zeroshot, max_drop = parity.zeroshot, self.settings.max_accuracy_drop
        if zeroshot is not None and zeroshot.gated and zeroshot.drop > max_drop:
            raise ClipcidError(
                f"{name}: {zeroshot.measure} falls from {zeroshot.pytorch:.4f} to {zeroshot.value:.4f} on "
                f"{zeroshot.images:,} images, by {100 * zeroshot.drop:.2f} points (allowed {100 * max_drop:.2f}). "
                "Nothing was written.",
                "Omit this number format from --quantize, or allow more with --max-accuracy-drop.",
            )

    def limit(self, kind: str) -> RowDifference:
        """Return the largest difference allowed for a number format; ``--max-difference`` is of all but int8."""
        asked = self.settings.max_difference
        return _LIMITS[kind] if asked is None or kind == "int8" else _LIMITS[kind]._replace(max_difference=asked)

    def describe(self) -> dict[str, Any]:
        """Return the reference and the limits, for `parity.json`."""
        info = self.model.info
        allowed: dict[str, Any] = {kind: self.limit(kind)._asdict() for kind in _LIMITS}
        allowed["int8"]["max_difference"] = None  # JSON has no infinity
        return {
            "reference": {
                "model": info.spec,
                "weights_hash": info.weights_hash,
                "engine": f"PyTorch {torch.__version__}",
                "precision": "fp32",
                "threads": torch.get_num_threads(),
                "bytes": sum(tensor.nbytes for tensor in self.model.module.state_dict().values()),
                "images_per_second": self.expected.images_per_second,
                "latency_ms": msgspec.to_builtins(self.expected.latency),
                "inputs": self.inputs.source,
                "images": len(self.inputs.pixels),
            },
            "allowed": allowed | {"max_accuracy_drop": self.settings.max_accuracy_drop},
        }
