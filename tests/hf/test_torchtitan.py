"""What torchtitan wrote, converted: its logits, its next AdamW step, and the same shards on every layout.

`torchtitan/step-5`: Llama 3 of CONFIG's dimensions after 5 AdamW steps as FSDP2 x TP2, saved by torchtitan in its last
version configured by TOML. `torchtitan/reference.npz`: tokens [2, 129] and, of tokens[:, :-1], torchtitan's own logits
at every 16th position, mean loss and gradient norm, in fp32.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from dtron.__main__ import main
from dtron.checkpoint.files import read_manifest
from dtron.checkpoint.hf_form import HeadOrder
from dtron.checkpoint.load import check_source, is_torchtitan, load, load_initial
from dtron.checkpoint.save import named_tensors
from dtron.checkpoint.storage import StoragePath
from dtron.config.sections import Optimizer
from dtron.errors import UserError
from dtron.hf import torchtitan
from dtron.mesh import Degrees, Mesh
from dtron.models.hf import to_hf_config
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.rope import Llama3Scaling, rope_frequencies
from dtron.parallel.compose import ParallelModel, parallelize
from dtron.train.optimizer import build_optimizers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FOLDER = Path(__file__).parent / "torchtitan"
SAVED = str(FOLDER / "step-5")
CONFIG = LlamaConfig(2048, 64, 2, 4, 2, 256, rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
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
Convert = Callable[..., Path]
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


def config_json(folder: Path, config: LlamaConfig = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    return folder / "config.json"


def converted(folder: Path, source: str = SAVED, config: LlamaConfig = CONFIG) -> Path:
    """What `dtron convert` makes of torchtitan's checkpoint `source`, inside `folder`."""
    out = folder / "converted"
    assert main(["convert", source, str(out), "--config", str(config_json(folder, config))]) == 0
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("torchtitan"))


def fill(tensors: dict[str, Tensor], path: Path) -> None:
    dcp.load(tensors, checkpoint_id=str(path))


def named(parameters: Iterator[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """A model's parameters by their names in a checkpoint, with AdamW state, made here, if there is an optimizer."""
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
def model(checkpoint: Path) -> Llama:
    """dtron's model with the checkpoint's weights, on this one process."""
    model = Llama(CONFIG)
    fill(named(model.named_parameters(), None), checkpoint)
    return model


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Weights:
    """Every tensor as one process loads it."""
    model = Llama(CONFIG)
    tensors = named(model.named_parameters(), adamw(model.parameters()))
    fill(tensors, checkpoint)
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
    model: Llama, reference: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadOrder, "read", lambda order, tensor, part: tensor)
    fill(named(model.named_parameters(), None), converted(tmp_path))
    off = (model(reference["tokens"][:, :-1])[:, ::16] - reference["logits"]).abs().max()
    assert off > 100 * LOGITS


def test_values_are_cast_to_the_models_dtype(whole: Weights, checkpoint: Path) -> None:
    half = torch.empty(64, 64, dtype=torch.bfloat16)
    fill({"model.layers.1.self_attn.q_proj.weight": half}, checkpoint)
    assert torch.equal(half, torch.from_numpy(whole["model.layers.1.self_attn.q_proj.weight"]).bfloat16())


def test_every_tensor_of_the_file_is_converted(whole: Weights, checkpoint: Path) -> None:
    assert set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata) == set(whole)
    manifest = read_manifest(StoragePath.at(checkpoint))
    assert not manifest.progress.model_only and "config.json" in manifest.files
    assert {name.removeprefix("model.") for name in whole if name.startswith("model.")} == set(THEIRS)
    assert all(np.abs(value).max() > 0 for value in whole.values()), "none was left as it was made"
    assert {value.item() for name, value in whole.items() if name.endswith(".step")} == {5.0}


# --- AdamW's state: torchtitan's model and ours take the same next step


def interleaved_logits(p: dict[str, Tensor], tokens: Tensor, c: LlamaConfig = CONFIG) -> Tensor:
    """torchtitan's Llama under its own names: rotary pairs are neighbours, turned as complex numbers."""
    angle = torch.arange(tokens.size(1))[:, None] * rope_frequencies(c.rope(0))
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


def test_the_next_adamw_step_is_torchtitans(model: Llama, reference: dict[str, Tensor], checkpoint: Path) -> None:
    tokens = reference["tokens"]
    theirs, their_optimizer = torchtitans_own()
    logits = interleaved_logits(theirs, tokens[:, :-1])
    torch.testing.assert_close(logits[:, ::16].detach(), reference["logits"], rtol=0, atol=LOGITS)
    loss_of(logits, tokens).backward()
    their_optimizer.step()
    optimizer = adamw(model.parameters())
    fill(named(model.named_parameters(), optimizer), checkpoint)
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


def parallel(degrees: Degrees, config: LlamaConfig = CONFIG) -> ParallelModel:
    spec = registry.look_up("model", "llama3", "model.name")
    run = build_config(Case("torchtitan", degrees))
    return parallelize(spec, config, run, Mesh(degrees, "cpu"), CPU, registry.cross_entropy, [])


def shards_differ(degrees: Degrees, whole: Weights, checkpoint: str) -> tuple[list[str], list[str]]:
    """A rank's job: load on this layout; (tensors whose shard is not that of the one process, all tensors)."""
    model = parallel(degrees)
    optimizers = build_optimizers(model, Optimizer())
    load_initial(StoragePath.at(checkpoint), model, optimizers, [], Llama(CONFIG))
    tensors = {name: tensor for name, tensor, _ in named_tensors(model, optimizers)}
    wrong = []
    for name, tensor in tensors.items():
        expected = torch.from_numpy(whole[name])
        if tensor.dim():
            expected = distribute_tensor(expected, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        if not torch.equal(local(tensor), expected):
            wrong.append(name)
    return wrong, list(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shard_is_that_of_one_process(ranks: Ranks, whole: Weights, checkpoint: Path, layout: str) -> None:
    results = ranks.run(LAYOUTS[layout].world, shards_differ, LAYOUTS[layout], whole, str(checkpoint))
    assert [wrong for wrong, _ in results] == [[]] * len(results)
    assert {name for _, names in results for name in names} == set(whole)


def kept(checkpoint: str, exclude: list[str]) -> tuple[dict[str, bool], bool]:
    """A rank's job: load but for `exclude`; whether each weight is the initial one, and whether AdamW's state is 0."""
    model = parallel(LAYOUTS["hsdp"])
    optimizers = build_optimizers(model, Optimizer())
    initial = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    load_initial(StoragePath.at(checkpoint), model, optimizers, exclude, Llama(CONFIG))
    same = {name: torch.equal(local(p), initial[name]) for name, p in model.named_parameters()}
    names = [name for name, left in same.items() if left]
    states = [
        x
        for name, x, _ in named_tensors(model, optimizers)
        if name.startswith("optimizer.") and any(n in name for n in names)
    ]
    return same, all(not local(x).any() for x in states)


def test_parameters_left_out_keep_their_initial_values(ranks: Ranks, checkpoint: Path) -> None:
    for same, zero in ranks.run(4, kept, str(checkpoint), ["*.q_proj.weight"]):
        assert zero and [name for name, left in same.items() if left] == [name for name in same if "q_proj" in name]


# --- other files of torchtitan's


def save(path: Path, weights: dict[str, Tensor], **more: Tensor) -> str:
    dcp.save({**weights, **more}, checkpoint_id=str(path))
    return str(path)


def today(name: str) -> str:
    name = re.sub(r"attention\.(w[qkv])\.", r"attention.qkv_linear.\1.", name)
    return re.sub(r"^output\.", "lm_head.", name)


@pytest.mark.parametrize("rename", [lambda name: f"model.{name}", today], ids=["2024", "today"])
def test_names_of_other_years(rename: Callable[[str], str], whole: Weights, tmp_path: Path) -> None:
    theirs, optimizer = torchtitans_own()
    state = {
        f"optimizer.state.{rename(name) if rename is today else name}.{key}": value
        for name, p in theirs.items()
        for key, value in optimizer.state[p].items()
    }
    other = save(tmp_path / "other", {rename(name): p.detach() for name, p in theirs.items()}, **state)
    assert is_torchtitan(StoragePath.at(other)) and is_torchtitan(StoragePath.at(SAVED))
    checkpoint = converted(tmp_path, other)
    tensors = {name: torch.zeros(value.shape) for name, value in whole.items()}
    fill(tensors, checkpoint)
    assert all(np.array_equal(tensor, whole[name]) for name, tensor in tensors.items())


def test_other_dcp_files_are_not_torchtitans(model: Llama, checkpoint: Path, tmp_path: Path) -> None:
    own_names = save(tmp_path / "own", named(model.named_parameters(), None))
    assert not is_torchtitan(StoragePath.at(own_names)) and not is_torchtitan(StoragePath.at(checkpoint))


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
    found = torchtitan.read_torchtitan(StoragePath.at(path), ours)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        tensors[name].copy_(tensor)
    assert torch.equal(tensors["model.embed_tokens.weight"], theirs.output.weight)
    moment = optimizer.state[theirs.output.weight]["exp_avg"]
    assert torch.equal(tensors["optimizer.embed_tokens.weight.exp_avg"], moment)


# --- mistakes


def refused(capsys: pytest.CaptureFixture[str], source: str, out: Path, *more: str) -> str:
    """What `dtron convert` says, having made nothing."""
    capsys.readouterr()
    assert main(["convert", source, str(out), *more]) == 1
    assert not out.exists() and not list(out.parent.glob(f"{out.name}.*"))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"ffn_dim": 320},
            "model.layers.0.mlp.gate_proj.weight (torchtitan's name: layers.0.feed_forward.w1.weight) "
            "is [256, 64] there and [320, 64] in the model; expected the config.json of the model",
        ),
        (
            {"n_layers": 4},
            "it has no model.layers.2.input_layernorm.weight (torchtitan's name: layers.2.attention_norm.weight); "
            "expected the config.json of the model",
        ),
        (
            {"n_layers": 1},
            "which has no model.layers.1.input_layernorm.weight (torchtitan's name: layers.1.attention_norm.weight)",
        ),
        ({"tie_embeddings": True}, "output.weight differs from tok_embeddings.weight, but the embeddings are tied"),
        ({"qk_norm": True}, "it has no model.layers.0.self_attn.q_norm.weight (torchtitan's name: none)"),
    ],
    ids=["width", "layers", "fewer layers", "tied", "no such parameter"],
)  # fmt: skip
def test_another_model_is_refused(
    change: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_json(tmp_path, replace(CONFIG, **change))
    said = refused(capsys, SAVED, tmp_path / "out", "--config", str(config))
    assert SAVED in said and expected in said


def test_misfits_are_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "load", lambda *_, **__: pytest.fail("read"))
    config = config_json(tmp_path, replace(CONFIG, n_layers=1))
    assert main(["convert", SAVED, str(tmp_path / "out"), "--config", str(config)]) == 1


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("layers.0.attention.wq.bias", torch.ones(64), "which has no layers.0.attention.wq.bias"),
        ("optimizer.state.norm.weight.exp_avg", torch.ones(8), "optimizer.norm.weight.exp_avg (torchtitan's name"),
        ("optimizer.state.layers.7.ffn_norm.weight.exp_avg", torch.ones(64), "no optimizer.layers.7.post_att"),
    ],
    ids=["bias", "state of another shape", "state of another parameter"],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(
    name: str, tensor: Tensor, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, _ = torchtitans_own()
    path = save(tmp_path / "more", {name: p.detach() for name, p in theirs.items()}, **{name: tensor})
    assert expected in refused(capsys, path, tmp_path / "out", "--config", str(config_json(tmp_path)))


def test_the_dimensions_have_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert "add --config FOLDER_OR_FILE" in refused(capsys, SAVED, tmp_path / "out")
    assert "--config: there is no file" in refused(capsys, SAVED, tmp_path / "out", "--config", str(tmp_path / "none"))
    said = refused(capsys, str(checkpoint), tmp_path / "out", "--config", str(config_json(tmp_path)))
    assert f"--config is for the folders of torchtitan, which {checkpoint} is not" in said


def test_what_lies_beside_the_config_is_taken_along(tmp_path: Path) -> None:
    config_json(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert main(["convert", SAVED, str(tmp_path / "out"), "--config", str(tmp_path / "model")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(SAVED, tmp_path / "broken")
    (broken / "__2_0.distcp").unlink()
    said = refused(capsys, str(broken), tmp_path / "out", "--config", str(config_json(tmp_path)))
    assert f"{broken} cannot be read" in said and "__2_0.distcp" in said


@pytest.mark.parametrize("command", ["sample", "train"])
def test_elsewhere_the_command_that_converts_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "sample":
        assert main(["sample", SAVED]) == 1
        said = capsys.readouterr().err
    else:
        with pytest.raises(UserError) as error:
            check_source(StoragePath.at(SAVED))
        said = str(error.value)
    assert f"{SAVED} is a checkpoint of torchtitan" in said and f"dtron convert {SAVED} NEW_FOLDER --config" in said


def state_and_sizes_that_lack(checkpoint: StoragePath) -> None:
    model = parallel(Degrees())
    load(checkpoint, model, None)
    with pytest.raises(UserError, match=r"no optimizer\..*set checkpoint\.initial_load_model_only = true"):
        load(checkpoint, model, build_optimizers(model, Optimizer()))
    wider = parallel(Degrees(), replace(CONFIG, vocab_size=4096))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is .*change the model's dimensions"):
        load(checkpoint, wider, build_optimizers(wider, Optimizer()))


def test_state_that_the_file_lacks_is_named_after_the_weights(tmp_path: Path, ranks: Ranks) -> None:
    theirs, _ = torchtitans_own()
    path = save(tmp_path / "weights", {name: p.detach() for name, p in theirs.items()})
    checkpoint = StoragePath.at(converted(tmp_path, path))
    assert read_manifest(checkpoint).progress.model_only
    ranks.run(1, state_and_sizes_that_lack, checkpoint)
