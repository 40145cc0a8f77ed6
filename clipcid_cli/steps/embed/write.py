"""What `embed` writes: the rows of a shard once it is encoded, and the sidecar once all shards are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import PIL

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.manifest import MANIFEST, ShardRecord, merge_skips
from clipcid_cli.formats.embeddings.sidecar import EmbedFacts, EmbedSidecar
from clipcid_cli.formats.embeddings.writer import ShardRows
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.skipped import SKIPPED
from clipcid_cli.formats.skips import Skips
from clipcid_cli.steps import reporting
from clipcid_cli.steps.data_index import note_counted_captions
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.encode import Batch, Encoded, join

# What is done to images that are not shown as they are stored.
_ADAPTED = {
    "laid_on_white": "transparent pixels, shown on white",
    "from_16_bit": "16 bits of grey, scaled to 8",
}


@dataclasses.dataclass
class Timings:
    """How many samples a process has embedded, and how its time went, in seconds."""

    embedded: int = 0
    read: float = 0.0  # waiting for a batch to be decoded
    encode: float = 0.0
    write: float = 0.0  # waiting until the shard before is written

    @property
    def elapsed(self) -> float:
        return self.read + self.encode + self.write


def make_rows(encoder: EmbedEncoder, shard: Shard, parts: Sequence[Encoded], last: Batch) -> ShardRows:
    """Join what was made of the batches of a shard, without what is not usable."""
    skipped = Skips()
    for part in parts:
        encoder.finish(part)
        skipped.merge(part.count_skips(shard))
    skipped.merge(last.skipped)
    encoded = join(parts)
    rows = {kind: np.empty((0, *shape), kind.dtype) for kind, shape in encoder.shapes.items()}
    rows |= {kind: values.numpy() for kind, values in encoded.rows.items()}
    counts = [max(1, len(sample.captions)) for sample in encoded.samples]
    several = Kind.TEXTS in rows and max(counts, default=1) > 1
    if several:
        texts = rows[Kind.TEXTS]
        firsts = np.cumsum([0, *counts[:-1]])
        rows[Kind.TEXTS] = texts[firsts]
        rows[Kind.FURTHER] = np.delete(texts, firsts, axis=0)
    assert last.read is not None, "a shard's last batch"
    return ShardRows(
        read=last.read,
        skipped=skipped,
        adapted={how: encoded.adapted[how] for how in _ADAPTED},
        keys=[sample.key for sample in encoded.samples],
        captions=[sample.captions[0] if sample.captions else "" for sample in encoded.samples],
        counts=counts if several else None,
        rows=rows,
    )


def measure(timings: Sequence[Timings]) -> dict[str, Any]:
    """Return the entries of a result that say how long processes took; they ran at the same time."""
    embedded = sum(process.embedded for process in timings)
    elapsed = max(process.elapsed for process in timings)
    phases = ("read", "encode", "write")
    return {
        "seconds": {phase: fmean(getattr(process, phase) for process in timings) for phase in phases},
        "images_per_second": round(embedded / elapsed, 1) if embedded and elapsed else None,
    }


def state_facts(plan: EmbedPlan, encoder: EmbedEncoder) -> EmbedFacts:
    """State what the sidecar says of model, data and machine."""
    truncation = plan.dataset.truncation
    return EmbedFacts(
        model=encoder.model.info,
        data=plan.dataset.describe(),
        missing_fraction=None if truncation is None else round(truncation.fraction, 4),
        device=encoder.model.device.type,
        pillow=PIL.__version__,
    )


def commit(
    output: Output[EmbedSidecar],
    facts: EmbedFacts,
    records: Sequence[ShardRecord],
    timings: Sequence[Timings],
    captions: Skips | None,
    *,
    max_bad_fraction: float,
    without_text: str = "",
) -> EmbedSidecar:
    """Check the embeddings of all shards together and commit them.

    Args:
        captions: What was counted of them; None where they are not embedded.
        without_text: As of `EmbedPlan`; advised where few other samples are unusable.
    """
    rows = read = 0
    adapted = dict.fromkeys(_ADAPTED, 0)
    for shard in records:
        rows += shard.rows
        read += shard.read
        for how in adapted:
            adapted[how] += getattr(shard, how)
    skips = merge_skips(records)
    if not rows:
        output.discard()  # it must not stand in the way of other data
        raise ClipcidError(
            f"None of the {read:,} samples in {facts.data.spec} can be used:\n{skips.describe()}", "Fix the data."
        )
    written = [output.work / name for name in (MANIFEST, SKIPPED)]
    outputs = [record(path, output.work) for path in written if path.exists()]
    without_caption = skips.counts.get("no_caption", 0)
    suffices = without_caption and skips.total - without_caption <= max_bad_fraction * read
    skips.check(read, max_bad_fraction, facts.data.spec, without_text if suffices else "")
    for how, count in adapted.items():
        if count:
            reporting.note(f"Images with {_ADAPTED[how]}: {count:,}.")
    of_captions = {} if captions is None else note_counted_captions(facts.data.caption_key, captions)
    if skips.total:
        reporting.warn(f"Samples skipped: {skips.total:,}\n{skips.describe()}")
    counts = {"images": rows, "read": read, "skipped": dict(sorted(skips.counts.items())), **adapted, **of_captions}
    if facts.missing_fraction is not None:
        counts["missing_fraction"] = facts.missing_fraction
    return output.commit(
        outputs=outputs,
        model=facts.model,
        counts=counts,
        **measure(timings),
        data=facts.data,
        run={"processes": len(timings), "device": facts.device, "pillow": facts.pillow},
    )
