"""Jobs of the processes in `harness.ranks`. Every rank creates the whole sequence from a seed and takes its part."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import anyattn
from anyattn import distributed
from anyattn.distributed import Sharding


class Case(NamedTuple):
    """Call of attention on a whole sequence, and its division."""

    arguments: dict[str, Any] | None = None  # keywords of attention
    arrays: tuple[str, ...] = ()  # names of further arrays: see `arrays`
    queries: int = 37
    keys: int = 37
    batch: int = 2
    nheads: int = 4
    nheads_kv: int = 4
    dtype: str = "float64"
    sharding: str = "contiguous"
    schedule: str = "ring"
    cu_seqlens: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()  # of the ranks, for a contiguous sharding
    mesh: tuple[int, ...] = ()
    dlse: bool = True


GRADIENTS = ("q", "k", "v", "bias", "sink", "table")
SHARED = ("sink", "bias_row")


def arrays(case: Case) -> dict[str, Tensor]:
    """Return every array of the whole call."""
    rng = np.random.default_rng(7)

    def random(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, case.dtype))

    b, n, m, h = case.batch, case.queries, case.keys, case.nheads
    lead = () if case.cu_seqlens else (b,)
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    found = {"q": random(*lead, n, h, 8), "k": random(*lead, m, case.nheads_kv, 8)}
    found |= {"v": random(*lead, m, case.nheads_kv, 6), "dout": random(*lead, n, h, 6)}
    found["dlse"] = random(*((h, n) if case.cu_seqlens else (b, h, n))).to(wide)
    extra = {
        "bias": lambda: random(1, h, n, m),
        "bias_heads": lambda: random(b, 1, n, m),
        "bias_row": lambda: random(1, h, 1, m),
        "mask": lambda: torch.from_numpy(rng.random((b, 1, n, m)) < 0.7),
        "mask_shard": lambda: (torch.arange(m) > m // 2).expand(b, 1, n, m).clone(),  # masks the first ranks' keys
        "alibi_slopes": lambda: random(h).abs().to(wide),
        "sink": lambda: random(h).to(wide),
        "kv_indices": lambda: torch.from_numpy(rng.integers(-1, m, (*lead, n, 9))).to(torch.int32),
        "seqused": lambda: torch.tensor([m - 5, m], dtype=torch.int32)[:b],
        "nan": lambda: found["k"].fill_(float("nan")),  # every key, and so every buffer of a message
        "table": lambda: random(max(b, len(case.cu_seqlens)), h, n + m),
    }
    return found | {name: extra[name]() for name in case.arrays}


def keywords(case: Case, given: dict[str, Tensor]) -> dict[str, Any]:
    """Return the keywords of a call on the whole or on a part."""
    found = dict(case.arguments or {})
    for name in case.arrays:
        if name == "seqused":
            found |= {"seqused_q": given[name], "seqused_k": given[name], "leftpad_k": torch.ones_like(given[name])}
        elif name == "table":
            found |= {"score_mod": relative(given[name], case.keys), "mask_mod": dilated}
        elif name != "nan":
            found[name.split("_")[0] if name.startswith(("bias", "mask")) else name] = given[name]
    return found


def relative(table: Tensor, keys: int) -> Any:
    """Return a score function that reads a table (batch, nheads, distances)."""
    return lambda score, b, h, q_idx, kv_idx: score + table[b, h, q_idx - kv_idx + keys]


def dilated(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return ((q_idx + 2 * kv_idx + h + b) % 5 != 0) & (q_idx - kv_idx < 30)


def differentiate(case: Case, given: dict[str, Tensor], call: Any) -> dict[str, np.ndarray]:
    """Run a call on these arrays, forward and backward."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items() if name.split("_")[0] in GRADIENTS}
    given = {**given, **leaves}
    out, lse = call(given["q"], given["k"], given["v"], return_lse=True, **keywords(case, given))
    loss = (out * given["dout"]).sum()
    if case.dlse:
        loss = loss + (torch.where(lse == -torch.inf, 0.0, lse) * given["dlse"]).sum()
    loss.backward()
    found = {"out": out, "lse": lse, **{f"d{name}": x.grad for name, x in leaves.items()}}
    return {name: x.detach().to(torch.float64).numpy() for name, x in found.items()}


def whole(case: Case) -> dict[str, np.ndarray]:
    """Compute a case in one process."""
    return differentiate(case, arrays(case), undivided(case))


def undivided(case: Case) -> Any:
    """Return the function that computes a case in one process."""

    def call(q: Tensor, k: Tensor, v: Tensor, **flags: Any) -> Any:
        if not case.cu_seqlens:
            return anyattn.attention(q, k, v, **flags)
        table = torch.tensor(case.cu_seqlens, dtype=torch.int32)
        return anyattn.attention_varlen(q, k, v, table, table, **flags)

    return call


def entries(case: Case) -> dict[str, Tensor]:
    """Return arrays for which out[..., i, h, j] is the weight of key j for query i: equal scores, and v = identity."""
    given = arrays(case)
    identity = torch.eye(case.keys, dtype=given["v"].dtype)[:, None].expand(-1, case.nheads_kv, -1)
    v = identity if case.cu_seqlens else identity.expand(case.batch, -1, -1, -1)
    return given | {"q": torch.zeros_like(given["q"]), "v": v}


def kept_entries(case: Case) -> np.ndarray:
    """Return which entries of the rank's queries dropout keeps, (batch, rows, nheads, keys)."""
    given = divide(case, entries(case), dist.get_rank(), dist.get_world_size())
    out: Tensor = divided(case)(given["q"], given["k"], given["v"], **keywords(case, given))
    return (out != 0).numpy()


def all_kept_entries(case: Case) -> np.ndarray:
    """Return which entries dropout keeps in one process."""
    given = entries(case)
    out: Tensor = undivided(case)(given["q"], given["k"], given["v"], **keywords(case, given))
    return (out != 0).numpy()


def sharding_of(case: Case, length: int, size: int) -> Sharding:
    if case.lengths:
        return Sharding.of_lengths(case.lengths)
    if case.sharding == "zigzag":
        return Sharding.zigzag(length, size, case.cu_seqlens or None)
    return getattr(Sharding, case.sharding)(length, size)


def divide(case: Case, given: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Return a rank's part of every array."""
    queries, keys = (sharding_of(case, n, size) for n in (case.queries, case.keys))
    first = 0 if case.cu_seqlens else 1
    axes = {"q": first, "dout": first, "dlse": first + 1, "bias": 2, "bias_heads": 2, "mask": 2, "kv_indices": first}
    axes["mask_shard"] = 2
    found = dict(given)
    for name, x in given.items():
        if name in axes:
            found[name] = queries.shard(x, rank, axes[name])
        elif name in ("k", "v"):
            found[name] = keys.shard(x, rank, first)
    return found


def part(case: Case) -> dict[str, np.ndarray]:
    """Compute the rank's part of a case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return differentiate(case, divide(case, arrays(case), rank, size), divided(case))


def divided(case: Case) -> Any:
    """Return the function that computes a case over the ranks."""
    size, group = dist.get_world_size(), None
    if case.mesh:
        from torch.distributed.device_mesh import init_device_mesh

        group = init_device_mesh("cpu", case.mesh)
    flags = {"group": group, "schedule": case.schedule, "sharding": sharding_of(case, case.queries, size)}
    flags["sharding_k"] = sharding_of(case, case.keys, size)

    def call(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
        if not case.cu_seqlens:
            return distributed.attention(q, k, v, **flags, **rest)
        table = torch.tensor(case.cu_seqlens, dtype=torch.int32)
        return distributed.attention_varlen(q, k, v, table, table, **flags, **rest)

    return call


def joined(case: Case, parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the whole results from the results of every rank."""
    size = len(parts)
    queries, keys = (sharding_of(case, n, size) for n in (case.queries, case.keys))
    first = 0 if case.cu_seqlens else 1
    axes = {"out": first, "lse": first + 1, "dq": first, "dbias": 2, "dbias_heads": 2, "dk": first, "dv": first}
    found = {}
    for name in parts[0]:
        tensors = [torch.from_numpy(one[name]) for one in parts]
        if name in axes:
            sharding = keys if name in ("dk", "dv") else queries
            found[name] = sharding.unshard(tensors, axes[name]).numpy()
        else:
            found[name] = torch.stack(tensors).sum(0).numpy()
    return found


def count_bytes(case: Case) -> tuple[int, int]:
    """Return the bytes that the rank sends to other ranks, forward and backward, without the check of arguments."""
    import pytest

    sent = [0, 0]
    phase = 0
    batch, exchange = dist.batch_isend_irecv, dist.all_to_all_single

    def counted_batch(operations: list[Any]) -> Any:
        sent[phase] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return batch(operations)

    def counted_exchange(received: Tensor, x: Tensor, sizes: Any, own: list[int], group: Any = None) -> Any:
        sent[phase] += (sum(own) - own[dist.get_rank(group)]) * x.element_size()
        return exchange(received, x, sizes, own, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted_batch)
        patch.setattr(dist, "all_to_all_single", counted_exchange)
        rank, size = dist.get_rank(), dist.get_world_size()
        given = divide(case, arrays(case), rank, size)
        q, k, v = (given[name].requires_grad_() for name in ("q", "k", "v"))
        sharding = sharding_of(case, case.queries, size)
        flags = {"sharding": sharding, "schedule": case.schedule}
        out = distributed.attention(q, k, v, **flags, **keywords(case, given))
        phase = 1
        out.sum().backward()
    return sent[0], sent[1]


def call_with(changes: dict[int, dict[str, Any]], shapes: dict[int, tuple[int, ...]] | None = None) -> None:
    """Call attention with arguments that differ between ranks."""
    rank = dist.get_rank()
    x = torch.ones((shapes or {}).get(rank, (1, 4, 2, 8)))
    distributed.attention(x, x, x, **changes.get(rank, {}))


def gradient_of_gradient() -> None:
    """Differentiate a loss that contains the gradient of attention."""
    x = torch.ones(1, 4, 2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(distributed.attention(x, x, x).sum(), x, create_graph=True)
    (x.sum() + gradient.square().sum()).backward()


def train_model() -> tuple[float, float]:
    """Return the largest differences of out and gradients between a model over the ranks and in one process."""
    torch.manual_seed(0)
    size = dist.get_world_size()
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    x, goal = torch.randn(2, 33, 16).double(), torch.randn(2, 33, 16).double()
    qkv = torch.nn.Linear(16, 48).double()

    def attend(rows: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in qkv(rows).chunk(3, -1)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return layer.linear2(torch.relu(layer.linear1(rows + mixed.transpose(1, 2).flatten(2))))

    want = attend(x)
    wanted = torch.autograd.grad((want * goal).sum(), list(qkv.parameters()))
    sharding = Sharding.zigzag(33, size)
    with distributed.context_parallel(sharding=sharding):
        out = attend(distributed.shard(x, sharding))
    (out * distributed.shard(goal, sharding)).sum().backward()
    grads = [p.grad for p in qkv.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    found = distributed.unshard(out.detach(), sharding)
    differences = [float((a - b).abs().max()) for a, b in zip(grads, wanted, strict=True)]
    return float((found - want).abs().max()), max(differences)


def seedless_dropout() -> bool:
    """Return whether ranks with different generators drop the entries of rank 0's state."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    x = torch.ones(1, 6, 2, 8)
    out = distributed.attention(x, x, x, dropout_p=0.5)
    torch.manual_seed(0)
    size = dist.get_world_size()
    whole = torch.ones(1, 6 * size, 2, 8)
    want = anyattn.attention(whole, whole, whole, dropout_p=0.5)
    return bool(torch.allclose(out, want[:, 6 * rank : 6 * rank + 6]))


def wait_for_lost_peer() -> None:
    """End the process of the last rank. The other ranks must not wait forever."""
    import os

    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(1)
    x = torch.ones(1, 4, 2, 8)
    distributed.attention(x, x, x, schedule="ring")


def measure_memory(case: Case) -> tuple[int, int, int]:
    """Return the bytes of the rank's q, and the peak and the remaining bytes of a call, forward and backward."""
    from anyattn.bench.allocations import allocated_bytes

    rank, size = dist.get_rank(), dist.get_world_size()
    given = divide(case, arrays(case), rank, size)
    q, k, v = (given[name].requires_grad_() for name in ("q", "k", "v"))
    flags = {"sharding": sharding_of(case, case.queries, size), "schedule": case.schedule}

    def work() -> None:
        distributed.attention(q, k, v, **flags, **keywords(case, given)).backward(given["dout"])

    work()  # creates plans and tables, which later calls use
    for x in (q, k, v):
        x.grad = None
    return q.nbytes, *allocated_bytes(work)
