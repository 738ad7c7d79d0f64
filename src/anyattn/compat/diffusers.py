"""anyattn for Hugging Face diffusers, through its "native" attention backend.

diffusers has a closed list of backends, so no name can be added. Its native backend, and the attention processors of
older models, call torch's scaled_dot_product_attention, which anyattn can replace:

    with anyattn.compat.diffusers.use_anyattn():
        image = pipeline(prompt).images[0]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import torch


@contextmanager
def use_anyattn() -> Iterator[None]:
    """Run diffusers' "native" attention backend on anyattn inside the `with` block.

    Models without a chosen backend use "native". A backend chosen with `set_attention_backend` is not changed. The
    conditions of compat.torch.use_anyattn apply: on a CPU, no dropout and one head_dim.
    """
    from diffusers import attention_backend

    with attention_backend("native"), torch.use_anyattn():
        yield
