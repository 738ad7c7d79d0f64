"""The Hopper kernels on a Hopper GPU: random problems against float64, and thousands of launches that must all end.

    PYTHONPATH=src:tests python tests/device/hopper.py [--launches 10000] [--problems 60]

A kernel whose barriers are wrong may never end: run it with a time limit, as `make gpu` does, and first with few
launches under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch

import anyattn
from anyattn import testing
from anyattn.config import settings
from anyattn.definition.problem import Problem
from anyattn.testing import Case
from device.arrays import to_device, to_numpy
from harness.hopper_inputs import aligned, drawn

LONGEST = 700


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--problems", type=int, default=60, help="small ones, against the definition in NumPy")
    arguments = parser.parse_args()
    launches = prepare()
    cases = [drawn(seed, 300) for seed in range(arguments.problems)]
    wrong = [f"{case}: {line}" for case in cases for line in small(case, "cuda")]
    cases += [drawn(seed, LONGEST) for seed in range(arguments.launches)]
    for case in cases[arguments.problems :]:
        wrong += [f"{case}: {line}" for line in large(case, "cuda")]
        if len(wrong) > 20:
            break
    result = f"{len(launches)} launches for {len(cases)} calls, {len(wrong)} wrong on {torch.cuda.get_device_name()}"
    sys.stdout.write("\n".join([*wrong, result, ""]))
    return 1 if wrong or len(launches) != len(cases) else 0


def prepare() -> list[Any]:
    """Hopper's kernels for small problems too, which others would share out better; fills with what they launch."""
    from anyattn.backends.triton import plan_forward
    from anyattn.backends.triton.sm90.plan import HopperKernel

    launches: list[Any] = []
    launch, shape = HopperKernel.launch, plan_forward.forward_shape

    def record(kernel: HopperKernel, *given: Any) -> None:
        launches.append(kernel.grid)
        launch(kernel, *given)

    def whole(problem: Problem, gpu: Any) -> plan_forward.Shape:
        return shape(problem, gpu)._replace(pack=False, splits=1)

    HopperKernel.launch, plan_forward.forward_shape = record, whole  # type: ignore[method-assign]
    os.environ["ANYATTN_HOPPER"] = "1"
    settings.reload()
    return launches


def small(case: Case, device: str) -> list[str]:
    """Return the errors against the definition, with NaN in all memory that no query attends to."""
    inputs = aligned(case)
    given = inputs.arguments | {name: to_device(inputs.arguments[name], device) for name in "qkv"}
    out, lse = anyattn.attention_forward(**given, backend="triton")
    return testing.compare(testing.expected(inputs), {"out": to_numpy(out), "lse": to_numpy(lse)})


def large(case: Case, device: str) -> list[str]:
    """Return the errors against float64 computed on the device, within the same bounds."""
    q, k, v = random_arrays(case, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    rule = {"causal": case.causal, "alignment": case.alignment, "scale": scale}
    out, lse = anyattn.attention_forward(q, k, v, **rule, backend="triton")
    wide = [x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (q, k, v)]
    seen = visible(case, device)
    exact_out, exact_lse, size = attention(*(x.double() for x in wide), seen, scale, torch.float64)
    plain_out, plain_lse, _ = attention(*(x.float() for x in wide), seen, scale, q.dtype)
    lines = []
    for name, got, exact, plain, largest, dtype in (
        ("out", out.transpose(1, 2), exact_out, plain_out, size, q.dtype),
        ("lse", lse, exact_lse, plain_lse, exact_lse[exact_lse.isfinite()].abs().amax().clamp(min=1), torch.float32),
    ):
        budget = 2 * error(plain, exact) + 4 * torch.finfo(dtype).eps * float(largest)
        found = error(got, exact)
        if not found <= budget:
            lines.append(f"{name}: error {found:.3g} > {budget:.3g}")
    return lines


def random_arrays(case: Case, device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(case.seed)
    found = []
    for rows, heads in ((case.seqlen_q, case.nheads_kv * case.group), *[(case.seqlen_k, case.nheads_kv)] * 2):
        axes = (case.batch, heads, rows) if case.layout == "bhsd" else (case.batch, rows, heads)
        x = torch.randn(*axes, case.head_dim, device=device, generator=generator).to(getattr(torch, case.dtype))
        found.append(x.transpose(1, 2) if case.layout == "bhsd" else x)
    return found


def visible(case: Case, device: str) -> torch.Tensor:
    """Return booleans (row, key): the visible keys of each row."""
    seen = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device)
    offset = case.seqlen_k - case.seqlen_q if case.alignment == "bottom-right" else 0
    return seen.tril(offset) if case.causal else seen


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, narrow: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and the largest sum of P|v|: the definition in q's dtype, with P and out rounded to `narrow`."""
    s = (scale * (q @ k.mT)).masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.where(seen, (s - lse[..., None]).exp(), 0.0)
    out = (p.to(narrow).to(v.dtype) @ v).to(narrow).to(v.dtype)
    return out, lse, (p @ v.abs()).amax()


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error; inf for a NaN or a wrong infinity."""
    finite = exact.isfinite()
    if not torch.equal(got[~finite].double(), exact[~finite].double()):
        return float("inf")
    difference = (got.double() - exact.double()).abs()[finite]
    return float(difference.nan_to_num(torch.inf).amax()) if difference.numel() else 0.0


if __name__ == "__main__":
    sys.exit(main())
