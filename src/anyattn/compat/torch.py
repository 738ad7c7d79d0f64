"""anyattn as the implementation of `torch.nn.functional.scaled_dot_product_attention`.

Importing this module registers the implementation under the name "anyattn" and does not activate it. Activate it by

    torch.nn.attention.activate_flash_attention_impl("anyattn")     # torch 2.10; until restore_flash_attention_impl()

or, with any version of torch, by

    with anyattn.compat.torch.use_anyattn(): ...

Then `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and modules that use them
run on anyattn, eager or compiled, forward and backward. This holds for all calls that torch passes to its flash kernel.
On a CPU these are all calls except dropout, a head_dim_v unlike head_dim, a mask that requires a gradient and, in torch
2.6, grouped queries. torch's math kernel computes the exceptions; `anyattn.sdpa` supports them. On a GPU (CUDA, ROCm)
they are float16 and bfloat16 calls without a mask. A MultiheadAttention with need_weights=True does not call these
functions. `torch.nn.attention.varlen`, if torch has it, runs on anyattn too, also on a CPU, for which torch has no
kernel. Other devices are not affected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.attention

from ..frameworks.torch_tools import Override


def register() -> None:
    """Register "anyattn" in torch's registry of flash implementations, if there is one. Nothing is activated."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl("anyattn", register_fn=Override)


@contextmanager
def use_anyattn() -> Iterator[None]:
    """Run scaled_dot_product_attention on anyattn inside the `with` block, in every thread of the process.

    >>> import torch, anyattn.compat.torch
    >>> x = torch.ones(1, 2, 16, 8)
    >>> with anyattn.compat.torch.use_anyattn():
    ...     torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([1, 2, 16, 8])
    """
    handle = Override()
    try:
        yield
    finally:
        handle.remove()


register()
