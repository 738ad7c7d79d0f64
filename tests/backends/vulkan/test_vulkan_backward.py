"""The backward pass on Vulkan beyond the common matrix: every shape of its kernels, parts, bindings, and a training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anyattn
from anyattn.backends.vulkan import device as devices
from anyattn.backends.vulkan import tuning
from anyattn.backends.vulkan.backward import BackwardPlan
from anyattn.backends.vulkan.engine import current_engine
from anyattn.definition.passes import BACKWARD
from anyattn.testing import Case, make_inputs
from backends.vulkan.common import (
    BACKWARD_CASES,
    check_backward,
    checked_gradients,
    fresh_plans,
    needs_vulkan,
    pass_self_tests,
    printed,
)
from harness.cases import named
from harness.paths import ROOT

pytestmark = [needs_vulkan, fresh_plans]


SHAPES = [
    {"lanes": 4, "own": 1, "step": 4, "shuffle": True},
    {"lanes": 8, "own": 2, "step": 2, "shuffle": True},
    {"lanes": 4, "own": 2, "step": 4, "shuffle": False},
    {"lanes": 1, "own": 4, "step": 4, "shuffle": False},
]


@pytest.mark.parametrize("case", [BACKWARD_CASES[0], BACKWARD_CASES[2]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: "-".join(f"{name}{int(value)}" for name, value in x.items()))
def test_gradients_do_not_depend_on_the_kernel_configuration(
    monkeypatch: pytest.MonkeyPatch, case: Case, shape: dict[str, Any]
) -> None:
    """Use configurations of GPUs, which a software driver does not choose: several lanes per row or key, shuffles."""
    original = tuning.backward_configs

    def configs(info: devices.DeviceInfo, problem: Any) -> dict[str, tuning.Config]:
        lanes, own, step = (shape[name] for name in ("lanes", "own", "step"))
        dims = [-(-tuning.vectors(x) // lanes) * lanes for x in (problem.head_dim, problem.head_dim_v)]
        found = {name: replace(x, dim=dims[0], dim_v=dims[1]) for name, x in original(info, problem).items()}
        wide = {"lanes": lanes, "shuffle": shape["shuffle"]}
        found["dq"] = replace(found["dq"], rows=own, keys=step, **wide)
        found["dkdv"] = replace(found["dkdv"], rows=step, keys=own, **wide)
        return found

    monkeypatch.setattr(tuning, "backward_configs", configs)
    check_backward(case)


def test_gpu_configuration_uses_lanes_and_shuffles() -> None:
    """The choice itself, on the description of a device that is not here."""
    gpu = replace(devices.device().info, kind="discrete", subgroup=32, shuffle=True)
    problem, _ = make_inputs(Case("wide", head_dim=256, head_dim_v=8)).describe(BACKWARD)
    configs = tuning.backward_configs(gpu, problem)
    assert len({(x.dim, x.dim_v) for x in configs.values()}) == 1
    assert all(configs[name].shuffle and configs[name].lanes == 16 for name in ("dq", "dkdv"))
    assert all(not configs[name].shuffle and configs[name].lanes == 1 for name in ("delta", "dbias", "sum", "store"))


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_split_dispatches_add_up_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """A driver that bounds loops gets several dispatches, whose sums meet in memory."""
    monkeypatch.setattr(tuning, "SOFTWARE_ITERATIONS", 200)
    check_backward(case)


def test_long_sequences_are_split_below_the_loop_limit_of_a_software_driver() -> None:
    """Mesa's leaves loops silently after 65,535: these rows and keys are more than one workgroup may take."""
    long = Case("long", batch=1, seqlen_q=9000, nheads_kv=1, group=4, seqlen_k=3, head_dim=8, head_dim_v=8, dlse=True)
    check_backward(long)
    check_backward(replace(long, seqlen_q=2, group=1, seqlen_k=20_000))


@pytest.mark.parametrize("limit", [60_000, 30_000])
def test_arrays_larger_than_a_binding_are_bound_in_blocks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Parts of the heads, and of one head's sequences, are bound in turn; they add to one bias and one sink."""
    pass_self_tests()
    info = replace(devices.device().info, storage_range=limit)
    monkeypatch.setattr(current_engine().device, "info", info)
    parts = {"batch": 3, "seqlen_q": 17, "seqlen_k": 21, "nheads_kv": 4, "group": 2, "sink": True}
    for case in (Case("b1", bias="b1", dtype="float16", **parts), Case("one", bias="one", mask="h1", **parts)):
        inputs = make_inputs(case)
        assert len(BackwardPlan(current_engine(), info, inputs.describe(BACKWARD)[0]).launches) > 1
        checked_gradients(inputs)


def test_gradients_do_not_depend_on_the_batch_or_the_number_of_submissions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, a sequence's gradients depend only on that sequence, and not on how the work is submitted."""
    inputs = make_inputs(replace(named("everything"), dropout_p=0.0, bias="", mask="", alibi="h", batch=3))
    first = checked_gradients(inputs)
    monkeypatch.setattr(current_engine(), "rate", 1e3)
    again = checked_gradients(inputs)
    assert all(np.array_equal(first[name], again[name]) for name in first if first[name] is not None)
    given = {"lse": None} | inputs.arguments
    given["out"], given["lse"] = anyattn.attention_forward(**inputs.arguments, backend="vulkan")
    alone = {name: x[1:2] if np.shape(x)[:1] == (3,) else x for name, x in given.items()}
    got = anyattn.attention_backward(inputs.dout[1:2], dlse=inputs.dlse[1:2], **alone, backend="vulkan")
    assert all(np.array_equal(getattr(got, name), first[name][1:2]) for name in ("dq", "dk", "dv"))


def test_device_without_unified_memory_uses_staging_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate a device without shared memory: all data passes through mapped staging buffers."""
    monkeypatch.setattr(current_engine().memory, "unified", False)
    current_engine().memory.trim()
    check_backward(BACKWARD_CASES[2])
    current_engine().memory.trim()


def test_unsupported_gradients_are_refused_by_name() -> None:
    x = np.ones((2, 4, 1, 8), np.float16)
    out, lse = anyattn.attention_forward(x, x, x, backend="vulkan")
    with pytest.raises(anyattn.UnsupportedProblem, match=r"supports dout in q.s dtype float16, got float32"):
        anyattn.attention_backward(out.astype(np.float32), x, x, x, out, lse, backend="vulkan")
    index = np.array([1, 0], np.int32)
    with pytest.raises(anyattn.UnsupportedProblem, match=r"has no backward through a KV cache"):
        anyattn.attention_backward(out, x, x, x, out, lse, cache_batch_idx=index, backend="vulkan")


def test_validation_layer_reports_nothing_for_the_backward_pass() -> None:
    code = (
        "from backends.vulkan.common import BACKWARD_CASES, check_backward\n"
        "from anyattn.backends.vulkan import tuning\n"
        "tuning.SOFTWARE_ITERATIONS = 2000\n"
        "for case in BACKWARD_CASES: check_backward(case)\n"
        "print('clean')\n"
    )
    assert printed(code, ANYATTN_VULKAN_VALIDATE="1").strip() == "clean"


def test_example_gpt_trains_to_the_losses_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors, autograd and optimiser on the host, attention on the device: step by step torch's losses."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from gpt import Config
    from train import Corpus, Trainer

    calls = []
    run = BackwardPlan.run
    monkeypatch.setattr(BackwardPlan, "run", lambda self, call: (calls.append(1), run(self, call)))
    corpus = Corpus(torch.arange(2000) % 7, "abcdefg")
    config = Config(vocab_size=7, context=48, nlayers=2, width=32, head_dim=16)
    losses = {}
    for name in ("anyattn", "torch"):
        trainer = Trainer(name, config)
        batches = corpus.batches(2, config.context, torch.Generator().manual_seed(0))
        with anyattn.backend("vulkan"):
            losses[name] = [trainer.step(next(batches)) for _ in range(6)]
    assert len(calls) == 6 * config.nlayers
    assert losses["anyattn"][-1] < losses["anyattn"][0] - 0.1
    assert np.abs(np.subtract(losses["anyattn"], losses["torch"])).max() < 1e-4
