"""Bad input: a ValueError or TypeError that names the argument, before any work; nothing is written."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.definition.errors import CacheOverflow
from anyattn.runtime import dispatch
from harness.kvcache_cases import AppendCase

BATCH, ROWS, KEYS, HEADS, HEADS_KV, DIM = 2, 5, 7, 4, 2, 8


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def dense(**changes: Any) -> dict[str, Any]:
    q, k = zeros(BATCH, ROWS, HEADS, DIM), zeros(BATCH, KEYS, HEADS_KV, DIM)
    return {"q": q, "k": k, "v": k, **changes}


def packed(**changes: Any) -> dict[str, Any]:
    q, k = zeros(9, HEADS, DIM), zeros(11, HEADS_KV, DIM)
    return {"q": q, "k": k, "v": k, "cu_seqlens_q": [0, 4, 9], "cu_seqlens_k": [0, 6, 11], **changes}


def paged(**changes: Any) -> dict[str, Any]:
    pages = zeros(6, 4, HEADS_KV, DIM)
    given = {"q": zeros(9, HEADS, DIM), "k": pages, "v": pages, "cu_seqlens_q": [0, 4, 9], "cu_seqlens_k": None}
    return {**given, "seqused_k": [5, 8], "block_table": [[0, 1], [2, 3]], **changes}


def refuses(call: Callable[..., Any], given: dict[str, Any], error: type[Exception], *words: str) -> None:
    """The call raises, its message holds every word, and no array that it got has changed."""
    arrays = {name: x.copy() for name, x in given.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error) as caught:
        call(**given)
    assert type(caught.value) in (ValueError, TypeError, CacheOverflow)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in the message: {caught.value}"
    for name, before in arrays.items():
        assert given[name].tobytes() == before.tobytes(), f"{name} was written"


LAST = zeros(BATCH, KEYS, HEADS_KV, DIM)

DENSE = {
    "q of rank 3": ({"q": zeros(5, 4, 8)}, ValueError, "q", "4 dimensions", "(5, 4, 8)"),
    "k of rank 3": ({"k": zeros(7, 2, 8)}, ValueError, "k", "4 dimensions"),
    "v of rank 5": ({"v": zeros(1, 2, 7, 2, 8)}, ValueError, "v", "4 dimensions"),
    "q of rank 0": ({"q": zeros()}, ValueError, "q"),
    "q is a list": ({"q": [[1.0]]}, TypeError, "q", "list"),
    "k is a list": ({"k": [[1.0]]}, TypeError, "k", "list"),
    "k is masked": ({"k": np.ma.masked_array(LAST)}, TypeError, "k", "masked"),
    "v is None": ({"v": None}, TypeError, "v"),
    "batches differ": ({"k": zeros(3, 7, 2, 8), "v": zeros(3, 7, 2, 8)}, ValueError, "k", "batch 2"),
    "k and v differ in length": ({"v": zeros(2, 6, 2, 8)}, ValueError, "k", "v"),
    "k and v differ in heads": ({"v": zeros(2, 7, 4, 8)}, ValueError, "k", "v"),
    "head_dim differs": ({"q": zeros(2, 5, 4, 9)}, ValueError, "head_dim"),
    "head_dim is 0": ({"q": zeros(2, 5, 4, 0), "k": zeros(2, 7, 2, 0)}, ValueError, "head_dim"),
    "head_dim_v is 0": ({"v": zeros(2, 7, 2, 0)}, ValueError, "head_dim_v"),
    "heads not a multiple": ({"q": zeros(2, 5, 5, 8)}, ValueError, "nheads (5)", "multiple", "nheads_kv (2)"),
    "fewer query heads": ({"q": zeros(2, 5, 1, 8)}, ValueError, "nheads (1)"),
    "no heads": ({"q": zeros(2, 5, 0, 8), "k": zeros(2, 7, 0, 8), "v": zeros(2, 7, 0, 8)}, ValueError, "nheads"),
    "k is float64": ({"k": LAST.astype(np.float64)}, TypeError, "dtype", "float64", "float32"),
    "v is float16": ({"v": LAST.astype(np.float16)}, TypeError, "dtype", "float16"),
    "integers": ({"q": zeros(2, 5, 4, 8, dtype=np.int32)}, TypeError, "q", "int32"),
    "complex": ({"q": zeros(2, 5, 4, 8, dtype=np.complex64)}, TypeError, "q", "complex64"),
    "another byte order": ({"q": zeros(2, 5, 4, 8, dtype=">f4")}, TypeError, "q", "byte order"),
    "scale is NaN": ({"scale": float("nan")}, ValueError, "scale", "nan"),
    "scale is infinite": ({"scale": float("inf")}, ValueError, "scale", "inf"),
    "scale is text": ({"scale": "1"}, TypeError, "scale"),
    "softcap is negative": ({"softcap": -1.0}, ValueError, "softcap"),
    "softcap is NaN": ({"softcap": float("nan")}, ValueError, "softcap"),
    "softcap is infinite": ({"softcap": float("inf")}, ValueError, "softcap"),
    "scale beyond float32": ({"scale": 1e39}, ValueError, "scale", "finite", "float32", "1e+39"),
    "softcap beyond float32": ({"softcap": 1e300}, ValueError, "softcap", "finite", "float32"),
    "causal is text": ({"causal": "False"}, TypeError, "causal", "True or False", "'False'"),
    "causal is None": ({"causal": None}, TypeError, "causal", "None"),
    "softcap is text": ({"softcap": "1"}, TypeError, "softcap"),
    "window is a number": ({"window": 3}, ValueError, "window", "pair"),
    "window is a triple": ({"window": (1, 2, 3)}, ValueError, "window", "pair"),
    "window is text": ({"window": "ab"}, ValueError, "window"),
    "window is negative": ({"window": (-1, 0)}, ValueError, "window", "None"),
    "window is negative on the right": ({"window": (0, -2)}, ValueError, "window"),
    "window of fractions": ({"window": (1.5, 0)}, ValueError, "window"),
    "window of a NumPy fraction": ({"window": (np.float32(1.5), 0)}, ValueError, "window", "integers"),
    "window of arrays": ({"window": (np.array([1, 2]), 0)}, ValueError, "window", "integers"),
    "chunk is negative": ({"chunk": -1}, ValueError, "chunk"),
    "chunk is a fraction": ({"chunk": 1.5}, TypeError, "chunk"),
    "chunk is a list": ({"chunk": [1]}, TypeError, "chunk must be an integer, got [1]"),
    "scale is an array": ({"scale": np.array([1.0, 2.0])}, TypeError, "scale must be a real number"),
    "unknown alignment": ({"alignment": "left"}, ValueError, "alignment", "top-left", "bottom-right"),
    "unknown precision": ({"precision": "half"}, ValueError, "precision", "exact", "fast"),
    "precision is a number": ({"precision": 0}, ValueError, "precision", "exact", "fast"),
    "offset of the wrong length": ({"offset": [0, 1, 2]}, ValueError, "offset"),
    "offset of fractions": ({"offset": np.array([0.5, 1.0])}, TypeError, "offset"),
    "offset is a fraction": ({"offset": 0.5}, TypeError, "offset"),
    "offset beyond int32": ({"offset": 2**31}, ValueError, "offset"),
    "dropout_p is 1": ({"dropout_p": 1.0, "seed": 0}, ValueError, "dropout_p"),
    "dropout_p rounds to 1": ({"dropout_p": 1 - 2.0**-18, "seed": 0}, ValueError, "dropout_p"),
    "dropout_p is negative": ({"dropout_p": -0.1, "seed": 0}, ValueError, "dropout_p"),
    "dropout_p is NaN": ({"dropout_p": float("nan"), "seed": 0}, ValueError, "dropout_p"),
    "dropout_p is text": ({"dropout_p": "0.5", "seed": 0}, TypeError, "dropout_p"),
    "dropout without a state": ({"dropout_p": 0.5}, ValueError, "rng_state", "seed"),
    "seed is a fraction": ({"dropout_p": 0.5, "seed": 1.5}, TypeError, "seed"),
    "seed of 65 bits": ({"dropout_p": 0.5, "seed": 2**64}, ValueError, "seed"),
    "seed and rng_state": (
        {"dropout_p": 0.5, "seed": 1, "rng_state": np.zeros(2, int)},
        ValueError,
        "seed",
        "rng_state",
    ),
    "rng_state of three": ({"dropout_p": 0.5, "rng_state": np.zeros(3, np.int64)}, ValueError, "rng_state"),
    "rng_state of floats": ({"dropout_p": 0.5, "rng_state": np.zeros(2)}, TypeError, "rng_state"),
    "mask does not broadcast": ({"mask": np.ones((2, 4, 5, 6), bool)}, ValueError, "mask", "broadcast", "(2, 4, 5, 7)"),
    "mask of wrong rank": ({"mask": np.ones((1, 1, 1, 5, 7), bool)}, ValueError, "mask"),
    "mask of bytes": ({"mask": np.ones((5, 7), np.uint8)}, TypeError, "mask", "bool"),
    "mask of floats": ({"mask": zeros(5, 7)}, TypeError, "mask", "bool"),
    "bias does not broadcast": ({"bias": zeros(3, 1, 5, 7)}, ValueError, "bias", "broadcast"),
    "bias of another dtype": ({"bias": zeros(5, 7, dtype=np.float64)}, TypeError, "bias", "float64"),
    "bias is a list": ({"bias": [[0.0]]}, TypeError, "bias"),
    "slopes of the wrong length": ({"alibi_slopes": zeros(5)}, ValueError, "alibi_slopes"),
    "slopes of integers": ({"alibi_slopes": zeros(4, dtype=np.int64)}, TypeError, "alibi_slopes"),
    "sink of the wrong length": ({"sink": zeros(2)}, ValueError, "sink"),
    "sink of integers": ({"sink": zeros(4, dtype=np.int32)}, TypeError, "sink"),
    "seqused_k too long": ({"seqused_k": [3, 8]}, ValueError, "seqused_k[1]", "8", "0 to 7"),
    "seqused_k negative": ({"seqused_k": [-1, 3]}, ValueError, "seqused_k[0]"),
    "seqused_k of the wrong length": ({"seqused_k": [3]}, ValueError, "seqused_k", "(2,)"),
    "seqused_k of floats": ({"seqused_k": np.ones(2)}, TypeError, "seqused_k"),
    "seqused_q too long": ({"seqused_q": [6, 0]}, ValueError, "seqused_q[0]", "0 to 5"),
    "leftpad_k beyond the keys": ({"leftpad_k": [0, 8]}, ValueError, "leftpad_k[1]"),
    "leftpad_k beyond seqused_k": ({"leftpad_k": [4, 0], "seqused_k": [3, 3]}, ValueError, "leftpad_k[0]", "0 to 3"),
    "leftpad_k negative": ({"leftpad_k": [0, -1]}, ValueError, "leftpad_k[1]"),
    "kv_indices beyond the keys": ({"kv_indices": [[[7]] * 5] * 2}, ValueError, "kv_indices", "query 0", "7", "to 6"),
    "kv_indices below -1": ({"kv_indices": [[[-2]] * 5] * 2}, ValueError, "kv_indices", "-2", "-1 (no key)"),
    "kv_indices of other queries": ({"kv_indices": [[[0]] * 4] * 2}, ValueError, "kv_indices", "seqlen_q = 5"),
    "kv_indices of query heads": (
        {"kv_indices": np.zeros((2, 4, 5, 1), np.int64)},
        ValueError,
        "kv_indices",
        "nheads_kv = 2",
        "(2, 4, 5, 1)",
    ),
    "kv_indices of floats": ({"kv_indices": np.zeros((2, 5, 1))}, TypeError, "kv_indices"),
    "table beyond int32": ({"seqused_k": [2**32, 1]}, ValueError, "seqused_k"),
    "backend is a list": ({"backend": ["cpu"]}, TypeError, "backend", "commas", "['cpu']"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend", "cuda"),
}
PACKED = {
    "q of rank 4": ({"q": zeros(1, 9, 4, 8)}, ValueError, "q", "3 dimensions"),
    "k of rank 4": ({"k": zeros(1, 11, 2, 8)}, ValueError, "k", "3 dimensions"),
    "cu_seqlens_q decreases": ({"cu_seqlens_q": [0, 5, 4]}, ValueError, "cu_seqlens_q", "decrease"),
    "cu_seqlens_k decreases": ({"cu_seqlens_k": [6, 0, 11]}, ValueError, "cu_seqlens_k", "decrease"),
    "cu_seqlens_q overruns": ({"cu_seqlens_q": [0, 4, 10]}, ValueError, "cu_seqlens_q", "9"),
    "cu_seqlens_k overruns": ({"cu_seqlens_k": [0, 6, 12]}, ValueError, "cu_seqlens_k", "11"),
    "cu_seqlens_q begins below 0": ({"cu_seqlens_q": [-1, 4, 9]}, ValueError, "cu_seqlens_q"),
    "cu_seqlens of different batches": ({"cu_seqlens_k": [0, 11]}, ValueError, "cu_seqlens", "batch"),
    "cu_seqlens_q is empty": ({"cu_seqlens_q": []}, ValueError, "cu_seqlens_q"),
    "cu_seqlens_q of rank 2": ({"cu_seqlens_q": [[0, 4, 9]]}, ValueError, "cu_seqlens_q"),
    "cu_seqlens_q of floats": ({"cu_seqlens_q": np.array([0.0, 4.0, 9.0])}, TypeError, "cu_seqlens_q"),
    "cu_seqlens_k is None": ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_k"),
    "max_seqlen_q too small": ({"max_seqlen_q": 3}, ValueError, "max_seqlen", "cu_seqlens_q"),
    "max_seqlen_k too small": ({"max_seqlen_k": 5}, ValueError, "max_seqlen", "cu_seqlens_k"),
    "max_seqlen_q is text": ({"max_seqlen_q": "4"}, TypeError, "max_seqlen_q", "integer", "'4'"),
    "max_seqlen_q negative": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
    "seqused_k beyond its sequence": ({"seqused_k": [6, 6]}, ValueError, "seqused_k[1]", "0 to 5"),
    "seqused_q beyond its sequence": ({"seqused_q": [5, 5]}, ValueError, "seqused_q[0]", "0 to 4"),
    "kv_indices beyond a sequence": (
        {"kv_indices": [[5]] * 9},
        ValueError,
        "kv_indices must be from -1",
        "to 4",
        "sequence 1",
    ),
    "kv_indices of a batch": ({"kv_indices": np.zeros((2, 5, 1), np.int32)}, ValueError, "kv_indices", "total_q = 9"),
    "slopes of another batch": ({"alibi_slopes": zeros(3, 4)}, ValueError, "alibi_slopes"),
}
PAGED = {
    "unknown page": ({"block_table": [[0, 1], [2, 6]]}, ValueError, "block_table[1, 1]", "6", "0 to 5"),
    "negative page": ({"block_table": [[-1, 1], [2, 3]]}, ValueError, "block_table[0, 0]"),
    "too few pages": ({"seqused_k": [5, 9]}, ValueError, "seqused_k[1]", "0 to 8"),
    "block_table of rank 1": ({"block_table": [0, 1]}, ValueError, "block_table"),
    "block_table of another batch": ({"block_table": [[0, 1]]}, ValueError, "block_table", "batch"),
    "block_table of floats": ({"block_table": np.zeros((2, 2))}, TypeError, "block_table"),
    "pages of rank 3": ({"k": zeros(24, 2, 8), "v": zeros(24, 2, 8)}, ValueError, "k", "page_size"),
    "no lengths": ({"seqused_k": None}, ValueError, "cu_seqlens_k", "seqused_k"),
}


@pytest.mark.parametrize("name", DENSE)
def test_wrong_dense_arguments_are_refused_by_name(name: str) -> None:
    changes, error, *words = DENSE[name]
    refuses(anyattn.attention_forward, dense(**changes), error, *words)
    if name != "dropout without a state":  # `attention` draws one
        refuses(anyattn.attention, dense(**changes), error, *words)


@pytest.mark.parametrize("name", PACKED)
def test_wrong_packed_arguments_are_refused_by_name(name: str) -> None:
    changes, error, *words = PACKED[name]
    refuses(anyattn.attention_varlen, packed(**changes), error, *words)


@pytest.mark.parametrize("name", PAGED)
def test_wrong_paged_arguments_are_refused_by_name(name: str) -> None:
    changes, error, *words = PAGED[name]
    refuses(anyattn.attention_varlen, paged(**changes), error, *words)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_dense_bias_and_packed_sequences_exclude_each_other(name: str) -> None:
    array = np.ones((2, 1, 1, 1), bool if name == "mask" else np.float32)
    refuses(anyattn.attention_forward, packed(**{name: array}), ValueError, name, "cu_seqlens")


def test_unknown_arguments_are_refused_by_name() -> None:
    refuses(anyattn.attention, dense(is_causal=True), TypeError, "is_causal")
    refuses(anyattn.attention_forward, dense(is_causal=True), TypeError, "is_causal")


SAVED = {
    "out of another shape": ({"out": zeros(2, 5, 4, 9)}, ValueError, "out", "(2, 5, 4, 8)"),
    "dout of another shape": ({"dout": zeros(2, 5, 2, 8)}, ValueError, "dout", "(2, 5, 4, 8)"),
    "lse of another shape": ({"lse": zeros(2, 5, 4)}, ValueError, "lse", "(2, 4, 5)"),
    "dlse of another shape": ({"dlse": zeros(2, 4, 6)}, ValueError, "dlse", "(2, 4, 5)"),
    "dout of another dtype": ({"dout": zeros(2, 5, 4, 8, dtype=np.float16)}, TypeError, "dout", "float16"),
    "lse of another dtype": ({"lse": zeros(2, 4, 5, dtype=np.float64)}, TypeError, "lse", "float64"),
    "out is None": ({"out": None}, (ValueError, TypeError), "out"),
    "dout is a list": ({"dout": [0.0]}, TypeError, "dout"),
}


@pytest.mark.parametrize("name", SAVED)
def test_wrong_backward_arguments_are_refused_by_name(name: str) -> None:
    changes, error, *words = SAVED[name]
    saved = {"out": zeros(2, 5, 4, 8), "dout": zeros(2, 5, 4, 8), "lse": zeros(2, 4, 5)}
    refuses(anyattn.attention_backward, dense(**{**saved, **changes}), error, *words)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


CACHE: dict[str, tuple[AppendCase, dict[str, Callable[[Any], Any] | None], type[Exception], str]] = {
    "full": (AppendCase(), {"cache_seqlens": lambda x: x * 0 + 36}, ValueError, "cache_seqlens"),
    "full, an int": (AppendCase(), {"cache_seqlens": lambda x: 36}, ValueError, "cache_seqlens"),
    "full, paged": (AppendCase(page_size=4), {"cache_seqlens": lambda x: x * 0 + 36}, ValueError, "cache_seqlens"),
    "negative length": (AppendCase(), {"cache_seqlens": lambda x: x * 0 - 1}, ValueError, "cache_seqlens"),
    "length is a fraction": (AppendCase(), {"cache_seqlens": lambda x: 1.5}, TypeError, "cache_seqlens"),
    "no lengths": (AppendCase(), {"cache_seqlens": None}, ValueError, "cache_seqlens"),
    "lengths of another batch": (AppendCase(), {"cache_seqlens": lambda x: x[:2]}, ValueError, "cache_seqlens"),
    "k without v": (AppendCase(), {"v": None}, ValueError, "v"),
    "v without k": (AppendCase(), {"k": None}, ValueError, "k"),
    "k and v of different lengths": (AppendCase(), {"v": lambda x: x[:, :3]}, ValueError, "v"),
    "k of another dtype": (AppendCase(), {"k": lambda x: x.astype(np.float16)}, TypeError, "dtype"),
    "k of another head_dim": (AppendCase(), {"k": lambda x: x[..., :-1]}, ValueError, "k"),
    "k of rank 3": (AppendCase(), {"k": lambda x: x[0]}, ValueError, "k"),
    "cache of another batch": (
        AppendCase(), dict.fromkeys(("k_cache", "v_cache"), lambda x: x[:2]), ValueError, "k_cache",
    ),
    "unknown page": (AppendCase(page_size=4), {"block_table": lambda x: x + 1000}, ValueError, "block_table"),
    "unknown entry": (AppendCase(entries=True), {"cache_batch_idx": lambda x: x + 9}, ValueError, "cache_batch_idx"),
    "entries with pages": (
        AppendCase(page_size=4), {"cache_batch_idx": lambda x: [0, 1, 2]}, ValueError, "cache_batch_idx",
    ),
    "rotary of one table": (AppendCase(rotary_dim=8), {"rotary_sin": None}, ValueError, "rotary_sin"),
    "rotary wider than head_dim": (AppendCase(rotary_dim=26), {}, ValueError, "rotary"),
    "rotary tables differ": (AppendCase(rotary_dim=8), {"rotary_sin": lambda x: x[:-1]}, ValueError, "rotary_sin"),
    "rotary too short": (
        AppendCase(rotary_dim=8), dict.fromkeys(("rotary_cos", "rotary_sin"), lambda x: x[:9]),
        ValueError, "rotary_cos",
    ),
    "rotary of integers": (AppendCase(rotary_dim=8), {"rotary_cos": lambda x: x.astype(int)}, TypeError, "rotary_cos"),
    "rotary without k": (AppendCase(rotary_dim=8), {"k": None, "v": None}, ValueError, "rotary_cos"),
    "read-only cache": (AppendCase(), {"k_cache": _read_only}, ValueError, "k_cache"),
    "cache with a stride": (AppendCase(), {"v_cache": lambda x: np.repeat(x, 2, -1)[..., ::2]}, ValueError, "v_cache"),
    "num_splits": (AppendCase(), {"num_splits": lambda x: -1}, ValueError, "num_splits"),
    "num_splits is None": (AppendCase(), {"num_splits": None}, TypeError, "num_splits"),
    "no cache": (AppendCase(), {"k_cache": None}, TypeError, "k_cache"),
    "cache is a list": (AppendCase(), {"v_cache": lambda x: [0.0]}, TypeError, "v_cache"),
    "k of rank 1": (AppendCase(), {"k": lambda x: x[0, 0, 0]}, ValueError, "k"),
    "attention refuses after the append": (AppendCase(), {"softcap": lambda x: -1.0}, ValueError, "softcap"),
    "attention's tables are wrong": (AppendCase(), {"leftpad_k": lambda x: [0, 0, 99]}, ValueError, "leftpad_k"),
    "bias does not broadcast": (AppendCase(), {"bias": lambda x: zeros(5, 99)}, ValueError, "bias"),
    "NaN scale": (AppendCase(), {"scale": lambda x: float("nan")}, ValueError, "scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE)
def test_wrong_cache_arguments_are_refused_by_name(name: str) -> None:
    setup, changes, error, word = CACHE[name]
    given = setup.draw()
    for argument, change in changes.items():
        given[argument] = None if change is None else change(given.get(argument))
    refuses(anyattn.attention_with_kvcache, given, error, word)


PARTS = {
    "out_a is a list": ({"out_a": [0.0]}, TypeError, "out_a", "list"),
    "out_b is None": ({"out_b": None}, TypeError, "out_b", "NoneType"),
    "lse_b is a number": ({"lse_b": 0.0}, TypeError, "lse_b", "float"),
    "one out would be broadcast": ({"out_b": zeros(1, 5, 4, 8)}, ValueError, "out_b (1, 5, 4, 8)"),
    "one lse would be broadcast": ({"lse_a": zeros(1, 4, 5)}, ValueError, "lse_a (1, 4, 5)"),
    "lse in out's order": ({"lse_a": zeros(2, 5, 4), "lse_b": zeros(2, 5, 4)}, ValueError, "nheads, seqlen)"),
    "out of rank 2": ({"out_a": zeros(4, 8), "out_b": zeros(4, 8)}, ValueError, "out_a (4, 8)"),
}


@pytest.mark.parametrize("name", PARTS)
def test_wrong_merge_arguments_are_refused_by_name(name: str) -> None:
    changes, error, *words = PARTS[name]
    given = {"out_a": zeros(2, 5, 4, 8), "lse_a": zeros(2, 4, 5), "out_b": zeros(2, 5, 4, 8), "lse_b": zeros(2, 4, 5)}
    refuses(anyattn.merge, given | changes, error, *words)


def test_wrong_flash_attention_arguments_are_refused_by_name() -> None:
    given = {"query": zeros(4, 5, 8), "key": zeros(1, 2, 7, 8), "value": zeros(1, 2, 7, 8)}
    refuses(anyattn.flash_attention, given, ValueError, "query")
    refuses(anyattn.flash_attention, given | {"query": zeros(1, 4, 5, 8), "causal": "False"}, TypeError, "causal")


def test_mixing_torch_and_numpy_arrays_is_refused() -> None:
    torch = pytest.importorskip("torch")
    refuses(anyattn.attention, dense(k=torch.zeros(2, 7, 2, 8)), TypeError, "k", "NumPy")


def test_backend_that_is_named_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error lists the reasons of every backend that was named, and no other backend is asked."""
    given = dense(backend="numpy")
    monkeypatch.setattr(type(dispatch.get("numpy")), "supports", lambda self, problem: ["it is Sunday"])
    dispatch.forget()
    with pytest.raises(anyattn.UnsupportedProblem, match="numpy: it is Sunday") as caught:
        anyattn.attention(**given)
    assert isinstance(caught.value, NotImplementedError) and operator.contains(caught.value.refusals, "numpy")
    assert list(caught.value.refusals) == ["numpy"]
    monkeypatch.undo()
    dispatch.forget()


def test_errors_are_raised_before_a_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a plan was looked for")

    monkeypatch.setattr(dispatch, "choose", fail)
    refuses(anyattn.attention, dense(scale=float("inf")), ValueError, "scale")
