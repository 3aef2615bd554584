"""Inputs of models that need more than text: images, sound, positions on a page … class of the model → function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

Inputs = dict[str, Tensor]


def special_inputs(model: nn.Module, inputs: Inputs, g: Generator) -> Inputs:
    """The text `inputs` of the model, with what its class needs; None removes an input."""
    special = _SPECIAL.get(type(model).__name__)
    if special is None:
        return inputs
    merged = inputs | special(model.config, inputs, g)
    return {key: value for key, value in merged.items() if value is not None}


def _random(g: Generator, *shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=g)


def _sound(name: str, shape: Callable[[Any], tuple[int, ...]]) -> Callable[..., dict[str, Any]]:
    """Sound goes into the encoder, text into the decoder."""

    def inputs(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
        return {
            name: _random(g, *shape(config)),
            "input_ids": None,
            "attention_mask": None,
            "decoder_input_ids": text["input_ids"],
        }

    return inputs


def _pixels(config: Any, g: Generator, *before: int) -> Tensor:
    size = getattr(config, "vision_config", config).image_size
    return _random(g, *before, 3, size, size)


def _with_image(text: Inputs, token: int, count: int) -> Tensor:
    """The text with `count` tokens that stand for an image."""
    ids = text["input_ids"].clone()
    ids[:, 2 : 2 + count] = token
    return ids


def _blip(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    return {"pixel_values": _pixels(config, g)}


def _blip2(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    ids = _with_image(text, config.image_token_index, config.num_query_tokens)
    return {"pixel_values": _pixels(config, g), "input_ids": ids}


def _instructblip(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    return {**_blip2(config, text, g), "qformer_input_ids": text["input_ids"][:, 10:]}


def _instructblipvideo(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    frames = 4
    return {
        "pixel_values": _pixels(config, g, frames),
        "input_ids": _with_image(text, config.video_token_index, frames * config.num_query_tokens),
        "qformer_input_ids": text["input_ids"][:, 10:],
    }


def _idefics(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    return {"pixel_values": _pixels(config, g, 1), "image_attention_mask": text["attention_mask"][..., None]}


def _kosmos2(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    mask = torch.zeros_like(text["input_ids"])
    mask[:, 2 : 2 + config.latent_query_num] = 1
    return {"pixel_values": _pixels(config, g), "image_embeds_position_mask": mask}


def _pix2struct(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """Patches in rows of four, each behind its row and column."""
    patches = _random(g, 12, 2 + config.vision_config.patch_embed_hidden_size)
    patches[..., 0], patches[..., 1] = torch.arange(12) // 4 + 1, torch.arange(12) % 4 + 1
    mask = torch.ones(1, 12, dtype=torch.int64)
    return {
        "flattened_patches": patches,
        "attention_mask": mask,
        "input_ids": None,
        "decoder_input_ids": text["input_ids"],
    }


def _udop(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """A place on the page for every token."""
    corner = torch.rand(1, text["input_ids"].shape[1], 2, generator=g) / 2
    return {"bbox": torch.cat([corner, corner + 0.25], dim=-1)}


def _pi0(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    vlm = config.vlm_config
    tokens = (vlm.vision_config.image_size // vlm.vision_config.patch_size) ** 2
    return {
        "state": _random(g, config.max_state_dim),
        "noise": _random(g, config.chunk_size, config.max_action_dim),
        "timestep": torch.rand(1, generator=g),
        "input_ids": _with_image(text, vlm.image_token_index, tokens),
        "pixel_values": _pixels(vlm, g, 1),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def _image_to_text(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """An image goes into the encoder, text into the decoder."""
    encoder = getattr(config, "encoder", config)
    return {
        "pixel_values": _pixels(encoder, g),
        "input_ids": None,
        "attention_mask": None,
        "decoder_input_ids": text["input_ids"],
    }


def _diffusion(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """The tokens that are to be refined."""
    return {"decoder_input_ids": torch.randint(3, 130, (1, config.canvas_length), generator=g)}


def _dia(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """A token of every channel of the sound that the decoder writes."""
    shape = (1, text["input_ids"].shape[1], config.decoder_config.num_channels)
    return {"decoder_input_ids": torch.randint(3, 130, shape, generator=g)}


def _kyutai(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """A text token and one of every codebook."""
    shape = (*text["input_ids"].shape, config.num_codebooks + 1)
    return {"input_ids": torch.randint(3, 130, shape, generator=g)}


def _voxtral_realtime(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    frames = config.audio_length_per_tok * text["input_ids"].shape[1]
    return {"input_features": _random(g, config.audio_config.num_mel_bins, frames)}


def _codebooks(config: Any, text: Inputs, g: Generator) -> dict[str, Any]:
    """One row of tokens for each codebook of the sound that a decoder writes."""
    books, length = config.num_codebooks, text["input_ids"].shape[1]
    ids = torch.randint(3, config.vocab_size - 30, (books, length), generator=g)
    return {"input_ids": ids, "attention_mask": None}


_SPECIAL: dict[str, Callable[[Any, Inputs, Generator], dict[str, Any]]] = {
    "WhisperForConditionalGeneration": _sound(
        "input_features", lambda c: (c.num_mel_bins, 2 * c.max_source_positions)
    ),
    "Speech2TextForConditionalGeneration": _sound("input_features", lambda c: (64, c.input_feat_per_channel)),
    "CanaryForConditionalGeneration": _sound(
        "input_features", lambda c: (128, c.encoder_config.num_mel_bins)
    ),
    "CohereAsrForConditionalGeneration": _sound(
        "input_features", lambda c: (128, c.encoder_config.num_mel_bins)
    ),
    "SeamlessM4TForSpeechToText": _sound("input_features", lambda c: (64, c.feature_projection_input_dim)),
    "SeamlessM4Tv2ForSpeechToText": _sound("input_features", lambda c: (64, c.feature_projection_input_dim)),
    "MoonshineForConditionalGeneration": _sound("input_values", lambda c: (8000,)),
    "MoonshineStreamingForConditionalGeneration": _sound("input_values", lambda c: (8000,)),
    "SpeechT5ForSpeechToText": _sound("input_values", lambda c: (8000,)),
    "SpeechEncoderDecoderModel": _sound("input_values", lambda c: (8000,)),
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "BlipForConditionalGeneration": _blip,
    "Blip2ForConditionalGeneration": _blip2,
    "InstructBlipForConditionalGeneration": _instructblip,
    "InstructBlipVideoForConditionalGeneration": _instructblipvideo,
    "IdeficsForVisionText2Text": _idefics,
    "Kosmos2ForConditionalGeneration": _kosmos2,
    "Pix2StructForConditionalGeneration": _pix2struct,
    "UdopForConditionalGeneration": _udop,
    "PI0ForConditionalGeneration": _pi0,
    "VisionEncoderDecoderModel": _image_to_text,
    "PPFormulaNetForConditionalGeneration": _image_to_text,
    "DiffusionGemmaForBlockDiffusion": _diffusion,
    "DiaForConditionalGeneration": _dia,
    "KyutaiSpeechToTextForConditionalGeneration": _kyutai,
    "VoxtralRealtimeForConditionalGeneration": _voxtral_realtime,
}
