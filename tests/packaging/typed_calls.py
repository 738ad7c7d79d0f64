"""Calls whose types mypy checks in `make lint`; nothing runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from typing_extensions import assert_type

import anyattn

NDArray = npt.NDArray[np.float32]


def of_numpy(x: NDArray, table: npt.NDArray[np.int32], flag: bool) -> None:
    assert_type(anyattn.attention(x, x, x, causal=True, window=(3, 0)), NDArray)
    assert_type(anyattn.attention(x, x, x, return_lse=True), tuple[NDArray, NDArray])
    assert_type(anyattn.attention(x, x, x, return_lse=flag), NDArray | tuple[NDArray, NDArray])
    assert_type(anyattn.attention_varlen(x, x, x, [0, 3], table, return_lse=True), tuple[NDArray, NDArray])
    assert_type(anyattn.attention_with_kvcache(x, x, x, k=x, v=x, cache_seqlens=3), NDArray)
    assert_type(anyattn.attention_forward(x, x, x, cu_seqlens_q=table), tuple[NDArray, NDArray])
    assert_type(anyattn.attention_weights(x, x, x, queries=[0, 2], seqused_k=table), NDArray)
    assert_type(anyattn.flash_attention(x, x, x), NDArray)


def of_torch(x: Tensor) -> None:
    assert_type(anyattn.attention(x, x, x, bias=x), Tensor)
    assert_type(anyattn.attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(anyattn.merge(x, x, x, x), tuple[Tensor, Tensor])
    assert_type(anyattn.attention_weights(x, x, x, queries=slice(-1, None), bias=x), Tensor)
    assert_type(anyattn.sdpa(x, x, x, is_causal=True), Tensor)
    out, lse = anyattn.attention_forward(x, x, x)
    assert_type(anyattn.attention_backward(x, x, x, x, out, lse), anyattn.Gradients)


def wrong(x: Any) -> None:
    anyattn.attention(x, x, x, bogus=1)  # type: ignore[call-overload]
    anyattn.attention(x, x, x, causal="yes")  # type: ignore[call-overload]
    anyattn.attention_forward(x, x, x, bogus=1)  # type: ignore[call-arg]
    anyattn.attention_weights(x, x, x, dropout_p=0.1)  # type: ignore[call-arg]
    anyattn.explain(x, x, x, is_causal=True)  # type: ignore[call-arg]
