"""Score functions that scripts/aot.py compiles: (score_mod, mask_mod), for 8 heads and 1024 queries and keys."""

from __future__ import annotations

from typing import Any

import torch

N, HEADS = 1024, 8
_documents = torch.zeros(N, dtype=torch.int32)
_slopes, _cap = torch.zeros(HEADS), torch.tensor(30.0)
_table = torch.zeros(HEADS, 2 * N, requires_grad=True)


def _is_causal_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (_documents[q_idx] == _documents[kv_idx]) & (q_idx >= kv_idx)


def _ten_operations(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    score = torch.where(q_idx % 2 == 0, score, score * torch.sigmoid(score))
    return 4 * torch.tanh(score / 4) + 0.1 * torch.abs(q_idx - kv_idx)


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "documents": (None, _is_causal_document),
    "alibi": (lambda score, b, h, q, kv: score - _slopes[h] * torch.abs(q - kv), _is_causal_document),
    "relative": (lambda score, b, h, q, kv: score + _table[h, q - kv + N], None),
    "operations": (_ten_operations, None),
    "softcap": (lambda score, b, h, q, kv: _cap * torch.tanh(score / _cap), None),
}
