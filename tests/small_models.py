"""Tiny random models of many families, for tests that go through all of them. Nothing here needs uniprune."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)

VOCABULARY = 64
EXCLUDED = {
    "mamba": "dt_proj",
    "falcon_mamba": "dt_proj",
    "jamba": "dt_proj",
}  # read past its layer's forward: see docs/models.md
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WIDE = {"hidden_size": 64, "state_size": 4, "conv_kernel": 4, "expand": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
QWEN3_5 = SMALL | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS}
INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
FAMILIES = {  # transformers' name of the family -> what its configuration needs beside SMALL; None: leaves that out
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "olmo2": {},
    "stablelm": {},
    "cohere": {},
    "granite": {},
    "smollm3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "afn": "gelu"},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT | ROUTED,
    "deepseek_v32": LATENT | ROUTED | INDEXED,
    "glm_moe_dsa": LATENT | ROUTED | INDEXED | {"mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "full"]},
    "deepseek_v4": {
        **INDEXED,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": None,
        "intermediate_size": 128,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "num_key_value_heads": 1,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "sliding_window": 8,
        "mlp_layer_types": ["moe", "moe"],
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": WIDE,
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 8, **WIDE},
    "falcon_mamba": WIDE,
    "jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "use_mem_rope": False,
        "chunk_size": 8,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 8, **MAMBA2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        **MAMBA2,
    },
    "qwen3_next": {
        "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        **EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
    },
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    "qwen3_5": {"text_config": QWEN3_5, "vision_config": QWEN_VISION},
    "qwen3_5_moe": {
        "text_config": {**QWEN3_5, "num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
        "vision_config": QWEN_VISION,
    },
    "llama4": {
        "text_config": {
            **SMALL,
            "intermediate_size": 32,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vision_output_dim": 32,
            "image_size": 28,
            "patch_size": 14,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
# Models of images and text. Those that transformers has no text model for are loaded whole.
FAMILIES |= {
    "llava": {"text_config": SMALL | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}},
    "qwen2_vl": {
        "text_config": SMALL | MROPE,
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {"text_config": SMALL | MROPE, "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0]}},
    "qwen3_vl": {"text_config": SMALL | MROPE, "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}},
    "qwen3_vl_moe": {
        "text_config": SMALL | MROPE | EXPERTS | {"num_experts": 4},
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "gemma3": {"text_config": SMALL, "vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": SMALL | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "paligemma": {
        "text_config": SMALL | {"model_type": "gemma"},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "projection_dim": 32,
    },
    "smolvlm": {"text_config": SMALL | {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 2},
    "internvl": {
        "text_config": SMALL | {"model_type": "qwen2"},
        "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "idefics3": {"text_config": SMALL | {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 2},
    "glm4v": {
        "text_config": SMALL | MROPE,
        "vision_config": {**VISION, "num_heads": 2, "depth": 1, "intermediate_size": 32, "out_hidden_size": 32},
    },
    "aria": {
        "text_config": SMALL | {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        "vision_config": VISION | {"model_type": "idefics3_vision"},
        "projector_patch_to_query_dict": {4: 2},
    },
    "git": {"vision_config": VISION},
    "gemma4": {
        "text_config": SMALL | PER_LAYER | {"global_head_dim": 8},
        "vision_config": VISION | {"head_dim": 16, "global_head_dim": 16, "num_key_value_heads": 2},
        "audio_config": None,
    },
    "gemma3n_text": {
        **PER_LAYER,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0],
    },
}
# Some families again, as transformers saves them if it is told to (save_original_format=False): experts fused, other names.
FUSED = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "qwen3_5_moe", "nemotron_h", "llava", "qwen2_vl", "gemma3")
FUSED += ("qwen3_vl_moe",)
FAMILIES |= {f"{family}, fused": FAMILIES[family] for family in FUSED}


def config_of(family: str, **changes: object) -> PretrainedConfig:
    own = FAMILIES[family]
    settings = (own if "text_config" in own else SMALL | own) | changes
    return AutoConfig.for_model(
        family.partition(",")[0], **{key: value for key, value in settings.items() if value is not None}
    )


IMAGES = {"emu3"}  # types with a causal class that cannot be loaded from a checkpoint of images and text


def kind_of(config: PretrainedConfig) -> type:
    """The class that loads a model."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    causal = type(config) in AutoModelForCausalLM._model_mapping and config.model_type not in IMAGES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


class Looped(torch.nn.ModuleList):
    """Blocks that a model passes through twice (of Dory's and Inkling 2's some are)."""

    def __getitem__(self, index):
        blocks = super().__getitem__(index)
        return [*blocks, *blocks] if isinstance(index, slice) else blocks


def tiny(family: str, **changes: object) -> torch.nn.Module:
    """A random model of a family, float32, on which every step takes a blink."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    return kind_of(config).from_config(config).eval().requires_grad_(False)


def random_model(family: str, **changes: object) -> torch.nn.Module:
    """As :func:`tiny`, with every parameter random: biases that are all 0 would hide that they were forgotten."""
    model = tiny(family, **changes)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def save(family: str, folder: Path, shard: str = "40KB") -> None:
    """Writes a model of a family as it is published: some have a text model only as a part of their checkpoint."""
    config = config_of(family)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config) if hasattr(config, "vision_config") else tiny(family)
    whole.save_pretrained(folder, max_shard_size=shard, save_original_format="fused" not in family)


MATRICES = {  # family: matrices per block
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3_text": 7,
    "phi3": 4,
    "olmo2": 7,
    "stablelm": 7,
    "cohere": 7,
    "granite": 7,
    "opt": 6,
    "gpt_neox": 4,
    "bloom": 4,
    "gpt2": 4,
}
