"""Plans of the gradients of captured arrays: clear sums, find the largest terms, add all terms, convert the sums."""

from __future__ import annotations

import math
from typing import Any

from ...definition.problem import Problem
from ...definition.score.graph import FLOAT
from .arguments import common, dims, flags, options
from .captured import Sums, attention_backward_dcaptured, clear_dcaptured, finish_dcaptured
from .launch import Address, Kernel, Template, i32, i64
from .plan_score import align
from .score_arguments import Lists
from .score_source import Read, generate
from .tuning import SUM_ELEMENTS, Config
from .views import Schedule


def captured_kernels(
    problem: Problem,
    inputs: tuple[Any, ...],
    lists: Lists | None,
    config: Config,
    schedule: tuple[Schedule, int],
    used: int,
) -> tuple[list[Kernel], int]:
    """Return the kernels of dcaptured, and the bytes of workspace with the sums.

    Args:
        problem: a backward problem with captured arrays.
        inputs: q, k, v, dout, lse and delta.
        lists: of tiles of keys.
        config: tiles of the kernel.
        schedule: order and number of the programs.
        used: bytes of workspace before the sums.
    """
    graph, found = problem.functions, generate(problem.functions)
    count, elements = len(graph.arrays), graph.sizes(floats=True)
    start = align(used)
    integers = align(start + 4 * count)
    marks = integers + 8 * elements
    end = marks + 4 * elements
    log_terms = math.ceil(math.log2(max(1, sum(_count_terms(problem, read, config) for read in found.reads))))
    sums = Sums(
        Address("workspace", "int32", start),
        Address("workspace", "int64", integers),
        Address("workspace", "int32", marks),
        Address("dcaptured", "float32"),
        i32(log_terms),
    )
    words = (end - start) // 4
    template = Template((sums, i64(words)), {"TILE": SUM_ELEMENTS})
    kernels = [Kernel(clear_dcaptured, template, (-(-words // SUM_ELEMENTS), 1), {})]
    order, programs = schedule
    arguments = (*inputs, *common(problem, lists), order, sums)
    constants = {**dims(problem), "TILE_Q": config.tile_q, "TILE_K": config.tile_k}
    constants |= {name: flags(problem)[name] for name in ("TOP_LEFT", "LOWER", "HOLES", "PRECISION")}
    constants |= {"LAST_FIRST": problem.interval.right is not None, "ADD": found.terms}
    for measure in (True, False) if found.reads else ():
        template = Template(arguments, {**constants, "MEASURE": measure})
        kernels.append(
            Kernel(attention_backward_dcaptured, template, (programs, 1), {**options(config), "num_stages": 1})
        )
    first = 0
    for number, array in enumerate(graph.arrays):
        if array.kind == FLOAT:
            template = Template((sums, i32(number), i32(first), i32(array.size)), {"TILE": SUM_ELEMENTS})
            kernels.append(Kernel(finish_dcaptured, template, (-(-array.size // SUM_ELEMENTS), 1), {}))
            first += array.size
    return kernels, end


def _count_terms(problem: Problem, read: Read, config: Config) -> int:
    """Return a bound on the number of terms that a read adds: sums over tiles count once."""
    rows = problem.q.shape[0] if problem.packed_q else problem.batch * problem.seqlen_q
    tiles = rows // config.tile_q + problem.batch + 2
    keys = problem.seqlen_k if read.by_key else -(-problem.seqlen_k // config.tile_k)
    return problem.nheads * keys * (rows if read.by_query else tiles)
