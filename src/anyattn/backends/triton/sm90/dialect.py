"""Names from Gluon that the kernels use, the same for every version of Triton (tested with 3.6 to 3.9)."""

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

# Triton 3.7 renamed the copies, and 3.9 removed the old names.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
