"""The repair of a teacher: decided once for its embeddings, by the step that needs it first, and applied by each."""

from __future__ import annotations

import dataclasses
import math

import msgspec

from clipcid_cli.algorithms.pairing import Pairs, are_enough
from clipcid_cli.algorithms.repair import MAX_PAIRS, RULE, can_be_divided, fit_repair
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import OutputSpec, find_output, open_output, remove_leftovers
from clipcid_cli.formats.results.repair import (
    REPAIR,
    STEP,
    RepairFigures,
    RepairSidecar,
    read_repair,
    write_repair,
)
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.pipeline import threads_for
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.pairing import read_pairs, teacher_scale
from clipcid_cli.steps.settings.shared import KeptSettings

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
        pairs = read_pairs(embeddings, MAX_PAIRS)
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
    from clipcid_cli.formats.embeddings.mapped import RowMap, map_images  # few teachers are repaired

    [written] = decision.outputs
    return map_images(embeddings, RowMap(read_repair(folder, written), written)), decision.result


def _decide(spec: OutputSpec[RepairSidecar], pairs: Pairs, scale: float) -> RepairSidecar:
    """Fit, judge and record a repair, unless another run does, which is waited for."""
    seconds = dict[str, float]()
    with open_output(spec, waits=True) as output:
        if output.finished is not None:
            return output.finished
        with timed(seconds, "fit"), threads_for(0):  # one thread: the same bytes whatever their number
            repair = fit_repair(pairs, scale, _SEED)
        output.begin_work()
        if repair.map_DD is not None:
            write_repair(output.work, repair.map_DD.numpy())
        written = [] if repair.map_DD is None else [record(output.work / REPAIR, output.work)]
        judged = {name: value for name, value in vars(repair).items() if name not in ("map_DD", "pairing")}
        repaired = repair.map_DD is not None
        pairing = msgspec.structs.replace(repair.pairing, repaired=True) if repaired else None
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
