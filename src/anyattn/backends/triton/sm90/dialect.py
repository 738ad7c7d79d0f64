"""What the kernels take from Gluon, under one name whatever the version of Triton (3.6 to 3.9 were tried)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "GluonASTSource", "TensorDescriptor", "fence_async_shared", "gl", "gluon", "mbarrier", "tma_load", "tma_store",
    "tma_store_wait", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

# Triton 3.7 gave the copies other names, and 3.9 took the old ones away.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
