"""`embed --texts`: embeddings of the lines of a text file, without images."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.embeddings.text_folder import (
    STEP,
    TextCounts,
    TextLines,
    copy_texts,
    read_texts,
    refuse_foreign_folder,
    rows_path,
    texts_path,
)
from clipcid_cli.formats.fingerprint import FileRecord, Memo, find_changed, record
from clipcid_cli.formats.output import Output, unfinished
from clipcid_cli.formats.sidecar import TextsSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.model_identity import is_of
from clipcid_cli.steps.reporting import Progress, Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Reads and tokenises texts, in a worker; batches are always of one size B, missing rows are zero."""

    lines: TextLines
    tokenizer: Tokenizer
    batch_size: int
    context_length: int

    def __call__(self, rows: range) -> torch.Tensor:
        """Return the tokens of some texts, int64 [B, L]."""
        tokens = torch.zeros(self.batch_size, self.context_length, dtype=torch.int64)
        tokens[: len(rows)] = self.tokenizer([self.lines[row] for row in rows])
        return tokens


@dataclasses.dataclass(frozen=True)
class TextEmbedder:
    """Embeds texts and writes their rows, file by file."""

    model: ClipModel
    precision: Precision
    batch_size: int
    workers: int

    def embed(self, folder: Path, numbers: list[int], sizes: list[int], progress: Progress) -> None:
        """Embed the texts of some files."""

        def batches() -> Iterator[range]:
            for number in numbers:
                first = number * sizes[0]
                for start in range(first, first + sizes[number], self.batch_size):
                    yield range(start, min(start + self.batch_size, first + sizes[number]))

        prepare = TextTokenizer(
            TextLines(str(texts_path(folder))),
            self.model.tokenizer,
            self.batch_size,
            self.model.info.context_length,
        )
        tokens = load_batches(batches(), prepare, self.workers)
        threads = threads_for_batches(self.model.device)
        found = zip(batches(), map_threads(tokens, self._encode, threads), strict=True)
        for number in numbers:
            rows = np.concatenate(list(self._take(found, sizes[number], progress)))
            write_npy(rows_path(folder, number), rows)

    def _encode(self, tokens: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float16]]:
        half: np.ndarray[Any, np.dtype[np.float16]] = (
            self.model.encode_texts(tokens, self.precision).to(torch.float16).cpu().numpy()
        )
        return half

    def _take(
        self, found: Iterator[tuple[range, Any]], size: int, progress: Progress
    ) -> Iterator[np.ndarray[Any, np.dtype[np.float16]]]:
        """Yield the rows of one file, batch by batch."""
        taken = 0
        while taken < size:
            batch, rows = next(found)
            rows = rows[: len(batch)]
            usable = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
            if not usable.all():
                place = batch.start + int(np.flatnonzero(~usable)[0])
                raise ClipcidError(
                    f"The embedding of text {place + 1:,} is not finite.", "Try --precision fp32, or remove the text."
                )
            taken += len(rows)
            progress.advance(len(rows))
            yield rows


def embed_texts(
    settings: EmbedSettings, machine: Machine, reporter: Reporter, name: ModelName, load: Callable[[], TextEmbedder]
) -> dict[str, Any]:
    """Embed the texts of a file.

    Args:
        load: Loads the model; called when there is work for it.

    Returns:
        The JSON object: ``texts, skipped, texts_per_second, seconds{encode}, files{}``.

    Raises:
        ClipcidError: when the file cannot be used, or the output is another run's.
    """
    assert settings.texts is not None
    source = settings.texts
    folder = settings.out or WorkDirectory(settings.work).texts(name.slug)
    inputs = machine.on_main(lambda: _check(source, folder))
    finished = machine.on_main(lambda: _find_finished(folder, settings, name, inputs))
    if finished is not None:
        reporter.note(f"{folder} already holds the embeddings of these texts.")
        return _describe(folder, finished)
    embedder = load()
    info = embedder.model.info
    identity = {
        "weights": info.weights_hash,
        "tokenizer": f"{info.tokenizer}, {info.context_length} tokens",
        "precision": embedder.precision.name,
        "batch_size": embedder.batch_size,
    }
    if settings.dry_run:
        return machine.on_main(lambda: _estimate(source, embedder, machine.size))
    reporter.note(
        f"Embedding the texts of {source} with {name.spec}: {2 * info.embed_dim:,} bytes a text and the text."
    )
    with claim_output(
        machine, folder, STEP, TextsSidecar, settings=identity, inputs=inputs, overwrite=settings.overwrite
    ) as output:
        if output.finished is not None:
            reporter.note(f"{folder} already holds the embeddings of these texts.")
            return _describe(folder, output.finished)
        work = output.work
        machine.on_main(output.start)
        counts = machine.on_main(lambda: copy_texts(source, work))
        sizes = TextLines(str(texts_path(work))).batch_sizes()
        missing = machine.on_main(lambda: [n for n in range(len(sizes)) if not rows_path(work, n).exists()])
        mine = missing[machine.rank :: machine.size]
        start = time.perf_counter()
        with reporter.progress("embed", sum(sizes[number] for number in mine), "texts") as progress:
            machine.on_all(lambda: embedder.embed(work, mine, sizes, progress))
        seconds = time.perf_counter() - start
        embedded = sum(sizes[number] for number in missing)
        sidecar = machine.on_main(
            lambda: _finish(output, len(sizes), counts, embedded / seconds, seconds, embedder.model)
        )
    return _describe(folder, sidecar)


def _check(source: Path, folder: Path) -> list[FileRecord]:
    """Look at the file and the output folder before a model is loaded; return the file's fingerprint."""
    refuse_foreign_folder(folder)
    next(read_texts(source, TextCounts()))
    return [record(source)]


def _find_finished(
    folder: Path, settings: EmbedSettings, name: ModelName, inputs: list[FileRecord]
) -> TextsSidecar | None:
    """Return the sidecar of finished embeddings that match the request, without loading the model; None otherwise.

    Where the request leaves batch size or precision open, any will do.
    """
    if settings.overwrite or unfinished(folder, STEP) is not None:  # what is left of a run is removed with a lock
        return None
    path = sidecar_path(folder, STEP)
    sidecar = read_sidecar(path, TextsSidecar)
    if sidecar is None:
        return None
    same = (
        settings.batch_size in (None, sidecar.settings["batch_size"])
        and settings.precision in ("auto", sidecar.settings["precision"])
        and [each.content for each in sidecar.inputs] == [each.content for each in inputs]
        and is_of(sidecar.model, name)
    )
    return sidecar if same and find_changed(folder, sidecar.outputs, path) is None else None


def _estimate(source: Path, embedder: TextEmbedder, processes: int) -> dict[str, Any]:
    """Check the file, and estimate from a few batches what embedding it takes; nothing is written."""
    counts = TextCounts()
    first = list(itertools.islice(read_texts(source, counts), embedder.batch_size))
    for _ in read_texts(source, counts := TextCounts()):
        pass
    tokens = embedder.model.tokenizer(first)
    batch = time_trial(lambda: embedder.model.encode_texts(tokens, embedder.precision), repeats=3).seconds
    return {
        "dry_run": True,
        "texts": counts.texts,
        "bytes": counts.texts * 2 * embedder.model.info.embed_dim,
        "seconds": {"encode": round(batch * counts.texts / len(first) / processes, 1)},
    }


def _finish(
    output: Output[TextsSidecar], number: int, counts: TextCounts, speed: float, seconds: float, model: ClipModel
) -> TextsSidecar:
    files = [texts_path(output.work), *(rows_path(output.work, each) for each in range(number))]
    return output.commit(
        outputs=Memo().record_all(files, output.work),
        counts={"texts": counts.texts, "skipped": {"empty_line": counts.empty} if counts.empty else {}},
        seconds={"encode": seconds},
        texts_per_second=round(speed, 1) or None,
        model=dataclasses.asdict(model.info) | {"logit_scale": model.logit_scale},
    )


def _describe(folder: Path, sidecar: TextsSidecar) -> dict[str, Any]:
    return {
        **sidecar.counts,
        "texts_per_second": sidecar.texts_per_second,
        "seconds": sidecar.seconds,
        "files": {"texts": str(folder), "sidecar": str(sidecar_path(folder, STEP))},
    }
