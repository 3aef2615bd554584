"""Tiny multimodal models, and inputs as their processors make them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCAB, IMAGE = 120, 119
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": VOCAB, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def spread(model: Any) -> Any:
    """Weights that make layers differ."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.6 / parameter[0].numel() ** 0.5)
    return model.float().eval()


def tiny_llava(seed: int = 0) -> Any:
    """Images of 16 × 16 become 4 patches of 8 × 8: 4 image tokens."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    return spread(LlavaForConditionalGeneration(config))


def llava_samples(count: int, seed: int = 1, length: int = 20) -> list[dict[str, Any]]:
    """One sequence with one image each, as a processor returns it with ``return_tensors="pt"``."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        ids = torch.randint(4, IMAGE - 1, (1, length), generator=generator)
        ids[0, 2:6] = IMAGE
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return samples


def tiny_qwen2_vl(seed: int = 0) -> Any:
    """Patches of 4 × 4, two frames; 2 × 2 of them become a token."""
    torch.manual_seed(seed)
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": TEXT["hidden_size"], "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
    )
    return spread(Qwen2VLForConditionalGeneration(config))


def qwen2_vl_samples(count: int, seed: int = 1, length: int = 20) -> list[dict[str, Any]]:
    """Images of different sizes, as flat lists of patches."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        height, width = (4, 2 + 2 * (number % 3))
        tokens = height * width // 4
        ids = torch.randint(4, IMAGE - 4, (1, length), generator=generator)
        ids[0, 2] = IMAGE - 2
        ids[0, 3 : 3 + tokens] = IMAGE
        ids[0, 3 + tokens] = IMAGE - 3
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).long(),
                "pixel_values": torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([[1, height, width]]),
            }
        )
    return samples


def tiny_whisper(seed: int = 0) -> Any:
    """60 frames of sound become 30 positions of the encoder."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=16, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, max_source_positions=30,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return spread(WhisperForConditionalGeneration(config))


def whisper_samples(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Sound and what is said in it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_features": torch.randn(1, 16, 60, generator=generator),
            "labels": torch.randint(4, VOCAB, (1, 12), generator=generator),
        }
        for _ in range(count)
    ]
