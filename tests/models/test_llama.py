"""The model against transformers: logits, files, parameter counts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dtron.checkpoint.hf_form import form_of
from dtron.errors import UserError
from dtron.models.families import FAMILIES
from dtron.models.flops import attention_flops_per_token, flops_per_token
from dtron.models.hf import from_hf_config, to_hf_config
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.models.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

BASE = LlamaConfig(
    vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, rope_theta=500.0, init_std=0.1
)
VARIANTS = {
    "gqa": BASE,
    "mha": replace(BASE, n_kv_heads=4),
    "tied": replace(BASE, tie_embeddings=True),
    "rope scaling": replace(BASE, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16)),
    "linear": replace(BASE, rope_scaling=LinearScaling(4.0)),
    "yarn": replace(BASE, rope_scaling=YarnScaling(4.0, 16, truncate=False)),
    "dynamic": replace(BASE, rope_scaling=DynamicScaling(4.0, 32)),
    "longrope": replace(BASE, rope_scaling=LongRopeScaling(4.0, 32, (1.0, 1.5, 2.0, 3.0), (2.0, 4.0, 6.0, 9.0))),
    "longrope, short": replace(BASE, rope_scaling=LongRopeScaling(4.0, 64, (1.0, 1.5, 2.0, 3.0), (2.0,) * 4)),
    "head size of its own": replace(BASE, head_dim=16),
    "norm eps": replace(BASE, norm_eps=0.1),
    "biases": replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "biases of attention": replace(BASE, qkv_bias=True, o_bias=True),
    "qwen2": replace(BASE, qkv_bias=True),
    "qwen3": replace(BASE, qk_norm=True, head_dim=16),
}


def hf_config(c: LlamaConfig) -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    longest = 131072
    if s := c.rope_scaling:
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(s).items()}
        rope |= {"rope_type": s.rope_type} | {n: value for n, value in fields.items() if n != "length"}
        longest = rope.pop("original_max_position_embeddings") if s.rope_type == "dynamic" else longest
    kind = "qwen2" if c.qkv_bias and not c.o_bias else "qwen3" if c.qk_norm else "llama"
    return AutoConfig.for_model(
        kind, vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.ffn_dim, head_dim=c.head_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_parameters=rope, max_position_embeddings=longest,
        attn_implementation="sdpa", attention_bias=c.o_bias, mlp_bias=c.mlp_bias,
    )  # fmt: skip


def hf_model(c: LlamaConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(c)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model


def with_weights_of(hf: PreTrainedModel, c: LlamaConfig) -> Llama:
    """Our model with transformers' weights: the same names without `model.`."""
    model = Llama(c)
    model.load_state_dict({name.removeprefix("model."): p for name, p in hf.state_dict().items()})
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path):
    config = VARIANTS[variant]
    hf = hf_model(config)
    tokens = torch.randint(0, 96, (2, 48))
    hf.config.save_pretrained(tmp_path)
    from_file = from_hf_config(str(tmp_path))
    assert replace(from_file, head_dim=config.head_dim, init_std=config.init_std) == config
    with torch.no_grad():
        expected = hf(tokens).logits
        assert expected.std() > 0.1
        for ours in (config, from_file):
            torch.testing.assert_close(with_weights_of(hf, ours)(tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["gqa", "rope scaling"])
def test_gradients_equal_transformers(variant: str):
    config = VARIANTS[variant]
    hf = hf_model(config)
    ours = with_weights_of(hf, config)
    tokens = torch.randint(0, 96, (2, 48))
    for model in (hf, ours):
        out = model(tokens)
        out = out if isinstance(out, torch.Tensor) else out.logits
        out.float().square().mean().backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in hf.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-4, atol=1e-6)


def test_each_variant_changes_the_logits():
    """The comparison above would see a setting that is ignored."""
    tokens = torch.randint(0, 96, (2, 48))
    weights = hf_model(BASE)
    base = with_weights_of(weights, BASE)(tokens)
    scalings = [c.rope_scaling for c in VARIANTS.values() if c.rope_scaling]
    changes = [{"norm_eps": 0.1}, {"rope_theta": 10000.0}, {"partial_rotary_factor": 0.5}, {"ropes": ("none",)}]
    for change in changes + [{"rope_scaling": scaling} for scaling in scalings]:
        assert (with_weights_of(weights, replace(BASE, **change))(tokens) - base).abs().max() > 1e-2


def test_positions_may_be_any_part_of_the_sequence():
    model = with_weights_of(hf_model(BASE), BASE)
    tokens = torch.randint(0, 96, (2, 16))
    shifted = model(tokens, torch.arange(5, 21).expand(2, -1))
    torch.testing.assert_close(shifted, model(tokens), atol=1e-4, rtol=1e-4)  # rotary positions are relative
    assert (model(tokens, torch.arange(0, 32, 2).expand(2, -1)) - shifted).abs().max() > 1e-2


# Parameters, as published with each model (the number on its hub page's weights; a tied matrix once).
PARAMETERS = {
    ("llama2", "7B"): 6_738_415_616,
    ("llama2", "13B"): 13_015_864_320,
    ("llama2", "70B"): 68_976_648_192,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "405B"): 405_853_388_800,
    ("llama3.2", "1B"): 1_235_814_400,
    ("llama3.2", "3B"): 3_212_749_824,
    ("smollm", "135M"): 134_515_008,
    ("smollm", "360M"): 361_821_120,
    ("smollm", "1.7B"): 1_711_376_384,
    ("qwen2", "0.5B"): 494_032_768,
    ("qwen2", "1.5B"): 1_543_714_304,
    ("qwen2", "7B"): 7_615_616_512,
    ("qwen2", "72B"): 72_706_203_648,
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
    ("yi", "6B"): 6_061_035_520,
    ("yi", "1.5-9B"): 8_829_407_232,
    ("yi", "34B"): 34_388_917_248,
    ("deepseek_llm", "7B"): 6_910_365_696,
    ("deepseek_llm", "67B"): 67_425_001_472,
    ("smollm3", "3B"): 3_075_098_624,
    ("seed_oss", "36B"): 36_151_104_512,
    ("internlm3", "8B"): 8_804_241_408,
    ("ernie4_5", "0.3B"): 360_748_032,
    ("phi", "1.5"): 1_418_270_720,
    ("phi", "2"): 2_779_683_840,
    ("phi3", "mini-4k"): 3_821_079_552,
    ("phi3", "medium-4k"): 13_960_238_080,
    ("phi3", "phi-4"): 14_659_507_200,
    ("mistral", "7B-v0.1"): 7_241_732_096,
    ("mistral", "7B-v0.3"): 7_248_023_552,
    ("mistral", "Ministral-8B"): 8_019_808_256,
    ("mistral", "Nemo-12B"): 12_247_782_400,
    ("mistral", "Small-24B"): 23_572_403_200,
    ("mixtral", "8x7B"): 46_702_792_704,
    ("mixtral", "8x22B"): 140_620_634_112,
    ("qwen3_moe", "30B-A3B"): 30_532_122_624,
    ("qwen3_moe", "235B-A22B"): 235_093_634_560,
    ("gpt_oss", "20B"): 20_914_757_184,
    ("gpt_oss", "120B"): 116_829_156_672,
    ("olmoe", "1B-7B"): 6_919_161_856,
    ("granite", "2B"): 2_533_531_648,
    ("granite", "8B"): 8_170_848_256,
    ("olmo2", "1B"): 1_484_916_736,
    ("olmo2", "7B"): 7_298_617_344,
    ("olmo2", "13B"): 13_716_198_400,
    ("olmo2", "32B"): 32_234_279_936,
    ("olmo3", "7B"): 7_298_011_136,
    ("olmo3", "32B"): 32_233_522_176,
    ("gemma", "2B"): 2_506_172_416,
    ("gemma", "7B"): 8_537_680_896,
    ("gemma2", "2B"): 2_614_341_888,
    ("gemma2", "9B"): 9_241_705_984,
    ("gemma2", "27B"): 27_227_128_320,
    ("gemma3", "270M"): 268_098_176,
    ("gemma3", "1B"): 999_885_952,
    ("cohere2", "command-r7b"): 8_028_033_024,
    ("cohere2", "command-a"): 111_057_580_032,
    ("glm4", "9B"): 9_400_279_040,
    ("glm4", "32B"): 32_566_081_536,
    ("exaone4", "1.2B"): 1_279_391_488,
    ("exaone4", "32B"): 32_003_216_384,
    ("apertus", "8B"): 8_053_338_176,
    ("apertus", "70B"): 70_599_864_480,
    ("starcoder2", "3B"): 3_030_371_328,
    ("starcoder2", "7B"): 7_173_923_840,
    ("nemotron", "minitron-4B"): 4_190_509_056,
    ("cohere", "aya-23-8B"): 8_028_033_024,
    ("cohere", "command-r"): 34_980_831_232,
    ("cohere", "command-r-plus"): 103_810_674_688,
    ("stablelm", "3B"): 2_795_443_200,
    ("stablelm", "2-1.6B"): 1_644_515_328,
    ("stablelm", "2-12B"): 12_143_185_920,
}


@pytest.mark.parametrize(("family", "flavor"), [(f, n) for f, flavors in FAMILIES.items() for n in flavors])
def test_parameter_counts_equal_transformers_and_the_published_ones(family: str, flavor: str):
    config = FAMILIES[family][flavor]
    written = to_hf_config(config)
    plain = written["model_type"] in ("llama", "qwen2", "qwen3")
    theirs = hf_config(config) if plain else AutoConfig.for_model(**written, pad_token_id=None)
    with torch.device("meta"):
        ours, hf = Llama(config), AutoModelForCausalLM.from_config(theirs)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in hf.parameters())
    published = PARAMETERS.get((family.replace("llama3.1", "llama3"), flavor))
    assert published == count or flavor == "debugmodel"
    names = {name for name, _ in hf.named_parameters()}
    form = form_of(written, "config.json")
    own = {their for name, p in ours.named_parameters() for their in form.their_names(f"model.{name}", p.shape)}
    own -= {name for name in own if form.constant(form.our_name(name)) is not None}
    if config.moe:  # transformers holds the experts as stacks, and their first two matrices as one
        own = {re.sub(r"experts\.\d+\.(gate|up|w1|w3)(_proj|)\.weight", "experts.gate_up_proj", name) for name in own}
        own = {re.sub(r"experts\.\d+\.(down_proj|w2)\.weight", "experts.down_proj", name) for name in own}
        own = {name.replace("block_sparse_moe", "mlp") for name in own}
    assert names == own


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_keeps_what_is_written(family: str, tmp_path: Path):
    """Through its own config class, which forgets fields that the type does not have and adds its defaults."""
    config = FAMILIES[family]["debugmodel"]
    AutoConfig.for_model(**to_hf_config(config), pad_token_id=None).save_pretrained(tmp_path)
    back = from_hf_config(tmp_path)
    assert replace(back, head_dim=config.head_dim, init_std=config.init_std) == config
    assert back.head_size == config.head_size


def flops(config: LlamaConfig, seq_len: int) -> float:
    with torch.device("meta"):
        model = Llama(config)
    return flops_per_token(model, [attention_flops_per_token(config, seq_len)] * config.n_layers)


def test_flops_per_token():
    """Llama-3-8B at 8,192 tokens: 57.9 GFLOPs per token with full attention (6 N + 12 L h s)."""
    assert flops(FAMILIES["llama3"]["8B"], 8192) == pytest.approx(57.9e9, rel=1e-3)
    assert flops(BASE, 64) == flops(replace(BASE, tie_embeddings=True), 64)  # the head counts, tied or not
    biased = replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True)
    assert flops(BASE, 64) == flops(biased, 64)


GOOD = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


GPT_OSS = {"model_type": "gpt_oss", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def read(tmp_path: Path, **change: object) -> LlamaConfig:
    content = {key: value for key, value in {**GOOD, **change}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return from_hf_config(str(tmp_path))


def test_a_field_without_effect_does_not_stand_in_the_way_of_an_export():
    mixture = replace(BASE, moe=MoEConfig(4, 2, 32))  # every layer's, so that nothing has ffn_dim
    assert to_hf_config(mixture)["intermediate_size"] == 32 != mixture.ffn_dim
    assert "rope_local_base_freq" not in to_hf_config(replace(BASE, local_rope_theta=5.0, ropes=("global", "global")))


def test_older_files_and_absent_fields(tmp_path: Path):
    assert read(tmp_path) == LlamaConfig(96, 32, 2, 4, 4, 64)
    assert read(tmp_path, rope_theta=500000.0, num_key_value_heads=2).rope_theta == 500000.0
    old = {"type": "llama3", "factor": 32.0, "low_freq_factor": 1, "high_freq_factor": 4}
    old["original_max_position_embeddings"] = 8192
    assert read(tmp_path, rope_scaling=old).rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    mistral, qwen = ({"model_type": kind, "num_key_value_heads": 2} for kind in ("mistral", "qwen2"))
    assert read(tmp_path, **mistral, sliding_window=None).windows == ()
    assert read(tmp_path, **mistral).windows == (4096,)  # what transformers takes
    assert read(tmp_path, **qwen, sliding_window=8).windows == ()  # not used
    used = qwen | {"use_sliding_window": True, "sliding_window": 8}
    assert read(tmp_path, **used).windows == ()  # from layer 28
    assert read(tmp_path, **used, max_window_layers=1).windows == (None, 8)
    assert read(tmp_path, **used, layer_types=["sliding_attention"] * 2).windows == (8,)
    assert read(tmp_path, model_type="qwen3", num_key_value_heads=2).head_size == 128  # what transformers takes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma4"}, "model_type is 'gemma4'"),
        ({"model_type": "qwen2"}, "num_key_value_heads missing"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0}, "sliding_window = 0"),
        (
            {"model_type": "mistral", "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2},
            "transformers does not read for model_type mistral",
        ),
        (
            {"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["sliding_attention"] * 2},
            "sliding_window = None, and layers have one",
        ),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["full_attention"]}, "names 1 layers"),
        (GPT_OSS, "rope_scaling is missing"),
        (GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}, "take a copy in bfloat16, such as unsloth/gpt"),
        (GPT_OSS | {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
        (
            {"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["chunked_attention"] * 2},
            "layer_types = ['chunked_attention', 'chunked_attention'] cannot be represented",
        ),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"hidden_size": -64}, "hidden_size missing or not a whole number above 0"),
        ({"hidden_size": True}, "hidden_size missing or not a whole number above 0"),
        ({"head_dim": "16"}, "head_dim = '16'"),
        ({"num_key_value_heads": -2}, "num_key_value_heads = -2"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps = 'x'"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        ({"rope_theta": None}, "rope_theta = None"),
        ({"rope_parameters": "x"}, "rope_parameters = 'x'"),
        ({"layer_types": 5}, "layer_types = 5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": "x"}, "attention_bias = 'x'"),
        ({"mlp_bias": 5}, "mlp_bias = 5"),
        ({"model_type": "phi3", "mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "yarm", "factor": 4}}, "'yarm' cannot be represented (did you mean 'yarn'?)"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor = '4'; expected a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "has no original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "the llama3 rope scaling has no low_freq_factor"),
        ({"hidden_size": "absent"}, "hidden_size missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers missing or not a whole number above 0"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(change: dict, said: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        read(tmp_path, **change)
    assert said in str(error.value) and "config.json" in str(error.value)


def test_a_model_like_no_type_is_not_written():
    with pytest.raises(ValueError, match="the nearest has no qk_norm = True"):
        to_hf_config(replace(BASE, qkv_bias=True, qk_norm=True))


def test_files_that_are_missing_or_no_json(tmp_path: Path):
    with pytest.raises(UserError, match="there is no file"):
        from_hf_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        from_hf_config(str(tmp_path))
