"""Tiny configurations of any model of transformers.

A configuration starts from the defaults of its class. Rules replace every size by its name: widths become WIDTH,
numbers of heads become HEADS, and so on. Sizes that have to match become equal in this way. `exceptions.py` lists what
the rules do not know about single models.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_sweep import exceptions

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH = HEADS * HEAD_DIM
INNER, EXPERT_INNER = 96, 32
LAYERS = 2
VOCABULARY, POSITIONS = 160, 128
WINDOW, CHUNK = 6, 8
IMAGE, PATCH = 32, 8
EXPERTS, CHOSEN_EXPERTS = 4, 2

Rule = tuple[str, Callable[[int], int]]


def _constant(number: int) -> Callable[[int], int]:
    return lambda value: number if value > 0 else value


def _at_most(number: int) -> Callable[[int], int]:
    return lambda value: min(value, number)


def _keep(value: int) -> int:
    return value


# The first pattern that matches the whole name decides. A size of zero or less usually switches something off.
RULES: list[Rule] = [
    (r"num_labels|chunk_size_feed_forward|seed|.*_every|.*(_ratio|_rate|_factor|_id|_index|_idx|_offset)", _keep),
    (r".*(sampling_rate|sample_rate|hop_length|n_fft|frame_rate)", _keep),
    (r".*(interval|period|frequency|_every_n_\w+|every_n_\w+|_pattern|layer_freq|_step)", _at_most(2)),
    # vocabulary and positions
    (r"type_vocab_size|.*segment_types", _at_most(4)),
    (r".*vocab_size.*|.*vocab", _constant(VOCABULARY)),
    (
        r".*max_position_embeddings|n_positions|n_ctx|max_\w*positions|max_seq_len|max_sequence_length|seq_length"
        r"|max_\w*length|block_size|seq_len|context_length|model_max_length",
        _constant(POSITIONS),
    ),
    (r"num_(bpe|character|wordpiece|qa|object|attr)_labels", _at_most(40)),
    # mixtures of experts
    (r"index_topk|compress_topk", _at_most(6)),
    (r".*(experts_per_tok|experts_per_token|topk|top_k|moe_k|num_selected_experts)", _at_most(CHOSEN_EXPERTS)),
    (r"n_group|topk_group|num_expert_group|num_expert_groups|n_expert_groups", _at_most(1)),
    (r".*shared_experts", _at_most(1)),
    (r".*num_experts|.*routed_experts|.*local_experts|.*experts", _at_most(EXPERTS)),
    (
        r"(moe|expert|shared_expert).*intermediate_size|.*expert_dim|expert_ffn.*",
        _constant(EXPERT_INNER),
    ),
    # windows of attention
    (
        r".*sliding_window(_size)?|local_attention|.*local_attention_window_len|attention_window(_size)?",
        _at_most(WINDOW),
    ),
    (r".*attention_chunk_size|index_block_size|.*attn_chunk_length", _at_most(CHUNK)),
    # heads
    (r"mamba_chunk_size|chunk_size", _at_most(CHUNK)),
    (r"linear_num_key_heads", _at_most(2)),
    (r"linear_num_value_heads", _at_most(4)),
    (r"mamba_(n|num)_heads", _constant(8)),
    (r".*(index_n_heads|index_num_heads)", _at_most(2)),
    (r".*(key_value|kv).*heads?", _at_most(KV_HEADS)),
    (r".*heads?(_per_\w+)?", _at_most(HEADS)),
    (r".*(qk_rope_head_dim|rotary_dim|qk_pos_emb_head_dim)", _at_most(8)),
    (r".*qk_nope_head_dim", _at_most(8)),
    (
        r".*(head_dim|d_kv|d_head|dim_head|head_size|kv_channels|dim_key|dim_value|mamba_d_head|head_width)",
        _at_most(HEAD_DIM),
    ),
    (r".*lora_rank|.*_rank", _at_most(16)),
    (r".*(state_size|d_state)", _at_most(8)),
    # layers
    (r"num_encoder_blocks", _keep),
    (r".*kv_shared_layers", _keep),
    (r".*(first_k_dense_replace|num_dense_layers)", _at_most(1)),
    (r".*(nextn_predict_layers|mtp_num_layers)", _keep),
    (r".*(layers?|n_layers?|depth|num_blocks|encoder_blocks)", _at_most(LAYERS)),
    # images and sounds
    (r".*(image_size|img_size|input_size|resolution|crop_size|spec_size)", _at_most(IMAGE)),
    (r".*patch_size|encoder_stride", _at_most(PATCH)),
    (r".*(temporal_patch_size|tubelet_size|spatial_merge_size|merge_size)", _at_most(2)),
    (r"num_frames", _at_most(4)),
    (r".*num_channels|audio_channels|in_channels|.*in_chans", _at_most(4)),
    (r".*(mel_bins|n_mels|input_feat_size|feature_size|mel_dim)", _at_most(16)),
    (r".*(window_size)", _at_most(4)),
    (r".*(num_queries|query_tokens|num_latents|query_num|n_latents)", _at_most(8)),
    (r".*codebook_size|.*num_embeddings|num_embeds|.*codes", _at_most(32)),
    (r"num_codebooks|n_codebooks|num_quantizers|num_code_groups", _at_most(4)),
    (r".*groups|.*group", _at_most(4)),
    (r"num_filters", _at_most(8)),
    (r"base_channels", _at_most(32)),
    # widths
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|mlp_dim|dim_ff|dff|intermediate_dim|ff_dim|feedforward_dim"
        r"|dim_feedforward|feed_forward_size|feed_forward_hidden_size|mlp_hidden_size|linear_units)",
        _constant(INNER),
    ),
    (
        r".*(hidden_size\w*|d_model|n_embd|embed_dim|embedding_size|embedding_dim|hidden_dim|projection_dim|emb_dim|_dim|_dimension|_width|channels"
        r"|embed_size|emb_size|inplanes|_features|output_size|proj_size|projection_size|d_latents|d_rel|_filters)",
        _at_most(WIDTH),
    ),
    (r"dim|width|dims?_\w+|.*_dims?|.*channels?|latent_query_num|.*_dim_\w+", _at_most(WIDTH)),
]
# Scores are about 1 in a tiny model: a cap or a scale for large ones would have no effect.
FLOATS = {r".*(softcap|logit_cap|logits_soft_cap|attn_cap).*": 2.0, r"attention_multiplier": HEAD_DIM**-0.5}
COMPILED = [(re.compile(pattern), rule) for pattern, rule in RULES]


def shrink_number(name: str, value: int) -> int:
    """Return the small number for a size called `name`; a size that no rule knows stays."""
    for pattern, rule in COMPILED:
        if pattern.fullmatch(name):
            return rule(value) if value > 0 else value
    return value


def tiny(kind: type, **given: Any) -> Any:
    """Return a tiny configuration of this class; `given` replaces single values."""
    return shrink(kind(**exceptions.START.get(kind.model_type, {})), given)


def shrink(configuration: Any, given: dict[str, Any] | None = None, ids: dict[str, int] | None = None) -> Any:
    """Return a tiny copy of a configuration and of the configurations in it."""
    kind, ids = type(configuration), {} if ids is None else ids
    read = configuration._getattr_without_heterogeneous_validation  # layers may differ
    values = {field.name: read(field.name, None) for field in dataclasses.fields(kind)}
    layers = chosen_layers(values)
    shares = (given or {}).get("num_kv_shared_layers", values.get("num_kv_shared_layers"))
    if layers and isinstance(shares, int) and shares:  # the second half takes the keys of the first
        layers, values["num_kv_shared_layers"] = layers * 2, len(layers)
        given = {name: x for name, x in (given or {}).items() if name != "num_kv_shared_layers"}
    small = {name: small_value(name, value, values, layers, ids) for name, value in values.items() if name not in PLAIN}
    overrides = getattr(vars(configuration).get("_heterogeneity_spec"), "per_layer_overrides", {})
    if overrides:
        kept = layers or range(small["num_hidden_layers"])
        small["per_layer_config"] = {
            new: {name: small_value(name, value, values, None, ids) for name, value in overrides[old].items()}
            for new, old in enumerate(kept)
            if old in overrides
        }
    fit(small)
    if "mrope_section" in modeling_source(kind):
        small["rope_parameters"] = fitting_mrope(small)
    exceptions.apply(kind.model_type, small)
    return kind(**small | (given or {}))


@functools.cache
def modeling_source(kind: type) -> str:
    """Return the source of the models of a configuration."""
    path = Path(inspect.getfile(kind).replace("configuration_", "modeling_"))
    return path.read_text(encoding="utf-8") if path.exists() else ""


def fitting_mrope(values: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters with sections that fit, even where the model would take its own default."""
    rope = dict(values.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0})
    if not any(isinstance(entry, dict) for entry in rope.values()):
        rope.setdefault("mrope_section", [1, 1, 1])
    fit_rope(rope, values)
    return rope


def fit(values: dict[str, Any]) -> None:
    """Make sizes agree that belong together."""
    if "mamba_d_head" in values and "mamba_expand" in values:
        values["mamba_n_heads"] = int(values["mamba_expand"] * values["hidden_size"]) // values["mamba_d_head"]
    for count, period in (("attn_layer_offset", "attn_layer_period"), ("expert_layer_offset", "expert_layer_period")):
        if count in values:
            values[count] = values[period] - 1
    if "kv_source_layers" in values and "num_hidden_layers" in values:
        values["kv_source_layers"] = list(range(values["num_hidden_layers"]))
    if "_out_features" in values:
        fit_stages(values)
    if values.get("head_dim", 0) is None:
        values["head_dim"] = HEAD_DIM
    if "backbone_feature_sizes" in values:
        values["backbone_feature_sizes"] = [[16, 16], [8, 8], [4, 4]]
    if "mm_tokens_per_image" in values:
        values["mm_tokens_per_image"] = 4
    if isinstance(values.get("image_grid_pinpoints"), list | tuple):
        values["image_grid_pinpoints"] = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]
    for name in ("vision_feature_layer", "vision_feature_layers"):
        if isinstance(values.get(name), list | tuple):
            values[name] = type(values[name])((-1, -2))
    if "num_pos_feats" in values:
        values["num_pos_feats"] = WIDTH // 2
    if "image_embedding_size" in values:
        values["image_embedding_size"] = values["image_size"] // values["patch_size"]
    if "window_size" in values and "spatial_merge_size" in values and isinstance(values["window_size"], int):
        values["window_size"] = 2 * values["spatial_merge_size"] * values["patch_size"]
    if isinstance(values.get("rope_parameters"), dict):
        fit_rope(values["rope_parameters"], values)
    if "hidden_sizes" in values and isinstance(values.get("num_attention_heads"), int):
        values["num_attention_heads"] = 2


def fit_stages(values: dict[str, Any]) -> None:
    """Let a backbone of layers give as many outputs as before, if it is asked for several."""
    staged = any(
        isinstance(x, list | tuple) and re.fullmatch(r"\w*depths|\w*blocks\w*|stage_\w+", name)
        for name, x in values.items()
        if name != "stage_names"
    )
    names, _ = values.pop("_out_features"), values.pop("_out_indices", None)
    values.pop("stage_names", None)
    if not staged and "num_hidden_layers" in values:
        values["num_hidden_layers"] = max(LAYERS, len(names or ()))
        names = [f"stage{i + 1}" for i in range(len(names or ()))]
    values["out_features"] = names or None


def fit_rope(rope: dict[str, Any], values: dict[str, Any]) -> None:
    """Make rotary parameters agree with the size of a head."""
    for entry in rope.values():
        if isinstance(entry, dict):
            fit_rope(entry, values)
    if rope.get("rope_type") == "dynamic" and rope.get("alpha", 1) is None:
        rope |= {"rope_type": "default", "alpha": 1.0}
    if isinstance(rope.get("mrope_section"), list | tuple):
        size = values.get("qk_rope_head_dim") or values.get("head_dim") or HEAD_DIM
        pairs, parts = int(size * rope.get("partial_rotary_factor", 1)) // 2, len(rope["mrope_section"])
        rope["mrope_section"] = [pairs - (parts - 1) * (pairs // parts)] + [pairs // parts] * (parts - 1)


PLAIN = {
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
    "dtype",
    "output_hidden_states",
    "return_dict",
}


def small_value(name: str, value: Any, values: dict[str, Any], layers: list[int] | None, ids: dict[str, int]) -> Any:
    """Return the small form of one value."""
    from transformers import PreTrainedConfig

    if isinstance(value, PreTrainedConfig):
        plain = re.fullmatch(r"timm_backbone|hgnet_v2|pp_lcnet\w*|rt_detr_resnet|resnet|pp_hgnet\w*", value.model_type)
        return backbone() if plain else shrink(value, ids=ids)
    if is_token(name) and value is not None:
        return token(name, value, ids)
    if name == "num_hidden_layers" and layers is not None:
        return len(layers)
    if isinstance(value, list | tuple) and layers is not None and len(value) == values.get("num_hidden_layers"):
        kept = [value[i] for i in layers]
        return type(value)(shrink_number(name, x) if type(x) is int and "layer" not in name else x for x in kept)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return next((x for pattern, x in FLOATS.items() if re.fullmatch(pattern, name)), value)
    if isinstance(value, int):
        if re.fullmatch(r".*(key_value|kv).*heads?", name) and value == values.get("num_attention_heads"):
            return min(value, HEADS)
        return shrink_number(name, value)
    if isinstance(value, list | tuple):
        return small_list(name, value)
    if isinstance(value, dict):
        return dict(value)
    return value


def small_list(name: str, value: Any) -> Any:
    """Shrink a list of sizes, one per stage of a model: each by the rule of its name, their ratios kept."""
    numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    if not numbers or not value:
        return value
    if re.fullmatch(r".*depths?|num_blocks|.*block_repeats|num_layers|n_attn_blocks|blocks_per_stage", name):
        return type(value)(min(x, 1) if i else min(x, 2) for i, x in enumerate(value))
    if re.fullmatch(r".*heads?(_per_stage)?", name):
        return type(value)(x // min(value) if min(value) else x for x in value)
    wide = r".*(hidden_sizes|embed_dims?|channels|dims|_sizes|embed_dim_per_stage|conv_dim|channel_list)"
    if re.fullmatch(wide, name) and max(value) > 32 and min(value) > 8:
        same = len(set(value)) == 1
        return type(value)(min(x, WIDTH) if same else 8 * round(2 * x / min(value)) for x in value)
    if re.fullmatch(r".*(image_size|img_size|input_size)", name):
        return type(value)(IMAGE for _ in value)
    return value


def backbone() -> Any:
    """Return the configuration of a tiny network that stands for one of the package timm."""
    from transformers import ResNetConfig

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    return ResNetConfig(**sizes, layer_type="basic", out_features=["stage2", "stage3", "stage4"])


PER_LAYER = re.compile(
    r"layer_types|.*_layer_types|layers_block_type|no_rope_layers|indexer_types|layer_rope_theta|.*_types"
)


def chosen_layers(values: dict[str, Any]) -> list[int] | None:
    """Return a few layers that show every kind of layer; None where no list says what the layers are."""
    count = values.get("num_hidden_layers")
    if not isinstance(count, int):
        return None
    lists = [
        x for name, x in values.items() if isinstance(x, list | tuple) and len(x) == count and PER_LAYER.fullmatch(name)
    ]
    if not lists or count < LAYERS:
        return None
    seen: dict[tuple[Any, ...], int] = {}
    for index, kinds in enumerate(zip(*lists, strict=True)):
        seen.setdefault(tuple(map(str, kinds)), index)
    chosen = sorted(seen.values())[:6]
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1] + 1)
    return chosen


def is_token(name: str) -> bool:
    """Tell whether this value is the id of a special token."""
    return (
        re.fullmatch(r".*_token_id|.*_token_index|.*_token_ids|(pad|bos|eos|image|video|audio)_(index|idx)", name)
        is not None
    )


FIXED = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "pad_index": 0,
    "bos_index": 1,
    "eos_index": 2,
}


def token(name: str, value: Any, ids: dict[str, int]) -> Any:
    """Return a small id; a name means the same id everywhere in a model, and different names different ids."""
    if name in FIXED:
        return FIXED[name]
    if isinstance(value, int):
        return ids.setdefault(name.replace("index", "id"), 3 + len(ids)) if value >= 0 else value
    return value
