"""``--against``: the images that others are compared with, found as embeddings or embedded by the same model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from clipcid_cli.algorithms.search.distances import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.pairing import list_files, list_inner_files
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.steps.embed.run import make_embeddings
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import EmbedSettings


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


def open_references(
    settings: BalanceSettings, machine: Machine, embeddings: Embeddings, reporter: Reporter
) -> list[Reference]:
    """Open what ``--against`` names; images are embedded first.

    Args:
        embeddings: The embeddings to balance.

    Raises:
        ClipcidError: when one cannot be opened or embedded, or is of another model.
    """
    found: list[Reference] = []
    for name in settings.against:
        folder = Path(name) if _holds_embeddings(Path(name)) else _embed(settings, machine, embeddings, name, reporter)
        cache = WorkDirectory(settings.work).fingerprints
        reference = open_embeddings(folder, settings.keys, settings.npz_array, cache)
        _refuse_other_model(embeddings, reference, name)
        bad = machine.on_main(lambda opened=reference: opened.find_bad_rows(texts=False))  # type: ignore[misc]
        if len(bad):
            reporter.warn(f"{len(bad):,} rows of {name} are zero or not finite, and nothing is compared with them.")
        entries = machine.on_main(reference.fingerprints)
        content = json.dumps([(entry["size"], entry["hash"]) for entry in entries])
        identity = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        numbers = np.delete(np.arange(reference.num_rows), bad)
        if not len(numbers):
            raise ClipcidError(f"None of the {reference.num_rows:,} rows of {name} is finite.", "Make them again.")
        found.append(Reference(name, identity, reference, numbers))
    return found


def _holds_embeddings(folder: Path) -> bool:
    """Tell whether a folder is one of embeddings, as `open_embeddings` finds them; also where they are unfinished."""
    if any((folder / name).exists() for name in ("img_emb", "embed.json")):
        return True
    return bool(list_files(folder, ".npy") or list_files(folder, ".npz") or list_inner_files(folder, ".npz"))


def _embed(settings: BalanceSettings, machine: Machine, embeddings: Embeddings, data: str, reporter: Reporter) -> Path:
    """Embed reference images with the model of the embeddings to balance; what is there already is taken."""
    model = settings.model if embeddings.sidecar is None else str(embeddings.sidecar["model"]["spec"])
    if model is None:
        raise ClipcidError(
            f"{data} contains no embeddings, and {embeddings.folder} does not record the model to embed it with.",
            "Name the model (--model M), or give a folder of embeddings: --against EMB",
        )
    name = with_default_tag(parse_model(model))
    digest = hashlib.blake2b(str(data).encode(), digest_size=4).hexdigest()
    folder = WorkDirectory(settings.work).references / f"{name.slug}-{digest}"
    shared = ("work", "config", "device", "workers", "seed", "overwrite", "quiet", "debug", "keys", "max_bad_fraction")
    columns = ("image_column", "caption_column", "key_column")
    given = {each: getattr(settings, each) for each in shared + columns}
    make_embeddings(EmbedSettings(**given, data=data, model=model, text=False, out=folder), machine, reporter)
    return folder


def _refuse_other_model(embeddings: Embeddings, reference: Embeddings, name: str) -> None:
    """Refuse a reference of another width, or that another model made where both say which.

    Raises:
        ClipcidError: naming both.
    """
    fix = "Embed it with the same model: give the images themselves (--against DATA)."
    if embeddings.width != reference.width:
        raise ClipcidError(
            f"The embeddings in {name} have width {reference.width}, those in {embeddings.folder} {embeddings.width}.",
            fix,
        )
    made = [None if each.sidecar is None else each.sidecar["model"] for each in (embeddings, reference)]
    if made[0] is not None and made[1] is not None and made[0]["weights_hash"] != made[1]["weights_hash"]:
        raise ClipcidError(
            f"The embeddings in {name} are of {made[1]['spec']} ({made[1]['weights_hash']}), those in {embeddings.folder} "
            f"of {made[0]['spec']} ({made[0]['weights_hash']}).",
            fix,
        )
