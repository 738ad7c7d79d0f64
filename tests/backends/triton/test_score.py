"""Tests of score functions in Triton: generated operations, lists of tiles, layouts, and bits of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn import testing
from anyattn.backends.triton import device, plan_score, score_limits, tuning
from anyattn.backends.triton.device import interpreted
from anyattn.definition import accuracy
from anyattn.definition.options import Options
from anyattn.definition.passes import FORWARD
from anyattn.definition.problem import Array, Problem, contiguous
from anyattn.definition.reads import check_sizes
from anyattn.definition.score.trace import trace
from anyattn.definition.validate import make_problem
from anyattn.frameworks.torch.score_functions import traced
from harness.backends import skip_module_without

skip_module_without("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="on a GPU tests/device runs instead")

TILE = 64  # of the interpreter


def check(dout: torch.Tensor | None = None, **arguments: Any) -> Any:
    """Compare out, lse and gradients with the reference. Return the gradients."""
    problem, given = testing.describe(arguments)
    out, lse = anyattn.attention_forward(**arguments, backend="triton")
    results = {"out": out, "lse": lse}
    lines = accuracy.check(accuracy.expected_forward(problem, given), _arrays(results))
    if dout is None:
        assert not lines
        return None
    grads = anyattn.attention_backward(dout, out=out, lse=lse, **arguments, backend="triton")
    expected = accuracy.expected_backward(problem, given, dout.double().numpy(), None)
    assert not lines + accuracy.check(expected, _arrays(grads._asdict()))
    return grads


def _arrays(results: dict[str, Any]) -> dict[str, Any]:
    return {name: testing.to_numpy(x) for name, x in results.items() if x is not None}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROUNDED = {
    "floor": lambda s, i, j: torch.floor(s),
    "round": lambda s, i, j: torch.round(s * 2) + torch.round((i - j) / 2.0),
    "sign": lambda s, i, j: torch.sign(s) + torch.sign(i - j),
    "floordiv": lambda s, i, j: s // 0.7 + (i - j) // 0.3,
    "mod": lambda s, i, j: s % 0.7 + (i - j) % -3.0,
    "to_int": lambda s, i, j: s.to(torch.int32) * 1.5,
}
SMOOTH = {
    "exp": lambda s, i, j: torch.exp(s / 4),
    "log": lambda s, i, j: torch.log(torch.abs(s) + 0.5),
    "sqrt": lambda s, i, j: torch.sqrt(torch.abs(s) + 0.5),
    "tanh": lambda s, i, j: torch.tanh(s),
    "sigmoid": lambda s, i, j: torch.sigmoid(s * 3),
    "sin": lambda s, i, j: torch.sin(s) * torch.cos(i - j),
    "powers": lambda s, i, j: s**2 - s**3 / 10 + s**4 / 100 + (torch.abs(s) + 1) ** -1,
    "pow": lambda s, i, j: (torch.abs(s) + 0.1) ** 1.7 + (i + 1) ** (j / 40.0),
    "min": lambda s, i, j: torch.minimum(s, (i - j) / 9.0) + torch.clamp(s, -1, 0.5),
    "max": lambda s, i, j: torch.maximum(s, torch.minimum(i, j) / 9.0),
    "where": lambda s, i, j: torch.where((s > 0) & (i != j), s, -s / 3),
}
INTEGERS = {
    "floordiv": lambda i, j: (i - j) // 5 + (i - j) // -4 + (i - j) // (j - 7),
    "mod": lambda i, j: (i - j) % 5 + (i - j) % -4 + (i - j) % (j - 7),
    "shifts": lambda i, j: ((i - j) >> 2) + (j << 3),
    "bits": lambda i, j: ((i & 12) | (j ^ 5)) + (i - j) & 63,
    "extrema": lambda i, j: torch.minimum(i, j) - torch.maximum(i, 2 * j) + torch.abs(i - j) - torch.sign(j - i),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_operations_and_their_derivatives_are_within_their_budgets(name: str) -> None:
    q, k, v, dout = (random(1, 30, 1, 16, seed=seed) for seed in range(4))
    check(dout, q=q, k=k, v=v, score_mod=lambda s, b, h, i, j: SMOOTH[name](s, i, j))


@pytest.mark.parametrize("name", ROUNDED)
def test_operations_that_jump_equal_numpy(name: str) -> None:
    """q and k are integers, so that both backends round the same numbers."""
    q, k, v = (torch.round(random(1, 30, 1, 16, seed=seed)) for seed in range(3))
    results = [
        anyattn.attention(q, k, v, scale=0.25, score_mod=lambda s, b, h, i, j: ROUNDED[name](s, i, j) / 3, backend=one)
        for one in ("triton", "numpy")
    ]
    torch.testing.assert_close(*results, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_exact(name: str) -> None:
    """One key is visible per query, chosen by the integers, so that a single wrong integer changes the result."""
    n = 40
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    quotients = {"floordiv": (np.floor_divide, "//"), "mod": (np.remainder, "%")}
    if name in quotients:  # torch raises for a divisor of 0
        apply, a, b = quotients[name][0], (i - j).numpy(), np.broadcast_to((j - 7).numpy(), (n, n))
        with np.errstate(all="ignore"):
            values = torch.from_numpy(apply(a, 5) + apply(a, -4) + apply(a, b))
    else:
        values = INTEGERS[name](i, j)
    x = torch.zeros(1, n, 1, 16)
    v = torch.eye(n)[None, :, None]
    table = values.contiguous()
    equal = anyattn.attention(
        x, x, v, mask_mod=lambda b, h, q, kv: INTEGERS[name](q, kv) == table[q, kv], backend="triton"
    )
    torch.testing.assert_close(equal, torch.full_like(equal, 1 / n))


def test_nan_and_infinity_pass_through_like_numpy() -> None:
    q, k, v = (random(1, 20, 1, 16, seed=seed) for seed in range(3))
    for function in (
        lambda s, b, h, i, j: torch.where(j > i, -torch.inf, s),
        lambda s, b, h, i, j: torch.maximum(torch.sqrt(s - (i == 3) * 99.0), s),
        lambda s, b, h, i, j: torch.where((i == 2) & (j == 3), torch.nan, s),
    ):
        found = [anyattn.attention(q, k, v, score_mod=function, backend=name) for name in ("triton", "numpy")]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6, equal_nan=True)


def sparse(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Leave full, mixed and empty tiles of 64, which differ from head to head and from sequence to sequence."""
    return ((i // TILE + j // TILE + h + b) % 3 != 0) & ((j // TILE != 1) | (i > j))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("extra", ["plain", "window", "lengths", "everything"])
def test_listed_tiles_give_the_results_of_all_tiles(extra: str, group: int) -> None:
    batch, n_q, n_k, heads = 2, 3 * TILE + 9, 4 * TILE - 5, 2
    q, dout = (random(batch, n_q, heads, 16, seed=seed) for seed in range(2))
    k, v = (random(batch, n_k, heads // group, 16, seed=seed) for seed in (2, 3))
    options: dict[str, Any] = {
        "plain": {},
        "window": {"window": (100, 30)},
        "lengths": {"seqused_k": torch.tensor([n_k, 100]), "seqused_q": torch.tensor([70, n_q]), "causal": True},
        "everything": {"causal": True, "softcap": 4.0, "dropout_p": 0.2, "seed": 1, "sink": torch.ones(heads)},
    }[extra]
    check(dout, q=q, k=k, v=v, mask_mod=sparse, score_mod=lambda s, b, h, i, j: s + (i - j) * 0.01, **options)


@pytest.mark.parametrize("bound", [True, False])
def test_packed_sequences_share_lists_if_their_lengths_are_bounded(bound: bool) -> None:
    lengths = torch.tensor([0, 80, 80, 229], dtype=torch.int32)
    q, k, v, dout = (random(229, 2, 16, seed=seed) for seed in range(4))
    bounds = {"max_seqlen_q": 149, "max_seqlen_k": 149} if bound else {}
    check(dout, q=q, k=k, v=v, mask_mod=sparse, cu_seqlens_q=lengths, cu_seqlens_k=lengths, **bounds)


def test_rows_without_visible_keys_are_zero_and_have_no_gradients() -> None:
    q, k, v, dout = (random(1, 150, 1, 16, seed=seed) for seed in range(4))
    table = random(150).requires_grad_()
    functions = {
        "mask_mod": lambda b, h, i, j: (i < 40) & (j < 70),
        "score_mod": lambda s, b, h, i, j: torch.log((39.5 - i) * 1.0) * table[j] + s,
    }
    grads = check(dout, q=q, k=k, v=v, **functions)
    out = anyattn.attention(q, k, v, backend="triton", **functions)
    assert not out[:, 40:].any() and not grads.dq[:, 40:].any() and not grads.dk[:, 70:].any()
    assert not grads.dcaptured[70:].any()


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_decoding_from_a_cache_counts_slots(seqlen_q: int) -> None:
    q = random(2, seqlen_q, 4, 16)
    k, v = (random(2, 300, 2, 16, seed=seed) for seed in (1, 2))
    bias = random(4, 300, seed=3)
    pages = torch.randperm(2 * 30, generator=torch.Generator().manual_seed(0)).reshape(2, 30).to(torch.int32)
    paged_k, paged_v = (torch.empty(60, 10, 2, 16) for _ in range(2))
    for cache, x in ((paged_k, k), (paged_v, v)):
        cache[pages.long()] = x.reshape(2, 30, 10, 2, 16)
    lengths = torch.tensor([300, 123], dtype=torch.int32)
    functions = {
        "score_mod": lambda s, b, h, i, j: s + bias[h, j] - i,
        "mask_mod": lambda b, h, i, j: (j % 3 != b) | (h == 1),
    }
    results = [
        anyattn.attention_with_kvcache(q, *cache, cache_seqlens=lengths, causal=True, backend=name, **functions, **more)
        for name, cache, more in (
            ("numpy", (k, v), {}),
            ("triton", (k, v), {}),
            ("triton", (paged_k, paged_v), {"block_table": pages}),
        )
    ]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=2e-6)


def test_gradients_of_captured_arrays_do_not_depend_on_the_order_of_programs() -> None:
    """Each order of the sequences gives the same integers, and so the same bits."""
    q, k, v, dout = (random(3, 100, 2, 16, seed=seed) for seed in range(4))
    table, scale = random(2, 199).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    functions = {"score_mod": lambda s, b, h, i, j: s * scale + table[h, i - j + 99]}
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        arrays = [x[order] for x in (q, k, v)]
        out, lse = anyattn.attention_forward(*arrays, backend="triton", **functions)  # type: ignore[arg-type]
        grads = anyattn.attention_backward(dout[order], *arrays, out, lse, backend="triton", **functions)  # type: ignore[misc]
        found.append(grads.dcaptured)
    assert found[0].any() and torch.equal(*found)


def test_infinite_terms_change_only_the_elements_that_they_reach() -> None:
    q, k, v, dout = (random(1, 70, 1, 16, seed=seed) for seed in range(4))
    table = random(4).requires_grad_()
    functions: dict[str, Any] = {"score_mod": lambda s, b, h, i, j: s + table[j % 4] * (j % 4 - 1)}
    functions["mask_mod"] = lambda b, h, i, j: j % 4 < 3
    out, lse = anyattn.attention_forward(q, k, v, backend="triton", **functions)
    dlse = torch.zeros_like(lse)
    dlse[0, 0, 5] = torch.inf
    grads = anyattn.attention_backward(dout, q, k, v, out, lse, dlse=dlse, backend="triton", **functions)
    inf = torch.inf  # the product with the derivative 0 is NaN; so is the product with the probability 0
    torch.testing.assert_close(grads.dcaptured, torch.tensor([-inf, torch.nan, inf, torch.nan]), equal_nan=True)


def problem(function: Callable[..., Any], n: int, **options: Any) -> Problem:
    """Return the problem of a dense call with these functions."""
    graph = traced(function, None).graph
    arrays = {name: contiguous((1, n, 2, 16), "float32") for name in ("q", "k", "v")}
    if graph.sizes(floats=True):
        arrays["captured"] = Array((graph.sizes(floats=True),), (1,), "float32")
    return make_problem(arrays, Options(score=graph.text, **options), FORWARD)


def test_other_sizes_and_constants_use_the_compiled_functions() -> None:
    from anyattn.backends.triton.score_arguments import scalars

    found = []
    for n, slope in ((40, 0.25), (90, 0.125)):
        table = torch.zeros(2, 2 * n)
        values = scalars(problem(lambda s, b, h, i, j, t=table, n=n, m=slope: s + m * t[h, i - j + n], n))
        found.append(values)
    assert found[0].score is not None and found[0].score == found[1].score
    assert type(found[0]) is type(found[1]) and found[0] != found[1]


def test_batch_invariant_calls_have_no_lists() -> None:
    graph = trace(None, lambda b, h, i, j: i // 16 >= j // 16).graph
    arrays = {name: contiguous((1, 300, 2, 16), "float32") for name in ("q", "k", "v")}
    found = []
    for invariant in (False, True):
        made = make_problem(arrays, Options(score=graph.text, batch_invariant=invariant), FORWARD)
        found.append(plan_score.plan_lists(made, plan_score.Tiles(TILE, TILE), 5))
    assert found[0] is not None and found[0].address.offset == 16 and found[1] is None
    config = tuning.forward(device.INTERPRETER, "float32", 16, heavy=False)
    assert (config.tile_q, config.tile_k) == (TILE, TILE)


def test_integers_beyond_int32_are_refused() -> None:
    large = problem(lambda s, b, h, i, j: s + torch.where(i == 2**40, 1.0, 0.0), 8)
    assert any("fit in int32" in reason for reason in score_limits.limits(large))


def test_reads_of_arrays_on_a_device_are_checked_from_the_sizes() -> None:
    bias, order = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    outside = traced(lambda s, b, h, i, j: s + bias[i - j], None).graph.text
    with pytest.raises(ValueError, match=r"shape \(8,\) must be from 0 to 7 on axis 0, got -7 to 7"):
        check_sizes(outside, (1, 2, 8, 8))
    check_sizes(outside, (1, 2, 0, 8))
    check_sizes(traced(lambda s, b, h, i, j: s + bias[order[j]], None).graph.text, (1, 2, 8, 8))
