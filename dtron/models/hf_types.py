"""The model types of Hugging Face that are read and written, as a table: what makes each another than Llama."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models import hf_variants as parts
from dtron.models.hf_fields import Fields, check_counts, positive, read_experts, write_experts
from dtron.models.hf_rope import pattern_of, read_rope
from dtron.models.hf_windows import (
    CWM,
    EVERYWHERE,
    GEMMA2,
    MINISTRAL,
    NOWHERE,
    QWEN,
    QWEN_MOE,
    Windows,
    all_but_every,
    read_windows,
)
from dtron.models.llama import LlamaConfig
from dtron.models.variants import XIELU, Variant

__all__ = ["DEFAULTS", "DROPOUTS", "LEGAL", "TYPES", "HFType"]

# What transformers takes for fields that a config.json does not have. num_key_value_heads is not here: it has another
# default in each type.
DEFAULTS: Fields = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
# Fields that change the architecture, and the values that our model has for each; the first is named in messages.
LEGAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "clip_qkv": (None,),
    "decoder_sparse_step": (1, None),
    "router_jitter_noise": (0, None),
    "shared_expert_intermediate_size": (None,),
}
# Shares of values that a training sets to 0, which ours does not.
DROPOUTS = ("attention_dropout", "embedding_dropout", "residual_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class HFType:
    """How a model_type is read and written.

    architecture: the class of transformers, as config.json names it; None: never written, an earlier type says the
        same.
    flags: of LlamaConfig, which a model of this type always has.
    defaults: what transformers takes for missing fields, where it is not in DEFAULTS.
    hints: field -> what the message says besides where its value is not legal.
    legal: values of fields that change the architecture, where they are not in LEGAL.
    biases: fields that say whether matrices have biases -> the flags that they set.
    read: (config.json with the defaults, file) -> further fields of LlamaConfig.
    write: LlamaConfig -> further fields of config.json.
    activation, eps: names of the fields.
    head_size_of_its_own: whether there is a head_dim; for others it is hidden_size / num_attention_heads.
    experts: whether it is a mixture of experts, which `read` gives then, and `write` needs.
    windows: which layers have windows.
    partial_rotary: whether its models may rotate a part of each head; for others transformers ignores the field.
    renames: (theirs, ours): parts of the weights' names, between dots.
    norm_lists: norms of queries and keys with weights of their own for each head are as many tensors.
    interleaved: rotary embeddings rotate neighbours of a head together, where ours rotate halves: the rows of q and k
        are in another order.
    expert_columns: the experts are in few tensors, with columns where ours have rows.
    constants: (name within a layer, value): stored numbers that are no weights of ours.
    fused: (theirs, ours): projections whose rows are below one another in one tensor.
    """

    architecture: str | None
    flags: Fields = field(default_factory=dict)
    defaults: Fields = field(default_factory=dict)
    legal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Fields, Path | str], Fields] = lambda hf, file: {}
    write: Callable[[LlamaConfig], Fields] = lambda c: {}
    activation: str = "hidden_act"
    eps: str = "rms_norm_eps"
    head_size_of_its_own: bool = True
    experts: bool = False
    windows: Windows = NOWHERE
    partial_rotary: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    norm_lists: bool = False
    interleaved: bool = False
    expert_columns: bool = False
    constants: tuple[tuple[str, float], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


NO_WINDOW = {"sliding_window": (None,)}
# Qwen's files often name a window that is not used.
QWEN_WINDOW: Fields = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN_LEGAL = {"use_sliding_window": (False, True, None)}

ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "o_bias")}
BIASES = ATTENTION_BIAS | {"mlp_bias": ("mlp_bias",)}
QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))


TIED: Fields = {"tie_word_embeddings": True}
# Gemma 1's "gelu" is the same; of the later ones the field is another.
GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu", None), "hidden_activation": ("gelu_pytorch_tanh", None)}
GEMMA_DEFAULTS = TIED | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
GLM_DEFAULTS: Fields = {
    "head_dim": 128, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5, "attention_bias": True,
}  # fmt: skip
RELU2 = {"hidden_act": ("relu2", None)}
PHI = Variant("layer_bias", norms="parallel", activation="gelu_tanh", gated=False)
PHI_LEGAL = {"hidden_act": ("gelu_new", "gelu_pytorch_tanh", None), "qk_layernorm": (False, None)}
BOTH_WAYS = {"use_bidirectional_attention": (False, None)}


def _read_mixtral(hf: Fields, file: Path | str) -> Fields:
    return {"moe": read_experts(hf, "intermediate_size", True, file)}


def _write_mixtral(c: LlamaConfig) -> Fields:
    fields = write_experts(c, "intermediate_size")
    fields["num_local_experts"] = fields.pop("num_experts")
    return fields


def _read_qwen3_moe(hf: Fields, file: Path | str) -> Fields:
    return {"moe": read_experts(hf, "moe_intermediate_size", bool(hf.get("norm_topk_prob")), file)}


def _write_qwen3_moe(c: LlamaConfig) -> Fields:
    assert c.moe is not None
    fields = write_experts(c, "moe_intermediate_size") | {"norm_topk_prob": c.moe.normalize_top_k}
    return fields | {"decoder_sparse_step": 1, "mlp_only_layers": list(range(c.moe.n_dense_layers))}


def _read_olmoe(hf: Fields, file: Path | str) -> Fields:
    return {"moe": read_experts(hf, "intermediate_size", bool(hf.get("norm_topk_prob")), file)}


def _write_olmoe(c: LlamaConfig) -> Fields:
    assert c.moe is not None
    return write_experts(c, "intermediate_size") | {"norm_topk_prob": c.moe.normalize_top_k}


def _read_gpt_oss(hf: Fields, file: Path | str) -> Fields:
    if not (hf.get("rope_scaling") or hf.get("rope_parameters")):
        raise UserError(f"{file}: rope_scaling is missing; expected yarn's settings, which transformers then takes")
    moe = read_experts(hf, "intermediate_size", True, file)
    return {"moe": replace(moe, biases=True, swiglu_limit=positive(hf, "swiglu_limit", file))}


def _write_gpt_oss(c: LlamaConfig) -> Fields:
    assert c.moe is not None
    return _write_mixtral(c) | {"swiglu_limit": c.moe.swiglu_limit, "swiglu_alpha": 1.702}


OLMO3 = all_but_every(4)


def _read_olmo3(hf: Fields, file: Path | str) -> Fields:
    """A rope_scaling that is given beside no kinds of layers is of those without a window."""
    rope = read_rope(hf, file)
    if not rope["rope_scaling"] or "ropes" in rope:
        return {}
    windows = read_windows(hf, OLMO3, file)["windows"] or (None,)
    kinds = ["local" if windows[i % len(windows)] else "global" for i in range(hf["num_hidden_layers"])]
    return {"ropes": pattern_of(kinds, "global"), "local_rope_theta": rope["rope_theta"]}


def _read_smollm3(hf: Fields, file: Path | str) -> Fields:
    """Which layers have no positions: those of a list with 0, else every n-th."""
    layers, every = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    given = hf.get("no_rope_layers")
    if given is None:
        check_counts({"no_rope_layer_interval": every}, file)
        given = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(has not in (0, 1) for has in given):
        raise UserError(f"{file}: no_rope_layers = {given!r}; expected a list of {layers} numbers, 0 or 1")
    return {"ropes": pattern_of(("global" if has else "none" for has in given[:layers]), "global")}


def _write_smollm3(c: LlamaConfig) -> Fields:
    return {"no_rope_layers": [int(c.rope(layer) is not None) for layer in range(c.n_layers)]}


def _write_phi3(c: LlamaConfig) -> Fields:
    """Its readers take the trained length from outside the rotary settings."""
    trained = getattr(c.rope_scaling, "original_max_position_embeddings", None)
    return {"original_max_position_embeddings": trained} if trained else {}


# In the order in which the types are tried for a model that is written.
TYPES: dict[str, HFType] = {
    "llama": HFType("LlamaForCausalLM", defaults={"num_key_value_heads": None}, legal=NO_WINDOW, biases=BIASES),
    "mistral": HFType("MistralForCausalLM", defaults={"sliding_window": 4096}, windows=EVERYWHERE),
    "ministral": HFType("MinistralForCausalLM", defaults={"sliding_window": 4096}, windows=MINISTRAL),
    "qwen2": HFType(
        "Qwen2ForCausalLM", flags={"qkv_bias": True}, defaults=QWEN_WINDOW, legal=QWEN_LEGAL, windows=QWEN
    ),
    "qwen3": HFType(
        "Qwen3ForCausalLM", flags={"qk_norm": True}, defaults={"head_dim": 128} | QWEN_WINDOW, legal=QWEN_LEGAL,
        windows=QWEN, biases=ATTENTION_BIAS,
    ),
    "smollm3": HFType(
        "SmolLM3ForCausalLM", biases=BIASES, read=_read_smollm3, write=_write_smollm3,
        defaults=TIED | {"rope_theta": 2000000.0, "no_rope_layer_interval": 4},
    ),
    "seed_oss": HFType(
        "SeedOssForCausalLM", write=lambda c: {"attention_dropout": 0.0, "residual_dropout": 0.0},
        biases={"attention_bias": ("qkv_bias",), "attention_out_bias": ("o_bias",), "mlp_bias": ("mlp_bias",)},
        defaults={"head_dim": 128, "attention_bias": True, "attention_dropout": 0.1, "residual_dropout": 0.1},
    ),
    "internlm3": HFType(
        None, defaults={"head_dim": 128, "rms_norm_eps": 1e-5}, biases=BIASES,
        legal={"qkv_bias": (False, None), "bias": (False, None)},  # older names
    ),
    "ernie4_5": HFType(
        None, interleaved=True, biases={"use_bias": ("qkv_bias", "o_bias", "mlp_bias")},
        defaults=TIED | {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    ),
    "phi": HFType(
        "PhiForCausalLM", partial_rotary=True, head_size_of_its_own=False, eps="layer_norm_eps", legal=PHI_LEGAL,
        flags=dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True) | {"variant": PHI},
        defaults={"num_key_value_heads": None, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        renames=(
            ("dense", "o_proj"), ("fc1", "up_proj"), ("fc2", "down_proj"), ("final_layernorm", "norm"),
        ),
    ),
    "granite": HFType(
        "GraniteForCausalLM", biases=BIASES, read=parts.read_granite, write=parts.write_granite,
        defaults={
            "num_key_value_heads": None, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
    ),
    "olmo2": HFType(
        "Olmo2ForCausalLM", flags={"qk_norm_whole": True, "variant": Variant(norms="after")},
        defaults={"num_key_value_heads": None, "rms_norm_eps": 1e-5}, biases=ATTENTION_BIAS,
    ),
    "olmo3": HFType(
        "Olmo3ForCausalLM", flags={"qk_norm_whole": True, "variant": Variant(norms="after")}, windows=OLMO3,
        read=_read_olmo3, biases=ATTENTION_BIAS,
        defaults={
            "num_key_value_heads": None, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096,
        },
    ),
    "cwm": HFType(
        "CwmForCausalLM", read=parts.llama3_rope(1e6, 16.0), windows=CWM,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "head_dim": 128, "sliding_window": 8192},
    ),
    "starcoder2": HFType(
        "Starcoder2ForCausalLM", flags={"variant": Variant("layer_bias", activation="gelu_tanh", gated=False)},
        eps="norm_epsilon", windows=EVERYWHERE, biases={"use_bias": ("qkv_bias", "o_bias", "mlp_bias")},
        defaults=TIED | {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None},
        legal={"hidden_act": ("gelu_pytorch_tanh", None)}, renames=(("c_fc", "up_proj"), ("c_proj", "down_proj")),
    ),
    "gemma": HFType(
        "GemmaForCausalLM", flags={"variant": parts.GEMMA}, defaults=TIED | {"head_dim": 256},
        biases=ATTENTION_BIAS,
        legal=GELU | BOTH_WAYS,
    ),
    "gemma2": HFType(
        "Gemma2ForCausalLM", read=parts.read_gemma2, write=parts.write_gemma2, activation="hidden_activation",
        biases=ATTENTION_BIAS, windows=GEMMA2, legal=GELU | BOTH_WAYS,
        defaults=GEMMA_DEFAULTS | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "vaultgemma": HFType(
        "VaultGemmaForCausalLM", read=parts.read_vaultgemma, write=parts.write_gemma2, activation="hidden_activation",
        biases=ATTENTION_BIAS, windows=GEMMA2, legal=GELU,
        defaults=GEMMA_DEFAULTS | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        renames=(("pre_feedforward_layernorm", "post_attention_layernorm"),),
    ),
    "gemma3_text": HFType(
        "Gemma3ForCausalLM", flags={"qk_norm": True}, read=parts.read_gemma3, write=parts.write_gemma2,
        activation="hidden_activation", windows=parts.GEMMA3_WINDOWS, biases=ATTENTION_BIAS,
        legal=GELU | BOTH_WAYS | {"attn_logit_softcapping": (None,)},
        defaults=GEMMA_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    ),
    "arcee": HFType(
        "ArceeForCausalLM", flags={"variant": Variant(activation="relu2", gated=False)}, legal=RELU2,
        defaults={"num_key_value_heads": None, "rms_norm_eps": 1e-5}, biases=BIASES,
    ),
    "nemotron": HFType(
        "NemotronForCausalLM", flags={"variant": Variant("layer_1p", activation="relu2", gated=False)}, legal=RELU2,
        eps="norm_eps", defaults={"norm_eps": 1e-5, "partial_rotary_factor": 0.5}, partial_rotary=True,
        biases=BIASES,
    ),
    "cohere": HFType(
        "CohereForCausalLM", biases=ATTENTION_BIAS, read=parts.read_cohere, write=parts.write_cohere,
        eps="layer_norm_eps", interleaved=True,
        defaults=TIED | {
            "num_key_value_heads": None, "layer_norm_eps": 1e-5, "rope_theta": 500000.0, "logit_scale": 0.0625,
        },
    ),
    "cohere2": HFType(
        "Cohere2ForCausalLM", read=parts.read_cohere2, write=parts.write_cohere, eps="layer_norm_eps", interleaved=True,
        head_size_of_its_own=False, biases=ATTENTION_BIAS, windows=parts.COHERE2_WINDOWS,
        legal={"use_qk_norm": (False, None)},
        defaults=TIED | {
            "num_key_value_heads": None, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "sliding_window": 4096,
        },
    ),
    "glm": HFType(
        "GlmForCausalLM", biases={"attention_bias": ("qkv_bias",)}, partial_rotary=True,
        interleaved=True, defaults=GLM_DEFAULTS, fused=(GATE_UP,),
    ),
    "glm4": HFType(
        "Glm4ForCausalLM", flags={"variant": Variant(norms="both")}, biases={"attention_bias": ("qkv_bias",)},
        partial_rotary=True, interleaved=True, defaults=GLM_DEFAULTS, fused=(GATE_UP,),
        renames=(
            ("post_self_attn_layernorm", "post_attention_layernorm"),
            ("post_attention_layernorm", "pre_feedforward_layernorm"),
            ("post_mlp_layernorm", "post_feedforward_layernorm"),
        ),
    ),
    "exaone4": HFType(
        "Exaone4ForCausalLM", flags={"qk_norm": True, "variant": Variant(norms="after")}, read=parts.read_exaone4,
        windows=parts.EXAONE4_WINDOWS, defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    "apertus": HFType(
        "ApertusForCausalLM", flags={"qk_norm": True, "variant": Variant(activation="xielu", gated=False)},
        read=parts.llama3_rope(12e6, 8.0), biases=ATTENTION_BIAS, legal={"hidden_act": ("xielu", None)},
        defaults={"num_key_value_heads": None, "rms_norm_eps": 1e-5, "rope_theta": 12e6},
        renames=(("attention_layernorm", "input_layernorm"), ("feedforward_layernorm", "post_attention_layernorm")),
        constants=(("mlp.act_fn.beta", XIELU.BETA), ("mlp.act_fn.eps", XIELU.EPS)),
    ),
    "stablelm": HFType(
        "StableLmForCausalLM", biases={"use_qkv_bias": ("qkv_bias",)}, read=parts.read_stablelm,
        write=parts.write_stablelm, eps="layer_norm_eps", head_size_of_its_own=False, partial_rotary=True,
        defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        renames=(("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")), norm_lists=True,
    ),
    "helium": HFType(
        None, defaults={"head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100000.0}, interleaved=True,
        biases=BIASES | {"attention_bias": ("qkv_bias",)},
    ),
    "phi3": HFType(
        "Phi3ForCausalLM", write=_write_phi3, windows=EVERYWHERE, partial_rotary=True, fused=(QKV, GATE_UP),
        defaults={
            "num_key_value_heads": None, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096,
            "sliding_window": None,
        },
    ),
    "mixtral": HFType(
        "MixtralForCausalLM", defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}, experts=True,
        windows=EVERYWHERE, read=_read_mixtral, write=_write_mixtral,
        renames=(("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")),
    ),
    "qwen3_moe": HFType(
        "Qwen3MoeForCausalLM", flags={"qk_norm": True}, defaults=QWEN_WINDOW, legal=QWEN_LEGAL, experts=True,
        windows=QWEN_MOE, biases=ATTENTION_BIAS, read=_read_qwen3_moe, write=_write_qwen3_moe,
    ),
    "gpt_oss": HFType(
        "GptOssForCausalLM", flags={"attention_sinks": True}, biases=ATTENTION_BIAS, windows=all_but_every(2),
        experts=True, read=_read_gpt_oss, write=_write_gpt_oss, expert_columns=True,
        defaults={
            "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128, "attention_bias": True,
            "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
        },
        legal={"swiglu_alpha": (1.702,)},
        hints={
            "quantization_config": "; weights in MXFP4 are not read: take a copy in bfloat16, such as "
            "unsloth/gpt-oss-20b-BF16, or save one with transformers' Mxfp4Config(dequantize=True)"
        },
        renames=(("router", "gate"), ("sinks", "sinks.weight")),
    ),
    "olmoe": HFType(
        "OlmoeForCausalLM", flags={"qk_norm_whole": True}, defaults={"rms_norm_eps": 1e-5}, experts=True,
        biases=ATTENTION_BIAS,
        read=_read_olmoe, write=_write_olmoe,
    ),
}  # fmt: skip
