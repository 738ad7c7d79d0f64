"""Programs that jax.export writes and another process loads."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import anyattn
from anyattn.compat.jax import export_checks
from harness.processes import fresh

Q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4, 8)), jnp.float32)
LOAD = """
import pathlib, jax, jax.export, numpy as np
from anyattn.compat.jax import export_checks
{register}
program = jax.export.deserialize(bytearray(pathlib.Path({program!r}).read_bytes()))
q = np.load({arrays!r})
found = (program.call(q), jax.grad(lambda q: (program.call(q) ** 2).sum())(q))
np.save({results!r}, np.stack([np.asarray(x) for x in found]))
"""


def attend(q: jax.Array) -> jax.Array:
    return anyattn.attention(q, q, q, causal=True, window=(3, 0))


def load(folder: Path, register: str) -> tuple[int, str]:
    """Run the program in another process; return its exit status and its errors."""
    names = {"program": "program", "arrays": "q.npy", "results": "results.npy"}
    paths = {name: str(folder / file) for name, file in names.items()}
    found = fresh(LOAD.format(register=register, **paths))
    return found.returncode, found.stderr


def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    program = jax.export.export(jax.jit(attend), disabled_checks=export_checks())(Q)
    (tmp_path / "program").write_bytes(program.serialize(vjp_order=1))
    np.save(tmp_path / "q.npy", Q)
    assert load(tmp_path, "export_checks()") == (0, "")
    out, gradient = np.load(tmp_path / "results.npy")
    np.testing.assert_array_equal(out, attend(Q))
    np.testing.assert_array_equal(gradient, jax.grad(lambda q: (attend(q) ** 2).sum())(Q))
    status, text = load(tmp_path, "")
    assert status and "anyattn_forward" in text  # the custom call is not registered


def test_export_without_the_checks_names_the_custom_call() -> None:
    with pytest.raises(ValueError, match="anyattn_forward"):
        jax.export.export(jax.jit(attend))(Q)
