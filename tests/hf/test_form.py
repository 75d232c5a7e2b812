"""Weights in another form than ours: names, and the order of rows within a head."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf.models import logits_of, save_random, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtron.__main__ import main
from dtron.checkpoint.hf import Entry
from dtron.checkpoint.hf_form import Form, HeadOrder
from dtron.checkpoint.load import fitting_entries
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.hf.read import open_model
from dtron.models.hf import from_hf_config
from dtron.models.llama import Llama

HEADS, SIZE = 4, 12


def interleaved(x: Tensor, angle: Tensor) -> Tensor:
    """x [H, D] rotated as Helium does, neighbours by angles [R/2]; the rest of D as it is."""
    rotated = 2 * len(angle)
    a, b = x[:, 0:rotated:2], x[:, 1:rotated:2]
    pairs = torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).flatten(1)
    return torch.cat((pairs, x[:, rotated:]), 1)


def halves(x: Tensor, angle: Tensor) -> Tensor:
    """As ours."""
    a, b, rest = x.split((len(angle), len(angle), SIZE - 2 * len(angle)), 1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), 1)


@pytest.mark.parametrize("rotated", [SIZE, 8, 2])
def test_scores_are_those_of_interleaved_rotations(rotated: int):
    theirs = torch.randn(2, HEADS * SIZE)  # q and k of one token
    order = HeadOrder(SIZE, rotated, dim=1)
    ours = order.read(theirs, (slice(0, 2), slice(0, HEADS * SIZE)))
    angles = torch.randn(2, rotated // 2)
    q, k = (interleaved(x.view(HEADS, SIZE), angle) for x, angle in zip(theirs, angles, strict=True))
    q2, k2 = (halves(x.view(HEADS, SIZE), angle) for x, angle in zip(ours, angles, strict=True))
    torch.testing.assert_close((q * k).sum(1), (q2 * k2).sum(1))
    assert torch.equal(order.written(ours), theirs)


class Counted:
    """A slice of safetensors that says how many rows were read."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.rows = whole, 0

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        self.rows = part[0].stop - part[0].start
        return self.whole[part]


@pytest.mark.parametrize(("first", "last"), [(0, 48), (12, 24), (5, 6), (11, 13), (36, 48), (7, 7)])
def test_a_rank_reads_the_heads_of_its_rows_only(first: int, last: int):
    order = HeadOrder(SIZE, 8, dim=0)
    stored = Counted(torch.randn(HEADS * SIZE, 6))
    whole = order.read(stored.whole, (slice(0, HEADS * SIZE), slice(0, 6)))
    part = order.read(stored, (slice(first, last), slice(2, 5)))
    assert torch.equal(part, whole[first:last, 2:5])
    assert stored.rows <= (last - first) + 2 * (SIZE - 1)
    bias = stored.whole[:, 0]
    assert torch.equal(order.read(bias, (slice(first, last),)), whole[first:last, 0])


def test_which_tensors_have_another_order():
    form = Form(head_size=SIZE, rotated=8)
    layer = "model.layers.3.self_attn."
    assert form.order(f"{layer}q_proj.weight", 2) == form.order(f"{layer}k_proj.bias", 1) == HeadOrder(SIZE, 8, 0)
    assert form.order(f"{layer}q_norm.weight", 2) == HeadOrder(SIZE, 8, 1)  # one row for each head
    assert form.order(f"{layer}k_norm.weight", 1) == HeadOrder(SIZE, 8, 0)  # the same for all heads
    assert all(form.order(f"{layer}{name}.weight", 2) is None for name in ("v_proj", "o_proj"))
    assert Form().order(f"{layer}q_proj.weight", 2) is None


FUSED = Form(fused=(("qkv_proj", (("q_proj", 12), ("k_proj", 6), ("v_proj", 6))),))


def test_the_parts_of_a_fused_projection_have_one_name_there():
    layer = "model.layers.3.self_attn."
    for leaf in ("weight", "bias"):
        ours = [f"{layer}{part}_proj.{leaf}" for part in "qkv"]
        assert FUSED.split(FUSED.our_name(f"layers.3.self_attn.qkv_proj.{leaf}")) == [
            *zip(ours, (12, 6, 6), strict=True)
        ]
        assert [FUSED.their_names(name, ()) for name in ours] == [[f"{layer}qkv_proj.{leaf}"]] * 3
    assert FUSED.split(f"{layer}o_proj.weight") == FUSED.split("model.norm") == []


@pytest.mark.parametrize(("first", "last"), [(0, 6), (2, 5), (4, 4)])
def test_a_rank_reads_its_rows_of_a_fused_projection_only(first: int, last: int):
    entry = Entry("file", "qkv_proj.weight", torch.float32, (6, 4), first=12)
    stored = Counted(torch.randn(24, 4))
    part = entry.read(stored, (slice(first, last), slice(1, 3)))
    assert torch.equal(part, stored.whole[12 + first : 12 + last, 1:3]) and stored.rows == last - first
    ordered = replace(entry, order=HeadOrder(6, 6, dim=0))
    whole = ordered.read(stored.whole, (slice(0, 6), slice(0, 4)))
    assert torch.equal(ordered.read(stored.whole, (slice(2, 5), slice(0, 4))), whole[2:5])
    assert torch.equal(HeadOrder(6, 6, dim=0).written(whole), stored.whole[12:18])


def test_a_fused_projection_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = save_random("Phi-4", tmp_path / "there")
    config = json.loads((folder / "config.json").read_text())

    def refusal(**change: int) -> str:
        (folder / "config.json").write_text(json.dumps(config | change))
        assert main(["convert", str(folder), str(tmp_path / "here")]) == 1
        return capsys.readouterr().err

    assert (
        "model.layers.0.self_attn.qkv_proj.weight has 128 rows; expected 96 by its config.json (64 of q_proj + 16 of "
        "k_proj + 16 of v_proj)"
    ) in refusal(num_key_value_heads=2)
    assert "it has no model.layers.3.input_layernorm.weight" in refusal(num_hidden_layers=4)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "it has no model.layers.1.mlp.gate_up_proj.weight" in refusal()


def test_stacks_of_norms_fused_projections_and_constants_have_their_names():
    norms = Form(norm_lists=True, renames=(("q_layernorm", "q_norm"),))
    ours, weight = "model.layers.0.self_attn.q_norm.weight", torch.randn(1, SIZE)
    assert norms.their_names(ours, (2, SIZE)) == [
        f"model.layers.0.self_attn.q_layernorm.norms.{i}.weight" for i in (0, 1)
    ]
    assert [t.shape for t in norms.written(ours, weight).values()] == [(SIZE,)]  # of a single head too
    assert Form().their_names(ours, (2, SIZE)) == [ours]


def test_a_number_that_the_model_has_in_its_code_is_checked(tmp_path: Path):
    folder = save_random("Apertus-8B-2509", tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.act_fn.beta"
    assert weights[name].item() == 0.5 and name in Form(constants=(("mlp.act_fn.beta", 0.5),)).written(
        "model.layers.1.input_layernorm.weight", torch.ones(4)
    )
    save_file(weights | {name: torch.tensor(0.25)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers.1.mlp.act_fn.beta = 0.25 cannot be represented; expected 0.5"):
        open_model(str(folder), torch.device("cpu"), torch.float32)


def test_without_the_reordering_logits_are_not_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_random("helium-1-preview-2b", tmp_path)
    monkeypatch.setattr(Form, "order", lambda form, name, dims: None)
    with torch.no_grad():
        ours = open_model(str(folder), torch.device("cpu"), torch.float32).model(tokens())
    assert (ours - logits_of(folder)).abs().max() > 0.01


def test_experts_in_one_tensor_are_read_by_their_columns():
    """gpt-oss: [N, in, out] for our [N, out, in]; the columns of gate and up take turns."""
    form = Form(columns=True)
    name = "model.layers.0.mlp.experts."
    theirs = {f"{name}gate_up_proj": torch.randn(4, 6, 10), f"{name}gate_up_proj_bias": torch.randn(4, 10)}
    theirs |= {f"{name}down_proj": torch.randn(4, 5, 6), f"{name}down_proj_bias": torch.randn(4, 6)}
    written: dict[str, list[torch.Tensor]] = {}
    for stored, tensor in theirs.items():
        for at, ours in enumerate(form.split_experts(stored)):
            order = form.order(ours, tensor.dim())
            whole = order.read(tensor, tuple(slice(0, n) for n in order.shape(tuple(tensor.shape))))
            turns = tensor if "down" in ours else tensor[..., at::2]
            assert torch.equal(whole, turns.mT if tensor.dim() == 3 else turns)
            part = (slice(1, 3), slice(2, 5), slice(3, 6))[: tensor.dim()]
            assert torch.equal(order.read(tensor, part), whole[part])
            for their, columns in form.written(ours, whole).items():
                written.setdefault(their, []).append(columns)
    assert written.keys() == theirs.keys()
    for stored, parts in written.items():
        assert torch.equal(form.join(stored, parts), theirs[stored])
    assert form.split_experts("model.layers.0.mlp.gate_proj.weight") == []
    assert Form().split_experts(f"{name}down_proj") == []


def test_a_folder_that_does_not_say_its_type_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = save_random("helium-1-preview-2b", tmp_path)
    with torch.device("meta"):
        model = Llama(from_hf_config(folder))
    fitting_entries(StoragePath.at(folder), model)
    assert not caplog.messages
    (folder / "config.json").unlink()
    fitting_entries(StoragePath.at(folder), model)
    assert "has no config.json; its weights are taken to have Llama's names and order of rows" in caplog.messages[0]
