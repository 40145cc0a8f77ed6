"""``--against``: the images that others are compared with, found as embeddings or embedded by the same model."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings, has_usable_row, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.layouts import find_rows
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.output import is_claimed
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.steps.balance.samples import open_named
from clipcid_cli.steps.embed.result import EmbedCost, Embedded
from clipcid_cli.steps.embed.run import make_embeddings
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.shared import ReadingSettings


@dataclasses.dataclass(frozen=True)
class Reference:
    """One reference.

    Attributes:
        name: As given by the user.
        identity: Hash of its files.
        numbers: Its rows that are usable, int64 [R], ascending.
    """

    name: str
    identity: str
    embeddings: Embeddings
    numbers: IntArray


def refuse_missing(settings: BalanceSettings) -> None:
    """Refuse references that are neither embeddings nor data, before anything is embedded."""
    for name in settings.against:
        if not _holds_embeddings(Path(name)):
            try:
                open_named(settings, name)
            except ClipcidError as error:
                raise ClipcidError(f"--against {name}: {error.message}", error.fix) from error


def plan_references(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, reporter: Reporter
) -> list[tuple[str, int, EmbedCost | None]]:
    """Look at what ``--against`` names as `open_references` does, for ``--dry-run``: nothing is made or written.

    Returns:
        Of each its name, its images, and what embedding them would cost; None where the embeddings are there.
    """
    opened = [(name, _open(settings, machine, embeddings, name, reporter)) for name in settings.against]
    return [
        (name, each.num_rows, None) if isinstance(each, Embeddings) else (name, each.images, each)
        for name, each in opened
    ]


def open_references(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, reporter: Reporter
) -> list[Reference]:
    """Open what ``--against`` names; images are embedded first, as the embeddings to balance were."""
    found = list[Reference]()
    for name in settings.against:
        reference = _open(settings, machine, embeddings, name, reporter)
        assert isinstance(reference, Embeddings)  # this is no dry run
        bad = machine.on_main(partial(reference.find_bad_rows, texts=False))
        if len(bad):
            reporter.warn(f"{len(bad):,} rows of {name} are zero or not finite, and nothing is compared with them.")
        identity = identity_of({}, machine.on_main(reference.fingerprints))
        found.append(Reference(name, identity, reference, np.delete(np.arange(reference.num_rows), bad)))
    return found


def _open(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, name: str, reporter: Reporter
) -> Embeddings | EmbedCost:
    """Open the embeddings of a reference; where there are none make them, or in a dry run return what that would cost."""
    folder = Path(name)
    if not _holds_embeddings(folder):
        folder, made = _embed(settings, machine, embeddings, name, reporter)
        if isinstance(made, EmbedCost):
            return made
    cache = None if settings.dry_run else WorkDirectory(settings.work).fingerprints
    reference = open_embeddings(folder, settings.keys, settings.npz_array, cache)
    _refuse_other_model(embeddings, reference, name)
    if not machine.on_main(partial(has_usable_row, reference.rows(Kind.IMAGES))):
        raise ClipcidError(f"All {reference.num_rows:,} rows of {name} are zero or not finite.", "Make them again.")
    return reference


def _holds_embeddings(folder: Path) -> bool:
    """Tell whether a folder is one of embeddings, as `open_embeddings` finds them; also where they are unfinished."""
    return is_claimed(folder, "embed") or find_rows(folder) is not None


def _embed(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, data: str, reporter: Reporter
) -> tuple[Path, Embedded]:
    """Embed reference images as the embeddings to balance were, into the folder; what is there already is taken."""
    model = settings.model if embeddings.sidecar is None else embeddings.sidecar.model.spec
    if model is None:
        raise ClipcidError(
            f"{data} contains no embeddings, and {embeddings.folder} does not record the model to embed it with.",
            "Name the model (--model M), or give a folder of embeddings: --against EMB",
        )
    name = with_default_tag(parse_model(model))
    digest = hashlib.blake2b(data.encode(), digest_size=4).hexdigest()
    folder = WorkDirectory(settings.work).references / f"{name.slug}-{digest}"
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ReadingSettings)}
    given |= {"batch_size": None, "precision": "auto", "data": data, "model": model, "text": False, "out": folder}
    if embeddings.sidecar is not None:
        made_so = embeddings.sidecar.made
        given |= {"fast_decode": made_so.fast_decode, "precision": made_so.precision}
        if made_so.precision == "fp16" and machine.device.type == "cpu":
            given["precision"] = "fp32"
            reporter.note(f"{embeddings.folder} was made in fp16, which needs a GPU: {data} is embedded in fp32.")
    try:
        made = make_embeddings(EmbedSettings(**given), machine, reporter)
    except ClipcidError as error:
        raise ClipcidError(f"--against {data}: {error.message}", error.fix) from error
    return folder, made


def _refuse_other_model(embeddings: Embeddings, reference: Embeddings, name: str) -> None:
    """Refuse a reference of another width; where both say how they were made, of another model or preprocessing."""
    fix = "Embed it with the same model: give the images themselves (--against DATA)."
    if embeddings.width != reference.width:
        raise ClipcidError(
            f"The embeddings in {name} have width {reference.width}, those in {embeddings.folder} {embeddings.width}.",
            fix,
        )
    sidecars = [each.sidecar for each in (embeddings, reference) if each.sidecar is not None]
    if len(sidecars) < 2:
        return
    own, other = (sidecar.model for sidecar in sidecars)
    if own.weights_hash != other.weights_hash:
        raise ClipcidError(
            f"The embeddings in {name} are of {other.spec} ({other.weights_hash}), those in {embeddings.folder} "
            f"of {own.spec} ({own.weights_hash}).",
            fix,
        )
    decoded = [sidecar.made for sidecar in sidecars]
    if decoded[0].preprocess != decoded[1].preprocess:
        ways = ["with" if each.fast_decode else "without" for each in decoded]
        raise ClipcidError(
            f"The images of {name} were preprocessed otherwise ({decoded[1].preprocess}, {ways[1]} --fast-decode) than "
            f"those of {embeddings.folder} ({decoded[0].preprocess}, {ways[0]}).",
            "Embed them likewise: give the images themselves (--against DATA).",
        )
