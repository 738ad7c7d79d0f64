"""anyattn behind `torch.nn.functional.scaled_dot_product_attention`.

Importing this module registers the implementation under the name "anyattn" and activates nothing. Then either

    torch.nn.attention.activate_flash_attention_impl("anyattn")     # torch 2.10; until restore_flash_attention_impl()

or, where torch has no such registry as well,

    with anyattn.compat.torch.use_anyattn(): ...

makes `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and what is built on them
run on anyattn, eager or compiled, forward and backward. That holds for whatever torch gives to its flash kernel: on a
CPU all but dropout, a head_dim_v that differs from head_dim, a mask that requires a gradient, and in torch 2.6 grouped
queries; those stay with torch's math kernel, and `anyattn.sdpa` computes them. On a GPU (CUDA, ROCm) it is float16 and
bfloat16 without a mask. A MultiheadAttention with need_weights=True calls neither. `torch.nn.attention.varlen`, where
torch has it, runs on anyattn too, on a CPU as well, where torch has no kernel for it. Other devices are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.attention

from ..frameworks.torch_tools import Override


def register() -> None:
    """Tells torch's registry of flash implementations, if this torch has one, about "anyattn"; activates nothing."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl("anyattn", register_fn=Override)


@contextmanager
def use_anyattn() -> Iterator[None]:
    """Runs scaled_dot_product_attention on anyattn inside the `with` block, in every thread of the process.

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
