"""Models of transformers with attn_implementation="anyattn" against the same weights with "eager"."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn.compat.flash_attn
import anyattn.compat.transformers as adapter
from anyattn import api
from compat import models
from compat.models import DECODERS, GENERATORS, MODELS, SEQLEN, WINDOW

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def built(name: str) -> Any:
    return MODELS[name].build()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the two functions that the adapter is over."""
    seen: list[dict[str, Any]] = []
    for name in ("attention", "attention_varlen"):
        original = getattr(api, name)

        def spy(*arrays: Any, _name: str = name, _original: Any = original, **arguments: Any) -> Any:
            seen.append({"function": _name, "q": arrays[0], "k": arrays[1], **arguments})
            return _original(*arrays, **arguments)

        monkeypatch.setattr(api, name, spy)
    yield seen


def no_score_sized_mask(calls: list[dict[str, Any]]) -> None:
    assert calls
    for call in calls:
        mask = call.get("mask")
        assert mask is None or mask.shape[1:3] == (1, 1)


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, side: str, calls: list[dict[str, Any]]) -> None:
    model, given = built(name), models.inputs(MODELS[name], side)
    want = models.logits(model, "eager", **given)
    assert not calls
    got = models.logits(model, "anyattn", **given)
    valid = given.get("attention_mask", given.get("decoder_attention_mask"))
    if MODELS[name].kind == "encoder-decoder":
        valid = torch.ones(want.shape[:2])
    torch.testing.assert_close(got[valid.bool()], want[valid.bool()], **TOLERANCE)
    no_score_sized_mask(calls)


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    """Of every parameter, sinks and T5's relative position bias included; to 1e-4 of each one's largest."""
    model, given = built(name), models.inputs(MODELS[name], "left")
    labels = given.get("decoder_input_ids", given.get("input_ids"))
    mask = given.get("decoder_attention_mask", given.get("attention_mask"))
    if mask.shape == labels.shape:  # what a row of padding predicts is noise
        labels = labels.masked_fill((mask == 0) | (mask.roll(1, -1) == 0), -100)
    given["labels"] = labels
    if MODELS[name].kind == "encoder-decoder":
        given.pop("decoder_input_ids")
    want, got = (models.gradients(model, kind, **given) for kind in ("eager", "anyattn"))
    assert want.keys() == got.keys()
    for key, value in want.items():
        error, largest = float((got[key] - value).abs().max()), float(value.abs().max())
        assert error <= 1e-4 * largest + 1e-6, f"{key}: {error} of {largest}"


@pytest.mark.parametrize("cache_implementation", [None, "static"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generate(name: str, cache_implementation: str | None) -> None:
    """Longer than the window, from a left-padded batch."""
    model, given = built(name), models.inputs(MODELS[name], "left")
    if MODELS[name].kind == "decoder":
        options: dict[str, Any] = {}
    else:
        given = {key: x for key, x in given.items() if not key.startswith("decoder")}
        options = {"decoder_start_token_id": 1}
    options |= {"max_new_tokens": 2 * WINDOW, "min_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0}
    both = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        both.append(model.generate(**given, **options, cache_implementation=cache_implementation))
    assert torch.equal(*both)
    assert len(both[0].unique()) > 2


LENGTHS = (6, 1, 7)


def packed() -> dict[str, Tensor]:
    ids = models.tokens(1, sum(LENGTHS))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gpt_oss"])
def test_packed_sequences_equal_each_sequence_alone(name: str, calls: list[dict[str, Any]]) -> None:
    model, given = built(name), packed() | {"use_cache": False}
    alone = [models.logits(model, "eager", input_ids=ids) for ids in given["input_ids"].split(LENGTHS, 1)]
    want = torch.cat(alone, 1)
    torch.testing.assert_close(models.logits(model, "eager", **given), want, **TOLERANCE)
    torch.testing.assert_close(models.logits(model, "anyattn", **given), want, **TOLERANCE)
    assert {call["function"] for call in calls} == {"attention_varlen"}


@pytest.mark.parametrize("extra", [{}, {"use_cache": False, "attention_mask": torch.ones(1, sum(LENGTHS))}])
@pytest.mark.parametrize("name", ["gpt_oss", "mistral"])
def test_restarting_positions_with_a_cache_or_a_mask_are_one_sequence(name: str, extra: dict[str, Any]) -> None:
    """Eager attention says so, and the layers of hybrid models that have a state; a warning tells the user."""
    model, given = built(name), packed() | extra
    want = models.logits(model, "eager", **given)
    with pytest.warns(UserWarning, match="position_ids restart"):
        got = models.logits(model, "anyattn", **given)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_packed_batch_of_two() -> None:
    """Several packed rows, one of them a single sequence."""
    model = built("mistral")
    positions = torch.stack([packed()["position_ids"][0], torch.arange(SEQLEN)])
    given = {"input_ids": models.tokens(), "position_ids": positions, "use_cache": False}
    both = [models.logits(model, implementation, **given) for implementation in ("eager", "anyattn")]
    torch.testing.assert_close(*both, **TOLERANCE)


def test_packed_gradients() -> None:
    model, given = built("mistral"), packed()
    given |= {"labels": given["input_ids"], "use_cache": False}
    want, got = (models.gradients(model, kind, **given) for kind in ("eager", "anyattn"))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


def test_packed_by_cu_seqlens(calls: list[dict[str, Any]]) -> None:
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) adds."""
    model, given = built("llama"), packed()
    begins = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    extra = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": 7, "max_length_k": 7}
    want = models.logits(model, "anyattn", **given, use_cache=False)
    torch.testing.assert_close(models.logits(model, "anyattn", **given, **extra), want, **TOLERANCE)
    assert {call["function"] for call in calls} == {"attention_varlen"}


@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("cache_class", ["DynamicCache", "StaticCache"])
def test_prefill_in_chunks(name: str, cache_class: str, side: str) -> None:
    """Several rows behind a cache: their positions come from it, with padding and window."""
    import transformers

    model, given = built(name), models.inputs(MODELS[name], side)
    ids, valid = given["input_ids"], given["attention_mask"]
    both = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        size = {} if cache_class == "DynamicCache" else {"max_cache_len": 20}
        past = getattr(transformers, cache_class)(config=model.config, **size)
        parts = []
        for begin, end in ((0, 4), (4, 10), (10, 11), (11, SEQLEN)):
            mask = valid[:, :end] if side else None
            with torch.no_grad():
                parts.append(model(input_ids=ids[:, begin:end], attention_mask=mask, past_key_values=past).logits)
        both.append(torch.cat(parts, 1)[valid.bool()])
    torch.testing.assert_close(*both, **TOLERANCE)


def test_bfloat16() -> None:
    """No further from the model in double precision than eager in bfloat16 is."""
    model, ids = MODELS["llama"].build(), models.tokens()
    exact = models.logits(model.double(), "eager", input_ids=ids)
    model = model.bfloat16()
    eager, got = (
        float((models.logits(model, kind, input_ids=ids) - exact).abs().max()) for kind in ("eager", "anyattn")
    )
    assert got <= 2 * eager


def test_gradient_checkpointing() -> None:
    model, given = MODELS["mistral"].build(), models.inputs(MODELS["mistral"], "left")
    given |= {"labels": given["input_ids"].masked_fill(given["attention_mask"].roll(1, -1) == 0, -100)}
    want = models.gradients(model, "anyattn", **given)
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = models.gradients(model, "anyattn", **given)
    for key, value in want.items():
        assert torch.equal(got[key], value)


def test_beam_search() -> None:
    model, given = built("gemma2"), models.inputs(MODELS["gemma2"], "left")
    both = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        both.append(model.generate(**given, max_new_tokens=8, do_sample=False, num_beams=3, pad_token_id=0))
    assert torch.equal(*both)


def test_holes_in_the_padding() -> None:
    model, given = built("llama"), models.inputs(MODELS["llama"], "")
    given["attention_mask"][0, 3] = given["attention_mask"][1, 7] = 0
    want, got = (models.logits(model, kind, **given) for kind in ("eager", "anyattn"))
    torch.testing.assert_close(got[given["attention_mask"].bool()], want[given["attention_mask"].bool()], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_custom_dense_mask(dtype: torch.dtype, calls: list[dict[str, Any]]) -> None:
    """A mask of four dimensions says everything: it need not be causal."""
    model = built("llama")
    seen = torch.rand(2, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(4)) > 0.4
    seen |= torch.eye(SEQLEN, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    want = models.logits(model, "eager", input_ids=models.tokens(), attention_mask=added)
    mask = seen if dtype is torch.bool else added
    got = models.logits(model, "anyattn", input_ids=models.tokens(), attention_mask=mask)
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert calls


def test_position_bias_and_float_mask() -> None:
    """T5's bias beside a mask of the caller's own."""
    q, k, v, bias, mask = (torch.randn(2, 4, 6, n, generator=torch.Generator().manual_seed(n)) for n in (8, 8, 8, 6, 6))
    mask = mask * 2
    got, _ = adapter.attention(torch.nn.Module(), q, k, v, mask, scaling=1.0, position_bias=bias)
    scores = q @ k.transpose(-1, -2) + bias + mask
    torch.testing.assert_close(got, (scores.softmax(-1) @ v).transpose(1, 2), **TOLERANCE)


@pytest.mark.parametrize("mask", [torch.ones(2, 6), torch.ones(2, 6).bool(), torch.ones(2, 1, 6, 6).int()], ids=str)
def test_masks_that_eager_does_not_define_are_refused(mask: Tensor) -> None:
    q = torch.randn(2, 4, 6, 8)
    if mask.is_floating_point():
        with pytest.raises(ValueError, match="bias"):
            adapter.attention(torch.nn.Module(), q, q, q, mask)
    else:
        with pytest.raises(ValueError, match="attention_mask must be floating point, or boolean of 4 dimensions"):
            adapter.attention(torch.nn.Module(), q, q, q, mask)


def test_positions_that_skip_are_one_sequence() -> None:
    model = built("llama")
    given = {"input_ids": models.tokens(1, 5), "position_ids": torch.tensor([[0, 1, 5, 6, 9]])}
    want, got = (models.logits(model, kind, **given, use_cache=True) for kind in ("eager", "anyattn"))
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_unknown_mask_functions_become_dense_masks() -> None:
    """Here Llama 4's chunks, and a function that overlays another."""
    from transformers import LlamaConfig, masking_utils

    config = LlamaConfig(**models.GROUPED, attn_implementation="anyattn", attention_chunk_size=4)
    arguments: dict[str, Any] = {"config": config, "inputs_embeds": torch.zeros(2, SEQLEN, 32)}
    arguments |= {"attention_mask": models.padding("left"), "past_key_values": None}
    chunked = masking_utils.create_chunked_causal_mask(**arguments)
    overlaid = masking_utils.create_causal_mask(**arguments, or_mask_function=lambda b, h, q, k: k == 9)
    config._attn_implementation = "eager"
    assert torch.equal(chunked, masking_utils.create_chunked_causal_mask(**arguments))
    assert overlaid.shape == (2, 1, SEQLEN, SEQLEN)
    assert (overlaid[:, 0, 5, 9] == 0).all()
    assert (overlaid[:, 0, 5, 8] < -1e30).all()


def test_a_mask_that_is_wanted_is_made() -> None:
    """Models that add something to it ask for that."""
    from transformers import LlamaConfig, masking_utils

    config = LlamaConfig(**models.GROUPED, attn_implementation="anyattn")
    arguments: dict[str, Any] = {"inputs_embeds": torch.zeros(2, SEQLEN, 32), "attention_mask": None}
    arguments |= {"past_key_values": None, "allow_is_causal_skip": False}
    assert masking_utils.create_causal_mask(config, **arguments).shape == (2, 1, SEQLEN, SEQLEN)


def test_dropout_in_training(calls: list[dict[str, Any]]) -> None:
    model = MODELS["llama"].build()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    want = models.logits(model, "eager", input_ids=models.tokens())
    torch.testing.assert_close(models.logits(model, "anyattn", input_ids=models.tokens()), want, **TOLERANCE)
    assert {call["dropout_p"] for call in calls} == {0.0}
    calls.clear()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.train()(input_ids=models.tokens()).logits)
    assert {call["dropout_p"] for call in calls} == {0.5}
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_compiled_model() -> None:
    """One graph; mask functions cannot be looked into there."""
    model, given = built("mistral"), models.inputs(MODELS["mistral"], "left")
    want = models.logits(model, "eager", **given, use_cache=False)
    model.set_attn_implementation("anyattn")
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(**given, use_cache=False).logits
    torch.testing.assert_close(got[given["attention_mask"].bool()], want[given["attention_mask"].bool()], **TOLERANCE)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_layers(name: str, backend: str) -> None:
    """The mask is made outside the graphs, which take it as an input."""
    given = models.inputs(MODELS[name], "left") | {"use_cache": False}
    want = models.logits(built(name), "eager", **given)
    model = MODELS[name].build()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    got = models.logits(model, "anyattn", **given)
    torch.testing.assert_close(got[given["attention_mask"].bool()], want[given["attention_mask"].bool()], **TOLERANCE)


def test_compiled_decoding_with_a_static_cache() -> None:
    model, given = MODELS["mistral"].build(), models.inputs(MODELS["mistral"], "left")
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    want = model.generate(**given, **options)
    model.set_attn_implementation("anyattn")
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(**given, **options), want)


@pytest.mark.parametrize("packed_with_cache", [False, True])
def test_compiled_and_eager_execution_agree_on_packing(packed_with_cache: bool) -> None:
    model, given = MODELS["llama"].build(), packed() | {"use_cache": packed_with_cache}
    want = models.logits(model, "eager", **given)
    model.set_attn_implementation("anyattn")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, want, **TOLERANCE)
        torch.testing.assert_close(model(**given).logits, want, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
def test_exported_model(name: str) -> None:
    model, given = MODELS[name].build(), models.inputs(MODELS[name], "left")
    given |= {} if name == "modernbert" else {"use_cache": False}
    other = given | {"attention_mask": models.padding("right")}
    want = models.logits(model, "eager", **other)
    model.set_attn_implementation("anyattn")
    exported = torch.export.export(model, (), given, strict=False).module()
    got, valid = exported(**other).logits, other["attention_mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], **TOLERANCE)


# Masks that models read themselves, and calls whose meaning is not known.


def lazy_mask(batch: int = 2, seqlen: int = 6, **arguments: Any) -> adapter.LazyMask:
    mask = adapter.mask(batch, seqlen, seqlen, **arguments)
    assert isinstance(mask, adapter.LazyMask)
    return mask


def eager_mask(batch: int = 2, seqlen: int = 6, **arguments: Any) -> Tensor:
    from transformers import masking_utils

    return masking_utils.eager_mask(batch, seqlen, seqlen, **arguments)


def test_lazy_mask_is_the_mask_of_eager_attention_for_foreign_code() -> None:
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


def test_lazy_mask_that_was_changed_is_attended_as_changed() -> None:
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


def test_lazy_mask_of_a_static_cache_keeps_its_positions() -> None:
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


def test_sinks_of_every_query() -> None:
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


def test_one_sequence_of_learned_queries_serves_the_batch() -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(2, 4, 6, 8)
    got, _ = adapter.attention(torch.nn.Module(), q, k, k, None)
    want = torch.nn.functional.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, k)
    torch.testing.assert_close(got, want.transpose(1, 2), **TOLERANCE)


def test_position_bias_with_packed_sequences() -> None:
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
def test_weights_are_those_of_eager_attention(name: str, side: str) -> None:
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


def test_weights_of_packed_sequences() -> None:
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
def test_selected_blocks_of_keys(heads: int, weights: bool) -> None:
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


def test_classes_written_in_a_notebook_are_judged_by_their_bases() -> None:
    from transformers import BloomModel, LlamaModel

    from anyattn.compat.transformers.refuse import computes_attention_itself

    space = {"__module__": "no_source_here"}
    assert not computes_attention_itself(type("Mine", (LlamaModel,), dict(space)))
    assert computes_attention_itself(type("Mine", (BloomModel,), dict(space)))


# Models that are hard-wired to flash_attention_2.


@pytest.fixture
def flash_attention_2() -> Iterator[None]:
    adapter.install_flash_attention_2()
    yield
    adapter.uninstall_flash_attention_2()


@pytest.mark.usefixtures("flash_attention_2")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_flash_attention_2(name: str) -> None:
    """Logits with padding, gradients, generated tokens, packed sequences."""
    from transformers import modeling_flash_attention_utils

    model, given = MODELS[name].build(), models.inputs(MODELS[name], "left")
    valid = given["attention_mask"].bool()
    want, got = (models.logits(model, kind, **given) for kind in ("eager", "flash_attention_2"))
    torch.testing.assert_close(got[valid], want[valid], **TOLERANCE)
    ids = models.tokens()
    want, got = (models.gradients(model, kind, input_ids=ids, labels=ids) for kind in ("eager", "flash_attention_2"))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    want, got = (models.logits(model, kind, **packed(), use_cache=False) for kind in ("eager", "flash_attention_2"))
    torch.testing.assert_close(got, want, **TOLERANCE)
    both = []
    for kind in ("eager", "flash_attention_2"):
        model.set_attn_implementation(kind)
        both.append(model.generate(**given, max_new_tokens=2 * WINDOW, do_sample=False, pad_token_id=0))
    assert torch.equal(*both)
    assert modeling_flash_attention_utils._flash_varlen_fn is anyattn.compat.flash_attn.flash_attn_varlen_func


def test_flash_attention_2_is_undone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**models.GROUPED)
    adapter.install_flash_attention_2()
    adapter.install_flash_attention_2()
    assert LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        built("t5").set_attn_implementation("flash_attention_2")
    adapter.uninstall_flash_attention_2()
    adapter.uninstall_flash_attention_2()
    with pytest.raises(ImportError, match="FlashAttention2"):
        LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
