"""Tiny models of transformers with random weights, large enough for every score to matter, and inputs for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

VOCABULARY, SEQLEN, WINDOW = 64, 14, 5
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GEMMA = {"attn_logit_softcapping": 2.0, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
ENCODER_DECODER = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
MODERNBERT = {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
MODERNBERT |= {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DEEPSEEK = {  # head_dim 12, head_dim_v 6
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,
}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
WHISPER = {
    "num_mel_bins": 6,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": SEQLEN,
    "max_target_positions": 64,
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "begin_suppress_tokens": None,
}


@dataclass(frozen=True)
class Model:
    """A class of transformers by name; `kind` says what its inputs look like."""

    config: str
    model: str
    arguments: dict[str, Any] = field(hash=False)
    kind: str = "decoder"

    def build(self) -> Any:
        import transformers

        transformers.logging.set_verbosity(logging.ERROR)
        config = getattr(transformers, self.config)(**self.arguments)
        torch.manual_seed(0)
        model = getattr(transformers, self.model)._from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                matrix = parameter.ndim > 1 and "norm" not in name
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 if matrix else 0.3)
                if not matrix and "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        return model.eval()


MODELS = {
    "llama": Model("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": Model("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": Model("Gemma2Config", "Gemma2ForCausalLM", GROUPED | GEMMA),
    "qwen2": Model(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": Model("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "gpt_oss": Model("GptOssConfig", "GptOssForCausalLM", GROUPED | EXPERTS | {"sliding_window": WINDOW}),
    "phimoe": Model("PhimoeConfig", "PhimoeForCausalLM", GROUPED | EXPERTS | {"sliding_window": WINDOW}),
    "deepseek": Model("DeepseekV3Config", "DeepseekV3ForCausalLM", SMALL | DEEPSEEK),
    "modernbert": Model("ModernBertConfig", "ModernBertForMaskedLM", SMALL | MODERNBERT, "encoder"),
    "bert": Model("BertConfig", "BertForMaskedLM", SMALL | NO_DROPOUT, "encoder"),
    "t5": Model("T5Config", "T5ForConditionalGeneration", ENCODER_DECODER | T5, "encoder-decoder"),
    "whisper": Model("WhisperConfig", "WhisperForConditionalGeneration", ENCODER_DECODER | WHISPER, "speech"),
}
DECODERS = [name for name, model in MODELS.items() if model.kind == "decoder"]
GENERATORS = [name for name, model in MODELS.items() if model.kind != "encoder"]


def tokens(batch: int = 2, seqlen: int = SEQLEN, seed: int = 1) -> Tensor:
    """Ids that are neither padding nor the end."""
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def padding(side: str) -> Tensor:
    """Return the padding mask of a batch of two. The first sequence is shorter unless `side` is ""."""
    mask = torch.ones(2, SEQLEN, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(SEQLEN - 4, SEQLEN) if side == "right" else slice(0, 0)] = 0
    return mask


def inputs(model: Model, side: str) -> dict[str, Any]:
    """A batch of two whose first sequence is padded at that side ("": not at all)."""
    mask = padding(side)
    if model.kind == "speech":
        features = torch.randn(2, 6, 2 * SEQLEN, generator=torch.Generator().manual_seed(2))
        return {"input_features": features, "decoder_input_ids": tokens(), "decoder_attention_mask": mask}
    given = {"input_ids": tokens(), "attention_mask": mask}
    if model.kind == "encoder-decoder":
        given |= {"decoder_input_ids": tokens(seqlen=9, seed=3)}
    return given


def logits(model: Any, implementation: str, **given: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        out: Tensor = model(**given).logits
    return out


def gradients(model: Any, implementation: str, **given: Any) -> dict[str, Tensor]:
    """Return the gradients of the loss of one training step."""
    model.set_attn_implementation(implementation)
    model.train()
    model.zero_grad()
    model(**given).loss.backward()
    model.eval()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def built(name: str) -> Any:
    return MODELS[name].build()


def no_score_sized_mask(calls: list[dict[str, Any]]) -> None:
    assert calls
    for call in calls:
        mask = call.get("mask")
        assert mask is None or mask.shape[1:3] == (1, 1)


LENGTHS = (6, 1, 7)


def packed() -> dict[str, Tensor]:
    ids = tokens(1, sum(LENGTHS))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
