"""What the general rules cannot know about single models."""

from __future__ import annotations

from typing import Any

START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {},
}
VALUES: dict[str, dict[str, Any]] = {
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
