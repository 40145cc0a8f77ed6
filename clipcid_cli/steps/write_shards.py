"""``balance --write-shards``: the kept samples as new shards, copied byte for byte, one source shard at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json
from clipcid_cli.formats.dataset import Dataset
from clipcid_cli.formats.keep_list import KeepList
from clipcid_cli.formats.output import Output, plan_path, sidecar_path
from clipcid_cli.formats.remote import local_copy
from clipcid_cli.formats.tar_index import TarShard
from clipcid_cli.formats.tar_writer import copy_samples
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.outputs import claim_output
from clipcid_cli.steps.reporting import Reporter

# open_clip and webdataset's tools look for this file to know how many samples each shard has.
_SIZES = "sizes.json"
_STEP = "write-shards"


def tar_shards(data: Dataset, target: Path) -> list[TarShard]:
    """Return the data's shards as tars, or say why there is nothing to copy from.

    Raises:
        ClipcidError: when the data is not made of tars, or `target` is where they lie.
    """
    shards = [shard for shard in data.shards if isinstance(shard, TarShard)]
    if len(shards) < len(data.shards):
        raise ClipcidError(
            f"--write-shards copies tar members, and {data.spec} is not made of tars.",
            "Leave it out: the keep list names what is kept.",
        )
    for shard in shards:
        if "://" not in shard.path and _target_of(target, shard).resolve() == Path(shard.path).resolve():
            raise ClipcidError(f"--write-shards {target} would replace the data itself.", "Give another folder.")
    return shards


def write_shards(
    machine: Machine,
    shards: list[TarShard],
    keep: KeepList,
    keep_fingerprint: dict[str, Any],
    target: Path,
    *,
    overwrite: bool,
    reporter: Reporter,
) -> None:
    """Write the new shards; processes share them out, and a run that was killed goes on with those not written yet.

    A shard that keeps nothing is not written. ``sizes.json`` tells the samples of each.

    Args:
        machine: The processes.
        shards: The shards to copy from, as :func:`tar_shards` gives them.
        keep: The keep list.
        keep_fingerprint: Fingerprint of its file.
        target: Folder to write to.
        overwrite: Replace shards that another keep list left there.
        reporter: The listener.

    Raises:
        ClipcidError: when the folder holds shards of another keep list, a shard is damaged, or one lacks a kept sample.
    """
    kept = keep.kept_by_shard()
    machine.on_main(lambda: _refuse_foreign(target))
    with claim_output(
        machine,
        target,
        _STEP,
        settings={},
        inputs=[keep_fingerprint],
        overwrite=overwrite,
        clear=lambda: _clear(target),
    ) as output:
        if output.finished is not None:
            reporter.note(f"{target} holds these shards already.")
            return
        mine = shards[machine.rank :: machine.size]
        sizes: dict[str, int] = {}
        error: ClipcidError | None = None
        with reporter.progress("shards", len(mine), "shards") as progress:
            try:
                for shard in mine:
                    sizes[shard.name] = _write_shard(shard, kept.get(shard.name, set()), target, output.resumed)
                    progress.advance()
            except ClipcidError as found:
                error = found
        machine.agree(error)
        together: dict[str, int] = {}
        for part in machine.gather(sizes):
            together |= part
        machine.on_main(lambda: _finish(output, shards, together))


def _write_shard(shard: TarShard, keys: set[str], target: Path, resumed: bool) -> int:
    """Write one shard, or leave it when this run, before it was killed, has: it appears under its name when complete."""
    path = _target_of(target, shard)
    if not keys:
        path.unlink(missing_ok=True)
        return 0
    if resumed and path.exists():
        return len(keys)
    prefix = f"{shard.name}/" if shard.prefix_keys else ""
    copied = copy_samples(local_copy(shard.path), path, {key.removeprefix(prefix) for key in keys})
    if copied < len(keys):
        path.unlink()
        raise ClipcidError(
            f"Shard {shard.path} has {copied:,} of the {len(keys):,} samples to keep from it.",
            "It changed since it was embedded: run clipcid embed and balance again.",
        )
    return copied


def _finish(output: Output, shards: list[TarShard], sizes: dict[str, int]) -> None:
    by_file = {f"{shard.name}.tar": sizes[shard.name] for shard in shards if sizes[shard.name]}
    write_json(output.folder / _SIZES, by_file)
    output.commit(counts={"samples": sum(by_file.values()), "shards": by_file}, seconds={})


def _clear(target: Path) -> None:
    """Remove the shards of another keep list; `_refuse_foreign` has made sure that all tars here are ours."""
    for path in target.rglob("*.tar"):
        path.unlink()


def _refuse_foreign(target: Path) -> None:
    """Refuse a folder whose tars another program wrote."""
    ours = sidecar_path(target, _STEP).exists() or plan_path(target, _STEP).exists()
    if not ours and target.is_dir() and any(target.rglob("*.tar")):
        raise ClipcidError(
            f"{target} holds tars that are not from --write-shards.", "Give a new or empty folder: nothing was written."
        )


def _target_of(target: Path, shard: TarShard) -> Path:
    return target / f"{shard.name}.tar"
