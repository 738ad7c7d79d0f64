"""anyattn as an attention implementation of Hugging Face transformers, 5.4 or later.

    import anyattn.compat.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="anyattn")

Importing this module registers the name with transformers' two interfaces, for attention and for masks. Results equal
"eager" attention, except for padding tokens. Causal, bidirectional and sliding-window mask functions, and
packed sequences of these, become a `LazyMask`: no score-sized mask exists unless the model itself reads it. Other
functions, and every function under torch.compile, become the mask of eager attention.

Sequences are packed if transformers says so: `position_ids` that restart, without attention_mask and without a cache
(use_cache=False), or `cu_seq_lens_q` and `cu_seq_lens_k`.

`QuantisedCache("int8")` is a KV cache of half the size: model.generate(..., past_key_values=QuantisedCache("int8")).

A model that computes attention itself (Bloom, GPT-J and others) raises ValueError when the name is chosen for it. For
models that are hard-wired to "flash_attention_2", use `install_flash_attention_2`.
"""

import inspect

from .attention import attention
from .flash_attention_2 import install_flash_attention_2, uninstall_flash_attention_2
from .lazy_mask import LazyMask, Pattern
from .masks import mask
from .parallel import context_parallel
from .quantised_cache import QuantisedCache
from .refuse import NAME, refuse_unsupported_models

__all__ = [
    "LazyMask",
    "Pattern",
    "QuantisedCache",
    "attention",
    "context_parallel",
    "install_flash_attention_2",
    "mask",
    "register",
    "uninstall_flash_attention_2",
]


def register() -> None:
    """Register "anyattn" with transformers; importing this module does it.

    Raises:
        ImportError: transformers is older than 5.4, which requests masks in another way.
    """
    from transformers import AttentionInterface, __version__, masking_utils

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(f"transformers must be version 5.4 or later, got {__version__}. Upgrade it.")
    AttentionInterface.register(NAME, attention)
    masking_utils.AttentionMaskInterface.register(NAME, mask)
    refuse_unsupported_models()


register()
