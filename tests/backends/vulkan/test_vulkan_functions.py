"""Score functions on Vulkan: accuracy of the shader library, linking, compilation, and limits of software drivers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn import testing
from anyattn.backends.vulkan import linking, pipeline, score_code, spirv
from anyattn.backends.vulkan.engine import current_engine
from anyattn.backends.vulkan.forward import Setup
from anyattn.definition.score.operations import OPERATIONS
from anyattn.definition.score.trace import trace
from anyattn.vulkan import DeviceArray
from backends.vulkan.common import VULKAN, fresh_plans, needs_vulkan, pass_self_tests, printed
from backends.vulkan.test_shaders import instructions
from conformance.test_score_functions import check, of_gallery

RNG = np.random.default_rng(0)
N = 3000
# what the library must treat like NumPy, in every combination
SPECIAL = np.array([0, -0.0, 1, -1, 0.5, -2, 3, np.inf, -np.inf, np.nan, 3e38, 1e-30, 88.9, -104], np.float32)
PAIRS = np.array(np.meshgrid(SPECIAL, SPECIAL), np.float32).reshape(2, -1)
WIDE = np.exp(RNG.uniform(-60, 60, N)) * RNG.choice([-1, 1], N)
NORMAL = RNG.standard_normal(N)
POSITIVE = np.abs(WIDE)
# Function, arguments, and the largest error in eps: that of the result, of its argument where the driver computes it,
# and 1.5 eps of the conversions to log2 units and back, through which results are seen here.
ACCURATE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]] = {
    "exp": (np.exp, (RNG.uniform(-85, 85, N),), 2),
    "log": (np.log, (POSITIVE,), 2),
    "log near 1": (np.log, (1 + NORMAL / 1000,), 2),
    "sin": (np.sin, (np.concatenate([WIDE, 10 * NORMAL, np.arange(N) * np.pi]),), 2),
    "cos": (np.cos, (np.concatenate([WIDE, 10 * NORMAL, np.arange(N) * np.pi / 2]),), 2),
    "tanh": (np.tanh, (NORMAL,), 5),
    "pow": (np.power, (np.abs(10 * NORMAL) + 1e-3, RNG.uniform(-4, 4, N)), 3),
    "large pow": (np.power, (1 + np.abs(NORMAL) / 100, RNG.uniform(-99, 99, N)), 30),  # |exponent| / 4 eps
    "mod": (np.remainder, (1000 * NORMAL, RNG.standard_normal(N)), 1.5),
    "mod of large": (np.fmod, (POSITIVE, RNG.random(N) + 0.1), 1.5),
}


def values_of(function: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """Return the values of a function in float32 on the device: lse of a query with one key is its score."""
    wrapped = [anyattn.captured(np.asarray(x, np.float32)) for x in arrays]
    q, k = (np.zeros((1, n, 1, 4), np.float32) for n in (len(arrays[0]), 1))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return function(*[x[q_idx] for x in wrapped])

    lse: np.ndarray = anyattn.attention_forward(q, k, k, score_mod=score_mod, backend="vulkan")[1]
    return lse.ravel()


@needs_vulkan
@pytest.mark.parametrize("name", ACCURATE)
def test_functions_are_accurate_to_a_few_units(name: str) -> None:
    function, arguments, units = ACCURATE[name]
    arguments = tuple(np.asarray(x, np.float32) for x in arguments)
    traced = np.remainder if function is np.fmod else function
    want = function(*[x.astype(np.float64) for x in arguments])
    error = np.abs(values_of(traced, *arguments) - want) / np.maximum(np.abs(want), 2.0**-126)
    assert error.max() <= (units + 1.5) * np.finfo(np.float32).eps


def kind_of(x: Any, where: Any = np.where) -> Any:
    """Return a number for NaN, infinities and numbers too large to be seen in a score."""
    large = where(x > 1e30, 5, where(x < -1e30, 6, where(abs(x) >= 0, 0, 7)))
    return where(large == 0, x, large)


BINARY = ("add", "sub", "mul", "div", "pow", "floordiv", "mod", "min", "max", "lt", "le", "eq", "ne")
UNARY = ("neg", "abs", "sign", "floor", "round", "exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos", "to_int")
NUMPY = {"neg": "negative", "sub": "subtract", "mul": "multiply", "div": "divide", "pow": "power", "mod": "remainder"}
NUMPY |= {"floordiv": "floor_divide", "min": "minimum", "max": "maximum", "lt": "less", "le": "less_equal"}
NUMPY |= {"eq": "equal", "ne": "not_equal"}


@needs_vulkan
@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_special_values_are_those_of_the_definition(name: str) -> None:
    arguments = PAIRS if name in BINARY else PAIRS[:1, : len(SPECIAL)]
    if name in ("to_int", "sigmoid"):
        found = values_of(lambda x: kind_of(x.int() * 1.0 if name == "to_int" else x.sigmoid()), *arguments)
    else:
        function = getattr(np, NUMPY.get(name, name))
        found = values_of(lambda *x: kind_of(function(*x)), *arguments)
    with np.errstate(all="ignore"):
        want = kind_of(np.asarray(OPERATIONS[name].compute(*arguments), np.float32))
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=2.0**-120)


INTEGERS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << abs(b),
    "shr": lambda a, b: a >> abs(b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "abs and neg": lambda a, b: abs(a) + np.negative(b),
    "sign and where": lambda a, b: np.where((a < b) ^ (b > 2), np.sign(a), np.sign(b)),
}


@needs_vulkan
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_exact(name: str) -> None:
    a, b = np.meshgrid(np.arange(-13, 14), np.arange(-9, 10))
    a, b = a.ravel(), b.ravel()
    first, second = (anyattn.captured(x.astype(np.int32)) for x in (a, b))
    q, k = (np.zeros((1, n, 1, 4), np.float32) for n in (len(a), 1))

    def score_mod(score: Any, batch: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.where(True, INTEGERS[name](first[q_idx], second[q_idx]), 0) * 1.0

    found = anyattn.attention_forward(q, k, k, score_mod=score_mod, backend="vulkan")[1].ravel()
    with np.errstate(all="ignore"):
        want = np.asarray(INTEGERS[name](a, b)).astype(np.float64)
    np.testing.assert_allclose(found, want, rtol=2.0**-21)  # of the conversions to log2 units and back


@needs_vulkan
def test_other_sizes_and_values_use_the_same_pipeline() -> None:
    made = current_engine().pipelines._made

    def call(n: int, number: float) -> None:
        table = anyattn.captured(np.full((2, n), number, np.float32))
        q = np.zeros((1, n, 2, 8), np.float32)
        anyattn.attention(
            *(q, q, q), score_mod=lambda s, b, h, i, j: s * number + table[h, i] - 123.25 * number, backend="vulkan"
        )

    call(9, 0.25)
    count = len(made)
    call(13, 0.75)
    assert len(made) == count


def test_a_linked_module_has_unique_types_and_every_called_function() -> None:
    traced = trace(lambda s, b, h, i, j: np.sin(s) ** (j % 3), lambda b, h, i, j: i // 5 >= j)
    for shader in ("forward_f32", "dkdv_16", "dbias_f32", "dq_matrix_f16"):
        bodies = dict(score_code.generate(traced.graph.text).bodies)
        module = linking.link(pipeline.binary(shader), pipeline.binary(pipeline.LIBRARY), bodies, 9)
        found = list(instructions(module))
        types = [(w[0], *w[2:]) for w in found if w[0] & 0xFFFF in linking.TYPES]
        scalars = [one for one in types if one[0] & 0xFFFF not in linking.AGGREGATES]
        assert len(set(scalars)) == len(scalars)
        functions = {w[2] for w in found if w[0] & 0xFFFF == linking.FUNCTION}
        assert {w[3] for w in found if w[0] & 0xFFFF == linking.CALL} <= functions
        assert len(found) > len(list(instructions(pipeline.binary(shader))))


def test_every_stub_is_found_in_every_shader_that_calls_it() -> None:
    for name, module in pipeline.binaries().items():
        shader = name.split("_")[0]
        words = [w for w in instructions(module) if w[0] & 0xFFFF == spirv.CONSTANT and w[3] in linking.STUBS]
        found = {linking.STUBS[w[3]] for w in words}
        wanted = {"score_mod", "mask_mod"} | (set() if shader == "forward" else {"score_slope"})
        assert found == (wanted if shader in linking.BINDINGS else set()), name


@needs_vulkan
def test_loops_of_a_function_do_not_exceed_the_limit_of_the_driver() -> None:
    """Mesa's software driver ends loops silently after 65,535 iterations. These remainders take 29 for each key."""
    q, k = np.zeros((1, 3, 1, 8), np.float32), np.zeros((1, 5000, 1, 8), np.float32)
    v, dout = RNG.standard_normal((1, 5000, 1, 8), np.float32), RNG.standard_normal((1, 3, 1, 8), np.float32)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + ((kv_idx + 1) * 1e34) % ((q_idx + 1) * 1.1e-33) * 1e33

    results = []
    for backend in ("numpy", "vulkan"):
        out, lse = anyattn.attention_forward(q, k, v, score_mod=score_mod, backend=backend)
        found = anyattn.attention_backward(dout, q, k, v, out, lse, score_mod=score_mod, backend=backend)
        results.append((out, lse, found.dq, found.dv))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@needs_vulkan
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_decoding_from_a_cache_counts_slots(seqlen_q: int) -> None:
    """Dense and paged caches, in host memory and on the device."""
    rng = np.random.default_rng(0)
    q, bias = rng.standard_normal((2, seqlen_q, 4, 16), np.float32), anyattn.captured(rng.standard_normal((4, 300)))
    cache = [rng.standard_normal((2, 300, 2, 16), np.float32) for _ in range(2)]
    pages = rng.permutation(60).reshape(2, 30).astype(np.int32)
    paged = [np.empty((60, 10, 2, 16), np.float32) for _ in range(2)]
    for target, x in zip(paged, cache, strict=True):
        target[pages] = x.reshape(2, 30, 10, 2, 16)
    given: dict[str, Any] = {
        "score_mod": lambda s, b, h, i, j: s + bias[h, j] - i,
        "mask_mod": lambda b, h, i, j: (j % 3 != b) | (h == 1),
        **{"cache_seqlens": np.array([300, 123], np.int32), "causal": True},
    }
    want = anyattn.attention_with_kvcache(q, *cache, backend="numpy", **given)
    for place in (np.asarray, DeviceArray):
        for arrays, more in ((cache, {}), (paged, {"block_table": pages})):
            found: Any = anyattn.attention_with_kvcache(
                *(place(x) for x in (q, *arrays)), backend="vulkan", **given, **more
            )
            found = found.numpy() if isinstance(found, DeviceArray) else found
            np.testing.assert_allclose(found, want, rtol=0, atol=2e-6)


@needs_vulkan
@pytest.mark.parametrize("name", ["documents", "empty_rows", "relative_clamped", "mixed"])
def test_half_precision_is_within_its_error_budgets(name: str) -> None:
    """Cooperative matrices compute these products, on drivers that have them."""
    check(*of_gallery(name, "float16", False), VULKAN)


@needs_vulkan
@fresh_plans
def test_indices_are_those_of_the_call_if_arrays_are_bound_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch has the heads of one KV head in one sequence. A captured array above the limit is refused."""
    pass_self_tests()
    device = current_engine().device
    monkeypatch.setattr(device, "info", replace(device.info, storage_range=22_500))
    arguments, *rest = of_gallery("temperature", "float32", False)
    assert len(Setup.of(device.info, testing.describe(arguments)[0]).launches) == 4
    check(arguments, *rest, VULKAN)
    check(*of_gallery("kinds", "float32", False), VULKAN)
    with pytest.raises(anyattn.UnsupportedProblem, match="larger than a binding"):
        check(*of_gallery("graph_edges", "float32", False), VULKAN)


@needs_vulkan
def test_validation_layer_reports_nothing_for_score_functions() -> None:
    code = (
        "import torch\nfrom conformance import test_score_functions as tests\n"
        "from backends.vulkan.common import VULKAN\n"
        "for name in ('documents', 'undo_softmax', 'sandwich', 'relative'):\n"
        "    for dtype in ('float32', 'bfloat16'):\n"
        "        tests.check(*tests.of_gallery(name, dtype, False), VULKAN)\n"
        "tests.test_functions_combine_with_every_other_argument(VULKAN)\n"
        "print('clean')\n"
    )
    assert printed(code, ANYATTN_VULKAN_VALIDATE="1").strip() == "clean"
