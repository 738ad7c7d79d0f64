"""`flash_attn.utils.generation`: state that `MHA` needs between the steps of a generation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """Caches of all layers and their state. The caller increases seqlen_offset after each step.

    Attributes:
        max_seqlen: slots of each cache.
        max_batch_size: entries of each cache.
        seqlen_offset: keys already in the cache.
        batch_size_offset: first cache entry of this batch.
        key_value_memory_dict: layer_idx -> cache (max_batch_size, max_seqlen, 2, nheads_kv, head_dim).
        lengths_per_sample: (batch,), keys already in the cache if the sequences differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start another generation. The caches are reused and overwritten."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
