"""A tiny configuration of every type of model that transformers has a causal class or one of images and text for.

Each is made from the type's own default configuration: sizes by their names (``SIZES``), lists of layers down to one layer of
each kind; what a type needs beside that stands in ``OWN``. Nothing here needs uniprune.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from small_models import EXCLUDED, FAMILIES, kind_of

TYPES = sorted({**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
VOCABULARY = 64
LAYERS = 2
SIZES = (
    (
        32,
        "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim projection_dim out_hidden_size lru_width "
        "attention_hidden_size encoder_hidden_size image_text_hidden_size vision_output_dim projector_input_dim "
        "projector_output_dim text_hidden_size vision_hidden_size image_token_embed_dim output_dim input_size "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_d_ssm projector_hidden_size ple_embed_dim "
        "codebook_size hidden_size_global projection_hidden_size projection_hidden_dim alignment_intermediate_size",
    ),
    (
        64,
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size intermediate_size_mlp "
        "dense_intermediate_size mlp_dim shared_intermediate_size dim_ff dff merged_hidden_size projection_intermediate_size "
        "max_position_embeddings n_positions n_ctx max_seq_len",
    ),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size mel_vocab_size unpadded_vocab_size "
        "encoder_hash_byte_group_vocab vocab_offset",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers layers "
        "num_encoder_layers max_window_layers num_blocks conf_num_hidden_layers resampler_depth num_global_layers",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads "
        "linear_num_heads resampler_heads resampler_n_heads conf_num_attention_heads n_mamba_heads index_topk",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads index_n_heads num_experts_per_tok moe_topk moe_k "
        "moe_top_k num_experts_per_token swa_num_key_value_heads",
    ),
    (
        8,
        "head_dim hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim qk_rope_head_dim qk_nope_head_dim "
        "v_head_dim index_head_dim rotary_dim state_size ssm_state_size mamba_d_state d_kv kv_channels global_head_dim "
        "linear_head_dim swa_head_dim dim_head chunk_size mamba_chunk_size sliding_window attention_window_size d_rel "
        "local_attention sliding_window_size num_query_tokens resampler_n_latents resampler_num_latents latent_query_num "
        "resampler_head_dim resampler_dim_head index_kpool",
    ),
    (
        16,
        "moe_intermediate_size kv_lora_rank q_lora_rank mamba_d_head mamba_head_dim expert_ffn_hidden_size o_lora_rank "
        "swa_num_attention_heads laurel_rank hc_lowrank num_embeddings moe_hidden_size",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_groups mamba_n_groups n_shared_experts num_shared_experts first_k_dense_replace "
        "num_dense_layers moe_num_shared_experts",
    ),
)
SIZE = {name: size for size, names in SIZES for name in names.split()}
VISION = {"image_size": 28, "patch_size": 14, "num_key_value_heads": 4, "num_position_embeddings": 16, "window_size": 28}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
HALF = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
MANY_EXPERTS = {"n_routed_experts": 32, "moe_intermediate_size": 128}  # beside them all that is no matrix is little
SHARED_INDICES = {"indexer_types": ["full", "shared"]}
EXPERTS = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
SAM = {"global_attn_indexes": [1], "downsample_channels": [32, 32], "output_channels": 32, "mlp_dim": 64, "window_size": 2}
SAM |= {"image_size": 32, "patch_size": 8, "num_pos_feats": 16, "scale": 16}
DECODER = {"is_decoder": True}
CODES = {"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
OWN: dict[str, dict[str, Any]] = {  # what types need beside their sizes; that of a part of them in braces
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"), DECODER),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer"), DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), DECODER),
    **{kind: {"text_config": MROPE} for kind in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl")},
    **{kind: {"text_config": MROPE} for kind in ("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl")},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"num_key_value_heads": 2},
    "deepseek_v2": {"n_routed_experts": 4, **EXPERTS},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **EXPERTS},
    "apertus1p5": {
        "image_token_offset": 0,
        "audio_token_offset": 32,
        "vision_config": {**CODES, "embed_dim": 32, "codebook_size": 32},
        "audio_config": {"codebook_dim": 32, "decoder_hidden_size": 32, "decoder_intermediate_size": 32, "num_filters": 4},
    },
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "chameleon": {
        "num_hidden_layers": 4,
        "vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6},
        "vq_config": CODES,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 32}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], **EXPERTS},
        "vision_config": {"sam_config": SAM, "encoder_config": {"max_position_embeddings": 64}},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM},
    "deepseek_v4": {
        "o_lora_rank": 8,
        "o_groups": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "n_routed_experts": 8,
        "moe_intermediate_size": 128,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16, "shared_experts_intermediate_size": 16},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6, "<|visual token 000000|>": 7}, "vq_config": CODES},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 8], "rope_parameters": MROPE["rope_parameters"]},
    },
    "falcon_mamba": {"hidden_size": 64},
    "mamba": {"hidden_size": 64},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4": {"audio_config": None},
    "glm4v_moe": {"text_config": HALF},
    "glm5_next": {"text_config": {"index_topk": 8, "index_kpool": 4, **MANY_EXPERTS}},
    "glm_moe_dsa": SHARED_INDICES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1],
        "image_grid_pinpoints": [[28, 28]],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hy_v4": MANY_EXPERTS | SHARED_INDICES,
    "hy_v4_vl": {"text_config": MANY_EXPERTS | SHARED_INDICES},
    "hunyuan_vl": {"text_config": {"head_dim": 8, **MROPE}, "vision_config": {"max_image_size": 64, "max_vit_seq_len": 64}},
    "janus": {"vq_config": CODES},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"n_routed_experts": 16, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {
        "vision_config": {"layer_types": ["full_attention", "window_attention"]},
        "audio_config": {"hidden_sizes": [8, 8, 8, 8], "patch_sizes": [16, 6, 5, 4], "depths": [1] * 4, "num_hidden_layers": 4},
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2, "image_size": 32, "patch_size": 16, "max_img_size": 64}
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "output_gate_type": "silu",
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,  # else buckets are drawn anew in each pass
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "feed_forward_size": 64,
        "attention_head_size": 8,
        **dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 8),
        "num_buckets": 2,
        **DECODER,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 32,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 32,
        "shape_vocab_size": 8,
        **DECODER,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX", **DECODER},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8, "num_experts": 32, "moe_intermediate_size": 128},
}
OWN["dots3_note"] = {
    "text_config": OWN["dots3_note_text"],
    "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
}
OWN["qwen3_omni_moe_thinker"] = {"audio_config": {"downsample_hidden_size": 8, "max_source_positions": 16}}
OWN["gemma4_assistant"] = {
    "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    "backbone_hidden_size": 32,
}
OWN["gemma4_unified_assistant"] = {"text_config": {"num_kv_shared_layers": 2}, "backbone_hidden_size": 32, "num_centroids": 8}
OWN["inkling2_loop_text"] = {
    "rel_extent": 8,
    "num_hidden_layers": 3,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "loop_gate_rank": 4,
}
OWN["inkling2_loop"] = {"text_config": OWN["inkling2_loop_text"]}
for kind in ("inkling2_text", "inkling_text"):
    OWN[kind] = {"rel_extent": 8}
for kind in ("inkling2", "inkling_mm_model"):
    OWN[kind] = {"text_config": {"rel_extent": 8}}
OWN["jamba"] = FAMILIES["jamba"]
OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}
OWN["diffusion_gemma"] = {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}}


def small(kind: str, **changes: Any) -> PretrainedConfig:
    """The tiny configuration of a type."""
    return AutoConfig.for_model(kind, **(_merged(_shrunk(AutoConfig.for_model(kind)), OWN.get(kind, {})) | changes))


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The settings of both, part by part; those of the other win."""
    inner = {name: _merged(one[name], value) for name, value in other.items() if _is_part(one.get(name)) and _is_part(value)}
    return one | other | inner


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "rope_type" not in value


def saved(kind: str, folder: Path) -> tuple[torch.nn.Module, str | tuple[()]]:
    """Writes a random model of a type as it is published; the model, and what cannot be pruned of it."""
    config = small(kind)
    images = type(config) in AutoModelForImageTextToText._model_mapping
    torch.manual_seed(0)
    whole = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_config(config)
    whole.save_pretrained(folder / "model", max_shard_size="100KB")
    torch.manual_seed(0)
    model = whole if isinstance(whole, kind_of(config)._model_mapping[type(config)]) else kind_of(config).from_config(config)
    return model.eval().requires_grad_(False), EXCLUDED.get(kind, ())


def _shrunk(config: PretrainedConfig, vision: bool = False) -> dict[str, Any]:
    """What is to be said to a configuration's class to make it tiny."""
    given = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    settings: dict[str, Any] = {}
    for name, value in given.items():
        own = vars(config).get(name, value)
        if isinstance(own, PretrainedConfig):
            settings[name] = _shrunk(own, name not in ("text_config", "llm_config")) | {"model_type": own.model_type}
        elif type(value) is int and name.endswith(("token_id", "token_index")):
            settings[name] = min(value, VOCABULARY - 1)
        elif type(value) is int and value > 0 and name in (SIZE | VISION if vision else SIZE):
            settings[name] = (SIZE | VISION)[name] if vision else SIZE[name]
    layers = given.get("num_hidden_layers")
    lists = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == layers and layers > 2}
    kinds = {name: list(dict.fromkeys(value)) for name, value in lists.items() if all(type(one) is str for one in value)}
    if lists:
        settings["num_hidden_layers"] = count = max(LAYERS, *map(len, kinds.values()), 0)
        settings |= {name: (kinds.get(name, value) * count)[:count] for name, value in lists.items()}
    if "kv_lora_rank" in given:  # latent attention has one key for each query
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    rope = given.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        settings["rope_parameters"] = rope | {"mrope_section": [1, 1, 2]}
    return settings
