"""Code of other packages over several processes, on the CPU through the replacement of flash_attn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harness.ranks import Ranks

HAS_HOOKS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # of PyTorch's context_parallel
JOBS = ("ring_flash_attention", "llama3_varlen", "deepspeed_ulysses", "yunchang_ulysses")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    found = Ranks(request.param)
    yield found
    found.close()


@pytest.mark.parametrize("job", JOBS)
def test_results_and_gradients_equal_one_process(job: str, ranks: Ranks) -> None:
    for found in ranks.results(f"peer_jobs.{job}"):
        assert max(found) < 1e-12, found


def test_bytes_of_other_packages_equal_the_formulas_of_the_documentation(ranks: Ranks) -> None:
    """4 heads of 16 for keys and for values, bfloat16, rows per rank; gradients of keys are float32."""
    rows, size = 8, ranks.size
    elements = rows * 4 * (16 + 16)
    formulas = (size - 1) * elements * 2, (size - 1) * elements * 2 + size * elements * 4
    names = ["ring_flash_attention_bytes", "torch_bytes"] if HAS_HOOKS else ["ring_flash_attention_bytes"]
    for name in names:
        assert ranks.results(f"peer_jobs.{name}", rows) == [formulas] * size


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", [1, 4])  # PyTorch balances the work if each rank has an even number of rows
def test_context_parallel_of_torch_runs_on_cpu_tensors(parts: int, causal: bool, ranks: Ranks) -> None:
    rows = ranks.size * parts
    for found in ranks.run("peer_jobs.torch_context_parallel", rows, causal):
        if HAS_HOOKS:
            assert max(found) < 1e-12, found
        else:
            assert isinstance(found, NotImplementedError) and "torch must have operators" in str(found)
