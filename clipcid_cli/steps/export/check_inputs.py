"""Images and texts on which an export is compared with the original model: real ones wherever there are any."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark_folder import MissingSplitError, find_benchmark_folder
from clipcid_cli.formats.data.dataset import Dataset, Sample, open_dataset, open_described
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import SkippedImage, decode_image, read_image
from clipcid_cli.steps.export.classes import CandidateTexts, Classes, find_candidates
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings

# Images, and texts, whose rows are compared at each batch size; zero-shot predictions are compared on all images.
NUM_COMPARED_ROWS = 16

_FEW_IMAGES, _MANY_IMAGES = 64, 1000

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
class CheckInputs:
    """What both models are compared on.

    Attributes:
        openers: Each decodes one image, RGB.
        images: The same after the model's resize and crop, uint8 [N, H, W, 3].
        texts: Those whose rows are compared, `NUM_COMPARED_ROWS`.
        candidates: Texts the images are matched with; None where they have neither class nor caption.
        source: Where they come from, in words.
    """

    openers: list[Callable[[], Image.Image]]
    images: torch.Tensor
    texts: list[str]
    candidates: CandidateTexts | None
    source: str
    skips: Skips

    def fingerprint(self) -> FileRecord:
        """Identify these inputs, so that a later run knows whether it compares on the same ones."""
        digest = hashlib.blake2b(self.images.numpy().tobytes(), digest_size=16)
        digest.update(repr(self.texts).encode())
        if self.candidates is not None:
            content = (self.candidates.measure, self.candidates.prompts, self.candidates.labels.tolist())
            digest.update(repr(content).encode())
        return FileRecord(f"{self.source}#compared", len(self.images), f"blake2b:{digest.hexdigest()}")


def make_check_inputs(
    model: ClipModel, settings: ExportSettings, classes: Classes | None, reporter: Reporter
) -> CheckInputs:
    """Collect inputs: from ``--data``, else from the work directory's data, else drawn patterns and shipped sentences.

    Args:
        classes: Classes of ``--classnames``, which labels then index; else those of the data, where it has any.
    """
    dataset = find_data(settings)
    limit = settings.check_images or (_MANY_IMAGES if settings.data is not None or settings.quantize else _FEW_IMAGES)
    skips, transform = Skips(), model.pixel_transform()
    samples, images = list[Sample](), list[torch.Tensor]()
    for sample in _choose(dataset, limit) if dataset is not None else ():
        image = read_image(sample.image)
        if isinstance(image, SkippedImage):
            skips.add(image.reason, sample.key)
            continue
        samples.append(sample)
        images.append(transform(image))
        if len(images) == limit:
            break
    if settings.data is not None:
        # Without --data it is what was embedded, which was held to this limit then.
        skips.check(len(images) + skips.total, settings.max_bad_fraction, settings.data)
        if not images:
            raise ClipcidError(f"--data {settings.data} holds no readable image.", "Give other data with --data.")
    if dataset is not None and skips.total:
        reporter.warn(f"{skips.total:,} images of {dataset.spec} were skipped:\n{skips.describe()}")
    openers: list[Callable[[], Image.Image]] = [partial(_decode, sample) for sample in samples]
    source, candidates = "drawn patterns and shipped sentences", None
    if dataset is not None and images:
        source, candidates = dataset.spec, find_candidates(samples, dataset, settings.data, classes)
    else:
        openers = [partial(_draw_pattern, number) for number in range(NUM_COMPARED_ROWS)]
        images = [transform(opener()) for opener in openers]
    reporter.note(f"Comparing on {len(images):,} images: {source}.")
    captions = [sample.captions[0] for sample in samples[: NUM_COMPARED_ROWS // 2] if sample.captions]
    texts = list(itertools.islice(itertools.cycle([*captions, *SENTENCES]), NUM_COMPARED_ROWS))
    return CheckInputs(openers, torch.stack(images), texts, candidates, source, skips)


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


def _choose(dataset: Dataset, limit: int) -> Iterator[Sample]:
    """Yield all samples, or, of labelled data, evenly spaced ones, since it is often sorted by class."""
    samples = (sample.without_data() for shard in dataset.shards for sample in shard.stream())
    first = next(samples, None)
    if first is None:
        return
    if first.label is None:
        yield first
        yield from samples
        return
    listed = [first, *samples]
    taken = min(limit, len(listed))
    yield from (listed[number * len(listed) // taken] for number in range(taken))


def _decode(sample: Sample) -> Image.Image:
    image = decode_image(sample.image.read())
    assert isinstance(image, Image.Image), "it was read before"
    return image


def _draw_pattern(number: int) -> Image.Image:
    """Draw a smooth random picture: a few colours enlarged, so that neighbouring pixels are alike as in a photograph."""
    generator = torch.Generator().manual_seed(number)
    colours = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize((256, 192), Image.Resampling.BICUBIC)
