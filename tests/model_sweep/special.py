"""Inputs of single models that no general guess finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from model_sweep.inputs import DECODER_SEQLEN, SEQLEN, normal, tokens

Values = dict[str, Any]


def decision_transformer(c: Any) -> Values:
    given = {"states": normal(2, SEQLEN, c.state_dim), "actions": normal(2, SEQLEN, c.act_dim)}
    given |= {"rewards": normal(2, SEQLEN, 1), "returns_to_go": normal(2, SEQLEN, 1)}
    return given | {"timesteps": torch.arange(SEQLEN).expand(2, -1), "attention_mask": torch.ones(2, SEQLEN)}


def dia(c: Any) -> Values:
    channels = c.decoder_config.num_channels
    return {"input_ids": tokens(), "decoder_input_ids": channel_tokens(DECODER_SEQLEN, channels)}


def dia_decoder(c: Any) -> Values:
    return {"input_ids": channel_tokens(DECODER_SEQLEN, c.num_channels), "encoder_hidden_states": normal(2, 9, 64)}


def channel_tokens(seqlen: int, channels: int) -> torch.Tensor:
    return torch.stack([tokens(2, seqlen, seed) for seed in range(channels)], -1)


def musicgen(c: Any) -> Values:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2 * c.decoder.num_codebooks, DECODER_SEQLEN) % 30}


def musicgen_decoder(c: Any) -> Values:
    return {"input_ids": tokens(2 * c.num_codebooks) % 30}


def lxmert(c: Any) -> Values:
    boxes = torch.rand(2, 5, c.visual_pos_dim, generator=torch.Generator().manual_seed(7))
    return {"input_ids": tokens(), "visual_feats": normal(2, 5, c.visual_feat_dim), "visual_pos": boxes}


def audio_encoder(c: Any) -> Values:
    """Sounds without a batch, one after another."""
    lengths = torch.tensor([40, 24])
    return {"input_features": normal(c.num_mel_bins, 64), "feature_lens": lengths, "aftercnn_lens": (lengths + 1) // 2}


def mllama_vision(c: Any) -> Values:
    images = normal(2, 1, c.max_num_tiles, c.num_channels, c.image_size, c.image_size)
    ids = torch.ones(2, 1, dtype=torch.long)
    return {"pixel_values": images, "aspect_ratio_ids": ids, "aspect_ratio_mask": torch.ones(2, 1, c.max_num_tiles)}


def florence_vision(c: Any) -> Values:
    return {"hidden_states": normal(2, 3, 64, 64)}


def depth_pro(c: Any) -> Values:
    return {"pixel_values": normal(2, 3, 128, 128)}


def clap_audio(c: Any) -> Values:
    audio = getattr(c, "audio_config", c)
    sound = normal(2, 1, audio.spec_size * audio.spec_size // audio.num_mel_bins, audio.num_mel_bins)
    return {"input_features": sound} | ({} if audio is c else {"input_ids": tokens()})


def deepseek_ocr2_encoder(c: Any) -> Values:
    return {"inputs_embeds": normal(2, SEQLEN, c.hidden_size), "num_patches": 5}


def idefics(c: Any) -> Values:
    size = c.vision_config.image_size
    return {
        "input_ids": tokens(),
        "pixel_values": normal(2, 1, 3, size, size),
        "image_attention_mask": torch.ones(2, SEQLEN, 1),
    }


def kosmos2(c: Any) -> Values:
    mask = torch.zeros(2, SEQLEN, dtype=torch.long)
    mask[:, 1 : 1 + c.latent_query_num] = 1
    size = c.vision_config.image_size
    return {"input_ids": tokens(), "pixel_values": normal(2, 3, size, size), "image_embeds_position_mask": mask}


def fun_asr_encoder(c: Any) -> Values:
    return {
        "input_features": normal(2, 40, 7 * c.num_mel_bins),
        "input_features_mask": torch.ones(2, 40, dtype=torch.long),
    }


def oneformer(c: Any) -> Values:
    return {"pixel_values": normal(2, 3, 64, 64), "task_inputs": normal(2, c.task_seq_len)}


def voxtral_realtime(c: Any) -> Values:
    return {"input_ids": tokens(), "input_features": normal(2, c.audio_config.num_mel_bins, 8 * SEQLEN)}


def voxtral_realtime_text(c: Any) -> Values:
    return {"input_ids": tokens(), "t_cond": normal(1, c.hidden_size)}


def speech_encoder_decoder(c: Any) -> Values:
    return {"inputs": normal(2, 800), "decoder_input_ids": tokens(seqlen=DECODER_SEQLEN)}


def moshi_depth(c: Any) -> Values:
    return {"input_ids": tokens(2, 3), "last_hidden_state": normal(2, 1, c.input_size)}


def xclip_vision(c: Any) -> Values:
    return {"pixel_values": normal(2 * c.num_frames, 3, c.image_size, c.image_size)}


def xcodec(c: Any) -> Values:
    return {"input_values": normal(2, 1, 1920)}


def mimi(c: Any) -> Values:
    return {"input_values": normal(2, 1, 1920)}


def phi4_audio(c: Any) -> Values:
    return {"hidden_states": normal(2, 40, c.input_size), "mask": torch.ones(2, 40, dtype=torch.bool)}


def time_series(c: Any) -> Values:
    past = c.context_length + max(c.lags_sequence)
    given = {
        "past_values": normal(2, past),
        "past_time_features": normal(2, past, 1),
        "past_observed_mask": torch.ones(2, past),
    }
    return given | {
        "future_values": normal(2, c.prediction_length),
        "future_time_features": normal(2, c.prediction_length, 1),
    }


MADE: dict[str, Callable[[Any], Values]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), time_series),
    "depth_pro": depth_pro,
    "clap": clap_audio,
    "clap_audio_model": clap_audio,
    "deepseek_ocr2_encoder": deepseek_ocr2_encoder,
    "idefics": idefics,
    "kosmos-2": kosmos2,
    "mimi": mimi,
    "moshi_depth": moshi_depth,
    "xclip_vision_model": xclip_vision,
    "xcodec": xcodec,
    "vibevoice_acoustic_tokenizer_encoder": lambda c: {"hidden_states": normal(2, 1, 1920)},
    "oneformer": oneformer,
    "voxtral_realtime": voxtral_realtime,
    "voxtral_realtime_text": voxtral_realtime_text,
    "speech-encoder-decoder": speech_encoder_decoder,
    "fun_asr_nano_encoder": fun_asr_encoder,
    "phi4_multimodal_audio": phi4_audio,
    "decision_transformer": decision_transformer,
    "dia": dia,
    "dia_decoder": dia_decoder,
    "musicgen": musicgen,
    "musicgen_melody": musicgen,
    "musicgen_decoder": musicgen_decoder,
    "musicgen_melody_decoder": musicgen_decoder,
    "lxmert": lxmert,
    "qwen2_5_omni_audio_encoder": audio_encoder,
    "qwen3_omni_moe_audio_encoder": audio_encoder,
    "mllama_vision_model": mllama_vision,
    "florence_vision": florence_vision,
}
