"""Models of transformers with attn_implementation="anyattn" against the same weights with "eager"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn.compat.transformers as adapter
from compat import models
from compat.models import (
    DECODERS,
    GENERATORS,
    LENGTHS,
    MODELS,
    SEQLEN,
    TOLERANCE,
    WINDOW,
    built,
    no_score_sized_mask,
    packed,
)


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_eager_attention(name: str, side: str, calls: list[dict[str, Any]]) -> None:
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
def test_gradients_equal_those_of_eager_attention(name: str) -> None:
    """Compare every parameter, including sinks and T5's position bias, to 1e-4 of its largest gradient."""
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
def test_generated_tokens_equal_those_of_eager_attention(name: str, cache_implementation: str | None) -> None:
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
    """Check that the result is that of eager attention, and that a warning informs the user."""
    model, given = built(name), packed() | extra
    want = models.logits(model, "eager", **given)
    with pytest.warns(UserWarning, match="position_ids restart"):
        got = models.logits(model, "anyattn", **given)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_packed_rows_of_a_batch_equal_eager_attention() -> None:
    """Several packed rows, one of them a single sequence."""
    model = built("mistral")
    positions = torch.stack([packed()["position_ids"][0], torch.arange(SEQLEN)])
    given = {"input_ids": models.tokens(), "position_ids": positions, "use_cache": False}
    both = [models.logits(model, implementation, **given) for implementation in ("eager", "anyattn")]
    torch.testing.assert_close(*both, **TOLERANCE)


def test_gradients_of_packed_sequences_equal_those_of_eager_attention() -> None:
    model, given = built("mistral"), packed()
    given |= {"labels": given["input_ids"], "use_cache": False}
    want, got = (models.gradients(model, kind, **given) for kind in ("eager", "anyattn"))
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


def test_cu_seq_lens_give_the_result_of_position_ids(calls: list[dict[str, Any]]) -> None:
    """Pass the arguments that DataCollatorWithFlattening(return_flash_attn_kwargs=True) adds."""
    model, given = built("llama"), packed()
    begins = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    extra = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": 7, "max_length_k": 7}
    want = models.logits(model, "anyattn", **given, use_cache=False)
    torch.testing.assert_close(models.logits(model, "anyattn", **given, **extra), want, **TOLERANCE)
    assert {call["function"] for call in calls} == {"attention_varlen"}


@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("cache_class", ["DynamicCache", "StaticCache"])
def test_prefill_in_chunks_equals_eager_attention(name: str, cache_class: str, side: str) -> None:
    """Compute several rows after a cache, whose positions come from the cache, with padding and window."""
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


def test_bfloat16_is_as_accurate_as_eager_attention() -> None:
    """No further from the model in double precision than eager in bfloat16 is."""
    model, ids = MODELS["llama"].build(), models.tokens()
    exact = models.logits(model.double(), "eager", input_ids=ids)
    model = model.bfloat16()
    eager, got = (
        float((models.logits(model, kind, input_ids=ids) - exact).abs().max()) for kind in ("eager", "anyattn")
    )
    assert got <= 2 * eager


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    model, given = MODELS["mistral"].build(), models.inputs(MODELS["mistral"], "left")
    given |= {"labels": given["input_ids"].masked_fill(given["attention_mask"].roll(1, -1) == 0, -100)}
    want = models.gradients(model, "anyattn", **given)
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = models.gradients(model, "anyattn", **given)
    for key, value in want.items():
        assert torch.equal(got[key], value)


def test_beam_search_finds_the_tokens_of_eager_attention() -> None:
    model, given = built("gemma2"), models.inputs(MODELS["gemma2"], "left")
    both = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        both.append(model.generate(**given, max_new_tokens=8, do_sample=False, num_beams=3, pad_token_id=0))
    assert torch.equal(*both)


def test_padding_masks_may_have_holes() -> None:
    model, given = built("llama"), models.inputs(MODELS["llama"], "")
    given["attention_mask"][0, 3] = given["attention_mask"][1, 7] = 0
    want, got = (models.logits(model, kind, **given) for kind in ("eager", "anyattn"))
    torch.testing.assert_close(got[given["attention_mask"].bool()], want[given["attention_mask"].bool()], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_custom_dense_mask_replaces_the_causal_mask(dtype: torch.dtype, calls: list[dict[str, Any]]) -> None:
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


def test_position_bias_and_float_mask_are_both_added() -> None:
    """Add T5's bias and a mask of the caller."""
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


def test_positions_with_gaps_are_one_sequence() -> None:
    model = built("llama")
    given = {"input_ids": models.tokens(1, 5), "position_ids": torch.tensor([[0, 1, 5, 6, 9]])}
    want, got = (models.logits(model, kind, **given, use_cache=True) for kind in ("eager", "anyattn"))
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_unknown_mask_functions_become_dense_masks() -> None:
    """Check the chunks of Llama 4, and a function that combines two masks."""
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


def test_requested_mask_is_materialized() -> None:
    """Models that add something to it ask for that."""
    from transformers import LlamaConfig, masking_utils

    config = LlamaConfig(**models.GROUPED, attn_implementation="anyattn")
    arguments: dict[str, Any] = {"inputs_embeds": torch.zeros(2, SEQLEN, 32), "attention_mask": None}
    arguments |= {"past_key_values": None, "allow_is_causal_skip": False}
    assert masking_utils.create_causal_mask(config, **arguments).shape == (2, 1, SEQLEN, SEQLEN)


def test_dropout_applies_only_in_training(calls: list[dict[str, Any]]) -> None:
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


def test_compiled_model_equals_eager_attention() -> None:
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
def test_compiled_layers_equal_eager_attention(name: str, backend: str) -> None:
    """The mask is made outside the graphs, which take it as an input."""
    given = models.inputs(MODELS[name], "left") | {"use_cache": False}
    want = models.logits(built(name), "eager", **given)
    model = MODELS[name].build()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    got = models.logits(model, "anyattn", **given)
    torch.testing.assert_close(got[given["attention_mask"].bool()], want[given["attention_mask"].bool()], **TOLERANCE)


def test_compiled_decoding_with_a_static_cache_equals_eager_decoding() -> None:
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
def test_exported_model_equals_eager_attention(name: str) -> None:
    model, given = MODELS[name].build(), models.inputs(MODELS[name], "left")
    given |= {} if name == "modernbert" else {"use_cache": False}
    other = given | {"attention_mask": models.padding("right")}
    want = models.logits(model, "eager", **other)
    model.set_attn_implementation("anyattn")
    exported = torch.export.export(model, (), given, strict=False).module()
    got, valid = exported(**other).logits, other["attention_mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], **TOLERANCE)
