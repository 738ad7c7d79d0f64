"""Framework for torch tensors, with autograd. Importing it registers the operators of `torch.ops.anyattn`."""

from . import batching as batching
from . import kvcache as kvcache
from . import ops as ops
