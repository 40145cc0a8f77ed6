"""The connected components of a graph."""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.gather import gather
from clipcid_cli.algorithms.near.exact import IntArray, row_type


def connected_components(num_nodes: int, a: IntArray, b: IntArray) -> IntArray:
    """Label each node of a graph, given both ends of its edges, by the smallest node that is reachable from it."""
    labels = np.arange(num_nodes, dtype=row_type(num_nodes))
    while True:
        apart = a != b
        a, b = a[apart], b[apart]
        if not len(a):
            break
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        a, b = find_roots(labels, a), find_roots(labels, b)
    while True:
        shorter = gather(labels, labels)
        if np.array_equal(shorter, labels):
            return labels
        labels = shorter


def find_roots(labels: IntArray, nodes: IntArray) -> IntArray:
    """Follow labels to their roots, and shorten the paths."""
    roots = gather(labels, nodes)
    while True:
        further = gather(labels, roots)
        if np.array_equal(further, roots):
            labels[nodes] = roots
            return roots
        roots = further
