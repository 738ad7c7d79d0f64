"""Support for models and programs that insist on attn_implementation="flash_attention_2" without that package."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

NAME = "flash_attention_2"
_installed: ExitStack | None = None


def install_flash_attention_2() -> None:
    """Make "flash_attention_2" use the functions of anyattn.compat.flash_attn, on any device, until uninstalled.

    Everything else is transformers' own code for FlashAttention: it removes and restores padding, finds packed
    sequences, and checks whether each model supports it. Call this before the model is created. If you can choose the
    name, "anyattn" supports more: other masks, sinks, position biases. A second call has no effect.
    """
    global _installed
    from transformers import modeling_flash_attention_utils as utils
    from transformers import modeling_utils

    from .. import flash_attn

    if _installed is not None:
        return
    lazy_imports, can_dispatch = utils._lazy_imports, modeling_utils.PreTrainedModel._flash_attn_can_dispatch
    functions = (flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache)

    def imports(implementation: str | None, *arguments: Any, **keywords: Any) -> Any:
        if implementation == NAME:
            return (*functions, utils._pad_input, utils._unpad_input)
        return lazy_imports(implementation, *arguments, **keywords)

    def dispatches(self: Any, flash_attn_version: int, is_init_check: bool = False) -> bool:
        if flash_attn_version == 2 and self._supports_flash_attn:
            return True
        return bool(can_dispatch(self, flash_attn_version, is_init_check))

    matrix = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    version_2 = {**matrix[2], "general_availability_check": lambda: True}  # otherwise it queries the kernel hub
    _installed = ExitStack()
    _installed.enter_context(mock.patch.object(utils, "_lazy_imports", imports))
    _installed.enter_context(mock.patch.object(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", dispatches))
    _installed.enter_context(mock.patch.dict(matrix, {2: version_2}))
    _installed.callback(setattr, utils, "_loaded_implementation", None)
    utils._loaded_implementation = None  # discards what was loaded before


def uninstall_flash_attention_2() -> None:
    """Undo install_flash_attention_2; no effect if it was not called."""
    global _installed
    if _installed is not None:
        _installed.close()
        _installed = None
