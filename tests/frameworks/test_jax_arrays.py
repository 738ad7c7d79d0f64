"""JAX arrays in the public functions: what is accepted, what is refused and by which words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import anyattn
from harness import jax_arrays
from harness.processes import fresh


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


Q, K, V = normal(2, 5, 4, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 6, seed=2)


def test_the_call_of_another_framework_does_not_import_jax() -> None:
    result = fresh(
        "import sys, numpy as np, anyattn\n"
        "x = np.ones((1, 4, 2, 8), np.float32); anyattn.attention(x, x, x)\n"
        "assert 'jax' not in sys.modules and 'anyattn.frameworks.jax' not in sys.modules\n"
        "import jax.numpy as jnp; anyattn.attention(jnp.asarray(x), jnp.asarray(x), jnp.asarray(x))\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_missing_library_is_named(tmp_path: Any) -> None:
    result = fresh(
        f"import os; os.environ['ANYATTN_LIBRARY'] = {str(tmp_path / 'absent.so')!r}\n"
        "import jax.numpy as jnp, anyattn\n"
        "x = jnp.ones((1, 4, 2, 8))\n"
        "assert (anyattn.attention(x, x, x, backend='numpy') == 1).all()\n"
        "try: anyattn.attention(x, x, x)\n"
        "except anyattn.UnsupportedProblem as error: assert 'absent.so' in str(error), error\n"
        "else: raise AssertionError('nothing was raised')\n"
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": np.ones((2, 7, 2, 8), np.float32)}, "k must be a JAX array like q, got ndarray"),
        ({"v": torch.ones(2, 7, 2, 8)}, "v must be a JAX array like q, got Tensor"),
        ({"bias": np.ones((5, 7), np.float32)}, "bias must be a JAX array like q, got ndarray"),
        ({"bias": jnp.ones((5, 7), jnp.int32)}, "bias must be float32, got int32"),
        ({"alibi_slopes": jnp.ones(4, jnp.int32)}, "alibi_slopes must be floating point, got int32"),
        ({"seqused_k": jnp.ones(2)}, "seqused_k must hold integers, got float32"),
        ({"seqused_k": [1.5, 2]}, "seqused_k must hold integers, got float64"),
        ({"rng_state": jnp.ones(2), "dropout_p": 0.5}, r"rng_state must be a jax\.random\.key"),
        ({"seed": jnp.uint32(3), "rng_state": jax.random.key(0), "dropout_p": 0.5}, "cannot be combined"),
        ({"seed": 1.5, "dropout_p": 0.5}, "seed must be an integer, got 1.5"),
        ({"seed": 2**65, "dropout_p": 0.5}, "seed must be a 64-bit integer"),
        ({"offset": 2**40}, "offset must fit in int32"),
        ({"seqused_k": [8, 1]}, r"seqused_k\[0\] must be from 0 to 7, got 8"),
        ({"seqused_k": jnp.asarray([8, 1])}, r"seqused_k\[0\] must be from 0 to 7, got 8"),
        ({"scale": "big"}, "scale must be a real number"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], text: str) -> None:
    for call in (anyattn.attention, jax.jit(anyattn.attention, static_argnames=tuple(arguments))):
        if call is not anyattn.attention and any(not isinstance(x, (int, float, str)) for x in arguments.values()):
            continue  # jit takes no such constants
        with pytest.raises((TypeError, ValueError), match=text):
            call(**({"q": Q, "k": K, "v": V} | arguments))


def test_values_that_are_known_only_in_the_program_are_checked_there() -> None:
    call = jax.jit(lambda n: anyattn.attention(Q, K, V, seqused_k=n))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"anyattn: seqused_k\[1\]"):
        jax.block_until_ready(call(jnp.asarray([1, 9])))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"seqused_k\[1\] must be from 0 to 7, got 9"):
        jax.block_until_ready(
            jax.jit(lambda n: anyattn.attention(Q, K, V, seqused_k=n, backend="numpy"))(jnp.asarray([1, 9]))
        )


def test_traced_scalars_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="scale must be a real number"):
        jax.jit(lambda scale: anyattn.attention(Q, K, V, scale=scale))(0.5)


def test_scales_of_quantised_keys_are_checked() -> None:
    k, v = K.astype(jnp.int8), V.astype(jnp.int8)
    with pytest.raises(TypeError, match="k_scale must be floating point, got int32"):
        anyattn.attention(Q, k, v, k_scale=jnp.ones(2, jnp.int32), v_scale=1.0)
    with pytest.raises(ValueError, match="v_scale must be finite and >= 0, got nan"):
        anyattn.attention(Q, k, v, k_scale=1.0, v_scale=float("nan"))
    with pytest.raises(ValueError, match="v_scale must be a number or an array"):
        anyattn.attention(Q, k, v, k_scale=1.0)


def test_gradients_through_quantised_keys_are_refused() -> None:
    k, v = K.astype(jnp.int8), V.astype(jnp.int8)
    with pytest.raises(ValueError, match="k and v must have q's dtype float32 in the tangent pass, got int8"):
        jax.grad(lambda q: anyattn.attention(q, k, v, k_scale=1.0, v_scale=1.0).sum())(Q)


def test_scalars_may_be_arrays_of_one_element() -> None:
    want = anyattn.attention(Q, K, V, scale=0.25, softcap=2.0, causal=True)
    got = anyattn.attention(Q, K, V, scale=jnp.float32(0.25), softcap=jnp.asarray([2.0]), causal=jnp.asarray(True))
    assert (got == want).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_devices_are_refused(platform: str) -> None:
    function = jax.jit(anyattn.attention)
    with pytest.raises(NotImplementedError, match=r"on the CPU, got .* Use jax\.nn\.dot_product_attention or tokamax"):
        function.trace(Q, K, V).lower(lowering_platforms=(platform,))


def test_tables_may_have_any_form() -> None:
    want = anyattn.attention(Q, K, V, seqused_k=jnp.asarray([3, 6]), offset=jnp.asarray([2, 2]), causal=True)
    for lengths in ([3, 6], np.array([3, 6]), np.array([3, 6], np.uint8), jnp.asarray([3, 6], jnp.int16)):
        assert (anyattn.attention(Q, K, V, seqused_k=lengths, offset=2, causal=True) == want).all()
    assert (jax.jit(lambda n: anyattn.attention(Q, K, V, seqused_k=[3, 6], offset=n, causal=True))(2) == want).all()


def test_dropout_states_of_all_forms_agree() -> None:
    state = np.array([-7, 5], np.int64)
    arrays = [np.asarray(x) for x in (Q, K, V)]
    want = anyattn.attention(*arrays, dropout_p=0.4, rng_state=state, backend="cpu")
    words = jnp.asarray(state.view(np.uint32))
    for given in (state, words):
        np.testing.assert_array_equal(anyattn.attention(Q, K, V, dropout_p=0.4, rng_state=given), want)
    with jax_arrays.wide():
        np.testing.assert_array_equal(anyattn.attention(Q, K, V, dropout_p=0.4, rng_state=jnp.asarray(state)), want)


def test_gradients_under_dropout_use_the_dropped_entries_of_the_forward() -> None:
    def loss(q: Any, key: Any) -> Any:
        return jnp.sin(anyattn.attention(q, K, V, dropout_p=0.4, rng_state=key)).sum()

    with jax_arrays.wide():
        q, k, v = (x.astype(jnp.float64) for x in (Q, K, V))

        def total(q: Any) -> Any:
            return jnp.sin(anyattn.attention(q, k, v, dropout_p=0.4, seed=3)).sum()

        along = normal(*Q.shape, seed=7).astype(jnp.float64)
        change = (total(q + 1e-6 * along) - total(q - 1e-6 * along)) / 2e-6
        np.testing.assert_allclose((jax.grad(total)(q) * along).sum(), change, rtol=1e-6)
    assert jnp.isfinite(jax.jit(jax.grad(loss))(Q, jax.random.key(3))).all()


def test_explicit_functions_take_jax_arrays() -> None:
    out, lse = anyattn.attention_forward(Q, K, V, causal=True)
    grads = anyattn.attention_backward(out, Q, K, V, out, lse, causal=True)
    want = jax.vjp(lambda *xs: anyattn.attention(*xs, causal=True), Q, K, V)[1](out)
    for got, one in zip(grads, want, strict=False):
        np.testing.assert_array_equal(got, one)
    assert grads.dbias is None and isinstance(grads.dq, jax.Array)
    assert anyattn.explain(Q, K, V, causal=True).chosen == "cpu"
    anyattn.warmup(Q, K, V, backward=True)


def test_merge_equals_the_union_and_has_gradients() -> None:
    def merged(q: Any, k: Any, v: Any) -> Any:
        halves = [anyattn.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 3), slice(3, None))]
        return anyattn.merge(*halves[0], *halves[1])[0]

    np.testing.assert_allclose(merged(Q, K, V), anyattn.attention(Q, K, V), rtol=1e-5, atol=1e-6)
    got, want = (jax.grad(lambda k, f=f: jnp.sin(f(Q, k, V)).sum())(K) for f in (merged, anyattn.attention))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [None, slice(1, None, 2), [0, -1]])
def test_weights_equal_numpy_arrays(queries: Any) -> None:
    lists = jnp.asarray(np.random.default_rng(3).integers(-1, 7, (2, 5, 4)), jnp.int32)
    given = {"causal": True, "softcap": 3.0, "bias": normal(5, 7, seed=3), "kv_indices": lists}
    lse = anyattn.attention(Q, K, V, **given, return_lse=True)[1]
    arrays = {name: np.asarray(x) if isinstance(x, jax.Array) else x for name, x in given.items()}
    got = jax.jit(lambda q: anyattn.attention_weights(q, K, lse, **given, queries=queries))(Q)
    want = anyattn.attention_weights(*(np.asarray(x) for x in (Q, K, lse)), **arrays, queries=queries)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_of_weights_equal_those_of_attention() -> None:
    def by_weights(q: Any) -> Any:
        lse = anyattn.attention(q, K, V, return_lse=True)[1]
        weights = anyattn.attention_weights(q, K, lse)
        return jnp.sin(jnp.einsum("bhij,bjhd->bihd", weights, jnp.repeat(V, 2, axis=2))).sum()

    want = jax.grad(lambda q: jnp.sin(anyattn.attention(q, K, V)).sum())(Q)
    np.testing.assert_allclose(jax.grad(by_weights)(Q), want, rtol=1e-4, atol=1e-5)


def test_queries_of_weights_must_be_known() -> None:
    lse = anyattn.attention(Q, K, V, return_lse=True)[1]
    with pytest.raises(TypeError, match="queries must be indices that are known"):
        jax.jit(lambda n: anyattn.attention_weights(Q, K, lse, queries=n))(jnp.asarray([1]))
    with pytest.raises(ValueError, match="queries must be indices from -5 to 4, got 5"):
        anyattn.attention_weights(Q, K, lse, queries=[5])
    with pytest.raises(ValueError, match=r"seqused_k\[1\] must be from 0 to 7, got 9"):
        anyattn.attention_weights(Q, K, lse, seqused_k=[1, 9])


def test_results_have_the_dtypes_of_the_inputs() -> None:
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        out, lse = anyattn.attention(*(x.astype(dtype) for x in (Q, K, V)), return_lse=True)
        assert out.dtype == dtype and lse.dtype == jnp.float32
    assert jnp.bfloat16 == ml_dtypes.bfloat16


def test_layouts_of_other_interfaces_take_jax_arrays() -> None:
    swapped = [x.swapaxes(1, 2) for x in (Q, K, V)]
    want = anyattn.attention(Q, K, V, causal=True).swapaxes(1, 2)
    np.testing.assert_array_equal(anyattn.flash_attention(*swapped, causal=True), want)
