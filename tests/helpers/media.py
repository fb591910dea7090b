"""Small models that see and hear, straight from transformers' configurations, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_IMAGE = {"image_size": 16, "patch_size": 4}
_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
_VIT = {
    **_ENCODER,
    **_IMAGE,
    "num_labels": 5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SWIN = {
    "image_size": 28,  # no multiple of the windows: they are padded
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "initializer_range": 0.2,
}
_TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_TOWER = {k: v for k, v in _ENCODER.items() if k != "initializer_range"} | _IMAGE
_SPEECH = {
    **_ENCODER,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "vocab_size": 12,
}
_WHISPER = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


def _drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ids(rows: int) -> torch.Tensor:
    ids = torch.randint(3, 40, (rows, 7), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 2  # where CLIP's tower of text takes its vector from
    return ids


def _images(size: int = 16) -> Callable[[int], dict[str, Any]]:
    return lambda rows: {"pixel_values": _drawn(rows, 3, size, size)}


def _both(rows: int) -> dict[str, Any]:
    return {"pixel_values": _drawn(rows, 3, 16, 16), "input_ids": _ids(rows)}


def _prompted(rows: int) -> dict[str, Any]:
    """A prompt with one image in each row."""
    places = torch.full((rows, 16), 45)
    return {
        "pixel_values": _drawn(rows, 3, 16, 16),
        "input_ids": torch.cat([places, _ids(rows)], 1),
    }


@dataclass(frozen=True)
class Medium:
    """A model and how the tests make it.

    Attributes:
        model: name of the model class.
        settings: name of the configuration class, and its arguments.
        inputs: makes inputs for a number of rows.
        excluded: what "all-linear" is told to leave out, since it is refused by name.
    """

    model: str
    settings: tuple[str, dict[str, Any]]
    inputs: Callable[[int], dict[str, Any]]
    excluded: Any = ()


MEDIA: dict[str, Medium] = {
    "vit": Medium("ViTForImageClassification", ("ViTConfig", _VIT), _images()),
    "dinov2": Medium(
        "Dinov2ForImageClassification",
        ("Dinov2Config", {**_VIT, "mlp_ratio": 2}),
        _images(),
    ),
    "swin": Medium("SwinForImageClassification", ("SwinConfig", _SWIN), _images(28)),
    "swinv2": Medium(
        "Swinv2ForImageClassification",
        ("Swinv2Config", {**_SWIN, "image_size": 32}),
        _images(32),
        r".*\bcontinuous_position_bias_mlp\..*",
    ),
    "convnext": Medium(
        "ConvNextForImageClassification",
        (
            "ConvNextConfig",
            {
                "hidden_sizes": [8, 12],
                "depths": [1, 1],
                "num_stages": 2,
                "patch_size": 2,
                "num_labels": 5,
                "initializer_range": 0.2,
                "layer_scale_init_value": 1.0,
            },
        ),
        _images(),
    ),
    "sam": Medium(
        "SamModel",
        (
            "SamConfig",
            {
                "initializer_range": 0.2,
                "vision_config": {
                    "hidden_size": 16,
                    "output_channels": 8,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "mlp_dim": 24,
                    "image_size": 40,
                    "patch_size": 4,
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "num_pos_feats": 4,
                    "initializer_range": 0.2,
                },
                "prompt_encoder_config": {
                    "hidden_size": 8,
                    "image_size": 40,
                    "patch_size": 4,
                    "mask_input_channels": 4,
                },
                "mask_decoder_config": {
                    "hidden_size": 8,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "mlp_dim": 16,
                    "iou_head_hidden_dim": 8,
                },
            },
        ),
        lambda rows: {
            "pixel_values": _drawn(rows, 3, 40, 40),
            "input_points": _drawn(rows, 2, 1, 2).abs() * 10,
        },
    ),
    "timesformer": Medium(
        "TimesformerForVideoClassification",
        ("TimesformerConfig", {**_VIT, "num_frames": 4, "drop_path_rate": 0}),
        lambda rows: {"pixel_values": _drawn(rows, 4, 3, 16, 16)},
    ),
    "clip": Medium(
        "CLIPModel",
        ("CLIPConfig", {"text_config": _TEXT, "vision_config": _TOWER, "projection_dim": 12}),
        _both,
    ),
    "siglip": Medium(
        "SiglipModel", ("SiglipConfig", {"text_config": _TEXT, "vision_config": _TOWER}), _both
    ),
    "llava": Medium(
        "LlavaForConditionalGeneration",
        (
            "LlavaConfig",
            {
                "text_config": {**_TEXT, "model_type": "llama"},
                "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
                "image_token_index": 45,
                "vision_feature_layer": -1,
            },
        ),
        _prompted,
    ),
    "wav2vec2": Medium(
        "Wav2Vec2ForCTC",
        ("Wav2Vec2Config", _SPEECH),
        lambda rows: {"input_values": _drawn(rows, 400)},
    ),
    "hubert": Medium(
        "HubertForCTC",
        ("HubertConfig", _SPEECH),
        lambda rows: {"input_values": _drawn(rows, 400)},
    ),
    "wavlm": Medium(
        "WavLMForCTC",
        ("WavLMConfig", _SPEECH),
        lambda rows: {"input_values": _drawn(rows, 400)},
        ["q_proj", "k_proj", "v_proj", "attention.out_proj"],
    ),
    "ast": Medium(
        "ASTForAudioClassification",
        (
            "ASTConfig",
            {
                **{k: v for k, v in _VIT.items() if k != "image_size"},
                "frequency_stride": 4,
                "time_stride": 4,
                "max_length": 16,
                "num_mel_bins": 8,
            },
        ),
        lambda rows: {"input_values": _drawn(rows, 16, 8)},
    ),
    "whisper": Medium(
        "WhisperForConditionalGeneration",
        ("WhisperConfig", _WHISPER),
        lambda rows: {"input_features": _drawn(rows, 8, 20), "decoder_input_ids": _ids(rows)},
    ),
}


def make(name: str) -> nn.Module:
    """A model with random weights, float64, in evaluation mode."""
    import transformers

    made = MEDIA[name]
    settings = getattr(transformers, made.settings[0])(**made.settings[1])
    torch.manual_seed(0)
    model = getattr(transformers, made.model)(settings).double().eval()
    if name == "sam":  # its own values are too small for an update to show in its masks
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2)
    return model  # type: ignore[no-any-return]
