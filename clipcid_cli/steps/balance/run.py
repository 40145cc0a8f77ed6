"""`balance`: embeddings → forest → sets → keep list, curve, report, and new shards where requested."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, list_shards
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import METADATA, Kind, remove_copies
from clipcid_cli.formats.embeddings.sidecar import read_embed_sidecar
from clipcid_cli.formats.files import validate_writable
from clipcid_cli.formats.fingerprint import find_lost
from clipcid_cli.formats.output import WORK, Output, find_works, list_differences, other_run_error
from clipcid_cli.formats.results.forest import (
    CURVE,
    ROW_FILES,
    SET_TABLE,
    RowFile,
    forest_path,
    read_row_files,
    write_row_files,
)
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skipped import SKIPPED
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.libraries import keep_few_kernels
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalancePlan, FoundClusters
from clipcid_cli.steps.balance.compute import begin, compute
from clipcid_cli.steps.balance.cost import estimate_cost
from clipcid_cli.steps.balance.filters.against import open_references, validate_models, validate_none_missing
from clipcid_cli.steps.balance.filters.cluster_cap import find_cap_clusters
from clipcid_cli.steps.balance.report import REPORT, has_new_pictures
from clipcid_cli.steps.balance.result import BalanceCost, BalanceResult
from clipcid_cli.steps.balance.samples import validate_data, validate_data_there
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.balance.write import validate_new, validate_uids, write, write_kept
from clipcid_cli.steps.balance.write_data import FLAG, form_of, validate_own
from clipcid_cli.steps.balance.write_shards import Form, TarForm, write_kept_samples
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.embed.run import ensure_embeddings
from clipcid_cli.steps.embeddings import open_given
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL, configured


def run(settings: BalanceSettings) -> BalanceResult | BalanceCost | EmbedCost:
    """Balance a data set; with ``--dry-run`` estimate what that takes, or first the embeddings that it lacks."""
    with open_dist_context(settings.device) as context:
        plan = make_plan(settings, context)
        if isinstance(plan, EmbedCost):
            return plan
        if settings.neighbors == "partitioned":  # the tiles of partitions are of many sizes
            keep_few_kernels()
        if settings.dry_run:
            return estimate_cost(plan)
        spec = context.on_rank0(plan.identify)
        if not settings.overwrite:
            context.on_rank0(lambda: _validate_none_lost(plan))
        with claim_output(context, spec) as output:
            result = context.on_rank0(lambda: _take_or_start(plan, output))
            if result is None:
                found = compute(begin(plan, output))
                context.barrier()  # until here another process may read what it has mapped
                result = context.on_rank0(lambda: write(found))
            context.on_rank0(lambda: write_kept(plan))
            if plan.data is not None:
                folder, form = _choose_form(settings, plan.data)
                written = write_kept_samples(plan, folder, form)
                result = msgspec.structs.replace(result, **{"data" if settings.write_data else "shards": written})
        skipped = plan.folder / SKIPPED
        files = {
            "keep_list": plan.keep_list,
            "forest": forest_path(plan.folder, settings.forest_kind),
            "sets": plan.folder / SET_TABLE,
            "curve": plan.folder / CURVE,
            "report": plan.folder / REPORT,
            "skipped": skipped if skipped.is_file() else None,
            "sidecar": sidecar_path(plan.folder, "balance"),
            "keys": settings.write_keys,
            "pairs": settings.write_pairs,
            "uids": settings.write_uids,
            "shards": settings.write_shards,
            "data": settings.write_data,
        }
        paths = {name: str(path) for name, path in files.items() if path is not None}
        return msgspec.structs.replace(result, files=paths)


def make_plan(settings: BalanceSettings, context: DistContext) -> BalancePlan | EmbedCost:
    """Look at what the settings name, before hours of embedding; then make what embeddings there are none of.

    A dry run makes none, and returns what they would cost.
    """
    seconds = dict[str, float]()
    with timed(seconds, "embed"):
        clusters = context.on_rank0(lambda: _validate_named(settings))
        folder = _find_embeddings(settings, context)
        if isinstance(folder, EmbedCost):
            return folder
        embeddings = open_given(settings, folder, None if settings.dry_run else settings.work)
    context.on_rank0(lambda: _note_new_shards(settings, embeddings))
    data = context.on_rank0(lambda: _open_data(settings, embeddings))
    references = [] if settings.dry_run else open_references(settings, embeddings, context)
    return BalancePlan(
        settings=settings,
        context=context,
        embeddings=embeddings,
        data=data,
        clusters=clusters,
        references=references,
        seconds=seconds,
    )


def _validate_named(settings: BalanceSettings) -> FoundClusters | None:
    for path in (settings.write_uids, settings.write_pairs, settings.write_keys):
        if path is not None:
            validate_writable(path)
    if settings.write_shards is not None:
        TarForm("--write-shards").validate(settings.write_shards)
    if settings.write_data is not None:
        validate_own(settings.write_data)
    validate_none_missing(settings)
    return find_cap_clusters(settings)


def _find_embeddings(settings: BalanceSettings, context: DistContext) -> Path | EmbedCost:
    work = WorkDirectory(settings.work)
    folder = settings.embeddings
    if folder is None and settings.data is None and settings.model is None:
        folder = context.on_rank0(work.find_embeddings)
        reporting.note(f"Embeddings: {folder}.")
    elif folder is None:
        model = settings.model or context.on_rank0(lambda: _model_of(work)) or configured().get("model", DEFAULT_MODEL)
        context.on_rank0(lambda: validate_models(settings, model))
        return ensure_embeddings(settings, context, data=settings.data, model=model)
    return folder


def _note_new_shards(settings: BalanceSettings, embeddings: Embeddings) -> None:
    """Say that the data has more shards than its embeddings, and how to take them in, where no data was named."""
    if settings.data is not None or settings.embeddings is not None or embeddings.sidecar is None:
        return
    spec = embeddings.sidecar.data.spec
    embedded = set(embeddings.shards)
    now = list[str]()
    with suppress(ClipcidError):  # it is gone, and not needed
        now = list_shards(spec)
    new = len(set(now) - embedded)
    if new and not embedded.isdisjoint(now):
        shards = "1 shard that is" if new == 1 else f"{new:,} shards that are"
        reporting.note(f"{spec} has {shards} not embedded yet. To include them, name the data in the command.")


def _model_of(work: WorkDirectory) -> str | None:
    """Return the model of the work directory's embeddings, when there are those of one model."""
    try:
        sidecar = read_embed_sidecar(work.find_embeddings())
    except ClipcidError:
        return None
    return None if sidecar is None else sidecar.model.spec


def _open_data(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data that the kept samples are copied from, and check that embeddings have what other settings need."""
    data = None
    if settings.write_shards is not None or settings.write_data is not None:
        flag = FLAG if settings.write_shards is None else "--write-shards"
        data = validate_data(settings, embeddings, flag)
        if settings.write_shards is not None and not data.has_tars:
            raise ClipcidError(
                f"--write-shards copies tar members, and {data.spec} does not consist of tars.",
                f"Give {FLAG} in its place, which writes the form of the data.",
            )
        folder, form = _choose_form(settings, data)
        _validate_apart(folder, form, data)
        form.validate(folder)
    validate_uids(settings, embeddings)
    if settings.reads_texts:
        embeddings.rows(Kind.TEXTS)  # refuses those without
    return data


def _choose_form(settings: BalanceSettings, data: Dataset) -> tuple[Path, Form]:
    """Return where the kept samples are written, and how."""
    if settings.write_shards is not None:
        return settings.write_shards, TarForm("--write-shards")
    assert settings.write_data is not None, "one of the two is given"
    return settings.write_data, form_of(data)


def _validate_apart(folder: Path, form: Form, data: Dataset) -> None:
    """Refuse a folder whose files would replace the data or become part of it, and names that lead out of the folder."""
    place = folder.resolve()
    for shard in data.shards:
        target = Path(os.path.normpath(place / f"{shard.name}{form.suffix}"))
        if not target.is_relative_to(place):
            raise ClipcidError(
                f"Shard {shard.source} is named {shard.name}, which leads out of {folder}.", "Rename the shard."
            )
        if "://" in shard.source:
            continue
        source = Path(shard.source).resolve()
        if target == source:
            raise ClipcidError(f"{form.flag} {folder} would overwrite the data itself.", "Give another folder.")
        if data.kind == "images" and place.is_relative_to(source):
            raise ClipcidError(f"{form.flag} {folder} would become part of the data.", "Give a folder outside of it.")


def _validate_none_lost(plan: BalancePlan) -> None:
    """Refuse embeddings that lack files of an output of `balance`, finished or not."""
    folder = plan.folder
    now = _list_row_files(plan.embeddings)
    fix = f"Add --overwrite to replace it, or write elsewhere ({WORK})."
    for holder in (folder, *find_works(folder, "balance")):
        path = holder / ROW_FILES
        if path.exists() and (lost := find_lost(read_row_files(path, fix), now)):
            raise other_run_error(f"{folder} holds balance output", {"inputs": lost})


def _list_row_files(embeddings: Embeddings) -> list[RowFile]:
    """List the files through which rows are numbered, each with the metadata beside it."""
    metadata = iter(embeddings.contents(METADATA))
    found: list[RowFile] = []
    for images, file in zip(embeddings.contents(Kind.IMAGES), embeddings.files, strict=True):
        found.append(RowFile(images.path, images.size, images.hash, rows=file.rows))
        if file.metadata is not None:
            beside = next(metadata)
            found.append(RowFile(beside.path, beside.size, beside.hash))
    return found


def _name_added(plan: BalancePlan, output: Output[BalanceSidecar]) -> dict[str, str]:
    """Return how a result differs; of embeddings that only have more shards than it, how many."""
    path = plan.folder / ROW_FILES
    there: list[RowFile] = []
    with suppress(ClipcidError):  # replaced anyway
        there = read_row_files(path, "") if path.exists() else []
    now = _list_row_files(plan.embeddings)
    added = sum(bool(each.rows) for each in now) - sum(bool(each.rows) for each in there)
    changed = {name for name in output.differences if name.startswith("input")}
    if not there or added <= 0 or find_lost(there, now):
        return output.differences
    others = {name: told for name, told in output.differences.items() if name not in changed}
    return others | {"inputs": f"{added:,} more shard{'s' * (added > 1)} now"}


def _take_or_start(plan: BalancePlan, output: Output[BalanceSidecar]) -> BalanceResult | None:
    """Return the result that is there already, unless its report can now show more; else start the output."""
    if output.finished is not None:
        if not has_new_pictures(plan, output.finished):
            reporting.note(f"{plan.folder} already holds this result.")
            return msgspec.convert(output.finished.result, BalanceResult)
        reporting.note("Pictures missing from the report can be read now: it is rewritten.")
    else:
        validate_new(plan.settings)
    if output.differences:
        told = list_differences(_name_added(plan, output))
        reporting.note(f"The result in {plan.folder}, made with other settings or inputs, will be replaced:\n{told}")
    validate_data_there(plan.settings, plan.embeddings)
    output.start()
    write_row_files(output.work / ROW_FILES, _list_row_files(plan.embeddings))
    SharedArrays(plan.context, output.work).clear()
    remove_copies(output.work)  # of a search in partitions that was killed
    plan.embeddings.validate_unique_keys()
    return None
