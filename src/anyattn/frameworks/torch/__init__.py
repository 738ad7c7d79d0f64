"""torch tensors in and out, with autograd. Importing this package registers the operators of `torch.ops.anyattn`."""

from . import batching as batching
from . import kvcache as kvcache
from . import ops as ops
