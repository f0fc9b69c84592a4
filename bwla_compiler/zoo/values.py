"""Configuration values that make an architecture tiny: one generic set, and what single families need besides."""

from typing import Any

GENERIC: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 96,
    "ffn_dim": 96,
    "d_model": 64,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "n_heads": 4,
    "num_heads": 4,
    "num_layers": 2,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Names that different families use for the same few sizes; a family ignores what it does not know."""

OMITTED: dict[str, tuple[str, ...]] = {
    "falcon": ("head_dim",),
    "prophetnet": ("num_hidden_layers", "decoder_layers"),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("v_head_dim",),
}
"""Generic names that a family's config refuses."""

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
}
"""An image tower that the text never passes through, as small as it goes."""

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "adapter_out_dim": 64,
    "per_layer_config": {},
}
"""A tower of vision or sound beside the text, as small as it goes."""

_GEMMA_TEXT: dict[str, Any] = {
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
}
_LATENT: dict[str, Any] = {"num_key_value_heads": 4}
"""Latent attention gives every head keys and values of its own."""

_MULTIMODAL: dict[str, Any] = {"text_config": GENERIC, "vision_config": _VISION}
_MAMBA: dict[str, Any] = {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        _LATENT,
    ),
    "blt": {
        "patch_in_forward": False,
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": GENERIC,
        "encoder_config": GENERIC | {"hidden_size_global": 64},
        "decoder_config": GENERIC | {"hidden_size_global": 64},
        "global_config": GENERIC,
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {
        "text_config": GENERIC | _LATENT,
        "vision_config": _TOWER | {"mlp_layer_types": ["dense"], "moe_intermediate_size": 16, "adapter_in_dim": 32},
        "audio_config": _TOWER | {"adapter_input_size": 32},
    },
    "dots1": {"n_shared_experts": 1},
    "emu3": _MULTIMODAL,
    "gemma3": _MULTIMODAL,
    "gemma3n_text": _GEMMA_TEXT,
    "gemma4": {
        "text_config": GENERIC | _GEMMA_TEXT,
        "vision_config": _TOWER | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 16},
        "audio_config": None,
    },
    "gemma4_unified": {
        "text_config": GENERIC | _GEMMA_TEXT,
        "vision_config": _TOWER | {"mm_embed_dim": 64, "mm_posemb_size": 8, "output_proj_dims": 64},
        "audio_config": None,
    },
    "gemma4_text": _GEMMA_TEXT,
    "git": {"vision_config": _VISION},
    "got_ocr2": _MULTIMODAL,
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": _MULTIMODAL,
    "mamba2": {"head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "mllama": {
        "text_config": GENERIC | {"cross_attention_layers": [1]},
        "vision_config": _VISION | {"num_global_layers": 1, "max_num_tiles": 4, "vision_output_dim": 32},
    },
    "moss_transcribe_diarize": {
        "text_config": GENERIC,
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "max_source_positions": 32,
            "num_mel_bins": 16,
        },
    },
    "phi4_multimodal": {
        "vision_config": _VISION | {"feature_layer": -1, "crop_size": 32},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen3_5": _MULTIMODAL,
    "qwen3_5_moe": _MULTIMODAL,
    "qwen4_exp": _MULTIMODAL,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "attention_head_size": 16,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 96,
    },
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": _MAMBA | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": _MAMBA | {"mamba_ngroups": 1, "mamba_headdim": 64, "n_mamba_heads": 2, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides the generic values, or instead of them."""


def values_of(name: str) -> dict[str, Any]:
    """Return the config values of an architecture by its model_type."""
    omitted = OMITTED.get(name, ())
    return {k: v for k, v in {**GENERIC, **FAMILIES.get(name, {})}.items() if k not in omitted}
