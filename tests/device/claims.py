"""Claims about GPUs in addition to the matrix of cases. Each function takes torch's device name and raises if it fails.

Functions in EVERYWHERE also run in Triton's interpreter, on "cpu". Functions in GPU need CUDA or ROCm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyattn
import anyattn.compat.torch
from anyattn.compat import aule, flash_attention, flash_attention_amd, flash_attn, flash_attn_triton, xformers
from anyattn.compat.flash_attn_3 import flash_attn_interface as flash_attn_3
from anyattn.compat.flash_attn_4 import interface as flash_attn_4

Claim = Callable[[str], None]
ROUNDINGS = {torch.float32: 64, torch.float16: 8}  # of the largest value: sums of some hundred terms, in two orders
ROWS, PACKED, HEADS_FIRST = (1, 70, 2, 32), (90, 2, 32), (1, 2, 70, 32)


def agree(got: Tensor, want: Tensor) -> None:
    got, want = got.detach().cpu(), want.detach().cpu()
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, got.dtype, want.shape, want.dtype)
    error = float((got.double() - want.double()).abs().max())
    budget = ROUNDINGS[want.dtype] * torch.finfo(want.dtype).eps * float(want.double().abs().max())
    assert error <= budget, f"differs by {error:.2e}; {budget:.2e} is allowed"


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def same_as_the_cpu(
    device: str, call: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """The call on three random tensors, and its gradients, by Triton there and by the native engine here."""
    found = []
    for backend, where in (("triton", device), ("cpu", "cpu")):
        inputs = [x.to(where, copy=True).requires_grad_() for x in random(shape, shape, shape, dtype=dtype)]
        with anyattn.backend(backend):
            out = call(*inputs)
            found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for got, want in zip(*found, strict=True):
        agree(got, want)


def _packed(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Two sequences of 40 and 50 rows."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = torch.tensor([0, 40, 90], dtype=torch.int32, device=q.device)
        out = function(q, k, v, starts, starts, 50, 50, causal=True)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return call


def _first(function: Callable[..., Any], *rest: Any, **options: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, *rest, **options)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return call


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "dropout drops the same entries": (_first(anyattn.attention, dropout_p=0.4, seed=3), ROWS),
    "flash_attn": (_first(flash_attn.flash_attn_func, causal=True, window_size=(20, 0), softcap=5.0), ROWS),
    "flash_attn, packed": (_packed(flash_attn.flash_attn_varlen_func), PACKED),
    "flash_attn_3": (_first(flash_attn_3.flash_attn_func, causal=True), ROWS),
    "flash_attn_3, packed": (_packed(flash_attn_3.flash_attn_varlen_func), PACKED),
    "flash_attn_4": (_first(flash_attn_4.flash_attn_func, causal=True), ROWS),
    "flash_attn_triton": (_first(flash_attn_triton.flash_attn_func, causal=True), ROWS),
    "flash_attention_amd": (_first(flash_attention_amd.flash_attn_func, causal=True), ROWS),
    "flash_attention": (_first(flash_attention.flash_attention_forward), HEADS_FIRST),
    "aule": (_first(aule.flash_attention), HEADS_FIRST),
    "xformers": (_first(xformers.memory_efficient_attention), ROWS),
    "sdpa": (_first(anyattn.sdpa, is_causal=True), HEADS_FIRST),
}


def decoding(device: str) -> None:
    """Check two steps after a prompt, with rotary positions, in a paged cache."""
    found = []
    for backend, where in (("triton", device), ("cpu", "cpu")):
        q, new = (x.to(where, copy=True) for x in random((2, 1, 4, 32), (2, 1, 2, 32)))
        pages = torch.zeros(9, 16, 2, 32, device=where)
        table = torch.arange(8, dtype=torch.int32, device=where).reshape(2, 4).contiguous()
        angles = torch.linspace(0, 3, 64 * 16, device=where).reshape(64, 16)
        rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "block_table": table, "causal": True}
        with anyattn.backend(backend):
            for length in (17, 18):
                used = torch.full((2,), length, dtype=torch.int32, device=where)
                out = anyattn.attention_with_kvcache(q, pages, pages, k=new, v=new, cache_seqlens=used, **rotary)
        found.append((out, pages))
    for got, want in zip(*found, strict=True):
        agree(got, want)


def repeats(device: str) -> None:
    """Gradients, bit for bit."""
    found = []
    for _ in range(2):
        inputs = [x.to(device).requires_grad_() for x in random(ROWS, ROWS, ROWS, dtype=torch.float16)]
        with anyattn.backend("triton"):
            out = anyattn.attention(*inputs, causal=True)
            found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hook(device: str) -> None:
    """torch's scaled_dot_product_attention, where it takes its FlashAttention kernel."""
    shape, dtype = (2, 4, 256, 64), torch.float16
    results = []
    for ours in (True, False):
        inputs = [x.to(device, copy=True).requires_grad_() for x in random(shape, shape, shape, dtype=dtype)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if ours:
                with anyattn.compat.torch.use_anyattn():
                    out = F.scaled_dot_product_attention(*inputs, is_causal=True)
                    results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
            else:
                out = F.scaled_dot_product_attention(*inputs, is_causal=True)
                results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert torch.equal(results[0][0], anyattn.sdpa(*inputs, is_causal=True)), "torch's kernel ran instead"
    for got, want in zip(*results, strict=True):
        agree(got, want)


def graph(device: str) -> None:
    """A captured call, forward and backward, replayed on other values."""
    inputs = [x.to(device).requires_grad_() for x in random(ROWS, ROWS, ROWS, dtype=torch.float16)]

    def step() -> list[Tensor]:
        out = anyattn.attention(*inputs, causal=True)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    with torch.no_grad():
        for x in inputs:
            x.mul_(-0.5)
    captured.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


def streams(device: str) -> None:
    """A call on another stream waits for what is on that stream, and for nothing else."""
    x = random((1, 2048, 8, 64), dtype=torch.float16)[0].to(device)
    want = anyattn.attention(x * 2, x, x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = x * 2  # there only after the pause
        got = anyattn.attention(late, x, x)
    side.synchronize()
    assert torch.equal(got, want)


def compiled(device: str) -> None:
    """Check code compiled by Inductor without a graph break."""
    inputs = [x.to(device).requires_grad_() for x in random(ROWS, ROWS, ROWS)]
    call = partial(anyattn.attention, causal=True)
    found = []
    for function in (call, torch.compile(call, fullgraph=True)):
        out = function(*inputs)
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def out_of_memory(device: str) -> None:
    """torch's own error, and the next call works."""
    few = torch.zeros(1, 1, 1, 64, device=device, dtype=torch.float16)
    huge = few.expand(1, 2**31 // 64, 512, 64)
    try:
        anyattn.attention(huge, few, few)
    except torch.OutOfMemoryError:
        assert not anyattn.attention(few, few, few).any()
        return
    raise AssertionError("2 TiB were there")


def offsets(device: str) -> None:
    """Check keys and values after the first 2^31 elements."""
    cache = torch.zeros(2, 2**20, 8, 128, device=device, dtype=torch.float16)[:, :, :, :]
    last = cache[1:, -300:]
    last.copy_(random(tuple(last.shape), dtype=torch.float16)[0])
    q = random((2, 5, 8, 128), dtype=torch.float16)[0].to(device)
    used = torch.full((2,), 2**20, dtype=torch.int32, device=device)
    got = anyattn.attention(q, cache, cache, window=(299, 0), causal=True, seqused_k=used)
    want = anyattn.attention(q[1:], last, last, window=(299, 0), causal=True)
    agree(got[1:, -1:], want[:, -1:])


def float32_precision(device: str) -> None:
    """Check that fewer bits are used only if torch's setting allows them."""
    q, k, v = (x.to(device) for x in random(ROWS, ROWS, ROWS))
    exact = anyattn.attention(*(x.cpu().double() for x in (q, k, v)))
    errors = {}
    try:
        for setting in ("highest", "medium"):
            torch.set_float32_matmul_precision(setting)
            errors[setting] = float((anyattn.attention(q, k, v).cpu() - exact).abs().max())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 2e-6 and errors["highest"] < errors["medium"] < 1e-2, errors


EVERYWHERE: dict[str, Claim] = {
    **{name: partial(same_as_the_cpu, call=call, shape=shape) for name, (call, shape) in CALLS.items()},
    "decoding": decoding,
    "repeats": repeats,
}
GPU: dict[str, Claim] = {
    claim.__name__: claim for claim in (hook, graph, streams, compiled, out_of_memory, offsets, float32_precision)
}
