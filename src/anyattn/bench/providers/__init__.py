"""Who is measured: ours first, then what people use today. What is not installed is named, not hidden."""

from __future__ import annotations

from collections.abc import Iterable

from .anyattn import Anyattn
from .base import Prepared, Provider, Refused
from .flex import Flex
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
    AnyattnVulkan(),
    Aule(),
)


def by_name(name: str) -> Provider:
    return next(provider for provider in PROVIDERS if provider.name == name)


def choose(words: Iterable[str]) -> tuple[Provider, ...]:
    """Ours and every provider in whose name one of the words occurs; no words: all; "none": ours alone.

    Raises:
        ValueError: no provider has that word in its name.
    """
    wanted = [word.strip().lower() for word in words if word.strip()]
    if not wanted:
        return PROVIDERS
    if wanted == ["none"]:
        return PROVIDERS[:1]
    for word in wanted:
        if not any(word in provider.name.lower() for provider in PROVIDERS):
            names = ", ".join(provider.name for provider in PROVIDERS)
            raise ValueError(f"no provider has {word!r} in its name; there are: {names}")
    named = [p for p in PROVIDERS if any(word in p.name.lower() for word in wanted)]
    return tuple(dict.fromkeys([PROVIDERS[0], *named]))
