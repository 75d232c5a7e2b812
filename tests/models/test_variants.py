"""Parts that are not Llama's: bf16 as in transformers, initial values, and fields of config.json that are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hf.models import config_json
from parity.single import MODELS, plain_model
from torch import nn
from transformers.activations import XIELUActivation
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from dtron.errors import UserError
from dtron.hf.generate import CachedModel
from dtron.models.families import FAMILIES
from dtron.models.hf import hf_dimensions
from dtron.models.init import initial_rows, llama_init_std
from dtron.models.llama import Llama
from dtron.models.variants import XIELU, NormPerHead, Variant, make_norm, scale_embedding, scale_logits

SIZE, EPS = 48, 1e-5


def filled(module: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.5, 0.3, generator=g)
    return module.bfloat16()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (make_norm(Variant("rms_1p"), SIZE, EPS), Gemma3RMSNorm(SIZE, EPS)),
        (make_norm(Variant("layer"), SIZE, EPS), CohereLayerNorm(SIZE, EPS)),
        (make_norm(Variant("layer_1p"), SIZE, EPS), NemotronLayerNorm1P(SIZE, EPS)),
        (NormPerHead(4, SIZE, EPS), CohereLayerNorm((4, SIZE), EPS)),
        (XIELU(), XIELUActivation(dtype=torch.bfloat16)),
    ],
    ids=["rms_1p", "layer", "layer_1p", "norm per head", "xielu"],
)
def test_parts_in_bfloat16_are_those_of_transformers(ours: nn.Module, theirs: nn.Module):
    x = (3 * torch.randn(2, 8, 4, SIZE, generator=torch.Generator().manual_seed(4))).bfloat16()
    got, expected = filled(ours)(x), filled(theirs)(x)
    # One rounding apart at most, and rarely: where products are rounded differs.
    assert got.dtype == torch.bfloat16 and (got == expected).float().mean() > 0.9
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


def test_gemmas_embedding_is_scaled_by_a_rounded_number():
    theirs = Gemma3TextScaledWordEmbedding(8, 3072, 0, embed_scale=3072**0.5).bfloat16()
    ours = theirs.weight[None]  # [1, 8, E]
    assert torch.equal(scale_embedding(Variant(embedding_multiplier="sqrt"), ours), theirs(torch.arange(8))[None])
    assert not torch.equal(ours * 3072**0.5, theirs(torch.arange(8))[None])  # 55.43, which bf16 rounds to 55.5


def test_logits_are_scaled_before_they_are_capped():
    logits = scale_logits(Variant(logits_multiplier=2.0, logits_softcap=3.0), torch.tensor([0.0, 1.0, 100.0]))
    torch.testing.assert_close(logits, 3 * torch.tanh(torch.tensor([0.0, 2 / 3, 200 / 3])))


def test_experts_with_another_activation_are_refused():
    config = replace(FAMILIES["mixtral"]["debugmodel"], variant=Variant(activation="relu2"))
    with torch.device("meta"), pytest.raises(ValueError, match="experts have no activation relu2"):
        Llama(config)


@torch.no_grad()
def test_a_sampled_tokens_logits_are_scaled_too():
    model = plain_model(MODELS["gemma"])
    torch.testing.assert_close(CachedModel(model, 3).read([5, 6, 7]), model(torch.tensor([[5, 6, 7]]))[0, -1])


@pytest.mark.parametrize("family", ["gemma3", "nemotron", "apertus", "cohere"])
def test_initial_values_are_those_that_modules_begin_with(family: str):
    """Of norms and activations; the rest is random."""
    config = FAMILIES[family]["debugmodel"]
    for name, p in Llama(config).named_parameters():
        if "norm" in name or "act_fn" in name:
            rows = initial_rows(name, p.shape, 0, p.shape[0], llama_init_std(name, config), 0, p.device)
            assert torch.equal(rows, p), name
    alpha = dict(XIELUActivation(dtype=torch.float32).named_parameters())
    for name, p in XIELU().named_parameters():
        torch.testing.assert_close(p, alpha[name])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gemma-7b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma-2-9b", {"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ("gemma-2-9b", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0"),
        ("gemma-3-1b-pt", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma-3-1b-pt", {"rope_parameters": {"rope_theta": 1e6}}, "expected settings by kind of layer"),
        (
            "gemma-3-1b-pt",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type 'linear' of sliding_attention",
        ),
        ("granite-3.0-2b-base", {"logits_scaling": 0}, "logits_scaling = 0"),
        ("AFM-4.5B", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("c4ai-command-r7b-12-2024", {"use_qk_norm": True}, "use_qk_norm = True"),
        ("c4ai-command-r7b-12-2024", {"head_dim": 32}, "head_dim = 32"),
        ("stablelm-2-1_6b", {"head_dim": 32}, "head_dim = 32"),
        ("stablelm-2-1_6b", {"layer_norm_eps": None}, "layer_norm_eps = None"),
        ("EXAONE-4.0-32B", {"layer_types": None}, "sliding_window_pattern = 'LLLG' without layer_types"),
        ("Apertus-8B-2509", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
    ],
)
def test_what_the_parts_cannot_do_is_refused_by_its_field(name: str, change: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        hf_dimensions(config_json(name, **change), "config.json")
    assert said in str(error.value)
