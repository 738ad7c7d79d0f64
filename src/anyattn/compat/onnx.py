"""ONNX operator `Attention` (opsets 23 to 25) computed by anyattn on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .. import api
from ..arguments import explicit
from ..frameworks import framework_of
from ..frameworks.scores import Stage
from ..scalars import integer

Array = npt.NDArray[Any]
DOUBLE = 11  # onnx.TensorProto.DOUBLE
STAGES: tuple[Stage, ...] = ("products", "capped", "masked", "weights")  # by qk_matmul_output_mode


def attention(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Array, ...]:
    """Compute the node from its inputs in order and its attributes by name.

    Args:
        Q: (batch, q_num_heads, q_sequence_length, head_size), or (batch, q_sequence_length, q_num_heads * head_size)
            with both numbers of heads as attributes.
        K: like Q, with kv_num_heads, which divides q_num_heads, and kv_sequence_length.
        V: like K, with its own head_size.
        attn_mask: boolean (False masks a key), or numbers that are added to the scores: integers too, as the operator
            defines it, so a mask of integers 0 and 1 masks nothing. Broadcast from the right to (batch, q_num_heads,
            q_sequence_length, total_sequence_length). Keys beyond its last dimension are masked.
        past_key: (batch, kv_num_heads, past_sequence_length, head_size), keys before K.
        past_value: like past_key, values before V.
        nonpad_kv_seqlen: (batch,), number of keys in use of a larger cache; not combined with past_key.
        is_causal: query i attends to keys up to i + offset. offset is the length of the past, or nonpad_kv_seqlen -
            q_sequence_length, or 0.
        kv_num_heads: number of KV heads, for three-dimensional inputs.
        left_window_size: keys before position i + offset that query i attends to; -1: unbounded.
        q_num_heads: number of query heads, for three-dimensional inputs.
        qk_matmul_output_mode: None: the fourth output is not computed, so no array of q_sequence_length by
            total_sequence_length exists. For a node with this output pass its mode (0 if it names none). 0: scaled
            products of Q and K. 1: these after softcap. 2: after softcap, mask, causal and windows, -inf for masked
            keys. 3: weights after the softmax, 0 for a query without keys.
        right_window_size: keys after position i + offset that query i attends to; -1: unbounded.
        scale: default head_size ** -0.5.
        softcap: 0: off.
        softmax_precision: DOUBLE computes in double. Every other precision is met by float32, which is used.

    Returns:
        (Y, present_key, present_value), and with a mode also qk_matmul_output (batch, q_num_heads, q_sequence_length,
        total_sequence_length), rounded to Q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong.

    >>> import numpy as np
    >>> from anyattn.compat import onnx
    >>> x = np.ones((2, 6, 24), np.float32)
    >>> Y, present_key, _ = onnx.attention(x, x, x, q_num_heads=3, kv_num_heads=3, is_causal=1)
    >>> Y.shape, present_key.shape
    ((2, 6, 24), (2, 3, 6, 8))
    """
    if qk_matmul_output_mode is not None:
        qk_matmul_output_mode = integer("qk_matmul_output_mode", qk_matmul_output_mode)
    if qk_matmul_output_mode not in (None, 0, 1, 2, 3):
        raise ValueError(f"qk_matmul_output_mode must be None, 0, 1, 2 or 3, got {qk_matmul_output_mode!r}.")
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key and past_value must be passed together, got one of them.")
    if past_key is not None and nonpad_kv_seqlen is not None:
        raise ValueError("nonpad_kv_seqlen cannot be combined with past_key.")
    q, k, v = _heads("Q", Q, q_num_heads), _heads("K", K, kv_num_heads), _heads("V", V, kv_num_heads)
    offset: Any = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = (np.concatenate((x.swapaxes(1, 2), y), 1) for x, y in ((past_key, k), (past_value, v)))
    if nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen - q.shape[1]
    wide = np.dtype(np.float64) if softmax_precision == DOUBLE else q.dtype
    arguments = {"offset": offset, "seqused_k": nonpad_kv_seqlen, "scale": scale, "softcap": softcap}
    window = (_bound("left_window_size", left_window_size), _bound("right_window_size", right_window_size))
    arguments.update({"causal": bool(is_causal), "window": window, **_scores(attn_mask, k.shape[1], wide)})
    query, key, value = (x.astype(wide, copy=False) for x in (q, k, v))
    out, lse = api.attention(query, key, value, **arguments, return_lse=True)
    out = out.astype(q.dtype, copy=False)
    Y: Array = out.reshape(*out.shape[:2], -1) if Q.ndim == 3 else out.swapaxes(1, 2)
    outputs = Y, k.swapaxes(1, 2), v.swapaxes(1, 2)
    if qk_matmul_output_mode is None:
        return outputs
    inputs, options, *_ = explicit(query, key, value, arguments, "attention")
    scores = framework_of(query).scores(inputs, options, None, STAGES[qk_matmul_output_mode], lse)
    return *outputs, scores.astype(q.dtype, copy=False)


def _heads(name: str, x: Array, heads: int | None) -> Array:
    """Return (batch, sequence, heads, head_size)."""
    if x.ndim == 4:
        return np.swapaxes(x, 1, 2)
    if x.ndim != 3 or not heads or x.shape[2] % heads:
        raise ValueError(f"{name} must have 4 dimensions, or 3 with q_num_heads and kv_num_heads, got {x.shape}.")
    return x.reshape(*x.shape[:2], heads, -1)


def _bound(name: str, size: int) -> int | None:
    if size < -1:
        raise ValueError(f"{name} must be >= 0, or -1 for none, got {size}.")
    return None if size == -1 else size


def _scores(attn_mask: Array | None, keys: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    """Return mask or bias with four dimensions and all keys."""
    if attn_mask is None:
        return {}
    boolean = attn_mask.dtype == np.bool_
    if not boolean and attn_mask.dtype != dtype:
        attn_mask = attn_mask.astype(np.float64 if dtype == np.float64 else np.float32)
    missing = keys - attn_mask.shape[-1]
    if missing < 0:
        raise ValueError(f"attn_mask must have no more than {keys} keys in its last dimension, got {attn_mask.shape}.")
    hidden: Any = False if boolean else -np.inf
    attn_mask = np.pad(attn_mask, [(0, 0)] * (attn_mask.ndim - 1) + [(0, missing)], constant_values=hidden)
    return {"mask" if boolean else "bias": attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)}
