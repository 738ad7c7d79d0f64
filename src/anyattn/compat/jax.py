"""Attention of JAX arrays on the CPU under the interfaces of other packages, and appends to KV caches.

`dot_product_attention` replaces `jax.nn.dot_product_attention`. `tokamax_implementation` is a callable for
`tokamax.dot_product_attention(..., implementation=[tokamax_implementation])`. Both are exact, store no score matrix,
and work in every transformation of JAX. There are four differences from `jax.nn`:

* A query without visible keys gives 0. In `jax.nn` it gives the mean of the values.
* An entry of `mask` or of the lengths that masks a key masks it completely, with scores of any size.
* The residual has the dtype of scores: float32, or float64 for float64.
* float64 is computed in float64. In `jax.nn` the softmax is computed in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import api, decoding
from ..arguments import bounds
from ..definition.inputs import Appended
from ..definition.options import Rotation
from ..frameworks import loaded
from ..scalars import flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..arguments import JaxArray
    from ..keywords import CacheArguments

__all__ = ["attention_with_kvcache", "dot_product_attention", "export_checks", "tokamax_implementation"]

APPENDED = ("k", "v", "rotary_cos", "rotary_sin", "rotary_interleaved", "cache_seqlens")


def dot_product_attention(
    query: JaxArray,
    key: JaxArray,
    value: JaxArray,
    bias: JaxArray | None = None,
    mask: JaxArray | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: JaxArray | None = None,
    key_value_seq_lengths: JaxArray | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Compute attention with the signature of `jax.nn.dot_product_attention`.

    Args:
        query: (B, T, N, H) or (T, N, H).
        key: (B, S, K, H) or (S, K, H); N is a multiple of K.
        value: (B, S, K, H) or (S, K, H). Unlike in `jax.nn`, its H may differ.
        bias: broadcastable to (B, N, T, S), with gradients.
        mask: boolean, broadcastable to (B, N, T, S); False masks a key.
        scale: default H ** -0.5.
        is_causal: query t attends to keys up to t (aligned to the top left).
        query_seq_lengths: (B,), queries in use; the others give 0.
        key_value_seq_lengths: (B,), keys in use.
        local_window_size: (left, right), or one number for both sides; also without `is_causal`.
        implementation: None or "anyattn".
        return_residual: also return the logarithm of the softmax denominator, (B, T, N) or (T, N), without gradients.

    Returns:
        The output in query's shape (H of value), and the residual on request.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    >>> import jax.numpy as jnp
    >>> from anyattn.compat.jax import dot_product_attention
    >>> x = jnp.ones((1, 16, 2, 8))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 16, 2, 8)
    """
    import jax
    import jax.numpy as jnp

    if implementation not in (None, "anyattn"):
        raise ValueError(
            f"implementation must be None or 'anyattn', got {implementation!r}. Call jax.nn.dot_product_attention."
        )
    q, k, v = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim not in (3, 4):
            raise ValueError(f"{name} must be (B, T, N, H) or (T, N, H), got {x.shape}.")
    q4, k4, v4 = (x[None] if x.ndim == 3 else x for x in (q, k, v))
    out, lse = api.attention(
        q4,
        k4,
        v4,
        causal=is_causal,
        window=_window(local_window_size),
        alignment="top-left",
        scale=scale,
        bias=None if bias is None else jnp.asarray(bias),
        mask=None if mask is None else jnp.asarray(mask),
        seqused_q=query_seq_lengths,
        seqused_k=key_value_seq_lengths,
        return_lse=True,
    )
    out = out[0] if q.ndim == 3 else out
    if not return_residual:
        return out
    residual = jax.lax.stop_gradient(jnp.swapaxes(lse, 1, 2))
    return out, residual[0] if q.ndim == 3 else residual


def _window(size: Any) -> Any:
    return size if size is None or isinstance(size, (tuple, list)) else (size, size)


def tokamax_implementation(
    query: JaxArray,
    key: JaxArray,
    value: JaxArray,
    *,
    bias: JaxArray | None = None,
    mask: Any = None,
    logits_scale: Any = None,
    logits_soft_cap: float | None = None,
    precision: Any = None,
    **others: Any,
) -> Any:
    """Compute attention as an implementation that `tokamax.dot_product_attention` calls.

    Leading axes before (T, N, H) become one batch. Lengths and causal masks stay lengths and masks of intervals; a
    window or a range per query becomes a boolean mask. float32 and float64 are computed at full precision, whatever
    `precision` says.

    Args:
        query: (..., T, N, H).
        key: (..., S, K, H).
        value: (..., S, K, h).
        bias: broadcastable to (..., N, T, S).
        mask: tokamax's mask, or None.
        logits_scale: a number; otherwise H ** -0.5.
        logits_soft_cap: a bound of the scores, only without `bias`, because tokamax adds the bias before it.
        precision: not used.
        **others: must be None.

    Raises:
        NotImplementedError: tokamax then calls the next implementation of its sequence.

    >>> import jax.numpy as jnp
    >>> from anyattn.compat.jax import tokamax_implementation
    >>> tokamax_implementation(jnp.ones((5, 2, 8)), jnp.ones((7, 1, 8)), jnp.ones((7, 1, 4))).shape
    (5, 2, 4)
    """
    import jax
    import jax.numpy as jnp

    given = [name for name, x in others.items() if x is not None]
    if given or not all(isinstance(x, jax.Array) for x in (query, key, value)):
        what = ", ".join(given) or "quantised arrays"
        raise NotImplementedError(f"query, key and value must be JAX arrays without further arguments, got {what}.")
    if logits_soft_cap and bias is not None:
        raise NotImplementedError("logits_soft_cap must be None with a bias, because tokamax adds the bias before it.")
    lead = query.shape[:-3]
    q, k, v = (jnp.reshape(x, (-1, *x.shape[-3:])) for x in (query, key, value))
    causal, lengths, visible = _tokamax_mask(mask, q.shape[1], k.shape[1], lead)
    out = api.attention(
        q,
        k,
        v,
        causal=causal,
        alignment="top-left",
        scale=float(logits_scale) if isinstance(logits_scale, (int, float)) else None,
        softcap=float(logits_soft_cap or 0.0),
        bias=None if bias is None else _four_dimensions(jnp.asarray(bias), lead),
        mask=None if visible is None else _four_dimensions(visible, lead),
        seqused_k=lengths,
    )
    return out.reshape(*lead, *out.shape[1:])


def _tokamax_mask(mask: Any, rows: int, keys: int, lead: tuple[int, ...]) -> tuple[bool, Any, Any]:
    """Return (causal, number of keys in use per sequence, what else is visible)."""
    import dataclasses

    import jax.numpy as jnp

    if mask is None:
        return False, None, None
    if not hasattr(mask, "as_array"):
        return False, None, mask
    end, lengths = mask.k_end, None
    if end is not None and end.ndim == len(lead) + 2 and end.shape[-2:] == (1, 1):  # the same for heads and queries
        lengths = jnp.clip(jnp.broadcast_to(end[..., 0, 0], lead).reshape(-1), 0, keys)
        end = None
    rest = dataclasses.replace(mask, is_causal=False, k_end=end)
    return bool(mask.is_causal), lengths, rest.as_array(rows, keys) if rest else None


def _four_dimensions(x: Any, lead: tuple[int, ...]) -> Any:
    """Return an array (..., N, T, S) with one axis for the leading axes."""
    import jax.numpy as jnp

    if x.ndim <= 3 or all(size == 1 for size in x.shape[:-3]):
        return x.reshape((1,) * (4 - min(x.ndim, 3)) + x.shape[-3:])
    return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])


def export_checks() -> list[Any]:
    """Return the values of `disabled_checks` with which `jax.export.export` accepts programs that call anyattn.

    A process that loads an exported program calls this function too, before it runs the program, because it registers
    the custom calls of the program with XLA. Both processes need the same version of anyattn. JAX needs the package
    flatbuffers to write and read programs.

    >>> import jax, jax.export, jax.numpy as jnp, anyattn
    >>> from anyattn.compat.jax import export_checks
    >>> x = jnp.ones((1, 16, 2, 8))
    >>> program = jax.export.export(jax.jit(anyattn.attention), disabled_checks=export_checks())(x, x, x)
    >>> jax.export.deserialize(program.serialize()).call(x, x, x).shape
    (1, 16, 2, 8)
    """
    import jax.export

    framework: Any = loaded.jax
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in framework.custom_calls()]


def attention_with_kvcache(
    q: JaxArray, k_cache: JaxArray, v_cache: JaxArray, *, return_lse: bool = False, **arguments: Unpack[CacheArguments]
) -> Any:
    """Append keys and values to a KV cache and attend to it, as `anyattn.attention_with_kvcache`.

    JAX arrays do not change, so the caches with the new keys are results. A compiled function that donates the caches
    updates them in place, without a copy.

    Args:
        q: (batch, seqlen_q, nheads, head_dim).
        k_cache: (entries, slots, nheads_kv, head_dim); with block_table (num_pages, page_size, nheads_kv, head_dim).
        v_cache: like k_cache, with head_dim_v.
        return_lse: also return lse.
        **arguments: keywords of `anyattn.attention_with_kvcache`; k, v and cache_seqlens are required. cache_seqlens
            may be a traced number.

    Returns:
        (out, k_cache, v_cache), or (out, lse, k_cache, v_cache). A quantised cache is followed by its new scales:
        (out, k_cache, v_cache, k_scale, v_scale).

    Raises:
        ValueError: the cache is full or a page is unknown. Inside a compiled function, JAX raises its own error.

    >>> import jax, jax.numpy as jnp
    >>> from anyattn.compat.jax import attention_with_kvcache
    >>> @jax.jit
    ... def step(q, k, v, cache_k, cache_v, length):
    ...     return attention_with_kvcache(q, cache_k, cache_v, k=k, v=v, cache_seqlens=length, causal=True)
    >>> x, cache = jnp.ones((1, 1, 2, 8)), jnp.zeros((1, 16, 2, 8))
    >>> out, cache_k, cache_v = step(x, x, x, cache, cache, 3)
    >>> bool(cache_k[0, 3].all()), bool(cache_k[0, 4].any())
    (True, False)
    """
    given: dict[str, Any] = dict(arguments)
    k, v, cos, sin, interleaved, lengths = (given.pop(name, None) for name in APPENDED)
    by_row = bounds(given.get("causal", False), given.get("window")) != (None, None)
    rotation = Rotation(True if interleaved is None else flag("rotary_interleaved", interleaved), by_row)
    places = given.get("cache_batch_idx"), given.get("block_table")
    scales = given.pop("k_scale", None), given.pop("v_scale", None)
    framework: Any = loaded.jax
    new = framework.kvcache.append(
        Appended(q, k_cache, v_cache, k, v, cos, sin, lengths, *places, *scales), rotation, given.get("backend")
    )
    given |= dict(zip(("k_cache", "v_cache", "k_scale", "v_scale"), new.caches, strict=False))
    result = decoding.attention_with_kvcache(new.q, cache_seqlens=new.cache_seqlens, return_lse=return_lse, **given)
    return (*result, *new.caches) if return_lse else (result, *new.caches)
