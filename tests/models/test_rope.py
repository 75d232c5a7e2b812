"""Rotary frequencies against transformers' own functions, and the parts of a head and of a model that are rotated."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dtron.config import load, read, to_toml
from dtron.errors import UserError
from dtron.models.llama import LlamaConfig
from dtron.models.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    rope_frequencies,
    rope_table,
    rotate,
)
from dtron.train.resolve import resolve

SHORT, LONG = tuple(1 + i / 32 for i in range(32)), tuple(1.0 + 2 * i for i in range(32))
SCALINGS: dict[str, RopeScaling] = {
    "linear": LinearScaling(4.0),
    "dynamic": DynamicScaling(4.0, 2048),
    "yarn": YarnScaling(4.0, 2048),
    "yarn, its own factor": YarnScaling(4.0, 2048, attention_factor=1.25),
    "yarn, mscale": YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=1.0),
    "yarn, betas": YarnScaling(16.0, 2048, beta_fast=24.0, beta_slow=2.0),
    "yarn, not truncated": YarnScaling(32.0, 4096, truncate=False),
    "yarn of one pair": YarnScaling(4.0, 2048, beta_fast=1.0, beta_slow=1.0, truncate=False),
    "yarn, not longer": YarnScaling(1.0, 2048),
    "longrope": LongRopeScaling(32.0, 2048, SHORT, LONG),
    "longrope, its own factor": LongRopeScaling(32.0, 2048, SHORT, LONG, attention_factor=1.5),
    "longrope, not longer": LongRopeScaling(1.0, 2048, SHORT, LONG),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 2048),
}


def theirs(scaling: RopeScaling, theta: float, length: int) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor by transformers, of heads of 64."""
    fields: dict[str, Any] = {name: value for name, value in vars(scaling).items() if name != "length"}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    config = TheirConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048,
        rope_parameters={"rope_type": scaling.rope_type, "rope_theta": theta} | fields,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[scaling.rope_type](config, None, seq_len=length)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_frequencies_and_attention_factor_are_transformers(name: str, theta: float):
    scaling = SCALINGS[name]
    for length in (33, 2048, 2049, 10000):
        expected, factor = theirs(scaling, theta, length)
        found = rope_frequencies(Rope(theta, 64, scaling), length)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert scaling.attention_scaling == pytest.approx(factor, rel=1e-12)


def test_every_scaling_changes_the_frequencies():
    plain = rope_frequencies(Rope(10000.0, 64))
    for name, scaling in SCALINGS.items():
        changed = rope_frequencies(Rope(10000.0, 64, scaling), 10000)
        assert name == "yarn, not longer" or (changed / plain - 1).abs().max() > 0.1, name


@pytest.mark.parametrize("scaling", [DynamicScaling(4.0, 16), LongRopeScaling(4.0, 16, SHORT, LONG)])
def test_a_scaling_by_length_takes_the_runs_length_else_that_of_the_positions(scaling: DynamicScaling):
    """A rank of context parallel, or a document that restarts, has smaller positions than the sequence is long."""
    positions = torch.arange(8)[None]
    fixed = rope_table(Rope(10000.0, 64, replace(scaling, length=32)), positions)
    by_positions = rope_table(Rope(10000.0, 64, scaling), torch.arange(32)[None])
    for a, b in zip(fixed, by_positions, strict=True):
        assert torch.equal(a, b[:, :8])
    assert not torch.equal(fixed[0], rope_table(Rope(10000.0, 64, scaling), positions)[0])
    assert replace(scaling, length=32) == scaling, "the length is the run's, not the model's"


def test_the_attention_factor_multiplies_cosines_and_sines():
    positions = torch.arange(40)[None]
    plain = rope_table(Rope(10000.0, 64, YarnScaling(4.0, 16, attention_factor=1.0)), positions)
    scaled = rope_table(Rope(10000.0, 64, YarnScaling(4.0, 16)), positions)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b * (0.1 * math.log(4) + 1))


def test_a_part_of_a_head_is_rotated():
    config = LlamaConfig(96, 64, 2, 4, 2, 64, partial_rotary_factor=0.5)
    cos, sin = rope_table(config.rope(0), torch.arange(7)[None])
    x = torch.randn(1, 7, 4, 16)
    out = rotate(x, cos, sin)
    assert torch.equal(out[..., 8:], x[..., 8:]) and torch.equal(out[..., :8], rotate(x[..., :8].clone(), cos, sin))
    assert not torch.equal(out[:, 1:, :, :8], x[:, 1:, :, :8])


def test_layers_have_the_rotary_embedding_of_the_pattern():
    config = LlamaConfig(
        96, 64, 6, 4, 2, 64, rope_theta=1e6, rope_scaling=LinearScaling(8.0), ropes=("local", "none", "global")
    )
    kinds = Rope(10000.0, 16), None, Rope(1e6, 16, LinearScaling(8.0))
    assert tuple(config.rope(layer) for layer in range(6)) == kinds * 2
    assert replace(config, ropes=()).rope(5) == kinds[2]


# --- [model.rope_scaling]

DYNAMIC = 'rope_type = "dynamic"\nfactor = 2\noriginal_max_position_embeddings = 64'
YARN = 'rope_type = "yarn"\nfactor = 4.0\noriginal_max_position_embeddings = 8192\nbeta_fast = 24'


def resolved(folder: Path, keys: str, *arguments: str) -> LlamaConfig:
    (folder / "x.toml").write_text(f"[model.rope_scaling]\n{keys}\n")
    given = ["--job.config_file", str(folder / "x.toml"), "--training.device", "cpu", *arguments]
    return resolve(load(given), 1).model_config


def test_a_run_takes_the_scaling_of_its_configuration(tmp_path: Path):
    assert resolved(tmp_path, YARN).rope_scaling == YarnScaling(4.0, 8192, beta_fast=24.0)
    assert resolved(tmp_path, "", "--model.name", "llama3.1").rope_scaling.rope_type == "llama3"
    assert resolved(tmp_path, 'rope_type = "default"', "--model.name", "llama3.1").rope_scaling is None
    again = load(["--job.config_file", str(tmp_path / "x.toml"), "--model.rope_scaling.rope_type", "yarn"])
    (tmp_path / "again.toml").write_text(to_toml(again))
    assert load(["--job.config_file", str(tmp_path / "again.toml")]).model == again.model


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        (["--training.seq_len", "128", "--validation.enable", "--validation.seq_len", "32"], 128),
        (["--validation.only", "--checkpoint.initial_load_path", ".", "--validation.seq_len", "32"], 32),
        (["--validation.only", "--checkpoint.initial_load_path", ".", "--training.seq_len", "16"], 16),
    ],
)
def test_a_scaling_by_length_is_that_of_the_runs_sequences(arguments: list[str], length: int, tmp_path: Path):
    assert resolved(tmp_path, DYNAMIC, *arguments).rope_scaling.length == length


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('rope_type = "yarn"', "model.rope_scaling: the yarn rope scaling has no factor"),
        (
            'rope_type = "linear"\nfactor = 2.0\nbeta_fast = 2',
            "model.rope_scaling.beta_fast has no meaning for rope",
        ),
        ('rope_type = "default"\nfactor = 2.0', "model.rope_scaling.factor has no meaning for rope_type default"),
        ('rope_type = "longrope"', 'expected "default", "linear"'),
        ('rope_type = "linear"\nfactor = 0.0', "factor = 0.0 (a float): expected a positive number"),
        ('rope_typ = "linear"', 'did you mean "model.rope_scaling.rope_type"'),
    ],
)
def test_what_is_wrong_with_a_scaling_is_named(keys: str, said: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        resolved(tmp_path, keys)
    assert said in str(error.value)


def test_a_scaling_without_its_type_is_told(tmp_path: Path):
    (tmp_path / "x.toml").write_text("[model.rope_scaling]\nfactor = 4.0\n")
    assert (
        "model.rope_scaling.factor has no effect: only read with model.rope_scaling.rope_type"
        in read(["--job.config_file", str(tmp_path / "x.toml")]).notes
    )


def test_heads_that_cannot_be_rotated_are_named(tmp_path: Path):
    assert Rope(1e4, 15).mistake.startswith("the head size 15, as far as it is rotated, is odd")
    assert Rope(1e4, 62, LongRopeScaling(4.0, 16, SHORT[:31], LONG)).mistake == (
        "long_factor has 32 numbers; expected 31, one for each rotated pair"
    )
    assert not Rope(1e4, 64, LongRopeScaling(4.0, 16, SHORT, LONG)).mistake
    with pytest.raises(UserError, match="model: the head size 33, as far as it is rotated, is odd"):
        resolved(tmp_path, "", "--model.dim", "264")
