"""Calls of the attention and mask functions of transformers: what models may do with masks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn.compat.transformers as adapter
from compat import models
from compat.models import MODELS, TOLERANCE, built, no_score_sized_mask, packed

# Masks that models read themselves, and calls whose meaning is not known.


def lazy_mask(batch: int = 2, seqlen: int = 6, **arguments: Any) -> adapter.LazyMask:
    mask = adapter.mask(batch, seqlen, seqlen, **arguments)
    assert isinstance(mask, adapter.LazyMask)
    return mask


def eager_mask(batch: int = 2, seqlen: int = 6, **arguments: Any) -> Tensor:
    from transformers import masking_utils

    return masking_utils.eager_mask(batch, seqlen, seqlen, **arguments)


def test_lazy_mask_has_the_values_of_the_eager_mask() -> None:
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    want = eager_mask(attention_mask=padding)
    for read in (
        lambda x: x + 0,
        lambda x: x[:, :, 2:, :3],
        lambda x: torch.cat([x, x], -1),
        lambda x: x == 0,
        lambda x: x.clone().masked_fill_(x < 0, 7.0),
        lambda x: torch.nn.functional.pad(x, (0, 2)),
        lambda x: x.expand(-1, 4, -1, -1),
        lambda x: x.bfloat16(),
    ):
        mask = lazy_mask(attention_mask=padding)
        assert (mask.shape, mask.dtype, mask.device) == (want.shape, want.dtype, want.device)
        assert not mask.is_dense
        got = read(mask)
        assert type(got) is Tensor
        assert torch.equal(got, read(want))


def test_changed_lazy_mask_is_applied_as_changed() -> None:
    q = torch.randn(2, 4, 6, 8)
    mask, want = lazy_mask(), eager_mask().clone()
    for x in (mask, want):
        x[:, :, :, 1:3].fill_(torch.finfo(torch.float32).min)
    got, _ = adapter.attention(torch.nn.Module(), q, q, q, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, want).transpose(1, 2)
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_lazy_mask_stays_lazy_between_devices_and_in_checkpoints() -> None:
    mask = lazy_mask(attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2).bool())
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert isinstance(moved, adapter.LazyMask)
    assert moved.pattern.padding.device.type == "meta"
    assert not mask.is_dense
    detached = mask.detach()
    detached.requires_grad = False
    assert isinstance(detached, adapter.LazyMask)
    assert not detached.is_dense
    assert torch.equal(mask.to(torch.float64), mask.dense().double())


def test_lazy_mask_keeps_the_positions_of_a_static_cache() -> None:
    """The cache moves its position in place after the mask was made."""
    position = torch.tensor(2)
    mask = adapter.mask(1, 2, 6, q_offset=position)
    position += 3
    assert torch.equal(mask + 0, eager_mask_of_two_queries())


def eager_mask_of_two_queries() -> Tensor:
    from transformers import masking_utils

    return masking_utils.eager_mask(1, 2, 6, q_offset=2)


def test_reentrant_checkpointing_makes_no_dense_mask(calls: list[dict[str, Any]]) -> None:
    model, given = MODELS["mistral"].build(), models.inputs(MODELS["mistral"], "left")
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"].roll(1, -1) == 0, -100)
    want = models.gradients(model, "anyattn", **given)
    model.activation_checkpointing_enable({"use_reentrant": True})
    got = models.gradients(model, "anyattn", **given)
    for key, value in want.items():
        assert torch.equal(got[key], value)
    no_score_sized_mask(calls)


def test_unknown_arguments_are_refused() -> None:
    q = torch.randn(2, 4, 6, 8)
    neutral: dict[str, Any] = {"use_cache": True, "num_items_in_batch": torch.tensor(3), "unknown": None}
    adapter.attention(torch.nn.Module(), q, q, q, None, **neutral)
    with pytest.raises(NotImplementedError, match=r"Module passes local_bias= to attention.*'eager' or 'sdpa'"):
        adapter.attention(torch.nn.Module(), q, q, q, None, local_bias=q)


def test_dropout_needs_training_mode() -> None:
    """Eager attention asks the module, whatever probability a model passes."""
    q, module = torch.randn(2, 4, 6, 8), torch.nn.Module().eval()
    plain, _ = adapter.attention(module, q, q, q, None)
    assert torch.equal(adapter.attention(module, q, q, q, None, dropout=0.5)[0], plain)
    assert not torch.equal(adapter.attention(module.train(), q, q, q, None, dropout=0.5)[0], plain)


def test_sinks_may_differ_between_queries() -> None:
    q, k, v, sinks = (torch.randn(2, 4, 6, n, dtype=torch.float64, requires_grad=True) for n in (8, 8, 3, 1))
    got, _ = adapter.attention(torch.nn.Module(), q, k, v, lazy_mask(), sinks=sinks)
    scores = q @ k.mT * 8**-0.5 + eager_mask()
    want = (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v, sinks), upstream),
        torch.autograd.grad(want, (q, k, v, sinks), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_learned_queries_of_batch_one_are_broadcast() -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(2, 4, 6, 8)
    got, _ = adapter.attention(torch.nn.Module(), q, k, k, None)
    want = torch.nn.functional.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, k)
    torch.testing.assert_close(got, want.transpose(1, 2), **TOLERANCE)


def test_position_bias_combines_with_packed_sequences() -> None:
    q, bias = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 6)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1]])
    from transformers import masking_utils

    function = masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(segments), masking_utils.causal_mask_function
    )
    got, _ = adapter.attention(
        torch.nn.Module(), q, q, q, lazy_mask(1, mask_function=function), scaling=1.0, position_bias=bias
    )
    scores = q @ q.mT + bias + eager_mask(1, mask_function=function)
    torch.testing.assert_close(got, (scores.softmax(-1) @ q).transpose(1, 2), **TOLERANCE)


# Weights.


@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "whisper", "t5", "bert"])
def test_weights_equal_those_of_eager_attention(name: str, side: str) -> None:
    model, given = built(name), models.inputs(MODELS[name], side)
    found = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(**given, output_attentions=True))
    names = [key for key in found[0] if key.endswith("attentions")]
    assert names
    for key in names:
        queries = given.get(
            "attention_mask" if key in ("attentions", "encoder_attentions") else "decoder_attention_mask"
        )
        assert len(found[0][key]) == len(found[1][key]) > 0
        for want, got in zip(found[0][key], found[1][key], strict=True):
            assert got.shape == want.shape
            valid = torch.tensor(True) if queries is None else queries[:, None, :, None].bool()
            torch.testing.assert_close(got.where(valid, 0.0), want.where(valid, 0.0), **TOLERANCE)


def test_weights_of_packed_sequences_equal_those_of_eager_attention() -> None:
    model, given = built("mistral"), packed() | {"use_cache": False, "output_attentions": True}
    found = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(**given).attentions)
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


def test_weights_have_gradients() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, got = adapter.attention(torch.nn.Module(), q, k, v, lazy_mask(), output_attentions=True)
    want = (q @ k.mT * 8**-0.5 + eager_mask()).softmax(-1)
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * upstream).sum() + out.sum(), (q, k, v)),
        torch.autograd.grad((want * upstream).sum() + (want @ v).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_weights_after_dropout_are_refused() -> None:
    q = torch.randn(2, 4, 6, 8)
    with pytest.raises(ValueError, match=r"output_attentions=True cannot be combined with dropout, got 0.5"):
        adapter.attention(torch.nn.Module(), q, q, q, None, dropout=0.5, output_attentions=True)


# Selected keys.

DEEPSEEK_SPARSE = models.DEEPSEEK | {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 8}
SPARSE = {
    "deepseek_v32": models.Model("DeepseekV32Config", "DeepseekV32ForCausalLM", models.SMALL | DEEPSEEK_SPARSE),
    "glm_moe_dsa": models.Model(
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        models.SMALL | DEEPSEEK_SPARSE | {"mlp_layer_types": ["dense"] * 2},
    ),
}


@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_models_select_the_keys_of_the_indexer(name: str, side: str, calls: list[dict[str, Any]]) -> None:
    model, given = SPARSE[name].build(), models.inputs(SPARSE[name], side)
    want = models.logits(model, "eager", **given)
    got = models.logits(model, "anyattn", **given)
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], **TOLERANCE)
    assert all(call["kv_indices"].shape[-1] == 3 for call in calls)


def test_sparse_models_have_gradients_and_weights() -> None:
    model, ids = SPARSE["deepseek_v32"].build(), models.tokens()
    want, got = (models.gradients(model, kind, input_ids=ids, labels=ids) for kind in ("eager", "anyattn"))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    found = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(ids, output_attentions=True).attentions)
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("weights", [False, True])
def test_block_indices_select_blocks_of_keys(heads: int, weights: bool) -> None:
    """MiniMax-M3: blocks of 4 keys of 10; the last block is short, -1 is none."""
    module = torch.nn.Module()
    module.indexer = torch.nn.Module()
    module.indexer.block_size = 4
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    blocks = torch.stack([torch.tensor([0, 2]), torch.tensor([1, -1])])[:heads, None].expand(2, heads, 10, 2)
    mask = adapter.mask(2, 10, 10)
    got, found = adapter.attention(module, q, k, v, mask, block_indices=blocks, output_attentions=weights)
    keep = torch.zeros(2, 4, 10, 10, dtype=torch.bool)
    for head in range(4):
        for block in blocks[0, head * heads // 4, 0]:
            if block >= 0:
                keep[:, head, :, block * 4 : block * 4 + 4] = True
    keep &= torch.ones(10, 10, dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~keep, -torch.inf)
    want = scores.softmax(-1).nan_to_num()
    torch.testing.assert_close(got, (want @ v).transpose(1, 2), **TOLERANCE)
    if weights:
        torch.testing.assert_close(found, want, **TOLERANCE)


# Models that compute attention themselves.

OWN = ["Bloom", "CodeGen", "XGLM", "GPTNeoXJapanese", "GPTJ", "GPTNeo", "Falcon", "Mpt", "BigBird", "Longformer"]


@pytest.mark.parametrize("name", OWN)
def test_models_that_compute_attention_themselves_are_refused(name: str) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")()
    config.num_hidden_layers = 1
    kind = getattr(transformers, f"{name}Model")
    message = f"{name}Model computes attention itself.*'eager' or 'sdpa'"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        kind._from_config(config, attn_implementation="anyattn")


def test_classes_without_source_code_are_checked_by_their_bases() -> None:
    from transformers import BloomModel, LlamaModel

    from anyattn.compat.transformers.refuse import computes_attention_itself

    space = {"__module__": "no_source_here"}
    assert not computes_attention_itself(type("Mine", (LlamaModel,), dict(space)))
    assert computes_attention_itself(type("Mine", (BloomModel,), dict(space)))
