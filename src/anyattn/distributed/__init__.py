"""Attention of sequences that are divided over processes (context parallelism), on torch.distributed.

gloo on CPUs and NCCL on GPUs. Every rank calls the same function with its own part of the sequence.
"""

from .api import attention, attention_varlen
from .context_parallel import context_parallel
from .sharding import Interval, Sharding
from .torch_context_parallel import torch_context_parallel
from .whole import shard, unshard

__all__ = [
    "Interval",
    "Sharding",
    "attention",
    "attention_varlen",
    "context_parallel",
    "shard",
    "torch_context_parallel",
    "unshard",
]
