"""Further texts of a step, for the text tower alone: lines of `embed --texts`, or variants of captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.command import data_command, texts_command
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.embeddings.text_folder import EmbeddedTexts, TextLines, open_texts
from clipcid_cli.formats.results.matched_samples import SampleRows
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings


@dataclasses.dataclass(frozen=True)
class ExtraText:
    """A further text, as it is sent to a worker.

    Attributes:
        row: Its row among the teacher's embeddings of such texts: of its line, or of the variant.
        sample: The sample of whose captions it is a variant; None for a line.
    """

    row: int
    sample: SampleRef | None = None


@dataclasses.dataclass(frozen=True)
class ExtraTextReader:
    """Makes the text of an `ExtraText`, in a worker.

    Attributes:
        lines: The texts of `embed --texts`; None where variants are shown.
        variants: The variants; None where lines are shown.
    """

    lines: TextLines | None
    variants: TextVariants | None

    def __call__(self, text: ExtraText) -> str:
        """Return it."""
        if text.sample is None:
            assert self.lines is not None
            return self.lines[text.row]
        assert self.variants is not None
        sample = text.sample.read()
        return self.variants(sample.captions, sample.key, text.row % self.variants.number)


@dataclasses.dataclass(frozen=True)
class RowRanges:
    """Rows starts[i] … stops[i] − 1 for each i, int64 [n] both."""

    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    def draw(self, random: np.random.Generator, number: int) -> npt.NDArray[np.int64]:
        """Draw rows uniformly, int64 [number]."""
        ends = np.cumsum(self.stops - self.starts)
        places = random.integers(ends[-1], size=number)
        return places + (self.stops - ends)[np.searchsorted(ends, places, side="right")]


@dataclasses.dataclass(frozen=True)
class ExtraTexts:
    """The further texts of a run, drawn uniformly for each step: of all lines, or of the variants of some samples.

    Attributes:
        rows: The teacher's embeddings of all there are.
        texts: Texts of `embed --texts`; None where they are variants of captions.
        variants: Those variants.
        samples: The samples to train on, whose variants they are.
        seed: Decides the draws.
        number: Texts a step, over all processes; None for as many as the batch has samples.
    """

    rows: Rows
    texts: EmbeddedTexts | None
    variants: TextVariants | None
    samples: SampleRows
    seed: int
    number: int | None

    @property
    def reader(self) -> ExtraTextReader:
        """What makes their texts in a worker."""
        return ExtraTextReader(None if self.texts is None else self.texts.lines, self.variants)

    def number_at(self, batch_size: int) -> int:
        """Return how many texts a step has, over all processes."""
        return batch_size if self.number is None else self.number

    def share(
        self, step: int, batch_size: int, rank: int, size: int, samples: RowRanges, place: Callable[[int], SampleRef]
    ) -> list[ExtraText]:
        """Draw one process's part of a step's texts: a slice of what one process would take.

        Args:
            batch_size: Samples of the whole batch.
            samples: Whose variants may be drawn: rows among those to train on, the same in each process.
            place: Where a sample is, by its row.
        """
        random = np.random.default_rng(derive_seed("extra texts", self.seed, step))
        number = self.number_at(batch_size)
        mine = slice(rank * number // size, (rank + 1) * number // size)
        if self.variants is None:
            return [ExtraText(row) for row in random.integers(len(self.rows), size=number)[mine].tolist()]
        chosen = samples.draw(random, number)[mine]
        variants = random.integers(self.variants.number, size=number)[mine]
        rows = self.samples.column("embeddings")[chosen].astype(np.int64) * self.variants.number + variants
        return [ExtraText(row, place(sample)) for row, sample in zip(rows.tolist(), chosen.tolist(), strict=True)]


def find_extra_texts(
    settings: DistillSettings,
    embeddings: Embeddings,
    samples: SampleRows,
    variants: TextVariants | None,
    reporter: Reporter,
) -> ExtraTexts | None:
    """Find the further texts of a run: of `embed --texts`, and where there are none variants of captions.

    Args:
        embeddings: The teacher's.
        variants: The variants of captions that are shown; None for none.
    """
    if not settings.shows_extra_texts:
        return None
    spec = None if embeddings.sidecar is None else embeddings.sidecar.model.spec
    folder = settings.texts
    if folder is None and spec is not None:
        kept = WorkDirectory(settings.work).texts(parse_model(spec).slug)
        folder = kept if (kept / "texts.json").exists() else None
    if folder is None:
        if variants is None:
            if settings.extra_texts is None:
                return None
            more = settings.data_flags | {"text": True, "text_variants": 8}
            raise ClipcidError(
                f"--extra-texts {settings.extra_texts}, but there are no texts: neither of `embed --texts` in "
                f"{settings.work}/texts, nor variants of captions in {embeddings.folder}.",
                f"Run: {texts_command(spec, work=settings.work)}\n"
                f"Or run: {data_command(embeddings.folder, embeddings.sidecar, settings.data, **more)}",
            )
        rows, texts, what = (
            embeddings.rows(Kind.VARIANTS),
            None,
            f"the {variants.number} variants of each sample's captions",
        )
    else:
        texts = open_texts(folder, spec)
        _check_model(settings, texts, embeddings)
        rows, variants = texts.rows, None
        what = f"{folder}, {len(rows):,} texts"
    reporter.note(f"Extra texts, for the text tower alone: of {what}.")
    return ExtraTexts(rows, texts, variants, samples, settings.seed, settings.extra_texts)


def _check_model(settings: DistillSettings, texts: EmbeddedTexts, embeddings: Embeddings) -> None:
    made, model = texts.sidecar.model, None if embeddings.sidecar is None else embeddings.sidecar.model
    if texts.rows.shape[1] != embeddings.width or (model is not None and made.weights_hash != model.weights_hash):
        of = "another tool's" if model is None else f"of {model.spec}, other weights"
        again = texts_command(None if model is None else model.spec, out=texts.folder, overwrite=True)
        without = "Add" if settings.texts is None else "Omit --texts and add"
        raise ClipcidError(
            f"The texts in {texts.folder} were embedded by {made.spec}, width {texts.rows.shape[1]}; "
            f"the embeddings in {embeddings.folder} are {of}, width {embeddings.width}.",
            f"{without} --extra-texts 0, or run: {again}",
        )
