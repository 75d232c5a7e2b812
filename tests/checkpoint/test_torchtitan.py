"""A checkpoint that torchtitan wrote gives its logits, its next AdamW step, and the same shards on every layout.

`torchtitan/step-5`: Llama 3 of CONFIG's dimensions after 5 AdamW steps as FSDP2 x TP2, saved by torchtitan in its last
version configured by TOML. `torchtitan/reference.npz`: tokens [2, 129] and, of tokens[:, :-1], torchtitan's own logits
at every 16th position, mean loss and gradient norm, in fp32.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from parity.layout import CPU, Case, Weights, build_config, local
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import distribute_tensor

from dtron import registry
from dtron.checkpoint import torchtitan
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.models.llama import Llama, LlamaConfig, RopeScaling, rope_frequencies
from dtron.parallel.compose import parallelize

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FOLDER = Path(__file__).parent / "torchtitan"
SAVED = str(FOLDER / "step-5")
CONFIG = LlamaConfig(2048, 64, 2, 4, 2, 256, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
LAYOUTS = {
    "fsdp2 x tp2": Degrees(dp_shard=2, tp=2),  # a shard of wk is half a head
    "fsdp3": Degrees(dp_shard=3),  # and here heads are cut unevenly
    "pp2": Degrees(pp=2),
    "hsdp": Degrees(dp_replicate=2, dp_shard=2),
}
# Largest differences measured: 2.4e-7 in logits of deviation 0.97 (6e-4 without the reordering), 1.2e-7 in weights that
# a step moves by 1e-3 and more in the mean.
LOGITS, STEP = 1e-6, 1e-6
STATES = ("exp_avg", "exp_avg_sq", "step")
# Written out once more, not taken from the code under test.
THEIRS = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "layers.{}.self_attn.q_proj.weight": "layers.{}.attention.wq.weight",
    "layers.{}.self_attn.k_proj.weight": "layers.{}.attention.wk.weight",
    "layers.{}.self_attn.v_proj.weight": "layers.{}.attention.wv.weight",
    "layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
    "layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
    "layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
THEIRS = {ours.format(i): theirs.format(i) for ours, theirs in THEIRS.items() for i in range(CONFIG.n_layers)}


def fill(tensors: dict[str, Tensor], path: str = SAVED, **more: object) -> None:
    torchtitan.load(dcp.FileSystemReader(path), tensors, CONFIG.n_heads, CONFIG.n_kv_heads, **more)  # type: ignore[arg-type]


def named(parameters: Iterator[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What `load` is given for a model's parameters, and for their AdamW state, made here, if there is an optimizer."""
    tensors: dict[str, Tensor] = {}
    for name, p in parameters:
        tensors[f"model.{name}"] = p.detach()
        if optimizer:
            moments = {"exp_avg": torch.zeros_like(p).detach(), "exp_avg_sq": torch.zeros_like(p).detach()}
            optimizer.state[p] = {"step": torch.zeros(()), **moments}
            tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return tensors


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with np.load(FOLDER / "reference.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def model() -> Llama:
    """dtron's model with the checkpoint's weights, on this one process."""
    model = Llama(CONFIG)
    fill(named(model.named_parameters(), None))
    return model


@pytest.fixture(scope="module")
def whole() -> Weights:
    """Every tensor as one process loads it."""
    model = Llama(CONFIG)
    tensors = named(model.named_parameters(), adamw(model.parameters()))
    fill(tensors)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


# --- what the weights compute


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_logits_loss_and_gradient_norm_are_torchtitans(model: Llama, reference: dict[str, Tensor]) -> None:
    tokens = reference["tokens"]
    logits = model(tokens[:, :-1])
    loss = loss_of(logits, tokens)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(logits[:, ::16].detach(), reference["logits"], rtol=0, atol=LOGITS)
    assert loss.item() == pytest.approx(reference["loss"].item(), rel=3e-7)
    assert norm.item() == pytest.approx(reference["grad_norm"].item(), rel=1e-6)


def test_without_the_reordering_they_are_not(
    model: Llama, reference: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchtitan, "_pairs_to_halves", lambda tensor, heads: None)
    fill(named(model.named_parameters(), None))
    off = (model(reference["tokens"][:, :-1])[:, ::16] - reference["logits"]).abs().max()
    assert off > 100 * LOGITS


def test_values_are_cast_to_the_models_dtype(whole: Weights) -> None:
    half = torch.empty(64, 64, dtype=torch.bfloat16)
    fill({"model.layers.1.self_attn.q_proj.weight": half}, excluded=lambda name: True)
    assert torch.equal(half, torch.from_numpy(whole["model.layers.1.self_attn.q_proj.weight"]).bfloat16())


def test_every_tensor_of_the_file_has_a_place(whole: Weights) -> None:
    assert {name.removeprefix("model.") for name in whole if name.startswith("model.")} == set(THEIRS)
    assert all(np.abs(value).max() > 0 for value in whole.values()), "none was left as it was made"
    assert {value.item() for name, value in whole.items() if name.endswith(".step")} == {5.0}


# --- AdamW's state: torchtitan's model and ours take the same next step


def interleaved_logits(p: dict[str, Tensor], tokens: Tensor, c: LlamaConfig = CONFIG) -> Tensor:
    """torchtitan's Llama under its own names: rotary pairs are neighbours, turned as complex numbers."""
    angle = torch.arange(tokens.size(1))[:, None] * rope_frequencies(c)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [S, 1, D/2]

    def heads(x: Tensor, weight: Tensor, rotary: bool) -> Tensor:
        x = (x @ weight.T).unflatten(-1, (-1, c.head_size))  # [B, S, heads, D]
        if rotary:
            x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        return x.transpose(1, 2)

    h = p["tok_embeddings.weight"][tokens]
    for i in range(c.n_layers):
        w = {name.removeprefix(f"layers.{i}."): x for name, x in p.items()}
        x = F.rms_norm(h, (c.dim,), w["attention_norm.weight"], c.norm_eps)
        q, k, v = (heads(x, w[f"attention.w{name}.weight"], name != "v") for name in "qkv")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = h + out.transpose(1, 2).flatten(2) @ w["attention.wo.weight"].T
        x = F.rms_norm(h, (c.dim,), w["ffn_norm.weight"], c.norm_eps)
        gate, up = x @ w["feed_forward.w1.weight"].T, x @ w["feed_forward.w3.weight"].T
        h = h + (F.silu(gate) * up) @ w["feed_forward.w2.weight"].T
    return F.rms_norm(h, (c.dim,), p["norm.weight"], c.norm_eps) @ p["output.weight"].T


def torchtitans_own() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Weights and AdamW with its state under torchtitan's names, in torchtitan's order, as the file has them."""
    shapes = {name: p.shape for name, p in Llama(CONFIG).named_parameters()}
    p = {theirs: nn.Parameter(torch.empty(shapes[ours])) for ours, theirs in THEIRS.items()}
    optimizer = adamw(iter(p.values()))
    state = {name: x.detach() for name, x in p.items()}
    for name, x in p.items():
        optimizer.state[x] = {key: torch.zeros(()) if key == "step" else torch.zeros_like(x) for key in STATES}
        state |= {f"optimizer.state.{name}.{key}": value for key, value in optimizer.state[x].items()}
    dcp.load(state, checkpoint_id=SAVED)
    return p, optimizer


def in_our_order(name: str, theirs: Tensor) -> Tensor:
    """Rows of a torchtitan weight as dtron's `name` has them, moved one by one."""
    if "q_proj" not in name and "k_proj" not in name:
        return theirs
    ours, half = torch.empty_like(theirs), CONFIG.head_size // 2
    for head in range(0, len(theirs), CONFIG.head_size):
        for i in range(half):
            ours[head + i], ours[head + half + i] = theirs[head + 2 * i], theirs[head + 2 * i + 1]
    return ours


def test_the_next_adamw_step_is_torchtitans(model: Llama, reference: dict[str, Tensor]) -> None:
    tokens = reference["tokens"]
    theirs, their_optimizer = torchtitans_own()
    logits = interleaved_logits(theirs, tokens[:, :-1])
    torch.testing.assert_close(logits[:, ::16].detach(), reference["logits"], rtol=0, atol=LOGITS)
    loss_of(logits, tokens).backward()
    their_optimizer.step()
    optimizer = adamw(model.parameters())
    fill(named(model.named_parameters(), optimizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model(tokens[:, :-1]), tokens).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        expected = in_our_order(name, theirs[THEIRS[name]].detach())
        torch.testing.assert_close(
            p.detach(), expected, rtol=0, atol=STEP, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert (p.detach() - before[name]).abs().mean() > 1000 * STEP, f"{name} hardly moved"


# --- layouts


def shards_differ(degrees: Degrees, whole: Weights) -> tuple[list[str], list[str]]:
    """A rank's job: load on this layout; (tensors whose shard is not that of the one process, all tensors)."""
    config = build_config(Case("torchtitan", degrees))
    spec = registry.look_up("model", "llama3", "model.name")
    model = parallelize(spec, CONFIG, config, Mesh(degrees, "cpu"), CPU, registry.cross_entropy, [])
    tensors = named(model.named_parameters(), adamw(p for _, p in model.named_parameters()))
    fill(tensors)
    wrong = []
    for name, tensor in tensors.items():
        expected = torch.from_numpy(whole[name])
        if tensor.dim():
            expected = distribute_tensor(expected, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        if not torch.equal(local(tensor), expected):
            wrong.append(name)
    return wrong, list(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shard_is_that_of_one_process(ranks: Ranks, whole: Weights, layout: str) -> None:
    results = ranks.run(LAYOUTS[layout].world, shards_differ, LAYOUTS[layout], whole)
    assert [wrong for wrong, _ in results] == [[]] * len(results)
    assert {name for _, names in results for name in names} == set(whole)


# --- other files of torchtitan's


def save(path: Path, weights: dict[str, Tensor], **more: Tensor) -> str:
    dcp.save({**weights, **more}, checkpoint_id=str(path))
    return str(path)


def test_names_of_2024_begin_with_model(model: Llama, whole: Weights, tmp_path: Path) -> None:
    theirs, _ = torchtitans_own()
    old = save(tmp_path / "old", {f"model.{name}": p.detach() for name, p in theirs.items()})
    assert torchtitan.is_torchtitan(dcp.FileSystemReader(old).read_metadata().state_dict_metadata)
    assert torchtitan.is_torchtitan(dcp.FileSystemReader(SAVED).read_metadata().state_dict_metadata)
    assert not torchtitan.is_torchtitan(named(model.named_parameters(), None)), "dtron's own names"
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    fill(tensors := named(model.named_parameters(), None), old)
    assert all(np.array_equal(tensor, whole[name]) for name, tensor in tensors.items())


class Tied(nn.Module):
    """Tied embeddings in torchtitan's vocabulary; no layers, as they change nothing here."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(CONFIG.vocab_size, CONFIG.dim)
        self.norm = nn.RMSNorm(CONFIG.dim)
        self.output = nn.Linear(CONFIG.dim, CONFIG.vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight


def test_tied_embeddings_are_loaded_if_the_file_ties_them(tmp_path: Path) -> None:
    theirs = Tied()
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs.output(theirs.norm(theirs.tok_embeddings(torch.arange(9)))).logsumexp(-1).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(theirs, optimizer, options=options)
    moments = {f"optimizer.{name}": x for name, x in state.items() if isinstance(x, Tensor)}
    path = save(tmp_path / "tied", get_model_state_dict(theirs), **moments)
    ours = Llama(replace(CONFIG, n_layers=0, tie_embeddings=True))
    tensors = named(ours.named_parameters(), adamw(ours.parameters()))
    assert "model.lm_head.weight" not in tensors
    fill(tensors, path)
    assert torch.equal(tensors["model.embed_tokens.weight"], theirs.output.weight)
    moment = optimizer.state[theirs.output.weight]["exp_avg"]
    assert torch.equal(tensors["optimizer.embed_tokens.weight.exp_avg"], moment)


# --- mistakes


def refused(degrees: Degrees, config: LlamaConfig, path: str) -> str:
    """A rank's job: the text of the error."""
    spec = registry.look_up("model", "llama3", "model.name")
    run = build_config(Case("torchtitan", degrees))
    model = parallelize(spec, config, run, Mesh(degrees, "cpu"), CPU, registry.cross_entropy, [])
    named_here = model.named_parameters()
    if config.tie_embeddings:  # as on a stage between the first and the last, the second rank then has neither copy
        named_here = ((name, p) for name, p in named_here if name not in model.aliases)
    tensors = named(named_here, None)
    try:
        fill(tensors, path)
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"ffn_dim": 320},
            "model.layers.0.mlp.gate_proj.weight (torchtitan's name: layers.0.feed_forward.w1.weight) "
            "is of shape [256, 64] there and of shape [320, 64] in the model; choose the model.flavor",
        ),
        (
            {"n_layers": 4},
            "model.layers.2.input_layernorm.weight (torchtitan's name: layers.2.attention_norm.weight) "
            "is missing there and of shape [64] in the model; choose the model.flavor",
        ),
        ({"tie_embeddings": True}, "output.weight differs from tok_embeddings.weight, but the model's embeddings are"),
    ],
    ids=["width", "layers", "tied"],
)  # fmt: skip
def test_another_model_is_refused_alike_on_all_ranks(ranks: Ranks, change: dict[str, int], expected: str) -> None:
    texts = ranks.run(2, refused, Degrees(pp=2), replace(CONFIG, **change), SAVED)
    assert texts[0] == texts[1]
    assert texts[0].startswith(SAVED) and expected in texts[0]


def test_a_file_with_more_layers_is_refused_before_anything_is_read() -> None:
    small = Llama(replace(CONFIG, n_layers=1))
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    with pytest.raises(UserError, match=r"which has no model\.layers\.1\.self_attn.* \(torchtitan's name: layers\.1\."):
        fill(named(small.named_parameters(), None))
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    fill(named(small.named_parameters(), None), excluded=lambda name: name.startswith("model.layers.1."))
    assert not torch.equal(small.norm.weight, before["norm.weight"])


def test_a_parameter_that_torchtitan_has_not_is_refused() -> None:
    with pytest.raises(UserError, match=r"self_attn\.q_norm\.weight \(torchtitan's name: none\) is missing there"):
        fill({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})


def test_state_that_the_file_lacks_is_named_after_the_weights(model: Llama, tmp_path: Path) -> None:
    theirs, _ = torchtitans_own()
    path = save(tmp_path / "weights", {name: p.detach() for name, p in theirs.items()})
    fill(named(model.named_parameters(), None), path)
    tensors = named(model.named_parameters(), adamw(model.parameters()))
    states_first = dict(reversed(tensors.items()))
    with pytest.raises(UserError, match=r"optimizer\.lm_head.*missing.*set checkpoint\.initial_load_model_only = true"):
        fill(states_first, path)
    with pytest.raises(UserError, match=r"momentum_buffer.*missing.*set checkpoint\.initial_load_model_only = true"):
        fill({"optimizer.norm.weight.momentum_buffer": torch.ones(64)})
    with pytest.raises(UserError, match=r"model\.norm\.weight .*shape \[64\].*choose the model"):
        fill({**states_first, "model.norm.weight": torch.ones(8)}, path)
