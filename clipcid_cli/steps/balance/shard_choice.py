"""Which samples of a shard are kept: by shard and key, or by key or uid alone where the embeddings are another tool's."""

from __future__ import annotations

from clipcid_cli.formats.data.tar_index import TarShard
from clipcid_cli.formats.embeddings.key_join import KeyIndex
from clipcid_cli.formats.results.keep_list import KeepList
from clipcid_cli.formats.results.kept_lists import is_uid
from clipcid_cli.steps.balance.samples import read_uid


class ShardChoice:
    """Finds the kept samples of each shard.

    `embed` records which shard a row is from. Other tools do not, and the keep list then has the names of their files, which
    are those of no shard: each sample is looked up by its key instead, or, where the rows' keys are uids of DataComp's and
    the samples' are not, by the uid in its ``.json``.
    """

    def __init__(self, keep: KeepList, shards: list[TarShard]) -> None:
        self._keep = keep
        self._num_rows = keep.count_by_shard()
        self._by_shard: dict[str, set[str]] | None = None
        if any(shard.name in self._num_rows for shard in shards):
            self._by_shard = keep.kept_by_shard()
        else:
            self._index = KeyIndex(keep.keys)
            self._may_be_uids = len(keep.keys) > 0 and is_uid(keep.keys[0].as_py())

    def of(self, shard: TarShard) -> tuple[set[str], int]:
        """Return the keys, as stored in the tar, of the samples to keep of a shard, and how many others it has to drop.

        Raises:
            ClipcidError: when the shard is damaged.
        """
        prefix = f"{shard.name}/" if shard.prefix_keys else ""
        if self._by_shard is not None:
            kept = self._by_shard.get(shard.name, set())
            return {key.removeprefix(prefix) for key in kept}, self._num_rows.get(shard.name, 0) - len(kept)
        samples = shard.samples()
        rows = self._index.find([sample.key for sample in samples])
        if self._may_be_uids and not (rows >= 0).any():
            rows = self._index.find([read_uid(sample) or "" for sample in samples])
        found = [(sample.key, row) for sample, row in zip(samples, rows.tolist(), strict=True) if row >= 0]
        keys = {key.removeprefix(prefix) for key, row in found if self._keep.kept[row]}
        return keys, len(found) - len(keys)
