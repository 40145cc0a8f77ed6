"""Further texts of a step, for the text tower alone: lines of `embed --texts`, or variants of captions."""

from __future__ import annotations

import dataclasses

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.command import data_command, texts_command
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.embeddings.text_folder import EmbeddedTexts, TextLines, open_texts
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import parse_model
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
class ExtraTexts:
    """The further texts of a run; either lines or variants is None.

    Attributes:
        rows: The teacher's embeddings of all there are.
        number: Texts a step, over all processes; None for as many as the batch has samples.
        fingerprints: Of the files of the lines.
    """

    rows: Rows
    lines: TextLines | None
    variants: TextVariants | None
    number: int | None
    fingerprints: list[FileRecord]

    def read(self, text: ExtraText) -> str:
        """Return the words."""
        if self.lines is not None:
            return self.lines[text.row]
        assert self.variants is not None
        assert text.sample is not None
        sample = text.sample.read()
        return self.variants(sample.captions, sample.key, text.row % self.variants.number)


def find_extra_texts(
    settings: DistillSettings, embeddings: Embeddings, variants: TextVariants | None, reporter: Reporter
) -> ExtraTexts | None:
    """Find the further texts of a run: of `embed --texts`, and where there are none variants of captions.

    Args:
        embeddings: The teacher's.
        variants: The variants of captions that are embedded; None for none.
    """
    if not settings.shows_extra_texts:
        return None
    spec = None if embeddings.sidecar is None else embeddings.sidecar.model.spec
    folder = settings.texts
    if folder is None and spec is not None:
        kept = WorkDirectory(settings.work).texts(parse_model(spec).slug)
        folder = kept if (kept / "texts.json").exists() else None
    if folder is not None:
        texts = open_texts(folder, spec)
        _validate_model(settings, texts, embeddings)
        reporter.note(f"Extra texts, for the text tower alone: of {folder}, {len(texts.rows):,} texts.")
        return ExtraTexts(texts.rows, texts.lines, None, settings.extra_texts, texts.fingerprints())
    if variants is not None:
        reporter.note(
            f"Extra texts, for the text tower alone: of the {variants.number} variants of each sample's captions."
        )
        return ExtraTexts(embeddings.rows(Kind.VARIANTS), None, variants, settings.extra_texts, [])
    if settings.extra_texts is None:
        return None
    more = settings.data_flags | {"text": True, "text_variants": 8}
    raise ClipcidError(
        f"--extra-texts {settings.extra_texts}, but there are no texts: neither of `embed --texts` in "
        f"{settings.work}/texts, nor variants of captions in {embeddings.folder}.",
        f"Run: {texts_command(spec, work=settings.work)}\n"
        f"Or run: {data_command(embeddings.folder, embeddings.sidecar, settings.data, **more)}",
    )


def _validate_model(settings: DistillSettings, texts: EmbeddedTexts, embeddings: Embeddings) -> None:
    made, model = texts.sidecar.model, None if embeddings.sidecar is None else embeddings.sidecar.model
    if texts.rows.shape[1] == embeddings.width and (model is None or made.weights_hash == model.weights_hash):
        return
    of = "another tool's" if model is None else f"of {model.spec}, other weights"
    again = texts_command(None if model is None else model.spec, out=texts.folder, overwrite=True)
    without = "Add" if settings.texts is None else "Omit --texts and add"
    raise ClipcidError(
        f"The texts in {texts.folder} were embedded by {made.spec}, width {texts.rows.shape[1]}; "
        f"the embeddings in {embeddings.folder} are {of}, width {embeddings.width}.",
        f"{without} --extra-texts 0, or run: {again}",
    )
