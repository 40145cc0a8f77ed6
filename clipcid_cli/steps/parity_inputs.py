"""Images and texts on which an exported model is compared with the original: real ones wherever there are any."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.dataset import Dataset, open_dataset, open_described
from clipcid_cli.formats.work import WorkDirectory
from clipcid_cli.runtime.encoder import ClipModel
from clipcid_cli.runtime.images import UnreadableImage, decode_image
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings

_SENTENCES = (
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
class ParityInputs:
    """What both models are shown.

    Attributes:
        pixels: float32 [N, 3, H, W], prepared by the model's own transform.
        tokens: int64 [N, L].
        source: Where they come from, for `parity.json`.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    source: str


def make_parity_inputs(model: ClipModel, settings: ExportSettings, reporter: Reporter, count: int) -> ParityInputs:
    """Collect inputs: from ``--data``, else from the work directory's data, else drawn patterns and shipped sentences.

    Args:
        model: Whose transform and tokenizer prepare them.
        settings: Names the data.
        reporter: Is told where they come from.
        count: N; where the data has fewer, they repeat.

    Raises:
        ClipcidError: when ``--data`` cannot be read or holds no readable image.
    """
    dataset = _find_data(settings)
    images, texts = _read(dataset, count) if dataset is not None else ([], [])
    if not images:
        if settings.data is not None:
            raise ClipcidError(f"--data {settings.data} holds no readable image.", "Give other data to check with.")
        images = [_draw_pattern(number) for number in range(count)]
        source = "drawn patterns and shipped sentences"
    else:
        assert dataset is not None
        source = dataset.spec
    reporter.note(f"Comparing on {source}.")
    texts = texts + list(_SENTENCES)
    transform = model.transform()
    return ParityInputs(
        pixels=torch.stack([transform(image) for image in itertools.islice(itertools.cycle(images), count)]),
        tokens=model.tokenizer(list(itertools.islice(itertools.cycle(texts), count))),
        source=source,
    )


def _find_data(settings: ExportSettings) -> Dataset | None:
    if settings.data is not None:
        return open_dataset(settings.data)
    try:
        return open_described(WorkDirectory(settings.work).find_data())
    except ClipcidError:
        # The data may have moved since it was embedded, or the model may come from elsewhere; patterns do as well.
        return None


def _read(dataset: Dataset, count: int) -> tuple[list[Image.Image], list[str]]:
    images: list[Image.Image] = []
    texts: list[str] = []
    for image, captions in itertools.islice(_readable(dataset), count):
        images.append(image)
        texts.extend(captions[:1])
    return images, texts[: count // 2]


def _readable(dataset: Dataset) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    for shard in dataset.shards:
        for sample in shard.samples():
            try:
                yield decode_image(sample.image.read()), sample.captions
            except (UnreadableImage, OSError):
                continue


def _draw_pattern(number: int) -> Image.Image:
    """Draw a smooth random picture: a few colours blown up, so that neighbouring pixels agree as in a photograph."""
    generator = torch.Generator().manual_seed(number)
    colours = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize((256, 192), Image.Resampling.BICUBIC)
