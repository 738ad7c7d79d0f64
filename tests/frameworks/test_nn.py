"""anyattn.nn: against the same layer in torch operations, in float64, trained, packed, and decoding with a cache."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anyattn
from anyattn.nn import Attention, KVCache, alibi_slopes
from harness.plain_torch import plain_attention
from harness.tensors import leaf, normal

WIDTH, ROWS = 24, 9
EVERYTHING: dict[str, Any] = {
    "nheads_kv": 2, "head_dim": 10, "head_dim_v": 7, "bias": True, "causal": True, "window": (5, None), "scale": 0.4,
    "softcap": 3.0, "sink": True, "alibi": True, "rotary_dim": 4, "rotary_interleaved": True, "rotary_base": 50.0,
}  # fmt: skip
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"nheads_kv": 2, "causal": True},
    "rotary": {"nheads_kv": 1, "rotary_dim": 6, "causal": True},
    "everything": EVERYTHING,
}


def layer(name: str) -> Attention:
    torch.manual_seed(0)
    made = Attention(WIDTH, 4, **LAYERS[name]).double()
    if made.sink is not None:
        torch.nn.init.normal_(made.sink)
    return made


def expected(layer: Attention, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Return the layer's output by its formula, with all scores in memory."""
    source = x if context is None else context
    q, k, v = (
        F.linear(y, projection.weight, projection.bias).unflatten(-1, (heads, -1))
        for y, projection, heads in (
            (x, layer.q, layer.nheads),
            (source, layer.k, layer.nheads_kv),
            (source, layer.v, layer.nheads_kv),
        )
    )
    if layer.rotary_dim:
        q, k = (rotated(layer, y.transpose(1, 2)).transpose(1, 2) for y in (q, k))
    slopes = None if layer._slopes is None else torch.tensor(alibi_slopes(layer.nheads)).to(q)
    options = {name: getattr(layer, name) for name in ("causal", "window", "scale", "softcap", "sink")}
    out, _ = plain_attention(q, k, v, mask=mask, alibi_slopes=slopes, **options)
    return F.linear(out.flatten(2), layer.out.weight, layer.out.bias)


def rotated(layer: Attention, x: Tensor) -> Tensor:
    """Rotate pairs as complex numbers, with angles in float32."""
    d = layer.rotary_dim
    turned = x[..., :d].double().unflatten(-1, (-1, 2) if layer.rotary_interleaved else (2, -1))
    first, second = turned.unbind(-1 if layer.rotary_interleaved else -2)
    angles = torch.outer(torch.arange(x.shape[2]).float(), 1 / layer.rotary_base ** (torch.arange(0, d, 2) / d))
    product = torch.complex(first, second) * torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
    pair = torch.stack((product.real, product.imag), -1 if layer.rotary_interleaved else -2)
    return torch.cat((pair.flatten(-2).to(x.dtype), x[..., d:]), -1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_equal_plain_torch(name: str) -> None:
    made, x, dout = layer(name), leaf(2, ROWS, WIDTH), normal(2, ROWS, WIDTH, seed=1)
    got, want = made(x), expected(made, x)
    close(got, want)
    wanted = (x, *made.parameters())
    for one, other in zip(
        torch.autograd.grad((got * dout).sum(), wanted), torch.autograd.grad((want * dout).sum(), wanted), strict=True
    ):
        close(one, other)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "plain"])
@torch.no_grad()
def test_decoding_equals_the_forward_pass_of_the_whole_sequence(name: str) -> None:
    made, x = layer(name), normal(2, ROWS, WIDTH)
    want = made(x)
    cache = made.cache(2, ROWS)
    steps = [made(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 6), (6, ROWS))]
    close(torch.cat(steps, 1), want)
    assert cache.seqlens.tolist() == [ROWS, ROWS]
    before = cache.k.clone()
    with pytest.raises(ValueError, match="cache_seqlens"):
        made(x[:, :1], cache=cache)
    assert torch.equal(cache.k, before) and cache.seqlens.tolist() == [ROWS, ROWS]
    cache.seqlens = torch.tensor([3, 6], dtype=torch.int32)  # rows dropped, each sequence its own
    ragged = made(torch.stack((x[0, 3:5], x[1, 6:8])), cache=cache)
    close(ragged, torch.stack((want[0, 3:5], want[1, 6:8])))


@pytest.mark.parametrize("name", ["grouped", "everything"])
def test_packed_and_padded_inputs_equal_separate_sequences(name: str) -> None:
    made, x = layer(name), normal(2, ROWS, WIDTH)
    cu_seqlens = torch.tensor([0, 5, 5, ROWS], dtype=torch.int32)
    want = torch.cat((made(x[:1, :5])[0], made(x[:1, 5:])[0]))
    close(made(x[0], cu_seqlens=cu_seqlens), want)
    close(made(x[0], cu_seqlens=cu_seqlens, max_seqlen=5), want)
    plain = Attention(WIDTH, 4).double()
    used = plain(x, seqused=torch.tensor([ROWS, 4]))
    close(used[1], plain(torch.cat((x[1:, :4], x[1:]), 1), x[1:, :4])[0, 4:])


def test_context_mask_and_bias_are_applied() -> None:
    made, x, context = layer("plain"), normal(2, 5, WIDTH), normal(2, 8, WIDTH, seed=1)
    close(made(x, context), expected(made, x, context))
    mask = torch.rand(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., 0] = True
    close(made(x, context, mask=mask), expected(made, x, context, mask))
    close(made(x, context, bias=torch.where(mask, 0.0, -torch.inf).double()), expected(made, x, context, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_low_precision_is_as_accurate_as_plain_torch(dtype: torch.dtype) -> None:
    """Against float64 on the rounded weights: no worse than the same layer in torch operations in that dtype, twice."""
    rounded = layer("everything").to(dtype)
    exact, x = copy.deepcopy(rounded).double(), normal(2, ROWS, WIDTH).to(dtype)
    want = expected(exact, x.double())
    plain = (expected(rounded, x).double() - want).abs().max()
    assert (rounded(x).double() - want).abs().max() <= 2 * plain + 4 * torch.finfo(dtype).eps * want.abs().max()
    cache = rounded.cache(2, 16)
    assert cache.k.dtype is dtype
    steps = torch.cat([rounded(x[:, :6], cache=cache), rounded(x[:, 6:], cache=cache)], 1)
    assert (steps.double() - want).abs().max() <= 2 * plain + 4 * torch.finfo(dtype).eps * want.abs().max()


def test_layer_learns_to_copy_the_previous_token() -> None:
    """Only attention can do that."""
    torch.manual_seed(0)
    embedding, made, head = (
        torch.nn.Embedding(8, 32),
        Attention(32, 4, causal=True, rotary_dim=8),
        torch.nn.Linear(32, 8),
    )
    optimizer = torch.optim.Adam([*embedding.parameters(), *made.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(80):
        tokens = torch.randint(0, 8, (8, 16))
        loss = F.cross_entropy(head(made(embedding(tokens)))[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_dropout_applies_only_in_training() -> None:
    made, x = Attention(WIDTH, 4, dropout_p=0.5), torch.ones(1, ROWS, WIDTH)
    torch.manual_seed(0)
    first, second = made(x), made(x)
    torch.manual_seed(0)
    assert torch.equal(made(x), first) and not torch.equal(first, second)
    assert torch.equal(made.eval()(x), made(x))


def test_state_survives_copies_and_casts() -> None:
    made = layer("everything")
    names = {f"{part}.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")} | {"sink"}
    assert set(made.state_dict()) == names
    assert set(Attention(WIDTH, 4).state_dict()) == {"q.weight", "k.weight", "v.weight", "out.weight"}
    x = normal(1, ROWS, WIDTH)
    want = made(x)
    other = Attention(WIDTH, 4, **EVERYTHING).double()
    other.load_state_dict(made.state_dict())
    for same in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(same(x), want)
    twelve = Attention(WIDTH, 12, alibi=True).bfloat16()
    assert twelve._slopes is not None and twelve._slopes.tolist() == torch.tensor(alibi_slopes(12)).tolist()


def test_layer_trains_after_inference_mode() -> None:
    made = layer("rotary")
    with torch.inference_mode():
        made(normal(1, ROWS, WIDTH))
    made(normal(1, ROWS, WIDTH)).sum().backward()
    assert made.q.weight.grad is not None


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 does not say that it exports")
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_exported_layer_accepts_every_length(used: bool) -> None:
    """Check that the tables of angles do not depend on the length of the export or of the last call."""
    made = layer("rotary").eval()
    if used:
        made(normal(2, 30, WIDTH))
    rows = torch.export.Dim("rows", min=2, max=512)
    program = torch.export.export(made, (normal(2, ROWS, WIDTH),), dynamic_shapes={"x": {1: rows}}).module()
    for length in (ROWS - 4, 70):
        x = normal(2, length, WIDTH)
        torch.testing.assert_close(program(x), made(x))


def test_compiled_equals_eager() -> None:
    made, x = layer("everything"), normal(2, ROWS, WIDTH)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    close(compiled(x), made(x))
    wanted = tuple(made.parameters())
    pairs = zip(torch.autograd.grad(compiled(x).sum(), wanted), torch.autograd.grad(made(x).sum(), wanted), strict=True)
    for one, other in pairs:
        close(one, other)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", torch.float8_e5m2])
def test_quantised_cache(dtype: Any) -> None:
    """Steps with a quantised cache differ from the whole by no more than the quantisation of keys and values."""
    made, x = layer("rotary").eval(), normal(2, ROWS, WIDTH)
    with torch.no_grad():
        want = made(x)
        cache = made.cache(2, ROWS + 3, dtype)
        got = torch.cat([made(part, cache=cache) for part in x.split((3, 1, ROWS - 4), dim=1)], dim=1)
    assert cache.k.dtype.itemsize == 1
    relative = {"int8": 0.02, "float8_e4m3fn": 0.1}.get(dtype, 0.2)
    assert 0 < float((got - want).abs().max()) <= relative * float(want.abs().max())


X, CU = torch.zeros(1, 4, WIDTH), torch.tensor([0, 4])
ROTARY = Attention(WIDTH, 4, rotary_dim=4, causal=True, dropout_p=0.5)
CACHE = KVCache(1, 8, 4, 6)
REFUSED: dict[str, tuple[Any, str]] = {
    "width": (lambda: Attention(10, 4), "nheads"),
    "group": (lambda: Attention(WIDTH, 4, 3), "nheads_kv"),
    "odd": (lambda: Attention(WIDTH, 4, rotary_dim=3), "rotary_dim"),
    "rotary": (lambda: Attention(WIDTH, 4, rotary_dim=8), "rotary_dim"),
    "dropout": (lambda: Attention(WIDTH, 4, dropout_p=1.0), "dropout_p"),
    "context": (lambda: ROTARY(X, X), "context"),
    "packed": (lambda: ROTARY(X[0], cu_seqlens=CU, mask=X > 0), "cu_seqlens"),
    "not causal": (lambda: Attention(WIDTH, 4)(X, cache=CACHE), "causal"),
    "training": (lambda: ROTARY(X, cache=CACHE), "eval"),
    "gradient": (lambda: Attention(WIDTH, 4, causal=True)(X, cache=CACHE), "no_grad"),
    "cache": (lambda: KVCache(1, 8, 4, 6, dtype="int4"), "dtype must be"),
    "backend": (lambda: Attention(WIDTH, 4, backend="abacus")(X), "abacus"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_module_is_imported_on_first_use() -> None:
    assert anyattn.nn.Attention is Attention
    with pytest.raises(AttributeError, match="nothing"):
        _ = anyattn.nothing
