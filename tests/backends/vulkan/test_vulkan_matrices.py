"""The kernels with cooperative matrices in every shape that some GPU gives them.

Debian's Mesa has no matrices: test_vulkan_drivers.py runs this file on a newer one and counts what passed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan import tuning
from anyattn.backends.vulkan.device_info import MATRICES
from anyattn.testing import Case
from backends.vulkan.common import VULKAN, check_backward, check_forward, fresh_plans
from harness.backends import engines
from harness.cases import named

needs_matrices = pytest.mark.skipif(
    VULKAN not in engines() or devices.device().info.paths()[MATRICES] != "",
    reason="no Vulkan device with cooperative matrices: test_vulkan_drivers.py has one",
)
pytestmark = [needs_matrices, fresh_plans]


CASES = [
    replace(named("everything"), name="features", dtype="float16", seqlen_q=70, seqlen_k=90, batch=2),
    Case("paged", lengths="paged", dtype="float16", head_dim=72, head_dim_v=40, seqlen_q=5, page_size=3),
    Case("packed", lengths="varlen_seqused", dtype="float16", causal=True, batch=3, seqlen_q=40, seqlen_k=40, group=3),
]
SHAPES = [
    {"lanes": 1, "rows": 1, "workgroup": 8},
    {"lanes": 2, "rows": 2, "workgroup": 32},
    {"lanes": 4, "rows": 4, "workgroup": 32, "keys": 16},
    {"lanes": 8, "rows": 8, "workgroup": 16},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: "-".join(f"{name}{value}" for name, value in x.items()))
def test_results_do_not_depend_on_the_kernel_configuration(
    monkeypatch: pytest.MonkeyPatch, case: Case, shape: dict[str, Any]
) -> None:
    """Several lanes for a row, several rows for a lane, more keys than rows and the other way around."""
    original = tuning.matrix_config

    def config(*arguments: Any) -> tuning.Config:
        chosen = original(*arguments)
        assert chosen is not None and chosen.matrix is not None and chosen.subgroup == chosen.matrix.m == 8
        return replace(chosen, **shape)

    monkeypatch.setattr(tuning, "matrix_config", config)
    check_forward(case)
    if case.lengths != "paged":
        check_backward(case)


def test_unrolled_loops_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unroll the loops, as the configuration of a GPU does."""
    original = tuning.forward_config
    monkeypatch.setattr(
        tuning, "forward_config", lambda *x: replace(original(*x), dim=2, dim_v=2, features=0, unroll=True)
    )
    check_forward(Case("unrolled", dtype="float16", head_dim=7, head_dim_v=3))


def test_unrolled_loops_do_not_change_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tuning.scalar_config
    monkeypatch.setattr(
        tuning, "scalar_config", lambda *x: replace(original(*x), dim=2, dim_v=2, features=0, unroll=True)
    )
    check_backward(Case("unrolled", dtype="float16", head_dim=7, head_dim_v=3))


def test_split_dispatches_add_up_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that bounds loops gets several dispatches, whose sums meet in memory."""
    monkeypatch.setattr(tuning, "SOFTWARE_ITERATIONS", 1000)
    check_backward(CASES[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_splitting_the_keys_does_not_change_results(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setattr(tuning, "split_keys", lambda info, problem, config: 32)
    check_forward(case)


def test_forty_thousand_keys_give_the_right_result() -> None:
    sizes = {"batch": 1, "seqlen_q": 9, "seqlen_k": 40_000, "nheads_kv": 1, "head_dim": 8, "head_dim_v": 8}
    check_forward(Case("long", dtype="float16", **sizes))


def test_dropout_scale_beyond_float16_is_applied() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 512, 1, 16)).astype(np.float16) for _ in range(2))
    v = np.full((1, 512, 1, 16), 1e-2, np.float16)
    given = {"dropout_p": 1 - 1 / 65536, "seed": 1}  # what is kept is multiplied by 65,536
    out, want = (anyattn.attention(q, k, v, **given, backend=name) for name in ("vulkan", "numpy"))
    assert want.any() and np.allclose(out, want, rtol=1e-2)
