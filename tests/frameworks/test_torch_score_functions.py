"""Score functions under torch.compile: one graph, with the results and the gradients of eager calls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex

import anyattn
from anyattn.compat import flex_attention as ours
from harness.score_gallery import BATCH, HEADS, N_K, N_Q, gallery

GRAPHS = "aot_eager"
pytestmark = pytest.mark.usefixtures("new_graphs")


@pytest.fixture
def new_graphs() -> None:
    torch._dynamo.reset()


def tensors(*, batch: int = BATCH, n_q: int = N_Q, n_k: int = N_K) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n_q, HEADS, 16), (n_k, HEADS // 2, 16), (n_k, HEADS // 2, 24))
    return [torch.randn(batch, *shape, generator=generator).requires_grad_() for shape in shapes]


def compile_whole(call: Callable[..., Any], **options: Any) -> Any:
    return torch.compile(call, **{"fullgraph": True, "backend": GRAPHS, **options})


def compare(call: Callable[..., Any], arrays: list[torch.Tensor], leaves: Any = (), **options: Any) -> None:
    """Compare the results and the gradients of a compiled call with those of the eager one."""
    both = []
    for one in (compile_whole(call, **options), call):
        out, lse = one(*arrays)
        loss = out.square().sum() + lse[lse > -torch.inf].sum()
        both.append((out, lse, *torch.autograd.grad(loss, (*arrays, *leaves))))
    for got, want in zip(*both, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", gallery())
def test_a_call_is_one_graph(name: str) -> None:
    entry = gallery()[name]

    def call(q: Any, k: Any, v: Any) -> Any:
        return anyattn.attention(q, k, v, score_mod=entry.score_mod, mask_mod=entry.mask_mod, return_lse=True)

    compare(call, tensors(), entry.leaves)


def test_packed_sequences_are_one_graph() -> None:
    slopes, boundaries = torch.rand(HEADS), torch.tensor([0, 20, N_Q])
    table = torch.zeros(HEADS, 2 * N_Q).requires_grad_()
    q, k, v = (x[0].detach().requires_grad_() for x in tensors(n_k=N_Q))

    def call(q: Any, k: Any, v: Any) -> Any:
        return anyattn.attention_varlen(
            q, k, v, boundaries, boundaries, N_Q, N_Q, causal=True, return_lse=True,
            score_mod=lambda s, b, h, i, j: s + table[h, i - j + N_Q] - slopes[b] * i,
        )  # fmt: skip

    compare(call, [q, k, v], (table,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_dropout_are_one_graph(dtype: torch.dtype) -> None:
    entry, causal = gallery()["relative_clamped"], gallery()["causal"].mask_mod
    arrays = [x.detach().to(dtype).requires_grad_() for x in tensors()]

    def call(*qkv: Any) -> Any:
        return anyattn.attention(
            *qkv, score_mod=entry.score_mod, mask_mod=causal, dropout_p=0.3, seed=5, return_lse=True
        )

    compare(call, arrays, entry.leaves)


class Parts:
    """Parts of a score function that change between calls."""

    def __init__(self) -> None:
        self.bias, self.times, self.shift = torch.zeros(HEADS, N_K), 2.0, 3


def test_values_are_read_in_every_call() -> None:
    parts = Parts()

    def relative(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score * parts.times + parts.bias[h, torch.clamp(j - parts.shift, min=0)]

    def call(*qkv: Any) -> Any:
        return anyattn.attention(*qkv, score_mod=relative)

    compiled, arrays = compile_whole(call), [x.detach() for x in tensors()]
    seen = []
    for change in (
        lambda: None,
        lambda: parts.bias.normal_(generator=torch.Generator().manual_seed(1)),
        lambda: setattr(parts, "bias", parts.bias.flip(1)),
        lambda: setattr(parts, "times", 0.5),
        lambda: setattr(parts, "times", 0.25),
        lambda: setattr(parts, "shift", 7),
        lambda: setattr(parts, "shift", 9),
    ):
        change()
        seen.append(call(*arrays))
        torch.testing.assert_close(compiled(*arrays), seen[-1])
    assert all(not torch.allclose(one, other) for one, other in pairwise(seen))


def test_one_graph_serves_every_length() -> None:
    slopes, blocks = torch.rand(HEADS), gallery()["tiles"].mask_mod
    graphs = torch._dynamo.testing.CompileCounter()

    def call(*qkv: Any) -> Any:
        return anyattn.attention(*qkv, score_mod=lambda s, b, h, i, j: torch.tanh(s) * slopes[h], mask_mod=blocks)

    compiled = compile_whole(call, dynamic=True, backend=graphs)
    for length in (40, 56, 72):
        arrays = [x.detach() for x in tensors(n_q=length, n_k=length + 5)]
        torch.testing.assert_close(compiled(*arrays), call(*arrays))
    assert graphs.frame_count == 1


def test_inductor_computes_gradients_of_captured_tensors() -> None:
    entry = gallery()["relative_clamped"]

    def call(q: Any, k: Any, v: Any) -> Any:
        out, lse = anyattn.attention(q.sin(), k, v, score_mod=entry.score_mod, return_lse=True)
        return out.cos(), lse

    compare(call, tensors(), entry.leaves, backend="inductor")


def test_integers_of_compiled_calls_must_fit() -> None:
    large = torch.tensor([2**40, 3])
    compiled = compile_whole(lambda *qkv: anyattn.attention(*qkv, mask_mod=lambda b, h, i, j: j < large[b]))
    arrays = [x.detach() for x in tensors()]
    with pytest.raises(RuntimeError, match="a captured tensor of integers must fit in int32"):
        compiled(*arrays)
    large[0] = 50
    torch.testing.assert_close(compiled(*arrays), anyattn.attention(*arrays, seqused_k=large))


def test_functions_that_dynamo_cannot_trace_break_the_graph() -> None:
    slopes = anyattn.captured(torch.rand(HEADS).numpy())

    def call(*qkv: Any) -> Any:
        return anyattn.attention(*qkv, score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j))

    arrays = [x.detach() for x in tensors()]
    torch.testing.assert_close(torch.compile(call, backend=GRAPHS)(*arrays), call(*arrays))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compile_whole(call)(*arrays)


def heads_first() -> list[torch.Tensor]:
    return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors()]


@pytest.mark.parametrize("name", ["causal", "prefix", "documents", "per_head"])
@pytest.mark.parametrize("create", [flex.create_block_mask, ours.create_block_mask])
def test_flex_attention_is_one_graph(name: str, create: Any) -> None:
    blocks = create(gallery()[name].mask_mod, BATCH, HEADS, N_Q, N_K, device="cpu", BLOCK_SIZE=16)
    entry = gallery()["relative_clamped"]

    def call(*qkv: Any) -> Any:
        return ours.flex_attention(*qkv, entry.score_mod, blocks, enable_gqa=True, return_lse=True)

    compare(call, heads_first(), entry.leaves)


def test_unlisted_blocks_are_skipped_in_a_graph() -> None:
    blocks = flex.create_block_mask(gallery()["causal"].mask_mod, None, None, N_Q, N_K, device="cpu", BLOCK_SIZE=16)
    compiled = compile_whole(ours.flex_attention)
    arrays = [x.detach() for x in heads_first()]
    for _ in range(2):
        want = ours.flex_attention(*arrays, block_mask=blocks, enable_gqa=True)
        torch.testing.assert_close(compiled(*arrays, block_mask=blocks, enable_gqa=True), want)
        blocks.kv_num_blocks.zero_()  # the blocks on the diagonal are no longer listed


@pytest.mark.parametrize("backend", [GRAPHS, "inductor"])
def test_torch_function_trains_in_one_graph(backend: str) -> None:
    blocks = flex.create_block_mask(gallery()["causal"].mask_mod, None, None, N_Q, N_K, device="cpu")
    entry, arrays = gallery()["relative_clamped"], heads_first()
    arguments: dict[str, Any] = {"score_mod": entry.score_mod, "block_mask": blocks, "enable_gqa": True}
    leaves = [*arrays, *entry.leaves]
    with ours.use_anyattn():
        out = compile_whole(flex.flex_attention, backend=backend)(*arrays, **arguments)
    want = ours.flex_attention(*arrays, **arguments)
    torch.testing.assert_close(out, want)
    for got, one in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, want)), strict=True):
        torch.testing.assert_close(got, one)
