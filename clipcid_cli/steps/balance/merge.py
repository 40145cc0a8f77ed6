"""What the processes of a search have saved, merged into one result: each process its share of the files, then in pairs.

At hundreds of millions of rows that takes minutes. So what is merged is saved now and then, in place of the files that
it comes from, and a killed run merges what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.algorithms.sets.sinks import NearestOf, PairsWithin
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import ArrayJournal, Arrays
from clipcid_cli.runtime.save_pace import SavePace
from clipcid_cli.steps.balance.shared_arrays import SharedArrays

Sink = ForestSink | NearestOf | PairsWithin


class Merger:
    """Files of a search that this process merges: their pairs in a sink, their names, and the chunks that they hold."""

    def __init__(self, sink: Sink, journal: ArrayJournal) -> None:
        self._sink = sink
        self._journal = journal
        self._names = np.empty(0, np.str_)
        self._chunks = np.empty(0, np.int64)
        self._pace = SavePace(expected=0.0)

    def load(self, names: Sequence[str]) -> None:
        """Add what files hold."""
        for name in names:
            saved = self._journal.read(name)
            if saved is None:
                raise ClipcidError(f"{self._journal.path(name)} can no longer be read.", "Run the same command again.")
            self.add((saved["a"], saved["b"], saved["weight"], saved["chunks"], np.array([name])))

    def add(self, arrays: Arrays) -> None:
        """Add what `arrays` has returned, of this process or another, and save all once that is due."""
        a, b, weight, chunks, names = arrays
        self._sink.add(Edges(a, b, weight))
        self._chunks = np.concatenate([self._chunks, chunks])
        self._names = np.concatenate([self._names, names])
        if len(self._names) > 1 and self._pace.is_due():
            with self._pace.saving():
                self._save()

    def arrays(self) -> Arrays:
        """Return what is merged so far: the ends and distances of pairs, the chunks that they are of, names of files."""
        edges = self._sink.result()
        return edges.a, edges.b, edges.weight, self._chunks, self._names

    def _save(self) -> None:
        a, b, weight, chunks, names = self.arrays()
        name = f"{chunks.min()}-{len(chunks)}"  # another one than its parts have
        self._journal.append(name, {"chunks": chunks, "a": a, "b": b, "weight": weight})
        for part in names.tolist():
            self._journal.forget(part)
        self._names = np.array([name])


def merge(shared: SharedArrays, sink: Sink, journal: ArrayJournal, names: Sequence[str]) -> Edges:
    """Merge what files hold, on all processes, into an empty sink; return the result, the same on every process."""
    merger = Merger(sink, journal)
    context = shared.context
    context.on_all(merger.load, names[context.rank :: context.size])
    a, b, weight, *_ = shared.reduce(merger.arrays, merger.add)
    return Edges(a, b, weight)
