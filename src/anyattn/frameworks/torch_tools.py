"""Functions for torch tensors that `compat` and `nn` need in addition to the Framework protocol.

They import these functions from here, and nothing from `frameworks.torch`.
"""

from .torch import rotary
from .torch.aten import Override
from .torch.dropped_scores import dropped_scores, round_multiple
from .torch.functional import per_sequence, random_state
from .torch.kinds import dense
from .torch.quantised import quantise

__all__ = [
    "Override",
    "dense",
    "dropped_scores",
    "per_sequence",
    "quantise",
    "random_state",
    "rotary",
    "round_multiple",
]
