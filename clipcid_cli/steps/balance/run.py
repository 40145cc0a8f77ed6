"""`balance`: prepare → plan → compute → write: embeddings → forest → sets → keep list, curve, report, and new shards."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import remove_copies
from clipcid_cli.formats.fingerprint import find_lost
from clipcid_cli.formats.output import Output, is_claimed, list_differences
from clipcid_cli.formats.results.forest import (
    ROW_NUMBERING,
    NumberedFile,
    is_forest_damaged,
    read_row_numbering,
    write_row_numbering,
)
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.compute import compute
from clipcid_cli.steps.balance.keep_list import read_names
from clipcid_cli.steps.balance.pictures import has_new_pictures
from clipcid_cli.steps.balance.plan import BalanceInputs, BalancePlan, list_row_numbering, make_plan, plan_checked
from clipcid_cli.steps.balance.prepare import prepare
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.balance.samples import validate_data_there
from clipcid_cli.steps.balance.shared_arrays import remove_shared
from clipcid_cli.steps.balance.write import name_files, validate_new, write, write_lists
from clipcid_cli.steps.claim import claim_output, preview_output
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.cost_result import BalanceCost
    from clipcid_cli.steps.embed.result import EmbedCost


def run(settings: BalanceSettings) -> BalanceResult | BalanceCost | EmbedCost:
    """Balance a data set; with ``--dry-run`` state what that takes, or first the embeddings that it lacks."""
    with open_dist_context(settings.device) as context:
        inputs = prepare(settings, context)
        if not isinstance(inputs, BalanceInputs):
            return inputs
        if settings.dry_run:
            return context.on_rank0(_preview, settings, inputs, context)
        plan = context.on_rank0(make_plan, settings, inputs)
        with claim_output(context, plan.spec) as output:
            return _balance(plan, output, context)


def _preview(settings: BalanceSettings, inputs: BalanceInputs, context: DistContext) -> BalanceCost:
    """Say what is there already, and what a new search would take."""
    from clipcid_cli.steps.balance.cost import estimate_cost

    # Else files of another tool need not be hashed; and where references are not embedded yet, no result has them.
    is_there = is_claimed(WorkDirectory(settings.work).balance, "balance")
    if is_there and all(isinstance(reference.rows, Embeddings) for reference in inputs.references):
        preview_output(plan_checked(settings, inputs).spec, "this result", "What follows is of a new search.")
    return estimate_cost(settings, inputs, context)


def _balance(plan: BalancePlan, output: Output[BalanceSidecar], context: DistContext) -> BalanceResult:
    """Balance, unless the output is there already; then write what the settings name beside it."""
    finished = context.on_rank0(_take_or_start, plan, output)
    result = finished
    if result is None:
        outcome = compute(plan, output, context)
        names = read_names(outcome.run)
        result = context.on_rank0(write, outcome, names)
    context.on_rank0(write_lists, plan)
    if plan.data is not None:
        from clipcid_cli.steps.balance.write_data import write_samples

        name, written = write_samples(plan, context)
        result = msgspec.structs.replace(result, **{name: written})
    return msgspec.structs.replace(result, files=name_files(plan))


def _take_or_start(plan: BalancePlan, output: Output[BalanceSidecar]) -> BalanceResult | None:
    """Return the result that is there already, unless its report can now show more; else start the output."""
    if output.finished is not None:
        is_damaged = plan.settings.overwrite and is_forest_damaged(plan.folder, plan.settings.forest_kind)
        if not is_damaged and not has_new_pictures(plan, output.finished):
            reporting.note(f"{plan.folder} already holds this result.")
            return msgspec.convert(output.finished.result, BalanceResult)
        what = (
            "The forest is not as it was written" if is_damaged else "Pictures missing from the report can be read now"
        )
        reporting.note(f"{what}: the result is made anew.")
    else:
        validate_new(plan.settings)
    if output.differences:
        differences = list_differences(_name_added(plan, output))
        reporting.note(
            f"The result in {plan.folder}, made with other settings or inputs, will be replaced:\n{differences}"
        )
    validate_data_there(plan.settings, plan.embeddings)
    output.begin_work()
    write_row_numbering(output.work / ROW_NUMBERING, list_row_numbering(plan.embeddings))
    remove_shared(output.work)
    remove_copies(output.work)  # of a run that was killed
    plan.embeddings.validate_unique_keys()
    return None


def _name_added(plan: BalancePlan, output: Output[BalanceSidecar]) -> dict[str, str]:
    """Return how a result differs; of embeddings that only have more shards than it, how many."""
    path = plan.folder / ROW_NUMBERING
    before: list[NumberedFile] = []
    with suppress(ClipcidError):  # replaced anyway
        before = read_row_numbering(path, "") if path.exists() else []
    now = list_row_numbering(plan.embeddings)
    added = sum(bool(file.rows) for file in now) - sum(bool(file.rows) for file in before)
    if not before or added <= 0 or find_lost(before, now):
        return output.differences
    others = {name: value for name, value in output.differences.items() if not name.startswith("input")}
    return others | {"inputs": f"{added:,} more shard{'s' * (added > 1)} now"}
