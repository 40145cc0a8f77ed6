"""The repair of a teacher: decided once for its embeddings, by the step that needs it first, and applied by each."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from clipcid_cli.algorithms.pairing import MAX_PAIRS as MAX_RANKED
from clipcid_cli.algorithms.pairing import Pairing, rank_pairs
from clipcid_cli.algorithms.repair import MAX_PAIRS, RULE, Pairs, are_enough, can_be_divided, fit_repair
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind, RowMap
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import OutputSpec, find_output, open_output, remove_leftovers
from clipcid_cli.formats.results.repair import (
    REPAIR,
    STEP,
    PairingFigures,
    RepairFigures,
    RepairSidecar,
    read_repair,
    write_repair,
)
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.pipeline import threads_for
from clipcid_cli.runtime.randomness import derive_seed, key_fractions
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.shared import KeptSettings

MAX_SCALE = 100.0
"""The scale at which CLIP training ends; taken where another tool's embeddings do not record it."""
# Pairs are drawn from so many rows, in so many stretches: a disk reads a stretch at once, and few files are opened.
_ROWS_CONSIDERED = 4 * MAX_PAIRS
_STRETCHES = 40
# `distill` holds out this share by default, those of the lowest fractions.
_HELD_OUT_BY_RUNS = 0.01
# One seed for all runs: they learn from one teacher, and from its clusters.
_SEED = 0


def repair_teacher(settings: KeptSettings, embeddings: Embeddings) -> tuple[Embeddings, RepairFigures | None]:
    """Repair the image rows of embeddings where that is better; return them with the figures that decided it, and say so.

    Call it on the first process. There are no figures where nothing could be judged, or not yet: in a dry run.
    """
    if settings.repair == "none" or not embeddings.has_texts:
        return embeddings, None
    folder = settings.work / "repair" / embeddings.slug_in(WorkDirectory(settings.work))
    scale = teacher_scale(embeddings)
    is_there = sidecar_path(folder, STEP).exists()
    decision: RepairSidecar | None = None
    if is_there or not settings.dry_run:
        inputs = embeddings.fingerprints([Kind.TEXTS])
        decided_by = {"scale": scale, **dataclasses.asdict(RULE)}
        spec = OutputSpec(folder, STEP, RepairSidecar, settings=decided_by, inputs=inputs, overwrite=True)
        decision = find_output(spec).finished
    if decision is None and settings.dry_run:
        reporting.note("Teacher: a run decides whether it is repaired (--repair none leaves it as it is).")
        return embeddings, None
    if decision is None:
        if is_there:
            reporting.note(f"{folder} was decided for other rows, or has been changed: deciding again.")
        pairs = _read_pairs(embeddings)
        if not are_enough(pairs) or not can_be_divided(pairs):
            reporting.note(
                "Teacher left as it is: too few pairs, or different captions or images, to judge a repair by."
            )
            return embeddings, None
        with reporting.progress("repair", len(pairs), "pairs") as bar:
            decision = _decide(spec, pairs, scale)
            bar.advance(len(pairs))
    elif not settings.dry_run:
        remove_leftovers(spec)
    reporting.note(describe_repair(decision.result))
    if not decision.result.repaired:
        return embeddings, decision.result
    [written] = decision.outputs
    return embeddings.mapped(RowMap(read_repair(folder, written), written)), decision.result


def _decide(spec: OutputSpec[RepairSidecar], pairs: Pairs, scale: float) -> RepairSidecar:
    """Fit, judge and record a repair, unless another run does, which is waited for."""
    seconds = dict[str, float]()
    with open_output(spec, waits=True) as output:
        if output.finished is not None:
            return output.finished
        with timed(seconds, "fit"), threads_for(0):  # one thread: the same bytes whatever their number
            repair = fit_repair(pairs, scale, _SEED)
        output.start()
        if repair.map_DD is not None:
            write_repair(output.work, repair.map_DD.numpy())
        written = [] if repair.map_DD is None else [record(output.work / REPAIR, output.work)]
        judged = {name: value for name, value in vars(repair).items() if name not in ("map_DD", "pairing")}
        repaired = repair.map_DD is not None
        pairing = _describe_pairing(repair.pairing, repaired=True) if repaired else None
        figures = RepairFigures(repaired=repaired, pairing=pairing, **judged)
        return output.commit(counts={}, seconds=seconds, outputs=written, result=figures)


def describe_repair(repair: RepairFigures) -> str:
    """Say what was decided, and by what."""
    before, after = (f"{math.exp(log_rank):,.2f}" for log_rank in repair.log_rank)
    if repair.repaired:
        return (
            f"Teacher's rank of a held-out caption's image {before} → {after} (geometric mean): repaired (--repair none "
            "leaves it as it is)."
        )
    recall, repaired_recall = repair.recall_at_1
    gain = "no clear gain from a repair"
    if RULE.is_clear(repair.log_rank[0] - repair.log_rank[1], repair.standard_error):
        gain = f"too small a gain from a repair (to {repaired_recall:.1%}, rank {before} → {after})"
    return f"Teacher left as it is: held-out R@1 {recall:.1%} (a guess: {repair.chance_at_1:.1%}), and {gain}."


def judge_pairing(embeddings: Embeddings, repair: RepairFigures | None) -> PairingFigures | None:
    """Measure whether the teacher of stored rows knows their captions and images: after its repair, where there is one.

    Call it on the first process with the rows as they are stored. None where there are no captions, or too few.
    """
    if repair is not None and repair.pairing is not None:
        return repair.pairing
    if not embeddings.has_texts:
        return None
    pairs = _read_pairs(embeddings, MAX_RANKED)
    if not are_enough(pairs):
        return None
    return _describe_pairing(rank_pairs(pairs.images_ND, pairs.texts_ND, pairs.captions_N), repaired=False)


def describe_pairing(pairing: PairingFigures) -> str:
    """Say how well a teacher knows the data, without a full stop."""
    state = ", after its repair" if pairing.repaired else ""
    return f"Teacher on these captions{state}: {pairing}"


def _describe_pairing(pairing: Pairing, *, repaired: bool) -> PairingFigures:
    return PairingFigures(**vars(pairing), near_chance=pairing.near_chance, repaired=repaired)


def teacher_scale(embeddings: Embeddings) -> float:
    """Return the logit scale of the model, exp(logit_scale), as recorded, else the usual one."""
    recorded = None if embeddings.model is None else embeddings.model.logit_scale
    return MAX_SCALE if recorded is None else float(recorded)


def _read_pairs(embeddings: Embeddings, most: int = MAX_PAIRS) -> Pairs:
    """Read pairs, at most so many, from everywhere in the data: those of the highest key fractions of some rows.

    None that runs hold out is read, and where there are more pairs than are needed, none that any ``--val-fraction`` holds
    out.
    """
    row_S = consider_rows(embeddings.num_rows)
    keys, caption_S = (
        pa.chunked_array(list(embeddings.take_column(read, row_S)))
        for read in (embeddings.keys_of, embeddings.captions_of)
    )
    fraction_S = key_fractions(keys.to_pylist())
    usable_S = (fraction_S >= _HELD_OUT_BY_RUNS) & (pc.utf8_length(caption_S).to_numpy() > 0)
    places = np.flatnonzero(usable_S)
    places = np.sort(places[np.argsort(-fraction_S[places], kind="stable")[:most]])
    images, texts = (
        torch.from_numpy(embeddings.rows(kind).take(row_S[places])).float() for kind in (Kind.IMAGES, Kind.TEXTS)
    )
    hashes = torch.tensor([derive_seed(caption) for caption in caption_S.take(places).to_pylist()])
    is_finite = images.isfinite().all(dim=1) & texts.isfinite().all(dim=1)
    pairs = Pairs(torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts), hashes)
    return pairs.take(is_finite.nonzero()[:, 0])


def consider_rows(num_rows: int) -> npt.NDArray[np.int64]:
    """Choose rows to draw pairs from, int64, ascending: all, or of many as long stretches in equal distances."""
    if num_rows <= _ROWS_CONSIDERED:
        return np.arange(num_rows)
    starts = np.arange(_STRETCHES) * num_rows // _STRETCHES
    return (starts[:, None] + np.arange(_ROWS_CONSIDERED // _STRETCHES)).ravel()
