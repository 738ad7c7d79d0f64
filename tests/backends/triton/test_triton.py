"""Tests of the Triton backend alone: its refusals, when it is chosen, and every tile size."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import anyattn
from anyattn.backends.triton import backend, device, tuning
from anyattn.backends.triton.device import INTERPRETER, interpreted
from anyattn.definition.passes import BACKWARD, SECOND
from anyattn.frameworks.torch.adapter import adapter
from anyattn.runtime import dispatch, execute
from anyattn.testing import Case, make_inputs
from harness.backends import Engine, skip_module_without
from harness.cases import named
from harness.checks import wrong

skip_module_without("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="on a GPU tests/device runs instead")

X = np.ones((1, 4, 2, 8), np.float32)
TRITON = Engine("triton")


def test_automatic_choice_never_takes_the_interpreter() -> None:
    explanation = anyattn.explain(X, X, X)
    assert explanation.chosen != "triton" and "which is slow" in explanation.reasons["triton"][0]
    assert anyattn.explain(X, X, X, backend="triton").chosen == "triton"


def test_refusals_name_what_is_accepted() -> None:
    wide = np.ones((1, 4, 2, 513), np.float32)
    with pytest.raises(anyattn.UnsupportedProblem, match=r"head_dim and head_dim_v up to 512, got 513"):
        anyattn.attention(wide, wide, wide, backend="triton")
    double = X.astype(np.float64)
    with pytest.raises(anyattn.UnsupportedProblem, match="has no float64"):
        anyattn.attention(double, double, double, backend="triton")
    cache = np.zeros((1, 8, 2, 8))
    with pytest.raises(anyattn.UnsupportedProblem, match=r"an append to a (?s:.)*has no float64"):
        anyattn.attention_with_kvcache(double, cache, cache, k=double, v=double, cache_seqlens=0, backend="triton")


def test_tensors_outside_a_gpu_are_refused_with_a_reason() -> None:
    problem, _ = make_inputs(named("plain")).describe()
    elsewhere = problem.with_arrays(q=problem.q._replace(device="meta"))
    assert "got q on meta" in dispatch.get("triton").supports(elsewhere)[0]


def test_gradients_whose_tiles_exceed_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cards", lambda: [("cpu", "Abacus 9000", "sm_75")])
    forward, _ = make_inputs(Case("wide", seqlen_q=4, seqlen_k=4, head_dim=160)).describe()
    backward, _ = make_inputs(Case("wide", seqlen_q=4, seqlen_k=4, head_dim=160)).describe(BACKWARD)
    supports = dispatch.get("triton").supports
    assert supports(forward) == []
    second, _ = make_inputs(Case("wide", seqlen_q=4, seqlen_k=4, head_dim=160)).describe(SECOND)
    for problem, what in ((backward, "gradients"), (second, "second derivatives")):
        reason = f"supports head_dim and head_dim_v up to 128 for float32 {what} on sm_75, got 160"
        assert supports(problem) == [reason]


@pytest.mark.parametrize("config", [(16, 16), (32, 128), (128, 32)], ids=str)
@pytest.mark.parametrize("name", ["everything", "varlen_window_alibi", "chunk_window", "paged_odd_page_f16"])
def test_results_do_not_depend_on_the_tile_size(
    name: str, config: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full tiles and edges on both sides, several of each."""
    monkeypatch.setattr(tuning, "forward", lambda *_, **__: tuning.Config(*config))
    inputs = make_inputs(named(name))
    assert not wrong(inputs, "forward", TRITON)


@pytest.mark.parametrize("section", [1, 3, 100])
def test_results_do_not_depend_on_the_order_of_programs(section: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "section", lambda *_: section)
    inputs = make_inputs(Case("sections", batch=2, seqlen_q=150, seqlen_k=90, nheads_kv=5, causal=True))
    assert not wrong(inputs, "forward", TRITON)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("lengths", ["full", "varlen", "paged"])
def test_results_do_not_depend_on_the_number_of_splits(
    count: int, lengths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More splits than some rows have keys, and a sink that only one of them may count."""
    monkeypatch.setattr(tuning, "splits", lambda *_: count)
    case = Case("splits", seqlen_q=3, seqlen_k=400, group=4, causal=True, sink=True, lengths=lengths, dropout_p=0.2)
    inputs = make_inputs(case)
    assert not wrong(inputs, "forward", TRITON)


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_splits_of_quantised_keys(dtype: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "splits", lambda *_: 3)
    case = Case("splits", seqlen_q=2, seqlen_k=300, group=4, causal=True, lengths="paged", stored=stored, dtype=dtype)
    assert not wrong(make_inputs(case), "forward", TRITON)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversion_of_float8_that_some_gpus_have(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter emulates it; the other tests convert by bits."""
    monkeypatch.setattr(tuning, "has_float8", lambda _: True)
    case = Case("float8", seqlen_q=70, seqlen_k=90, stored="float8_e4m3fn", dtype=dtype, seed=5)
    inputs = make_inputs(case)
    assert not wrong(inputs, "forward", TRITON)
    assert not wrong(inputs, "backward", TRITON)


@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_batch_invariant_results_equal_those_of_each_sequence_alone(seqlen_q: int) -> None:
    """Each sequence alone and in a batch: the same bits."""
    inputs = make_inputs(Case("batch", batch=3, seqlen_q=seqlen_q, seqlen_k=300, group=4, causal=True, dtype="float16"))
    q, k, v = (inputs.arguments[name] for name in "qkv")
    flags = {"causal": True, "batch_invariant": True, "backend": "triton"}
    out = anyattn.attention(q, k, v, **flags)
    for b in range(3):
        one = slice(b, b + 1)
        assert anyattn.attention(q[one], k[one], v[one], **flags).tobytes() == out[one].tobytes()


def test_results_are_identical_from_run_to_run() -> None:
    inputs = make_inputs(named("everything"))
    out, lse = anyattn.attention_forward(**inputs.arguments, backend="triton")
    grads = [
        anyattn.attention_backward(
            inputs.dout, out=out, lse=lse, dlse=inputs.dlse, **inputs.arguments, deterministic=True, backend="triton"
        )
        for _ in range(2)
    ]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*(one[:5] for one in grads), strict=True))


def test_splits_occupy_most_processors() -> None:
    assert tuning.splits(0, 100, 132) == tuning.splits(132, 100, 132) == tuning.splits(8, 4, 132) == 1
    assert tuning.splits(8, 1000, 132) * 8 / 132 > 0.8
    assert tuning.splits(8, 6, 132) <= 6


@pytest.mark.parametrize(
    ("size", "want"), [(1, (16, 0)), (64, (64, 0)), (96, (64, 32)), (100, (128, 0)), (300, (256, 64))]
)
def test_dimensions_are_split_into_powers_of_two(size: int, want: tuple[int, int]) -> None:
    assert tuning.chunks(size) == want


def test_every_architecture_has_a_config() -> None:
    for arch in (INTERPRETER, "sm_90", "gfx1100", "sm_999", "xpu"):
        for dtype in ("float32", "float16"):
            for width in (16, 64, 80, 128, 256, 512):
                config = tuning.forward(arch, dtype, width)
                assert config.tile_q >= 16 and config.tile_k >= 16


def test_device_of_an_architecture_name_has_default_limits() -> None:
    assert device.device("sm_90") == device.Device("sm_90", 128, 2**25)


def test_out_of_memory_on_a_gpu_raises_the_error_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that results and workspace are allocated before anything is written."""

    def empty(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        execute._workspace(adapter, 2**40, torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "Triton is not installed"), ("3.5.1", r"Triton 3\.5 is too old: 3\.6 or later"), ("3.6.0+git1", None)],
)
def test_old_versions_of_triton_are_refused_with_a_reason(
    version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check every package that contains Triton, because torch for ROCm has a separate one."""

    def found(name: str) -> str:
        if version is None or name != "pytorch-triton-rocm":
            raise device.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(device, "version", found)
    got = backend.TritonBackend().available(named=True)
    assert got is None if reason is None else re.match(reason, str(got))


@pytest.mark.parametrize(
    ("arch", "triton", "state"),
    [
        ("sm_90", "3.9", "compiled"),
        ("sm_121", "3.9", "expected"),
        ("sm_61", "3.9", "Triton compiles for sm_70 and later; this card is sm_61"),
        ("gfx1030", "3.6", "compiled"),
        ("gfx1030", "3.7", "Triton after 3.6 does not compile for gfx1030"),
        ("xpu", "3.9", "expected"),
    ],
)
def test_info_and_explain_report_the_support_of_each_gpu(
    arch: str, triton: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the state that `info` lists for a GPU, and the reason in `explain`."""
    monkeypatch.setattr(device, "version", lambda name: triton)
    monkeypatch.setattr(backend, "cards", lambda: [("cuda:0", "A card", arch)])
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    assert backend.list_gpus() == [{"device": "cuda:0", "name": "A card", "arch": arch, "state": state}]
    problem, _ = make_inputs(named("plain")).describe()
    problem = problem.with_arrays(q=problem.q._replace(device="cuda:0"))
    assert backend.TritonBackend().supports(problem) == ([state] if state.startswith("Triton") else [])
