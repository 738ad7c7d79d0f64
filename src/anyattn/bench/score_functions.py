"""Seconds of score functions: written as functions, as built-in arguments, and by torch's compiled flex_attention.

torch compiles flex_attention for a CPU in the forward pass alone, and needs a C++ compiler at run time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .providers.flex import Flex
from .timing import measure as measure_times

if TYPE_CHECKING:
    from torch import Tensor

SHAPE, QUICK_SHAPE = (1, 4, 4096, 64), (1, 2, 512, 16)
DTYPES = ("float32", "bfloat16")
FUNCTION, ARGUMENT, FLEX = "function", "argument", "flex_attention (compiled)"
MASK_LENGTH, QUICK_MASK_LENGTH = 131072, 2048
DOCUMENTS, MASK_BLOCK = 8, 128
# torch's create_block_mask computes every pair of the mask, which takes 10 bytes for each: 2.5 GiB for this length.
LARGEST_EAGER_MASK = 16384
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # absolute, for values of about 1

Row = dict[str, Any]


class Case(NamedTuple):
    """Function, the arguments that say what it says ({}: a call without a function), and captured leaves."""

    functions: dict[str, Any]
    arguments: dict[str, Any]
    baseline: str
    leaves: tuple[Any, ...] = ()


def cases(nheads: int, seqlen: int) -> dict[str, Case]:
    """Return the functions that are timed, with new tensors."""
    import torch

    size = seqlen // DOCUMENTS
    document = torch.arange(seqlen) // size
    slopes = torch.rand(nheads, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(nheads, 2 * seqlen - 1, requires_grad=True)

    def ten(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = (q_idx - kv_idx) * 0.001
        raised = score * 0.9 + distance
        return torch.where(raised > 0.5, raised - 0.25 * distance, raised * 1.1) - 0.1 * q_idx

    return {
        f"causal window of {size}": Case(
            {"mask_mod": lambda b, h, i, j: (i >= j) & (i - j < size)}, {"window": (size - 1, 0)}, "window"
        ),
        f"{DOCUMENTS} documents of {size}": Case(
            {"mask_mod": lambda b, h, i, j: document[i] == document[j]},
            {"boundaries": torch.arange(0, seqlen + 1, size, dtype=torch.int32)},
            "packed sequences",
        ),
        "ALiBi": Case(
            {"score_mod": lambda s, b, h, i, j: s - slopes[h] * abs(i - j)}, {"alibi_slopes": slopes}, "alibi_slopes"
        ),
        "table of relative positions, with its gradient": Case(
            {"score_mod": lambda s, b, h, i, j: s + table[h, i - j + seqlen - 1]}, {}, "no function", (table,)
        ),
        "ten operations": Case({"score_mod": ten}, {}, "no function"),
    }


def measure(seconds: float, quick: bool = False) -> dict[str, list[Row]]:
    """Return one row for each function, dtype and pass, and one for each length of a block mask."""
    shape = QUICK_SHAPE if quick else SHAPE
    found = [row(name, case, dtype, shape, seconds) for name, case in cases(*shape[1:3]).items() for dtype in DTYPES]
    lengths = (QUICK_MASK_LENGTH,) if quick else (LARGEST_EAGER_MASK, MASK_LENGTH)
    return {"functions": [one for rows in found for one in rows], "masks": [mask_row(length) for length in lengths]}


def row(name: str, case: Case, dtype: str, shape: tuple[int, ...], seconds: float) -> list[Row]:
    """Return the rows of the forward and of the backward pass."""
    import torch

    batch, nheads, seqlen, dim = shape
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(batch, seqlen, nheads, dim, generator=generator).to(getattr(torch, dtype)) for _ in range(4)]
    leaves, dout = [x.requires_grad_() for x in arrays[:3]], arrays[3]
    both = {FUNCTION: case.functions, ARGUMENT: case.arguments}
    forward: dict[str, Callable[[], Any]] = {name: partial(attend, leaves, one) for name, one in both.items()}
    outs = {provider: call() for provider, call in forward.items()}
    wanted = {FUNCTION: [*leaves, *case.leaves], ARGUMENT: leaves}
    backward = {provider: gradient(outs[provider], wanted[provider], dout) for provider in outs}
    compiled = flex(leaves, case.functions, dtype)
    if compiled is not None:
        forward[FLEX] = compiled
    problem = wrong(case, outs, dtype)
    rows = []
    for pass_, calls in (("forward", forward), ("backward", backward)):
        timings = {} if problem else measure_times(calls, seconds)
        given = {"name": name, "compared with": case.baseline, "dtype": dtype, "pass": pass_, "shape": shape}
        rows.append({**given, "wrong": problem, "seconds": {key: asdict(x) for key, x in timings.items()}})
    return rows


def attend(leaves: list[Tensor], arguments: dict[str, Any]) -> Tensor:
    """Return the result of functions or arguments; `boundaries`: of packed sequences."""
    from .. import attention, attention_varlen

    if "boundaries" not in arguments:
        out: Tensor = attention(*leaves, **arguments)
        return out
    boundaries = arguments["boundaries"]
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    q, k, v = (x[0] for x in leaves)
    packed: Tensor = attention_varlen(q, k, v, boundaries, boundaries, longest, longest)
    return packed[None]


def gradient(out: Tensor, leaves: list[Tensor], dout: Tensor) -> Callable[[], Any]:
    import torch

    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def wrong(case: Case, outs: dict[str, Tensor], dtype: str) -> str | None:
    """Return how the two results differ, or None. Functions that no argument expresses are not compared."""
    if not case.arguments:
        return None
    error = float((outs[FUNCTION] - outs[ARGUMENT]).detach().abs().max())
    return None if error <= TOLERANCE[dtype] else f"results differ by {error:.1e}"


def flex(leaves: list[Tensor], functions: dict[str, Any], dtype: str) -> Callable[[], Any] | None:
    """Return torch's compiled forward pass, after it has been compiled; None without a compiler."""
    import torch

    if Flex().absent():
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.detach().transpose(1, 2).contiguous() for x in leaves)
    mask = functions.get("mask_mod")
    blocks = None if mask is None else create_block_mask(mask, None, None, q.shape[2], k.shape[2], "cpu")

    def run() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, score_mod=functions.get("score_mod"), block_mask=blocks)

    try:
        run()
    except Exception:
        return None  # torch does not compile every function for a CPU
    return run


def mask_row(length: int) -> Row:
    """Return the seconds of the block mask of causal documents, by this package and by torch if its pairs fit."""
    import torch

    from .. import block_mask

    document = torch.sort(torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(0)))[0]

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)

    found = {"anyattn": best(lambda: block_mask(mask, 1, 1, length, length, block_size=MASK_BLOCK))}
    if length <= LARGEST_EAGER_MASK:
        from torch.nn.attention.flex_attention import create_block_mask

        found["torch"] = best(lambda: create_block_mask(mask, None, None, length, length, "cpu", MASK_BLOCK), rounds=1)
    return {"length": length, "seconds": found}


def best(call: Callable[[], Any], rounds: int = 5) -> float:
    """Return the shortest time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
