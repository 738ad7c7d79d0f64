"""Providers: anyattn first, then other libraries. Libraries that are not installed are listed as absent."""

from __future__ import annotations

from collections.abc import Iterable

from .anyattn import Anyattn
from .base import Prepared, Provider, Refused
from .flex import Flex
from .jax_arrays import AnyattnJax, JaxNn
from .onnx_runtime import OnnxRuntime
from .open_vino import OpenVino
from .plain import NumpyPlain, TorchPlain
from .sdpa import Sdpa, SdpaPacked, SdpaPadded
from .vulkan import AnyattnVulkan, Aule

__all__ = ["PROVIDERS", "Prepared", "Provider", "Refused", "by_name", "choose"]

PROVIDERS: tuple[Provider, ...] = (
    Anyattn(),
    Sdpa(),
    SdpaPacked(),
    SdpaPadded(),
    Flex(),
    OnnxRuntime(),
    OpenVino(),
    NumpyPlain(),
    TorchPlain(),
    JaxNn(),
    AnyattnJax(),
    AnyattnVulkan(),
    Aule(),
)


def by_name(name: str) -> Provider:
    return next(provider for provider in PROVIDERS if provider.name == name)


def choose(words: Iterable[str]) -> tuple[Provider, ...]:
    """Return anyattn and every provider whose name contains one of the words. No words: all; "none": only anyattn.

    Raises:
        ValueError: no provider's name contains a word.
    """
    wanted = [word.strip().lower() for word in words if word.strip()]
    if not wanted:
        return PROVIDERS
    if wanted == ["none"]:
        return PROVIDERS[:1]
    for word in wanted:
        if not any(word in provider.name.lower() for provider in PROVIDERS):
            names = ", ".join(provider.name for provider in PROVIDERS)
            raise ValueError(f"peers must be parts of {names}, got {word!r}.")
    named = [p for p in PROVIDERS if any(word in p.name.lower() for word in wanted)]
    return tuple(dict.fromkeys([PROVIDERS[0], *named]))
