"""Settings of single architectures that the rules of `tiny_configs` get wrong: model_type → settings.

``...`` drops a setting, so that the class's default stays.
"""

from __future__ import annotations

from typing import Any

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
_MROPE_HALF = {
    "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
}
_SLIDING = ["sliding_attention", "full_attention"]
_GEMMA4 = {"num_hidden_layers": 2, "layer_types": _SLIDING, "global_head_dim": 16}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_EMU3_TOKENS = {"<image>": 150, "<|extra_200|>": 151} | {
    f"<|visual token {i:06}|>": 100 + i for i in range(16)
}
_CHAMELEON_TOKENS = {"<image>": 150} | {
    f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 100 + i for i in range(16)
}
_VIBEVOICE = {"num_filters": 2, "depths": [1] * 7}
# The towers of timm, another package, are replaced by one of transformers.
_NO_TIMM = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 16,
        "model_args": {"embed_dim": 64},
    }
}
_ALL_HEADS = {"num_key_value_heads": 4}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "codegen": {"rotary_dim": 16},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
             "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
              "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "blt": {"encoder_hash_byte_group_vocab": 200, "num_hidden_layers": 2},
    "longcat_flash": {"qk_head_dim": 32, "num_key_value_heads": 4, "zero_expert_num": 2},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
                     "laurel_rank": 8,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 96,
                     "activation_sparsity_pattern": [0.0] * 4},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "glm4v_moe_text": _MROPE_HALF,
    "glm46v_text": _MROPE,
    "glm4v_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "gemma4_unified_text": _GEMMA4,
    "gemma4_text": _GEMMA4 | {"vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 16},
    "diffusion_gemma_text": _GEMMA4 | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "cohere_compass_text": {"layer_types": _SLIDING, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _SLIDING}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
              "first_k_dense_replace": 1},
    "helium": {"num_key_value_heads": 4, "head_dim": 16},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen4_exp_text": {"indexer_head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "num_hidden_layers": 2,
                         "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "xlstm": {"qk_dim_factor": 1.0},
    "kimi_linear": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [3, 3, 2]},
                             "moe_intermediate_size": [32, 16]},
    "dots3_note_text": {"layer_types": ["indexed_attention", "sliding_attention"], "per_layer_config": {
        1: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "head_dim": 32}}},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "per_layer_config": {}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [28, 28], "num_position_embeddings": 4},
    "glm5_next_text": {"index_topk": 8, "index_kpool": 4, "mlp_layer_types": ["dense", "sparse"]},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [4, 4], "hidden_sizes": [32, 64], "depths": [1, 1]},
    "step3p5": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"],
                "num_sliding_attention_heads": 8, "mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": _EMU3_TOKENS},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": 16},
    "chameleon": {"vocabulary_map": _CHAMELEON_TOKENS},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 16,
                        "resolution": 32},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 16},
    "florence_vision": {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
                        "patch_prenorm": [False, True], "embed_dim": [32, 64], "num_heads": [2, 4],
                        "num_groups": [2, 4], "window_size": 4},
    "hunyuan_vl_text": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [2, 2, 2, 2]}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
    "radio": {"video_temporal_patch_size": 2},
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151, "image_token_index": 152, "video_token_index": 153},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "speecht5": {"vocab_size": 160, "conv_dim": [32] * 7},
    "wav2vec2": {"conv_dim": [32] * 7},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "nemotron3_5_transcribe_asr_audio": _ALL_HEADS,
    "nemotron3_5_transcribe_word_timestamp": _ALL_HEADS,
    "nemotron3_diarization_audio": _ALL_HEADS,
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150, "num_query_tokens": 4},
    "idefics": {"alpha_initializer": "ones"},
    "kosmos-2": {"latent_query_num": 8},
    "udop": {"max_2d_position_embeddings": 128},
    "diffusion_gemma": {"canvas_length": 16},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 8], "attn_layers": ["local", "lsh"],
                 "num_attention_heads": 4, "attention_head_size": 16, "local_attn_chunk_length": 8,
                 "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0},
    "esm": {"vocab_size": 160},
    "esmc": {"num_key_value_heads": 4, "vocab_size": 160},
    "perceiver": {"num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 2},
    "mimi": {"upsample_groups": 64, "vector_quantization_hidden_dimension": 64, "codebook_size": 64, "num_filters": 8},
    "vibevoice_acoustic_tokenizer_encoder": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer": _VIBEVOICE,
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4}},
    "fast_vlm": _NO_TIMM,
    "perception_lm": _NO_TIMM,
    "gemma3n": _NO_TIMM,
    "apertus1p5_vision_tokenizer": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
                                    "codebook_size": 10},
    "wavtokenizer_encoder": {"codebook_size": 10, "num_filters": 8},
    "apertus1p5": {"audio_token_offset": 145, "image_token_offset": 135},
}  # fmt: skip
