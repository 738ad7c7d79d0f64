"""Conversion of the arguments of public functions to what frameworks take: interval bounds, Options, Inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from .definition.inputs import NO_EXTRAS, Extras, Inputs
from .definition.options import Options
from .frameworks import framework_of
from .frameworks.score_arguments import EXPLICIT, Call, Use
from .frameworks.score_functions import Packed
from .scalars import flag, integer, real

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from .backends.vulkan.device_array import DeviceArray

    class JaxArray(Protocol):
        """Array or tracer of JAX, recognised by its methods, because JAX may not be installed."""

        @property
        def shape(self) -> tuple[int, ...]: ...
        def block_until_ready(self) -> Any: ...
        def copy_to_host_async(self) -> None: ...
        def swapaxes(self, axis1: int, axis2: int) -> Any: ...

    Array = npt.NDArray[Any] | Tensor | JaxArray | DeviceArray
    Table = Array | Sequence[int]  # lengths and positions
else:
    Array = Table = Any

A = TypeVar("A", bound="Array")  # results have the kind of the inputs
Window = Sequence["int | None"] | None
ScoreFunction = Callable[..., Any]
Interval = tuple["int | None", "int | None"]


class Request(NamedTuple):
    """Call in the form that every framework takes. functions: how results and gradients come back, or None."""

    inputs: Inputs
    options: Options
    seed: int | None
    backend: str | None
    functions: Call | None = None


def bounds(causal: Any, window: Any) -> Interval:
    """Return (left, right), the interval that causal and window give together."""
    if causal is not True and causal is not False:
        causal = flag("causal", causal)
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) or None, got {window!r}.")
    left, right = _side(window, 0), _side(window, 1)
    return left, 0 if causal else right


def _side(window: Sequence[Any], index: int) -> int | None:
    side = window[index]
    if side is None:
        return None
    try:
        found = integer("window", side)
    except TypeError as error:
        raise ValueError(f"window must hold integers >= 0 or None (unbounded), got {window!r}.") from error
    if found < 0:
        raise ValueError(f"window must hold integers >= 0 or None (unbounded), got {window!r}.")
    return found


def make_options(
    interval: Interval,
    *,
    scale: Any = None,
    softcap: Any = 0.0,
    chunk: Any = 0,
    alignment: str = "bottom-right",
    dropout_p: Any = 0.0,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    deterministic: Any = False,
    batch_invariant: Any = False,
    query_start: Any = 0,
    key_start: Any = 0,
    partial: Any = False,
    score: str = "",
    precision: Any = None,
) -> Options:
    """Return the options of a call as plain Python values. The usual types are tested first because this is faster."""
    if scale is not None and type(scale) is not float:
        scale = real("scale", scale)
    if type(softcap) is not float:
        softcap = real("softcap", softcap)
    if type(dropout_p) is not float:
        dropout_p = real("dropout_p", dropout_p)
    if type(chunk) is not int:
        chunk = integer("chunk", chunk)
    if deterministic is not False:
        deterministic = flag("deterministic", deterministic)
    if batch_invariant is not False:
        batch_invariant = flag("batch_invariant", batch_invariant)
    if partial is not False:
        partial = flag("partial", partial)
    left, right = interval
    return Options(
        scale=scale, softcap=softcap, left=left, right=right, chunk=chunk, alignment=alignment, dropout_p=dropout_p,
        max_seqlen_q=0 if max_seqlen_q is None else integer("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=0 if max_seqlen_k is None else integer("max_seqlen_k", max_seqlen_k),
        deterministic=deterministic, batch_invariant=batch_invariant,
        query_start=query_start if type(query_start) is int else integer("query_start", query_start),
        key_start=key_start if type(key_start) is int else integer("key_start", key_start), partial=partial,
        score=score, precision="" if precision is None else precision,
    )  # fmt: skip


def check_parts(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> None:
    """Raise unless the arrays are two results over disjoint sets of keys. Nothing is broadcast."""
    parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in parts.items():
        if not hasattr(x, "shape"):
            raise TypeError(f"{name} must be an array or a tensor, got {type(x).__name__}.")
    shape = tuple(out_a.shape)
    want = (*shape[:-3], *shape[-3:-1][::-1])  # shape of lse (..., nheads, seqlen) for out (..., seqlen, nheads, dim)
    if len(shape) < 3 or out_b.shape != shape or lse_a.shape != want or lse_b.shape != want:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in parts.items())
        raise ValueError(
            f"out_a and out_b must be (..., seqlen, nheads, head_dim_v), and lse_a and lse_b (..., nheads, seqlen), "
            f"got {shapes}."
        )


def paged_lengths(block_table: Any, cu_seqlens_k: Any, seqused_k: Any) -> tuple[Any, Any]:
    """Return (cu_seqlens_k, seqused_k). With pages, cumulative lengths give only lengths, so they become seqused_k."""
    if block_table is None or cu_seqlens_k is None:
        return cu_seqlens_k, seqused_k
    if seqused_k is None:
        cu_seqlens_k = np.asarray(cu_seqlens_k) if isinstance(cu_seqlens_k, (list, tuple)) else cu_seqlens_k
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    return None, seqused_k


_KEYWORDS = {*Extras._fields, *Options._fields, "causal", "window", "seed", "backend", "score_mod", "mask_mod"}
_KEYWORDS -= {"left", "right", *Packed._fields}


def explicit(q: Array, k: Array, v: Array, arguments: Mapping[str, Any], caller: str, use: Use = EXPLICIT) -> Request:
    """Return the request of an explicit call from its keywords (`keywords.ExplicitArguments`).

    Raises:
        TypeError: an unknown keyword, under the name of the public function that was called.
    """
    for name in arguments:
        if name not in _KEYWORDS:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    interval = bounds(arguments.get("causal", False), arguments.get("window"))
    rest = {name: x for name, x in arguments.items() if name not in ("causal", "window")}
    return make_request(q, k, v, interval, use=use, **rest)


def make_request(
    q: Array,
    k: Array,
    v: Array,
    interval: Interval,
    *,
    seed: int | None = None,
    backend: str | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    use: Use = EXPLICIT,
    **arguments: Any,
) -> Request:
    """Return the request for the interval (left, right). Other keywords are fields of Extras and Options."""
    cu_seqlens_k, seqused_k = arguments.get("cu_seqlens_k"), arguments.get("seqused_k")
    cu_seqlens_k, seqused_k = paged_lengths(arguments.get("block_table"), cu_seqlens_k, seqused_k)
    given = {**arguments, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    extras = {name: given[name] for name in Extras._fields if given.get(name) is not None}
    options = make_options(interval, **{name: x for name, x in given.items() if name not in Extras._fields})
    inputs = Inputs(q, k, v, Extras(**extras) if extras else NO_EXTRAS)
    if score_mod is None and mask_mod is None:
        return Request(inputs, options, seed, backend)
    call = framework_of(q).with_functions(inputs, options, score_mod, mask_mod, use)
    return Request(call.inputs, call.options, seed, backend, call)
