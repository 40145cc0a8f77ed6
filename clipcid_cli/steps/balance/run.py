"""`balance`: embeddings → forest → sets → keep list, curve, report, and new shards when asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.output import Output, fingerprint_file, read_sidecar, sidecar_path
from clipcid_cli.formats.results.curve import CURVE, write_curve
from clipcid_cli.formats.results.forest import forest_path
from clipcid_cli.formats.results.keep_list import KEEP_LIST, read_keep_list, write_keep_list
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.audit import Audit, audit_kept
from clipcid_cli.steps.balance.compare_linkage import OtherLinkage, compare_linkages
from clipcid_cli.steps.balance.cost import estimate_cost
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.report import write_report
from clipcid_cli.steps.balance.samples import require_data
from clipcid_cli.steps.balance.search import Survey, survey_rows
from clipcid_cli.steps.balance.sets import Inputs, Sets, make_sets
from clipcid_cli.steps.balance.write_lists import check_uids, write_kept
from clipcid_cli.steps.balance.write_shards import tar_shards, write_shards
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.embed.ensure import ensure_embeddings
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL

REPORT = "report.html"

# A set this large a share of all images is a chain or a placeholder more often than one picture many times.
_LARGE_SET = 0.01


def run(settings: BalanceSettings, reporter: Reporter) -> dict[str, Any]:
    """Balance a data set.

    Returns:
        The JSON object: ``images, kept, keep_ratio, threshold, components, largest_component, coverage, other_linkage{
        linkage, kept, coverage}, neighbors, audit{sampled, kept, near, rate, low, high}, skipped{}, seconds{embed, search,
        write}, files{}``. ``coverage`` is the share of dropped images that are farther than the threshold from the image
        that stands for them; ``other_linkage`` says what the linkage that was not asked for gives at the same threshold,
        and is null where that is not computed. ``audit`` is null for exact neighbors; for partitioned ones it says how many
        of the sampled kept images have another kept one within the threshold, the rate with the ends of its 95 % interval,
        and ``seconds.audit`` what it cost.

    Raises:
        ClipcidError: when there is nothing to balance, too much of it is unusable, or another run is in the way.
    """
    with open_machine(settings.device) as machine:
        started = time.perf_counter()
        folder, cache = _find_embeddings(settings, machine, reporter), WorkDirectory(settings.work).fingerprints
        embeddings = open_embeddings(folder, settings.keys, settings.npz_array, cache)
        seconds = {"embed": time.perf_counter() - started}
        if settings.dry_run:
            return estimate_cost(settings, machine, embeddings, reporter)
        shards = None
        if settings.write_shards is not None:
            shards = tar_shards(require_data(settings, embeddings, "--write-shards"), settings.write_shards)
        machine.on_main(lambda: check_uids(settings, embeddings))
        folder = WorkDirectory(settings.work).balance
        wanted = _wanted(settings, embeddings)
        fingerprints = machine.on_main(embeddings.fingerprints)
        with claim_output(
            machine,
            folder,
            "balance",
            settings=wanted,
            inputs=fingerprints,
            overwrite=settings.overwrite,
            replaceable=frozenset(wanted),
        ) as output:
            if output.finished is not None:
                reporter.note(f"{folder} holds this result already.")
                result: dict[str, Any] = output.finished["result"]
            else:
                result = _balance(settings, machine, embeddings, output, seconds, reporter)
            result["files"] = _files(folder, settings.neighbors)
            keep_list = folder / KEEP_LIST
            result["files"] |= machine.on_main(lambda: write_kept(settings, embeddings, keep_list, reporter))
            if shards is not None:
                assert settings.write_shards is not None  # as `shards` tells
                write_shards(
                    machine,
                    shards,
                    read_keep_list(keep_list),
                    fingerprint_file(keep_list),
                    settings.write_shards,
                    overwrite=settings.overwrite,
                    reporter=reporter,
                )
                result["files"]["shards"] = str(settings.write_shards)
        return result


def _find_embeddings(settings: BalanceSettings, machine: Machine, reporter: Reporter) -> Path:
    """Return the folder of the embeddings to balance, making them where there are none."""
    if settings.embeddings is not None:
        return settings.embeddings
    work = WorkDirectory(settings.work)
    if settings.data is None and settings.model is None:
        folder = machine.on_main(work.find_embeddings)
        reporter.note(f"Taking the embeddings in {folder}.")
        return folder
    model = settings.model or machine.on_main(lambda: _model_there(work)) or DEFAULT_MODEL
    return ensure_embeddings(settings, machine, reporter, data=settings.data, model=model)


def _model_there(work: WorkDirectory) -> str | None:
    """Return the model of the work directory's embeddings, when there are those of one model."""
    try:
        sidecar = read_sidecar(sidecar_path(work.find_embeddings(), "embed"))
    except ClipcidError:
        return None
    return None if sidecar is None else str(sidecar["model"]["spec"])


def _balance(
    settings: BalanceSettings,
    machine: Machine,
    embeddings: Embeddings,
    output: Output,
    seconds: dict[str, float],
    reporter: Reporter,
) -> dict[str, Any]:
    started = time.perf_counter()
    survey = survey_rows(machine, embeddings.images(), reporter)
    seconds["search"] = time.perf_counter() - started
    skips = _check_rows(settings, embeddings, survey, reporter)
    machine.on_main(embeddings.refuse_repeated_keys)
    inputs = Inputs(settings, machine, output.folder, embeddings, output.inputs, survey, reporter, seconds)
    sets, forest, was_there = make_sets(inputs)
    if was_there:
        reporter.note("The forest of these embeddings was there: keep list, curve and report are made anew from it.")
    other = compare_linkages(inputs, sets, forest)
    if isinstance(other, NotComputed) and sets.threshold is not None:
        reporter.note(f"What --linkage star would keep at this cut-off is not computed: {other.reason}.")

    audit = _audit(inputs, sets)
    result = _summarise(settings, sets, other, audit, embeddings, skips)
    warnings = _warnings(settings, sets)
    for warning in warnings:
        reporter.warn(warning)

    def phases() -> dict[str, float]:
        spent = time.perf_counter() - started - seconds["search"] - seconds.get("audit", 0.0)
        return {phase: round(value, 3) for phase, value in (seconds | {"write": spent}).items()}

    def write() -> dict[str, Any]:
        numbers = pa.array(survey.readable)
        write_keep_list(
            output.folder / KEEP_LIST,
            keys=embeddings.keys.take(numbers),
            shards=embeddings.shards.take(numbers),
            labels=sets.labels,
            representatives=sets.representatives,
            distances=sets.distances,
        )
        curve = sets.curve
        write_curve(
            output.folder / CURVE,
            distances=curve.distance,
            kept=curve.kept,
            largest=curve.largest,
            num_images=survey.num_rows,
        )
        report = result | {"seconds": phases()}
        write_report(output.folder / REPORT, settings, embeddings, survey, forest, sets, other, report, warnings)
        result["seconds"] = phases()
        counts = {"read": embeddings.num_rows, "used": survey.num_rows, "skipped": result["skipped"]}
        made_of = WorkDirectory(settings.work).name_of(embeddings.folder)
        output.commit(counts=counts, seconds=phases(), embeddings=made_of, result=result)
        return result

    return machine.on_main(write)


def _wanted(settings: BalanceSettings, embeddings: Embeddings) -> dict[str, Any]:
    """Return the settings that decide what is written; all of them may change on an existing forest."""
    texts = None
    if settings.select == "similarity":
        hashes = [entry["hash"] for entry in embeddings.text_fingerprints()]
        texts = hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()
    names = ("keep", "threshold", "cosine_distance", "linkage", "select", "neighbors")
    return {name: getattr(settings, name) for name in names} | {
        "seed": settings.seed if settings.select == "random" else None,
        "texts": texts,
    }


def _check_rows(settings: BalanceSettings, embeddings: Embeddings, survey: Survey, reporter: Reporter) -> Skips:
    """Count and name rows that are not finite, and refuse too many of them."""
    skips = Skips()
    bad = np.setdiff1d(np.arange(embeddings.num_rows), survey.readable, assume_unique=True)
    for key in embeddings.keys.take(pa.array(bad)).to_pylist():
        skips.add("nan_row", key)
    if not survey.num_rows:
        raise ClipcidError(
            f"None of the {embeddings.num_rows:,} rows of {embeddings.folder} is finite.", "Make the embeddings again."
        )
    skips.check(embeddings.num_rows, settings.max_bad_fraction, str(embeddings.folder))
    if skips.total:
        reporter.warn(f"{skips.total:,} rows were skipped:\n{skips.describe()}")
    return skips


def _audit(inputs: Inputs, sets: Sets) -> Audit | None:
    """Count what a search in partitions left, where one was made and something was to be merged."""
    if inputs.settings.neighbors == "exact" or sets.threshold is None:
        return None
    started = time.perf_counter()
    scan = choose_scan(inputs.settings.precision, inputs.machine.device)
    kept = np.flatnonzero(sets.representatives == np.arange(len(sets.labels)))
    audit = audit_kept(inputs.machine, inputs.survey, kept, sets.threshold, scan, inputs.reporter)
    inputs.seconds["audit"] = time.perf_counter() - started
    return audit


def _summarise(
    settings: BalanceSettings,
    sets: Sets,
    other: OtherLinkage | NotComputed,
    audit: Audit | None,
    embeddings: Embeddings,
    skips: Skips,
) -> dict[str, Any]:
    kept, images = sets.num_kept, len(sets.labels)
    embedded = (embeddings.sidecar or {}).get("counts", {}).get("skipped", {})
    return {
        "images": images,
        "kept": kept,
        "keep_ratio": kept / images,
        "threshold": sets.threshold,
        "components": kept,
        "largest_component": int(sets.sizes.max()),
        "coverage": sets.coverage,
        "other_linkage": None
        if isinstance(other, NotComputed)
        else {"linkage": other.linkage, "kept": other.kept, "coverage": other.coverage},
        "neighbors": settings.neighbors,
        "audit": None if audit is None else dataclasses.asdict(audit) | {"rate": audit.rate},
        "skipped": {**embedded, **skips.counts},
    }


def _warnings(settings: BalanceSettings, sets: Sets) -> list[str]:
    """Say what may surprise: ties at the cut-off, copies beyond the target, one set that is very large."""
    warnings = []
    images, kept = len(sets.labels), sets.num_kept
    if settings.keep is not None:
        missed = max(1, round(settings.keep * images)) - kept
        if missed > 0 and sets.threshold == 0.0:
            warnings.append(
                f"Exact copies alone are more than --keep {settings.keep:g} lets go: all of them go, which keeps {kept:,} "
                f"images, {missed:,} fewer than asked."
            )
        elif missed > 0:
            warnings.append(
                f"Pairs tie at the cut-off {sets.threshold:.6g}, and all of them merge: {kept:,} images are kept, "
                f"{missed:,} fewer than asked."
            )
    largest = int(sets.sizes.max())
    if largest > 1 and largest > _LARGE_SET * images:
        advice = "; --linkage star keeps sets tight" if settings.linkage == "single" else ""
        warnings.append(
            f"One set holds {largest:,} of {images:,} images ({largest / images:.1%}). It may be a chain of images that "
            f"differ, or one placeholder: look at the report{advice}."
        )
    return warnings


def _files(folder: Path, neighbors: str) -> dict[str, str]:
    forest = forest_path(folder, neighbors).name
    names = {"keep_list": KEEP_LIST, "forest": forest, "curve": CURVE, "report": REPORT, "sidecar": "balance.json"}
    return {name: str(folder / file) for name, file in names.items()}
