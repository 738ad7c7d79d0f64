"""Attention of sequences that are divided over processes (context parallelism), on torch.distributed.

gloo on CPUs and NCCL on GPUs; every rank calls the same function with its own part of the sequence.
"""

from .api import attention, attention_varlen
from .sharding import Interval, Sharding

__all__ = ["Interval", "Sharding", "attention", "attention_varlen"]
