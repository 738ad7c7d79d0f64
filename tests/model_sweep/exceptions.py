"""Exceptions from the general rules for single models."""

from __future__ import annotations

from typing import Any

SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}
SWIN = {"image_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SMALL_EFFICIENTNET = {"width_coefficient": 0.2, "depth_coefficient": 0.3}
NO_DROPOUT = {"dropout_rate": 0.0}

OMNI_TOKENS = {"vision_start_token_id": 60, "vision_end_token_id": 61, "audio_start_token_id": 62}
LETTERS = ("".join(chr(ord("A") + int(digit)) for digit in str(i)) for i in range(32))
CHAMELEON_TOKENS = {"<image>": 5} | {f"IMGIMG{letters}Z": 100 + i for i, letters in enumerate(LETTERS)}
EMU_TOKENS = {"<image>": 5, "<|extra_200|>": 6} | {f"<|visual token {i:06}|>": 100 + i for i in range(32)}

# Values that the configuration needs from the beginning.
START: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {}, "audio_config": {}},
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
}
# Values instead of those that the rules give.
VALUES: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "maskformer-swin": SWIN,
    "align_vision_model": SMALL_EFFICIENTNET,
    "efficientnet": SMALL_EFFICIENTNET,
    "t5gemma2_decoder": NO_DROPOUT,
    "t5gemma2_encoder": NO_DROPOUT,
    "t5gemma2_text": NO_DROPOUT,
    "step3p5": {"sliding_window": 6},
    "step3p7_text": {"sliding_window": 6},
    "blip-2": {"image_token_index": 5},
    "instructblip": {"image_token_index": 5},
    "instructblipvideo": {"image_token_index": 5},
    "qwen2_5_omni_thinker": OMNI_TOKENS,
    "qwen3_omni_moe_thinker": OMNI_TOKENS,
    "glmasr_encoder": {"intermediate_size": 256},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "clvp_encoder": {"hidden_size": 256, "intermediate_size": 256},
    "superpoint": {"keypoint_decoder_dim": 65},
    "lilt": {"hidden_size": 48, "intermediate_size": 64},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 16},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "sam2_hiera_det_model": {"hidden_size": 16},
    "tvp": {"max_img_size": 32, "visual_prompt_size": 4},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "chameleon": {"vocabulary_map": CHAMELEON_TOKENS},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0]},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "clap_audio_model": {
        "spec_size": 64,
        "window_size": 2,
        "patch_embeds_hidden_size": 16,
        "num_attention_heads": [1, 2, 4, 8],
        "num_mel_bins": 64,
        "hidden_size": 128,
    },
    "sam2_prompt_encoder": {"patch_size": 16},
    "sam2_vision_model": {"backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]},
    "emu3": {"vocabulary_map": EMU_TOKENS},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64},
    "maskformer": {"fpn_feature_size": 64, "mask_feature_size": 64},
    "llama4_vision_model": {"intermediate_size": 256},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1]},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "esmfold2_atom_encoder": {"num_spatial_rope_pairs_per_axis": 2, "num_uid_rope_pairs": 2},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "dots3_note_text": {"per_layer_config": {}},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "vitmatte": {"fusion_hidden_sizes": [64, 32, 16, 8]},
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "seggpt": {"image_size": [64, 32]},
    "molmo2_vision": {"num_position_embeddings": 16},
    "zamba": {"attention_head_dim": 32, "attention_hidden_size": 128},
    "mobilevit": {"num_attention_heads": 4},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 160, "pad_token_id": 0, "mask_token_id": 4},
    "longcat_flash": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 48)},
    "xlnet": {"d_head": 16},
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": None},
    "glm5_next_text": {"index_topk": 6, "index_kpool": 2},
    "efficientloftr": {"hidden_size": 256},
    "lw_detr_vit": {"num_windows": 4, "image_size": 32},
    "dia_decoder": {"num_channels": 9},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "muse_spark_audio": {"num_hidden_layers": 4, "depths": (1, 1, 1, 1)},
}

# Differences whose cause is in transformers, by model and check.
NO_REQUEST = "the model does not tell attention that weights are wanted: none are returned, as with sdpa"
NO_SINK = "eager returns weights without the sink that it computes with; ours contain it, as those of gpt_oss do"
KNOWN = {
    ("bridgetower", "attentions"): NO_REQUEST,
    ("kosmos-2", "attentions"): NO_REQUEST,
    ("pix2struct", "attentions"): NO_REQUEST,
    ("pix2struct_vision_model", "attentions"): NO_REQUEST,
    ("granite_swa", "attentions"): NO_SINK,
    ("granitemoe_swa", "attentions"): NO_SINK,
}


def apply(model_type: str, values: dict[str, Any]) -> None:
    """Replace the values of a model's configuration that the rules cannot give."""
    values |= VALUES.get(model_type, {})
    if model_type == "fun_asr_nano":
        values["adaptor_config"].intermediate_size = 16
    if model_type == "zamba":
        values |= {"layers_block_type": 2 * values["layers_block_type"], "num_hidden_layers": 4}
    if model_type == "chmv2":
        values["backbone_config"].return_class_token = True
    if model_type == "dbrx":
        values["attn_config"].clip_qkv = 8.0
    if model_type == "gemma4_assistant":
        shared = {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}
        for name, value in shared.items():
            setattr(values["text_config"], name, value)
