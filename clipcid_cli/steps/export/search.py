"""The images that the page searches: chosen, encoded by the original model, written, and compared with the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.models.export_folder import WEB
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.models.web_folder import SearchImages, read_search_rows, write_search
from clipcid_cli.formats.report import encode_thumbnail
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.exported import OnnxSession
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.steps import reporting
from clipcid_cli.steps.encode import Decoded, Decoder
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.inputs import choose_samples, open_data
from clipcid_cli.steps.export.limits import SEARCH, validate_parity
from clipcid_cli.steps.export.web import describe_for_page, page_encoders, smallest_kind
from clipcid_cli.steps.settings.export import ExportSettings

_THUMBNAIL_SIDE = 192  # pixels
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The images of ``--search-images`` that the page searches."""

    dataset: Dataset
    samples: Sequence[Sample]

    def fingerprint(self) -> FileRecord:
        """Identify the images, so that a later run knows whether it would search the same ones."""
        images = fingerprint_images(self.dataset, self.samples)
        return msgspec.structs.replace(images, path=f"{self.dataset.spec}#searched", size=len(self.samples))


def find_gallery(settings: ExportSettings) -> Gallery | None:
    """List the images of ``--search-images``; None without it."""
    if settings.search_images is None:
        return None
    dataset, most = open_data(settings.search_images, settings), settings.max_search_images
    samples = choose_samples(dataset, most)
    if len(samples) == most:
        reporting.note(f"Any images of {dataset.spec} beyond {most:,} are left out: --max-search-images.")
    return Gallery(dataset, samples)


def encode_gallery(checker: Checker, gallery: Gallery) -> SearchImages:
    """Encode the images by the original model; too many that cannot be used are an error."""
    spec, total = gallery.dataset.spec, len(gallery.samples)
    encode = _BatchEncoder(checker, Decoder.from_model(checker.model, captions=False))
    batches = [gallery.samples[start : start + _BATCH] for start in range(0, total, _BATCH)]
    searched = list[_Searched]()
    skips = Skips()
    with reporting.progress("search images", total, "images") as progress:
        for part, skipped in thread_map(encode, batches, threads_for_batches(checker.model.device)):
            searched += part
            skips.merge(skipped)
            progress.advance(len(part) + skipped.total)
    skips.check(total, checker.settings.max_bad_searched, f"--search-images {spec}")
    if not searched:
        raise ClipcidError(f"--search-images {spec} holds no readable image.", "Give other data.")
    if skips.total:
        reporting.warn(f"Images of {spec} skipped: {skips.total:,}\n{skips.describe()}")
    return SearchImages(
        torch.stack([image.row for image in searched]).numpy(),
        [image.sample.key for image in searched],
        [next(iter(image.sample.captions), "") for image in searched],
        [image.thumbnail for image in searched],
    )


def write_gallery(checker: Checker, images: SearchImages, folder: Path) -> Parity:
    """Write the page that searches the images into an export's web folder, and compare its answers with the original's."""
    _, text_encoder = (folder / WEB / name for name in page_encoders(checker.settings))
    files = write_search(folder / WEB, describe_for_page(checker.model), text_encoder, images)
    size = sum(path.stat().st_size for path in files)
    reporting.note(f"The page searches {len(images.names):,} images, which take {size / 1e6:,.1f} MB beside it.")
    return _compare(checker, torch.from_numpy(images.rows), text_encoder, size)


@dataclasses.dataclass(frozen=True)
class _Searched:
    """A sample that the page can search, its row [D], and its image as a small WebP."""

    sample: Sample
    row: torch.Tensor
    thumbnail: bytes


@dataclasses.dataclass(frozen=True)
class _BatchEncoder:
    """Encodes a batch of samples by the original model, and counts those it leaves out. Several threads may call it."""

    checker: Checker
    decoder: Decoder

    def __call__(self, samples: Sequence[Sample]) -> tuple[list[_Searched], Skips]:
        decoded, render = Decoded(), self.decoder.render
        assert render is not None
        # Of a large image only what is needed is kept.
        small = {
            place: (render(image), encode_thumbnail(image, _THUMBNAIL_SIDE))
            for place, image in self.decoder.read_images(samples, decoded, render)
        }
        searched = list[_Searched]()
        if small:
            rows = self.checker.original.images(
                torch.from_numpy(np.stack([pixels for pixels, _ in small.values()]))
            ).cpu()
            for (place, (_, thumbnail)), row in zip(small.items(), rows, strict=True):
                if row.isfinite().all():
                    searched.append(_Searched(samples[place], row, thumbnail))
                else:
                    decoded.failures[place] = "nan_row"
        return searched, Skips.of({samples[place].key: reason for place, reason in sorted(decoded.failures.items())})


def _compare(checker: Checker, rows: torch.Tensor, text_encoder: Path, size: int) -> Parity:
    """Compare the cosines of the page's rows and texts with the original's: largest difference, same nearest image."""
    tokens = checker.inputs.tokens
    written = torch.from_numpy(read_search_rows(text_encoder.parent, rows.shape[1]))
    session = OnnxSession(text_encoder)
    cosines, expected = session(tokens) @ written.T, checker.original.texts(tokens) @ rows.T
    parity = Parity(
        precision=smallest_kind(checker.settings),
        images=len(rows),
        max_cosine_difference=float((cosines - expected).abs().max()),
        agreement=float((cosines.argmax(dim=1) == expected.argmax(dim=1)).double().mean()),
        bytes=size,
        zeroshot=None,
        engine=session.engine,
    )
    validate_parity(SEARCH, parity, checker.model.info.spec, checker.settings)
    return parity
