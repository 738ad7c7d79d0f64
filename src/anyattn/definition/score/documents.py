"""Documents: `documents[q_idx] == documents[kv_idx]`, which packed sequences express.

Every document becomes a sequence of its own, and indices count from its start. So the rest of a graph may depend on the
indices only through their difference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .builder import Builder
from .graph import INT, READ, Graph
from .linear import linear
from .patterns import LENGTHS, MASK, Recognized, recognize, terms
from .score_patterns import BIAS

PLACES = {BIAS, MASK, LENGTHS}  # arguments that name places in the whole sequence


class Documents(NamedTuple):
    """Number of the captured array of documents, (seqlen,) or (batch, seqlen), and what is left inside a document."""

    array: int
    inside: Recognized


@lru_cache(256)
def find(graph: Graph, nheads: int, allowed: frozenset[str]) -> Documents | None:
    """Return the documents of a mask function, or None if packed sequences do not express the graph."""
    for term in () if graph.mask is None else terms(graph, graph.mask):
        array = _documents(graph, term)
        if array is not None:
            inside = recognize(_inside(graph, term), nheads, allowed - PLACES)
            if inside.chunk == 0 and _depends_on_distance(inside.graph):
                return Documents(array, inside)
    return None


def boundaries(documents: npt.NDArray[np.integer], batch: int) -> npt.NDArray[np.int32] | None:
    """Return the cumulative lengths of all documents of a batch; None if a document has parts in several places.

    documents: (seqlen,) or (batch, seqlen), equal numbers for the tokens of a document.
    """
    seqlen = documents.shape[-1]
    starts: list[list[int]] = []
    for row in documents.reshape(-1, seqlen):
        changes = (row[1:] != row[:-1]).nonzero()[0]
        found = [0, *(changes + 1).tolist()]
        if len(set(row[changes].tolist()) | {int(row[-1])}) < len(found):
            return None
        starts.append(found)
    if len(starts) == 1:
        starts *= batch
    places = [entry * seqlen + start for entry, found in enumerate(starts) for start in found]
    return np.array([*places, batch * seqlen], np.int32)


def _documents(graph: Graph, term: int) -> int | None:
    """Return the array of documents[q_idx] == documents[kv_idx] or documents[b, q_idx] == documents[b, kv_idx]."""
    node = graph.nodes[term]
    if node.operation != "eq":
        return None
    reads = [graph.nodes[one] for one in node.arguments]
    if any(read.operation != READ or read.kind != INT for read in reads) or reads[0].value != reads[1].value:
        return None
    places = {tuple([graph.nodes[one].operation for one in read.arguments]) for read in reads}
    if places not in ({("q_idx",), ("kv_idx",)}, {("b", "q_idx"), ("b", "kv_idx")}):
        return None
    return int(reads[0].value or 0)


def _inside(graph: Graph, term: int) -> Graph:
    """Return the graph without a term that is true, which makes the key's document that of the query."""
    one, other = graph.nodes[term].arguments
    is_query = graph.nodes[graph.nodes[one].arguments[-1]].operation == "q_idx"
    of_query, of_key = (one, other) if is_query else (other, one)
    build = Builder()
    place: dict[int, int] = {}
    for number, given in enumerate(graph.nodes):
        node = graph.nodes[of_query] if number == of_key else given
        arguments = tuple([place[x] for x in node.arguments])
        if number == term:
            place[number] = build.constant(True)
        elif node.operation == "and":
            place[number] = build.apply("and", *arguments)
        else:
            place[number] = build.add(node._replace(arguments=arguments))
    mask = place[graph.mask] if graph.mask is not None else None
    everything = mask is not None and build.constant_value(mask) is True
    score = None if graph.score is None else place[graph.score]
    return build.graph(score, None if everything else mask, graph.arrays)


def _depends_on_distance(graph: Graph) -> bool:
    """Return whether the results depend on b, q_idx and kv_idx only through q_idx - kv_idx."""
    found = {result for result in (graph.score, graph.mask) if result is not None}
    for number in range(len(graph.nodes) - 1, -1, -1):
        if number not in found:
            continue
        node, value = graph.nodes[number], linear(graph, number)
        if value is not None and value.q + value.kv == 0 and value.q and not value.others:
            continue
        if node.operation in ("b", "q_idx", "kv_idx"):
            return False
        found.update(node.arguments)
    return True
