"""Hugging Face models with random weights: the published config.json of each, its sizes shrunk."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parity.single import CLIP, batch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHRUNK = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 96,
}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5}
SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768,
    "max_window_layers": 21, "use_sliding_window": False, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "head_dim": 16,
    "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
    "max_position_embeddings": 40960,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
HELIUM = {
    "model_type": "helium", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
    "head_dim": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8, "rope_theta": 100000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": None,
    "original_max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False,
    "max_position_embeddings": 65536, "max_window_layers": 28, "no_rope_layer_interval": 4, "pretraining_tp": 2,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False, "num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": 4,
}  # fmt: skip
SEED_OSS = {
    "model_type": "seed_oss", "attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "attention_out_bias": False, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 524288,
    "mlp_bias": False, "rms_norm_eps": 1e-6, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
INTERNLM3 = {
    "model_type": "internlm3", "attention_dropout": 0.0, "bias": False, "qkv_bias": False, "head_dim": 8,
    "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000, "tie_word_embeddings": False,
}  # fmt: skip
ERNIE = {
    "model_type": "ernie4_5", "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "head_dim": 16, "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
PHI2 = {
    "model_type": "phi", "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.0,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "num_key_value_heads": 8,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.0, 1.1, 1.25], "long_factor": [1.05, 1.5, 3.0, 24.0]}
# The published multiplier of the embedding, 12, makes a small random model repeat one token.
GRANITE = {
    "model_type": "granite", "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier": 0.015625,
    "embedding_multiplier": 0.5, "hidden_act": "silu", "logits_scaling": 8.0, "max_position_embeddings": 4096,
    "mlp_bias": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000,
    "tie_word_embeddings": True,
}  # fmt: skip
OLMO2 = {
    "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "max_position_embeddings": 4096, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "gelu",
    "max_position_embeddings": 8192, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "query_pre_attn_scalar": 7,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 8,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768, "num_key_value_heads": 2, "query_pre_attn_scalar": 7, "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 8,
    "sliding_window_pattern": 2,
}  # fmt: skip
CWM = {
    "model_type": "cwm", "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu", "mlp_bias": False,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_scaling": SCALING | {"factor": 16.0},
    "rope_theta": 1000000.0, "sliding_window": 8, "tie_word_embeddings": False,
}  # fmt: skip
STARCODER2 = {
    "model_type": "starcoder2", "attention_dropout": 0.0, "embedding_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-5, "norm_type": "layer_norm",
    "residual_dropout": 0.0, "rope_theta": 999999.4420358813, "sliding_window": 8, "use_bias": True,
}  # fmt: skip
ARCEE = {
    "model_type": "arcee", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 8, "hidden_act": "relu2",
    "max_position_embeddings": 65536, "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "type": "yarn",
    },
    "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "relu2",
    "max_position_embeddings": 4096, "mlp_bias": False, "norm_eps": 1e-5, "partial_rotary_factor": 0.5,
    "rope_theta": 10000, "tie_word_embeddings": False,
}  # fmt: skip
COHERE = {
    "model_type": "cohere", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "max_position_embeddings": 8192, "rope_theta": 8000000.0,
    "tie_word_embeddings": True, "use_qk_norm": False,
}  # fmt: skip
STABLELM = {
    "model_type": "stablelm", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "qk_layernorm": False,
    "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False, "use_parallel_residual": False,
    "use_qkv_bias": True, "num_attention_heads": 4,
}  # fmt: skip
COHERE2 = {
    "model_type": "cohere2", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "layer_switch": 2,
    "layer_norm_eps": 1e-5, "logit_scale": 0.25, "max_position_embeddings": 8192, "order_of_interleaved_layers":
    "local_attn_first", "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct":
    1.0, "sliding_window": 8, "sliding_window_pattern": 2, "use_embedding_sharing": True, "use_gated_activation": True,
    "use_parallel_block": True, "use_parallel_embedding": True,
}  # fmt: skip
GLM4 = {
    "model_type": "glm4", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu",
    "max_position_embeddings": 32768, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
EXAONE4 = {
    "model_type": "exaone4", "attention_dropout": 0.0, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 65536, "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None,
    "layer_types": ["full_attention"] * 3, "rope_scaling": SCALING | {"factor": 16.0}, "tie_word_embeddings": True,
}  # fmt: skip
APERTUS = {
    "model_type": "apertus", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "xielu",
    "hidden_dropout": 0.0, "max_position_embeddings": 65536, "mlp_bias": False, "post_norm": False, "qk_norm": True,
    "rms_norm_eps": 1e-5, "rope_scaling": SCALING | {"type": "llama3"}, "rope_theta": 12000000,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_act": "silu", "max_position_embeddings": 32768, "num_experts_per_tok": 2,
    "num_local_experts": 4, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_act": "silu", "attention_dropout": 0.0, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "norm_topk_prob": False,
    "max_position_embeddings": 4096, "num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
}  # fmt: skip
OLMO3 = {
    "model_type": "olmo3", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"], "num_hidden_layers": 5,
    "max_position_embeddings": 65536, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 500000,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "sliding_window": 8, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0, "experts_per_token": 3, "head_dim": 16,
    "hidden_act": "silu", "initial_context_length": 4096, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4, "max_position_embeddings": 131072, "num_experts_per_tok": 3, "num_local_experts": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "sliding_window": 8, "swiglu_limit": 0.5, "tie_word_embeddings": False,
}  # fmt: skip
# What the model's own config.json has besides its sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": LLAMA | {"num_key_value_heads": 8, "rope_theta": 10000.0, "max_position_embeddings": 4096},
    "Meta-Llama-3-8B": LLAMA | {"rope_theta": 500000.0, "max_position_embeddings": 8192},
    "Llama-3.1-8B": LLAMA
    | {"rope_theta": 500000.0, "rope_scaling": SCALING, "max_position_embeddings": 131072, "bos_token_id": 1},
    "Llama-3.2-1B": LLAMA
    | {
        "rope_theta": 500000.0, "rope_scaling": SCALING | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 8,
        "max_position_embeddings": 131072,
    },
    "SmolLM-135M": LLAMA
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    "Qwen2-0.5B": QWEN2 | {"tie_word_embeddings": True},
    "Qwen2-7B": QWEN2 | {"tie_word_embeddings": False},
    "Qwen2.5-7B-Instruct, 128k": QWEN2 | {"rope_scaling": YARN, "max_position_embeddings": 131072},
    "Qwen3-8B, 128k": QWEN3
    | {"rope_scaling": YARN | {"rope_type": "yarn"}, "max_position_embeddings": 131072},
    "deepseek-coder-6.7b-base": LLAMA
    | {
        "num_key_value_heads": 8, "rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rms_norm_eps": 1e-6, "max_position_embeddings": 16384,
    },
    "deepseek-llm-7b-base": LLAMA
    | {"num_key_value_heads": 8, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
    "InternLM2, Llama with biases": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 4096},
    "Qwen3 with attention biases": QWEN3 | {"attention_bias": True},
    "Yi-6B": LLAMA
    | {"rope_theta": 5000000.0, "max_position_embeddings": 4096, "pretraining_tp": 1, "rope_scaling": None},
    "dynamic NTK, trained with 16": LLAMA
    | {"rope_theta": 10000.0, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "max_position_embeddings": 16},
    "Qwen3-0.6B": QWEN3 | {"tie_word_embeddings": True},
    "Qwen3-8B": QWEN3 | {"tie_word_embeddings": False},
    "helium-1-preview-2b": HELIUM,
    # Windows are shrunk like the sizes, so that they are shorter than the texts of the tests.
    "Mistral-7B-v0.1": MISTRAL | {"sliding_window": 8, "rope_theta": 10000.0},
    "Mistral-7B-v0.3": MISTRAL | {"sliding_window": None},
    "Mistral-Nemo-Base-2407": MISTRAL | {"sliding_window": None, "head_dim": 16, "max_position_embeddings": 1024000},
    "Ministral-8B-Instruct-2410": MISTRAL | {"sliding_window": 16, "head_dim": 16, "rope_theta": 100000000.0},
    "Ministral, every third layer full": MISTRAL
    | {
        "model_type": "ministral", "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "Qwen2-7B, windows from layer 1": QWEN2
    | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": False},
    "Qwen3-8B, layer_types": QWEN3
    | {
        "use_sliding_window": True, "sliding_window": 8, "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "SmolLM3-3B": SMOLLM3 | {"no_rope_layers": [1, 1, 1, 0]},
    "SmolLM3-3B, its layers by the interval": SMOLLM3 | {"no_rope_layer_interval": 2, "attention_bias": True},
    "Seed-OSS-36B": SEED_OSS,
    "Seed-OSS-36B, with output bias": SEED_OSS | {"attention_out_bias": True, "mlp_bias": True},
    "internlm3-8b-instruct": INTERNLM3,
    "ERNIE-4.5-0.3B-PT": ERNIE,
    "ERNIE-4.5, with biases": ERNIE | {"use_bias": True, "tie_word_embeddings": False},
    "phi-2": PHI2,
    "Phi-3-mini-128k-instruct": PHI3
    | {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": LONGROPE,
    },
    "Phi-3-mini-4k-instruct": PHI3
    | {"num_key_value_heads": 8, "max_position_embeddings": 4096, "sliding_window": 20, "rope_scaling": None},
    "Phi-3-mini-128k-instruct, trained with 16": PHI3
    | {
        "num_key_value_heads": 8, "max_position_embeddings": 512, "original_max_position_embeddings": 16,
        "rope_scaling": LONGROPE,
    },
    "Phi-4": PHI3
    | {
        "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "partial_rotary_factor": 1.0,
        "rope_scaling": None, "rope_theta": 250000,
    },
    "Phi-4-mini-instruct": PHI3
    | {
        "hidden_size": 128, "max_position_embeddings": 131072, "partial_rotary_factor": 0.75, "sliding_window": 262144,
        "tie_word_embeddings": True,
        "rope_scaling": LONGROPE | {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.1, 1.4, 2.0, 5.0, 47.7]},
        "mlp_bias": False, "interpolate_factor": 1, "full_attn_mod": 1, "lm_head_bias": False,
    },
    "granite-3.0-2b-base": GRANITE,
    "OLMo-2-1124-7B": OLMO2,
    "Olmo-3-1025-7B": OLMO3,
    "Olmo-3, no scaling": OLMO3 | {"rope_scaling": None, "num_key_value_heads": 2},
    "cwm": CWM,
    "starcoder2-3b": STARCODER2,
    "vaultgemma-1b": GEMMA2 | {"model_type": "vaultgemma"},
    "gemma-7b": GEMMA,
    "gemma-2-9b": GEMMA2,
    "gemma-3-1b-pt": GEMMA3,
    "Apertus-8B-2509": APERTUS,
    "c4ai-command-r7b-12-2024": COHERE2,
    "glm-4-9b-chat-hf": GLM4 | {"model_type": "glm", "attention_bias": True},
    "GLM-4-9B-0414": GLM4,
    "EXAONE-4.0-1.2B": EXAONE4,
    "EXAONE-4.0-32B": EXAONE4
    | {
        "sliding_window": 8, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "AFM-4.5B": ARCEE,
    "Minitron-4B-Base": NEMOTRON,
    "c4ai-command-r-v01": COHERE,
    "c4ai-command-r-plus": COHERE | {"logit_scale": 0.8333333333333334, "rope_theta": 75000000.0, "use_qk_norm": True},
    "stablelm-2-1_6b": STABLELM,
    "stablelm-2-12b": STABLELM
    | {"num_key_value_heads": 2, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False},
    "Mixtral-8x7B-v0.1": MIXTRAL,
    "Mixtral, a window": MIXTRAL | {"sliding_window": 8},
    "Qwen3-30B-A3B": QWEN3
    | {
        "model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 48,
        "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 3, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "intermediate_size": 96,
    },
    "OLMoE-1B-7B-0924": OLMOE,
    "gpt-oss-20b": GPT_OSS,
}  # fmt: skip


def config_json(name: str, **change: Any) -> dict[str, Any]:
    return {**SHRUNK, **PUBLISHED[name], **change}


def attention(config: dict[str, Any]) -> str:
    """transformers' implementation of it; "sdpa" knows no soft cap, and no sinks."""
    return "eager" if config.get("attn_logit_softcapping") or config["model_type"] == "gpt_oss" else "sdpa"


def random_model(name: str, dtype: torch.dtype = torch.float32, **change: Any) -> PreTrainedModel:
    """Weights far enough from 0 and 1 that a wrong one changes the logits."""
    config = config_json(name, **change)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention(config))
    g = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            weight_of_norm = "norm" in parameter_name and not parameter_name.endswith(".bias")
            p.normal_(1.0 if weight_of_norm else 0.0, 0.1, generator=g)
    return model.to(dtype).eval()


def save_random(name: str, folder: Path, dtype: torch.dtype = torch.float32, size: str = "5GB", **change: Any) -> Path:
    random_model(name, dtype, **change).save_pretrained(folder, max_shard_size=size)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(0, SHRUNK["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))


def load_random(folder: Path | str) -> PreTrainedModel:
    """transformers' own model, in fp32."""
    implementation = attention(json.loads((Path(folder) / "config.json").read_text()))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation).eval()


@torch.no_grad()
def logits_of(folder: Path | str) -> torch.Tensor:
    """transformers' logits in fp32."""
    return load_random(folder)(tokens()).logits


def train_plainly(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[list[float], list[float]]:
    """Losses, and gradient norms before clipping, of a plain loop over the batches of the parity matrix."""
    losses, norms = [], []
    for step in range(steps):
        text, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(text).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
