"""Which samples of the data can be trained on, and which of those a run trains on and holds out."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, refuse_repeated_keys
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.caches import MAX_CAPTIONS
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.randomness import key_fraction
from clipcid_cli.steps.data_index import take_samples


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples of one kind (training or held-out), by shard.

    Attributes:
        positions: For each shard, the places in its list of samples, int64, ascending.
        rows: For each shard, the row of each sample among all the data's usable samples, int64.
    """

    positions: list[npt.NDArray[np.int64]]
    rows: list[npt.NDArray[np.int64]]

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard."""
        return [len(positions) for positions in self.positions]

    @property
    def total(self) -> int:
        """Samples of all shards."""
        return sum(self.sizes)

    def narrow(self, keep: npt.NDArray[np.bool_]) -> Selection:
        """Keep the samples whose row is marked; `keep` has one entry per usable sample of the data."""
        masks = [keep[rows] for rows in self.rows]
        return Selection(
            [positions[mask] for positions, mask in zip(self.positions, masks, strict=True)],
            [rows[mask] for rows, mask in zip(self.rows, masks, strict=True)],
        )


@dataclasses.dataclass(frozen=True)
class UsableSamples:
    """All samples that have an image and a caption.

    Attributes:
        keys: Their keys, in order of row.
        caption_counts: Number of captions of each, int32, in order of row.
        skips: Samples that are not usable, by reason.
        read: Samples that were listed, usable or not.
    """

    selection: Selection
    keys: list[str]
    caption_counts: npt.NDArray[np.int32]
    skips: Skips
    read: int

    def split(self, val_fraction: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Mark the rows to train on and those held out: the keys whose hash falls below the fraction."""
        held_out = np.fromiter((key_fraction(key) < val_fraction for key in self.keys), bool, len(self.keys))
        return ~held_out, held_out


def find_usable(dataset: Dataset, max_bad_fraction: float) -> UsableSamples:
    """List the samples that can be trained on.

    Raises:
        ClipcidError: when too many have no image or no caption, or a key repeats.
    """
    skips, keys, counts = Skips(), list[str](), list[npt.NDArray[np.int32]]()
    positions, rows = list[npt.NDArray[np.int64]](), list[npt.NDArray[np.int64]]()
    read = 0
    by_shard: list[tuple[str, list[str]]] = []
    for number, shard in enumerate(dataset.shards):
        skipped_before = skips.total
        listed, num_captions = _list_shard(dataset, number, skips)
        read += len(listed) + skips.total - skipped_before
        usable = np.flatnonzero(num_captions)
        for place in np.flatnonzero(num_captions == 0).tolist():
            skips.add("no_caption", listed[place])
        positions.append(usable)
        rows.append(np.arange(len(keys), len(keys) + len(usable), dtype=np.int64))
        by_shard.append((shard.name, [listed[place] for place in usable.tolist()]))
        keys.extend(by_shard[-1][1])
        counts.append(num_captions[usable])
    if not keys:
        raise ClipcidError(
            f"{dataset.spec}: none of {read:,} samples has a caption.",
            "Training needs captions: a .txt file next to each image, or --caption-column for a list.",
        )
    skips.check(read, max_bad_fraction, dataset.spec)
    if dataset.index is None:  # which was refused if a key repeats
        refuse_repeated_keys(by_shard)
    return UsableSamples(Selection(positions, rows), keys, np.concatenate(counts), skips, read)


def _list_shard(dataset: Dataset, number: int, skips: Skips) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the keys of a shard's samples and how many captions each has, from the index where there is one."""
    if dataset.index is not None:
        part = dataset.index.part(number)
        skips.merge(dataset.index.records[number].skips)
        return part.keys.to_pylist(), part.num_captions
    samples = dataset.shards[number].samples(skips)
    return [sample.key for sample in samples], np.array([len(sample.captions) for sample in samples], dtype=np.int32)


def used_tokens(dataset: Dataset, usable: UsableSamples, tokenizer: Tokenizer) -> torch.Tensor | None:
    """List the tokens of all captions of usable samples; None where there are too many samples for that to pay.

    Returns:
        int64, ascending, each once.
    """
    if len(usable.keys) > MAX_CAPTIONS:
        return None
    found = [torch.empty(0, dtype=torch.int64)]
    for number, positions in enumerate(usable.selection.positions):
        captions = {caption for sample in take_samples(dataset, number, positions) for caption in sample.captions}
        if captions:
            found.append(torch.unique(tokenizer(sorted(captions))))
    tokens: torch.Tensor = torch.unique(torch.cat(found))
    return tokens
