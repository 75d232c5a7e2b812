"""Published Llama-like models by family and flavor."""

from dataclasses import replace
from functools import partial
from typing import Any

from dtron.models.llama import LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.models.rope import DynamicScaling, Llama3Scaling, YarnScaling
from dtron.models.variants import Variant

__all__ = ["FAMILIES"]


def _model(vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(vocab, dim, layers, heads, kv_heads, ffn, **more)


_DEBUG = _model(4096, 256, 6, 8, 4, 768)
_LLAMA3 = {
    "debugmodel": replace(_DEBUG, rope_theta=500000.0),
    "8B": _model(128256, 4096, 32, 32, 8, 14336, rope_theta=500000.0),
    "70B": _model(128256, 8192, 80, 64, 8, 28672, rope_theta=500000.0),
    "405B": _model(128256, 16384, 126, 128, 8, 53248, rope_theta=500000.0),
}
_QWEN2: dict[str, Any] = {"rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN3: dict[str, Any] = {"rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True, "head_dim": 128}
_SCALED = {factor: Llama3Scaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 16.0, 32.0)}
_SCALED_32 = {"rope_theta": 500000.0, "rope_scaling": _SCALED[32.0], "tie_embeddings": True}

_MIXTRAL: dict[str, Any] = {"rope_theta": 1e6, "norm_eps": 1e-5}
_GPT_OSS: dict[str, Any] = {
    "rope_theta": 150000.0, "rope_scaling": YarnScaling(32.0, 4096, truncate=False), "head_dim": 64, "qkv_bias": True,
    "o_bias": True, "attention_sinks": True, "windows": (128, None),
}  # fmt: skip
_GPT_OSS_EXPERTS = partial(MoEConfig, biases=True, swiglu_limit=7.0)
_OLMOE: dict[str, Any] = {"qk_norm_whole": True, "norm_eps": 1e-5}

_OLMO2: dict[str, Any] = {
    "qk_norm_whole": True, "norm_eps": 1e-6, "rope_theta": 500000.0, "variant": Variant(norms="after"),
}  # fmt: skip
# As published, with the scaling by which layers without a window were trained further to 65,536 tokens.
_OLMO3: dict[str, Any] = _OLMO2 | {
    "windows": (4096, 4096, 4096, None), "ropes": ("local", "local", "local", "global"), "local_rope_theta": 500000.0,
    "rope_scaling": YarnScaling(8.0, 8192, attention_factor=1.2079441541679836),
}  # fmt: skip
_STARCODER2: dict[str, Any] = {
    "qkv_bias": True, "o_bias": True, "mlp_bias": True, "windows": (4096,), "tie_embeddings": True,
    "variant": Variant("layer_bias", activation="gelu_tanh", gated=False),
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "head_dim": 256, "norm_eps": 1e-6, "tie_embeddings": True,
    "variant": Variant("rms_1p", activation="gelu_tanh", embedding_multiplier="sqrt"),
}  # fmt: skip
_NEMOTRON: dict[str, Any] = {
    "head_dim": 128, "partial_rotary_factor": 0.5, "variant": Variant("layer_1p", activation="relu2", gated=False),
}  # fmt: skip
_APERTUS: dict[str, Any] = {
    "qk_norm": True, "rope_theta": 12e6, "rope_scaling": _SCALED[8.0],
    "variant": Variant(activation="xielu", gated=False),
}  # fmt: skip
_STABLELM: dict[str, Any] = {"partial_rotary_factor": 0.25, "variant": Variant("layer_bias")}

_SMOLLM3: dict[str, Any] = {
    "rope_theta": 5e6, "norm_eps": 1e-6, "tie_embeddings": True, "ropes": ("global", "global", "global", "none"),
}  # fmt: skip
_SEED_OSS: dict[str, Any] = {"rope_theta": 1e7, "norm_eps": 1e-6, "qkv_bias": True, "head_dim": 128}
_PHI: dict[str, Any] = {
    "qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_bias": True,
    "variant": Variant("layer_bias", norms="parallel", activation="gelu_tanh", gated=False),
}  # fmt: skip


_GEMMA3: dict[str, Any] = {
    "head_dim": 256, "norm_eps": 1e-6, "tie_embeddings": True, "qk_norm": True, "attention_scale": 256**-0.5,
    "rope_theta": 1e6, "ropes": (*5 * ("local",), "global"), "windows": (*5 * (512,), None),
    "variant": replace(_GEMMA["variant"], norms="both"),
}  # fmt: skip
_GLM4: dict[str, Any] = {"partial_rotary_factor": 0.5, "variant": Variant(norms="both")}
_EXAONE4: dict[str, Any] = {"qk_norm": True, "rope_theta": 1e6, "variant": Variant(norms="after")}
_COHERE2: dict[str, Any] = {
    "rope_theta": 50000.0, "tie_embeddings": True, "ropes": (*3 * ("global",), "none"),
    "windows": (*3 * (4096,), None), "variant": Variant("layer", norms="parallel", logits_multiplier=0.25),
}  # fmt: skip


def _gemma2(head_size: int, scalar: float, window: int = 4096) -> dict[str, Any]:
    variant = replace(_GEMMA["variant"], norms="both", logits_softcap=30.0)
    scores = {"attention_scale": scalar**-0.5, "attention_softcap": 50.0, "windows": (window, None)}
    return _GEMMA | {"variant": variant, "head_dim": head_size} | scores


def _granite(embedding: float, logits: float, residual: float, attention: float) -> dict[str, Any]:
    variant = Variant(embedding_multiplier=embedding, residual_multiplier=residual, logits_multiplier=1 / logits)
    return {"variant": variant, "attention_scale": attention, "tie_embeddings": True}


def _cohere(logits: float, theta: float, norm_per_head: bool = False) -> dict[str, Any]:
    variant = Variant("layer", norms="parallel", norm_per_head=norm_per_head, logits_multiplier=logits)
    return {"variant": variant, "rope_theta": theta, "tie_embeddings": True}


# Sources: the config.json of each model on the Hugging Face hub.
FAMILIES: dict[str, dict[str, LlamaConfig]] = {
    "llama2": {
        "debugmodel": _DEBUG,
        "7B": _model(32000, 4096, 32, 32, 32, 11008),
        "13B": _model(32000, 5120, 40, 40, 40, 13824),
        "70B": _model(32000, 8192, 80, 64, 8, 28672),
    },
    "llama3": _LLAMA3,
    "llama3.1": {name: replace(c, rope_scaling=_SCALED[8.0]) for name, c in _LLAMA3.items()},
    "llama3.2": {
        "debugmodel": replace(_LLAMA3["debugmodel"], rope_scaling=_SCALED[32.0], tie_embeddings=True),
        "1B": _model(128256, 2048, 16, 32, 8, 8192, **_SCALED_32),
        "3B": _model(128256, 3072, 28, 24, 8, 8192, **_SCALED_32),
    },
    "smollm": {
        "debugmodel": replace(_DEBUG, tie_embeddings=True),
        "135M": _model(49152, 576, 30, 9, 3, 1536, tie_embeddings=True),
        "360M": _model(49152, 960, 32, 15, 5, 2560, tie_embeddings=True),
        "1.7B": _model(49152, 2048, 24, 32, 32, 8192, tie_embeddings=True),
    },
    "qwen2": {
        "debugmodel": replace(_DEBUG, **_QWEN2, tie_embeddings=True),
        "0.5B": _model(151936, 896, 24, 14, 2, 4864, **_QWEN2, tie_embeddings=True),
        "1.5B": _model(151936, 1536, 28, 12, 2, 8960, **_QWEN2, tie_embeddings=True),
        "7B": _model(152064, 3584, 28, 28, 4, 18944, **_QWEN2),
        "72B": _model(152064, 8192, 80, 64, 8, 29568, **_QWEN2),
    },
    "qwen3": {
        "debugmodel": replace(_DEBUG, **_QWEN3 | {"head_dim": 32}, tie_embeddings=True),
        "0.6B": _model(151936, 1024, 28, 16, 8, 3072, **_QWEN3, tie_embeddings=True),
        "1.7B": _model(151936, 2048, 28, 16, 8, 6144, **_QWEN3, tie_embeddings=True),
        "4B": _model(151936, 2560, 36, 32, 8, 9728, **_QWEN3, tie_embeddings=True),
        "8B": _model(151936, 4096, 36, 32, 8, 12288, **_QWEN3),
        "14B": _model(151936, 5120, 40, 40, 8, 17408, **_QWEN3),
        "32B": _model(151936, 5120, 64, 64, 8, 25600, **_QWEN3),
    },
    "mistral": {
        "debugmodel": replace(_DEBUG, windows=(64,)),
        "7B-v0.1": _model(32000, 4096, 32, 32, 8, 14336, windows=(4096,)),
        "7B-v0.3": _model(32768, 4096, 32, 32, 8, 14336, rope_theta=1e6),
        "Ministral-8B": _model(131072, 4096, 36, 32, 8, 12288, rope_theta=1e8, windows=(32768,)),
        "Nemo-12B": _model(131072, 5120, 40, 32, 8, 14336, head_dim=128, rope_theta=1e6),
        "Small-24B": _model(131072, 5120, 40, 32, 8, 32768, head_dim=128, rope_theta=1e8),
    },
    "yi": {
        "debugmodel": replace(_DEBUG, rope_theta=5e6),
        "6B": _model(64000, 4096, 32, 32, 4, 11008, rope_theta=5e6),
        "1.5-9B": _model(64000, 4096, 48, 32, 4, 11008, rope_theta=5e6, norm_eps=1e-6),
        "34B": _model(64000, 7168, 60, 56, 8, 20480, rope_theta=5e6),
    },
    "deepseek_llm": {
        "debugmodel": replace(_DEBUG, norm_eps=1e-6),
        "7B": _model(102400, 4096, 30, 32, 32, 11008, norm_eps=1e-6),
        "67B": _model(102400, 8192, 95, 64, 8, 22016, norm_eps=1e-6),
    },
    # Other positions and biases than Llama's, and other names in Hugging Face's folders.
    "smollm3": {
        "debugmodel": replace(_DEBUG, **_SMOLLM3),
        "3B": _model(128256, 2048, 36, 16, 4, 11008, **_SMOLLM3),
    },
    "seed_oss": {
        "debugmodel": replace(_DEBUG, **_SEED_OSS | {"head_dim": 64}),
        "36B": _model(155136, 5120, 64, 80, 8, 27648, **_SEED_OSS),
    },
    "internlm3": {
        "debugmodel": replace(_DEBUG, rope_theta=5e7, rope_scaling=DynamicScaling(6.0, 32768)),
        "8B": _model(
            128512, 4096, 48, 32, 2, 10240, rope_theta=5e7, rope_scaling=DynamicScaling(6.0, 32768)
        ),
    },
    "ernie4_5": {
        "debugmodel": replace(_DEBUG, rope_theta=500000.0, head_dim=64, tie_embeddings=True),
        "0.3B": _model(103424, 1024, 18, 16, 2, 3072, rope_theta=500000.0, head_dim=128, tie_embeddings=True),
    },
    "phi": {
        "debugmodel": replace(_DEBUG, **_PHI, n_kv_heads=8, partial_rotary_factor=0.5),
        "1.5": _model(51200, 2048, 24, 32, 32, 8192, **_PHI, partial_rotary_factor=0.5),
        "2": _model(51200, 2560, 32, 32, 32, 10240, **_PHI, partial_rotary_factor=0.4),
    },
    # Those with longrope, the 128k versions and Phi-4-mini, by their config.json, which has its many factors.
    "phi3": {
        "debugmodel": replace(_DEBUG, windows=(2047,), partial_rotary_factor=0.75),
        "mini-4k": _model(32064, 3072, 32, 32, 32, 8192, windows=(2047,)),
        "medium-4k": _model(32064, 5120, 40, 40, 10, 17920, windows=(2047,)),
        "phi-4": _model(100352, 5120, 40, 40, 10, 17920, rope_theta=250000.0),
    },
    # Mixtures of experts. Where every layer is one, ffn_dim is not used; it is what the config.json says.
    "mixtral": {
        "debugmodel": replace(_DEBUG, **_MIXTRAL, ffn_dim=256, moe=MoEConfig(8, 2, 256)),
        "8x7B": _model(32000, 4096, 32, 32, 8, 14336, **_MIXTRAL, moe=MoEConfig(8, 2, 14336)),
        "8x22B": _model(32000, 6144, 56, 48, 8, 16384, **_MIXTRAL, moe=MoEConfig(8, 2, 16384)),
    },
    "qwen3_moe": {
        "debugmodel": replace(_DEBUG, **_QWEN3 | {"head_dim": 32}, moe=MoEConfig(16, 4, 128)),
        "30B-A3B": _model(151936, 2048, 48, 32, 4, 6144, **_QWEN3, moe=MoEConfig(128, 8, 768)),
        "235B-A22B": _model(151936, 4096, 94, 64, 4, 12288, **_QWEN3, moe=MoEConfig(128, 8, 1536)),
    },
    "gpt_oss": {
        "debugmodel": replace(
            _DEBUG, **_GPT_OSS | {"head_dim": 32, "windows": (64, None)}, ffn_dim=128, moe=_GPT_OSS_EXPERTS(8, 2, 128)
        ),
        "20B": _model(201088, 2880, 24, 64, 8, 2880, **_GPT_OSS, moe=_GPT_OSS_EXPERTS(32, 4, 2880)),
        "120B": _model(201088, 2880, 36, 64, 8, 2880, **_GPT_OSS, moe=_GPT_OSS_EXPERTS(128, 4, 2880)),
    },
    "olmoe": {
        "debugmodel": replace(
            _DEBUG, **_OLMOE, n_kv_heads=8, ffn_dim=128, moe=MoEConfig(16, 4, 128, normalize_top_k=False)
        ),
        "1B-7B": _model(50304, 2048, 16, 16, 16, 1024, **_OLMOE, moe=MoEConfig(64, 8, 1024, normalize_top_k=False)),
    },
    # Other parts than Llama's: see dtron/models/variants.py.
    "granite": {
        "debugmodel": replace(_DEBUG, **_granite(12.0, 8.0, 0.22, 1 / 32)),
        "2B": _model(49155, 2048, 40, 32, 8, 8192, **_granite(12.0, 8.0, 0.22, 1 / 64)),
        "8B": _model(49155, 4096, 40, 32, 8, 12800, **_granite(12.0, 16.0, 0.22, 1 / 128)),
    },
    "olmo2": {
        "debugmodel": replace(_DEBUG, **_OLMO2, n_kv_heads=8),
        "1B": _model(100352, 2048, 16, 16, 16, 8192, **_OLMO2),
        "7B": _model(100352, 4096, 32, 32, 32, 11008, **_OLMO2),
        "13B": _model(100352, 5120, 40, 40, 40, 13824, **_OLMO2),
        "32B": _model(100352, 5120, 64, 40, 8, 27648, **_OLMO2),
    },
    "olmo3": {
        "debugmodel": replace(_DEBUG, **_OLMO3 | {"windows": (64, 64, 64, None)}, n_kv_heads=8),
        "7B": _model(100278, 4096, 32, 32, 32, 11008, **_OLMO3),
        "32B": _model(100278, 5120, 64, 40, 8, 27648, **_OLMO3),
    },
    "starcoder2": {
        "debugmodel": replace(_DEBUG, **_STARCODER2 | {"windows": (256,)}),
        "3B": _model(49152, 3072, 30, 24, 2, 12288, **_STARCODER2, rope_theta=999999.4420358813),
        "7B": _model(49152, 4608, 32, 36, 4, 18432, **_STARCODER2, rope_theta=1e6),
    },
    "gemma": {
        "debugmodel": replace(_DEBUG, **_GEMMA | {"head_dim": 64}),
        "2B": _model(256000, 2048, 18, 8, 1, 16384, **_GEMMA),
        "7B": _model(256000, 3072, 28, 16, 16, 24576, **_GEMMA),
    },
    "gemma2": {
        "debugmodel": replace(_DEBUG, **_gemma2(64, 64, 256)),
        "2B": _model(256000, 2304, 26, 8, 4, 9216, **_gemma2(256, 256)),
        "9B": _model(256000, 3584, 42, 16, 8, 14336, **_gemma2(256, 256)),
        "27B": _model(256000, 4608, 46, 32, 16, 36864, **_gemma2(128, 144)),
    },
    "gemma3": {
        "debugmodel": replace(_DEBUG, **_GEMMA3 | {"head_dim": 64, "windows": (*5 * (256,), None)}),
        "270M": _model(262144, 640, 18, 4, 1, 2048, **_GEMMA3),
        "1B": _model(262144, 1152, 26, 4, 1, 6912, **_GEMMA3),
    },
    "nemotron": {
        "debugmodel": replace(_DEBUG, **_NEMOTRON | {"head_dim": 64}),
        "minitron-4B": _model(256000, 3072, 32, 24, 8, 9216, **_NEMOTRON),
    },
    "cohere": {
        "debugmodel": replace(_DEBUG, **_cohere(0.0625, 8e6)),
        "aya-23-8B": _model(256000, 4096, 32, 32, 8, 14336, **_cohere(0.0625, 10000.0)),
        "command-r": _model(256000, 8192, 40, 64, 64, 22528, **_cohere(0.0625, 8e6)),
        "command-r-plus": _model(256000, 12288, 64, 96, 8, 33792, **_cohere(0.8333333333333334, 7.5e7, True)),
    },
    "cohere2": {
        "debugmodel": replace(_DEBUG, **_COHERE2),
        "command-r7b": _model(256000, 4096, 32, 32, 8, 14336, **_COHERE2),
        "command-a": _model(256000, 12288, 64, 96, 8, 36864, **_COHERE2),
    },
    "glm4": {
        "debugmodel": replace(_DEBUG, **_GLM4),
        "9B": _model(151552, 4096, 40, 32, 2, 13696, **_GLM4, qkv_bias=True),
        "32B": _model(151552, 6144, 61, 48, 2, 23040, **_GLM4, head_dim=128),
    },
    "exaone4": {
        "debugmodel": replace(_DEBUG, **_EXAONE4, tie_embeddings=True, rope_scaling=_SCALED[16.0]),
        "1.2B": _model(102400, 2048, 30, 32, 8, 4096, **_EXAONE4, tie_embeddings=True, rope_scaling=_SCALED[16.0]),
        "32B": _model(
            102400, 5120, 64, 40, 8, 27392, **_EXAONE4, rope_scaling=_SCALED[16.0], windows=(*3 * (4096,), None),
            ropes=(*3 * ("global",), "none"),
        ),
    },
    "apertus": {
        "debugmodel": replace(_DEBUG, **_APERTUS),
        "8B": _model(131072, 4096, 32, 32, 8, 21504, **_APERTUS),
        "70B": _model(131072, 8192, 80, 64, 8, 43008, **_APERTUS),
    },
    "stablelm": {
        "debugmodel": replace(_DEBUG, **_STABLELM, qkv_bias=True),
        "3B": _model(50304, 2560, 32, 32, 32, 6912, **_STABLELM),
        "2-1.6B": _model(100352, 2048, 24, 32, 32, 5632, **_STABLELM, qkv_bias=True),
        "2-12B": _model(
            100352, 5120, 40, 32, 8, 13824,
            **_STABLELM | {"variant": Variant("layer_bias", norms="parallel", norm_per_head=True)},
        ),
    },
}  # fmt: skip
