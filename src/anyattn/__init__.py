"""anyattn: FlashAttention on any hardware. Exact attention in O(N) memory, forward and backward.

>>> import numpy as np, anyattn
>>> q = k = v = np.ones((1, 4, 2, 8), np.float32)  # (batch, seqlen, nheads, head_dim)
>>> anyattn.attention(q, k, v, causal=True).shape
(1, 4, 2, 8)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .api import (
    attention,
    attention_varlen,
)
from .c_library import get_include, get_library
from .decoding import attention_with_kvcache
from .definition.errors import UnsupportedProblem
from .definition.inputs import Gradients, SecondGradients
from .definition.mask import Mask
from .derivatives import attention_forward_tangent, attention_second, attention_tangent
from .explicit import attention_backward, attention_forward, merge
from .sdpa import flash_attention, sdpa
from .weights import attention_weights

if TYPE_CHECKING:
    from .block_masks import BlockMask, block_mask
    from .definition.score.trace import captured
    from .introspection import explain, get_available_backends, print_backend_info, warmup
    from .runtime.dispatch import Explanation, backend
    from .threads import get_num_threads, num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "Explanation",
    "Gradients",
    "Mask",
    "SecondGradients",
    "UnsupportedProblem",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_forward_tangent",
    "attention_second",
    "attention_tangent",
    "attention_varlen",
    "attention_weights",
    "attention_with_kvcache",
    "backend",
    "block_mask",
    "captured",
    "explain",
    "flash_attention",
    "get_available_backends",
    "get_include",
    "get_library",
    "get_num_threads",
    "merge",
    "num_threads",
    "print_backend_info",
    "sdpa",
    "set_num_threads",
    "warmup",
]


# Names and modules that are imported on first use.
_NAMES = {
    **dict.fromkeys(("BlockMask", "block_mask"), "block_masks"),
    "captured": "definition.score.trace",
    **dict.fromkeys(("explain", "get_available_backends", "print_backend_info", "warmup"), "introspection"),
    **dict.fromkeys(("Explanation", "backend"), "runtime.dispatch"),
    **dict.fromkeys(("get_num_threads", "num_threads", "set_num_threads"), "threads"),
}
_MODULES = ("compat", "distributed", "errors", "keywords", "nn", "settings", "testing", "vulkan")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        globals()[name] = found = getattr(import_module(f".{_NAMES[name]}", __name__), name)
        return found
    if name in _MODULES:
        return import_module(f".{name}", __name__)  # not `from . import`, which would call this function again
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
