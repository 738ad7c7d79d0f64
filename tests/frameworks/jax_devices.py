"""Program of test_jax_devices.py: attention on four devices of the host, which a process sets up before its first call.

Prints a line for every claim that does not hold.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import anyattn
from anyattn.compat.jax import attention_with_kvcache

BATCH, ROWS, KEYS, NHEADS, NHEADS_KV, DIM = 4, 6, 10, 8, 4, 16
SPECS = {
    "batch and heads": P("x", None, "y"),
    "batch": P(("x", "y")),
    "heads": P(None, None, ("x", "y")),
    "rows": P(None, "x"),
    "head_dim": P(None, None, None, "y"),
    "whole": P(),
}
WHOLE = ("rows", "head_dim")  # XLA gathers what attention does not divide
AXES = jax.sharding.AxisType
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AXES.Auto, AXES.Auto))
explicit = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AXES.Explicit, AXES.Explicit))


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


Q = normal(BATCH, ROWS, NHEADS, DIM, seed=0)
K, V = (normal(BATCH, KEYS, NHEADS_KV, DIM, seed=seed) for seed in (1, 2))
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "bias": normal(1, NHEADS, ROWS, KEYS, seed=3),
        "sink": normal(NHEADS, seed=4),
        "mask": normal(BATCH, 1, ROWS, KEYS, seed=5) > -1,
        "alibi_slopes": normal(BATCH, NHEADS, seed=6) ** 2,
        "seqused_k": jnp.asarray([10, 3, 0, 7]),
    },
    "lists": {"kv_indices": jnp.asarray(np.random.default_rng(7).integers(-1, KEYS, (BATCH, NHEADS_KV, ROWS, 5)))},
    "bias of one number": {"bias": normal(1, 1, 1, 1, seed=3)},
    "dropout": {"rng_state": jax.random.key(0)},
}


def attend(extras: dict[str, Any], q: Any, k: Any, v: Any) -> Any:
    return anyattn.attention(q, k, v, causal=True, dropout_p=0.3 * ("rng_state" in extras), **extras)


def loss(extras: dict[str, Any], q: Any, k: Any, v: Any) -> Any:
    return jnp.sin(attend(extras, q, k, v)).sum()


def differ(name: str, got: Any, want: Any) -> Iterator[str]:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not np.allclose(a, b, rtol=1e-5, atol=2e-6):
            yield f"{name}: error {np.abs(np.asarray(a) - np.asarray(b)).max()}"


def automatic() -> Iterator[str]:
    """Yield what is wrong if arrays are sharded and XLA divides the calls."""
    for name, extras in EXTRAS.items():
        wanted = {key: x for key, x in extras.items() if key in ("bias", "sink")}

        def gradient(wanted: Any, *xs: Any, extras: Any = extras) -> Any:
            return loss(extras | wanted, *xs)

        differentiated = jax.grad(gradient, (0, 1, 2, 3))
        results, gradients = attend(extras, Q, K, V), differentiated(wanted, Q, K, V)
        for place, spec in SPECS.items():
            sharding = NamedSharding(mesh, spec)
            arrays = [jax.device_put(x, sharding) for x in (Q, K, V)]
            program = jax.jit(attend).lower(extras, *arrays).compile()
            out = program(extras, *arrays)
            yield from differ(f"{place}, {name}", out, results)
            yield from differ(f"gradient, {place}, {name}", jax.jit(differentiated)(wanted, *arrays), gradients)
            if place not in WHOLE and name != "dropout":
                if re.search("all-gather|all-to-all", program.as_text()):
                    yield f"{place}, {name}: arrays are gathered"
                if not out.sharding.is_equivalent_to(sharding, out.ndim):
                    yield f"{place}, {name}: the output has {out.sharding}"


def typed() -> Iterator[str]:
    """Yield what is wrong if the types of arrays name their shardings, as JAX 0.7 and later lets them."""
    if not hasattr(jax, "set_mesh"):
        return
    everything = EXTRAS["everything"]
    forward, gradient = jax.jit(attend), jax.jit(jax.grad(loss, (1, 2, 3)))
    for place, spec in SPECS.items():
        sharding = NamedSharding(explicit, spec)
        with jax.set_mesh(explicit):
            arrays = [jax.device_put(x, sharding) for x in (Q, K, V)]
            out, grads = forward(everything, *arrays), gradient(everything, *arrays)
            yield from differ(f"explicit, {place}", attend(everything, *arrays), out)
        yield from differ(f"explicit, {place}", out, attend(everything, Q, K, V))
        yield from differ(f"gradient, explicit, {place}", grads, jax.grad(loss, (1, 2, 3))(everything, Q, K, V))
        if place not in WHOLE and not out.sharding.is_equivalent_to(sharding, out.ndim):
            yield f"explicit, {place}: the output has {out.sharding}"


def manual() -> Iterator[str]:
    """Yield what is wrong inside jax.shard_map."""
    shards, lengths = P("x", None, "y"), jnp.asarray([10, 3])

    def whole(n: Any, *xs: Any) -> Any:
        return anyattn.attention(*xs, seqused_k=jnp.concatenate([n, n]), causal=True)

    for checked in (True, False):
        divided = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), shards, shards, shards), out_specs=shards)
        call = divided(lambda n, *xs: anyattn.attention(*xs, seqused_k=n, causal=True), check_vma=checked)
        yield from differ("shard_map", jax.jit(call)(lengths, Q, K, V), whole(lengths, Q, K, V))
        got, want = (jax.grad(lambda *xs, f=f: jnp.sin(f(*xs)).sum(), (1, 2, 3)) for f in (call, whole))
        yield from differ("gradient in shard_map", got(lengths, Q, K, V), want(lengths, Q, K, V))


def caches() -> Iterator[str]:
    """Yield what is wrong about appends to caches on several devices."""
    lengths = jnp.asarray([1, 0, 5, 2])
    step = jax.jit(lambda q, k, v, a, b: attention_with_kvcache(q, a, b, k=k, v=v, cache_seqlens=lengths, causal=True))
    new = [x[:, :2] for x in (Q, K, V)]
    want = step(*new, K, V)
    for place, spec in SPECS.items():
        sharding = NamedSharding(mesh, spec)
        yield from differ(f"append, {place}", step(*[jax.device_put(x, sharding) for x in (*new, K, V)]), want)


def quantised() -> Iterator[str]:
    """Yield what is wrong about quantised caches on several devices, with scales of several shapes."""
    lengths, codes = jnp.asarray([1, 0, 5, 2]), jnp.asarray(np.clip(50 * K, -127, 127), jnp.int8)
    scale = normal(BATCH, KEYS, NHEADS_KV, seed=8) ** 2

    @jax.jit
    def step(q: Any, k: Any, v: Any, codes: Any, scale: Any) -> Any:
        scales = {"k_scale": scale, "v_scale": scale}
        found = attention_with_kvcache(q, codes, codes, k=k, v=v, cache_seqlens=lengths, causal=True, **scales)
        return found, anyattn.attention(q, codes, codes, k_scale=scale[0, 0, 0], v_scale=scale[:, 0])

    new = [x[:, :2] for x in (Q, K, V)]
    want = step(*new, codes, scale)
    for place, spec in SPECS.items():
        put = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (*new, codes)]
        got = step(*put, jax.device_put(scale, NamedSharding(mesh, P(*spec[:3]))))
        yield from differ(f"quantised, {place}", got, want)


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    found = [*automatic(), *typed(), *manual(), *caches(), *quantised()]
    sys.stdout.write("\n".join([*found, f"{len(found)} faults\n"]))
