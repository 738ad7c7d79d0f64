"""anyattn as an attention implementation of Hugging Face transformers, 5.4 or later.

    import anyattn.compat.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="anyattn")

Importing this module registers the name with transformers' two interfaces, for attention and for masks. A mask function
that is causal, bidirectional, a sliding window or packed sequences of these, as almost every model's is, is handed over
as a `Pattern` on a mask of two dimensions: no score-sized mask is made. Any other becomes the boolean mask that
transformers makes for SDPA, and so does every mask under torch.compile, where functions cannot be looked into.

Results are those of "eager", but for rows of padding, and for packed sequences (position_ids that
start anew): these are kept apart even where a cache was created, as transformers does for FlashAttention alone.

`install_flash_attention_2` is for models that are hard-wired to "flash_attention_2".
"""

import inspect

from .attention import attention
from .flash_attention_2 import install_flash_attention_2, uninstall_flash_attention_2
from .masks import Pattern, mask

__all__ = ["Pattern", "attention", "install_flash_attention_2", "mask", "register", "uninstall_flash_attention_2"]


def register() -> None:
    """Registers "anyattn"; done when this module is imported. ImportError if transformers asks for masks otherwise."""
    from transformers import AttentionInterface, __version__, masking_utils

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(f"anyattn.compat.transformers needs transformers 5.4 or later; got {__version__}")
    AttentionInterface.register("anyattn", attention)
    masking_utils.AttentionMaskInterface.register("anyattn", mask)


register()
