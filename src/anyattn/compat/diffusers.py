"""anyattn for Hugging Face diffusers, by its "native" attention backend.

diffusers has a closed list of backends, so there is no name to add. Its native one, and the attention processors of
older models, call torch's scaled_dot_product_attention, and that can be computed by anyattn:

    with anyattn.compat.diffusers.use_anyattn():
        image = pipeline(prompt).images[0]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import torch


@contextmanager
def use_anyattn() -> Iterator[None]:
    """Models whose backend is not chosen otherwise use "native", and that is anyattn, inside the `with` block.

    A backend that was given to a model by `set_attention_backend` stays. What holds for compat.torch.use_anyattn holds
    here: a CPU, no dropout, one head_dim.
    """
    from diffusers import attention_backend

    with attention_backend("native"), torch.use_anyattn():
        yield
