"""float8: the matrix products of the blocks' linear layers, by torchao.

Each product casts both operands to 8 bits with a scale, in the forward (input, weight) and in the backward (gradient,
weight; input, gradient), and adds up in the compute dtype or wider; see Micikevicius et al. 2022, arXiv 2209.05433.
Weights, gradients, optimizer state and checkpoints are what they are without it, and so are messages, but for weights
that FSDP gathers as float8 where asked to (enable_fsdp_float8_all_gather): half the bytes. Those scales are torchao's,
no powers of two, but of whole weights, so that all layouts without tensor parallel agree.

All other scales are rounded down to powers of two. What a tensor's scale is depends on how it is sharded: each rank
takes the largest value of its own tokens. With powers of two a value gets the same bits under either scale, but for the
very smallest; with others, the weights of a small model were 38% of their way apart on one rank and two, after two
steps. So layouts agree, to 2e-7, but where the last bit of a sum decides how a value is rounded
(tests/parity/test_float8.py).

The head, the embedding, the router and the grouped products of experts keep the compute dtype.
"""

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from dtron.config.sections import Config
from dtron.errors import UserError
from dtron.models.moe import Router
from dtron.models.spec import layers_of

__all__ = [
    "FLOAT8",
    "check_float8",
    "converters_of_parameters",
    "describe_float8",
    "scale_gathered_weights",
    "to_float8",
]

FLOAT8 = ("float8", "quantize.linear.float8")  # model.converters: dtron's name, and torchtitan's since 2025-09
MULTIPLE = 16  # of the sizes of every operand of torch._scaled_mm
# Least compute capability (major, minor) of NVIDIA's GPUs, as torch._scaled_mm checks it.
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}


def to_float8(model: nn.Module, config: Config) -> nn.Module:
    """The meta model with float8 products in the linear layers of its blocks; names and parameters stay."""
    float8 = config.quantize.linear.float8
    chosen = {id(linear) for _, linear in _converted(model, float8.filter_fqns)}
    with _quiet_import():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # late: an extra

    recipe = Float8LinearConfig.from_recipe_name(float8.recipe_name or "tensorwise")
    recipe = dataclasses.replace(
        recipe,
        emulate=float8.emulate,
        round_scales_to_power_of_2=True,
        enable_fsdp_float8_all_gather=float8.enable_fsdp_float8_all_gather,
    )
    return convert_to_float8_training(  # type: ignore[no-any-return]
        model, config=recipe, module_filter_fn=lambda module, name: id(module) in chosen
    )


def scale_gathered_weights(config: Config, parts: Iterable[nn.Module]) -> None:
    """Compute the scales of all weights that FSDP gathers as float8 at once, where that is asked for.

    A collective over the mesh of the weights, to be called when they were loaded, and after each update.
    """
    float8 = config.quantize.linear.float8
    asked = float8.enable_fsdp_float8_all_gather and float8.precompute_float8_dynamic_scale_for_fsdp
    if not asked or not any(name in FLOAT8 for name in config.model.converters):
        return
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    for part in parts:
        precompute_float8_dynamic_scale_for_fsdp(part)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao tells which of its compiled parts are missing, none of which is used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def converters_of_parameters(names: Iterable[str]) -> list[str]:
    """Of model.converters those that may change parameters or their names: all but float8."""
    return [name for name in names if name not in FLOAT8]


def describe_float8(config: Config) -> str:
    """A few words for the log; none without float8."""
    if not any(name in FLOAT8 for name in config.model.converters):
        return ""
    float8 = config.quantize.linear.float8
    return f", float8 {float8.recipe_name or 'tensorwise'}{' (emulated)' if float8.emulate else ''}"


def _converted(model: nn.Module, filters: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in _linears(model):
        if not any(part in name for part in filters):
            yield name, module


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, by their names in the model."""
    for index, block in layers_of(model).items():
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not isinstance(module, Router):
                yield f"layers.{index}.{name}", module


def check_float8(config: Config, build: Callable[[], nn.Module], tp: int, cp: int) -> None:
    """UserError where float8 is asked for and cannot be had. build: makes the whole model on meta."""
    if not any(name in FLOAT8 for name in config.model.converters):
        return
    section, float8 = "quantize.linear.float8", config.quantize.linear.float8
    if not importlib.util.find_spec("torchao"):
        raise UserError(
            "model.converters has float8, which needs torchao 0.18 or newer: pip install 'dtron[float8]' (or torchao)"
        )
    if float8.enable_fsdp_float8_all_gather and (float8.recipe_name or "tensorwise") != "tensorwise":
        raise UserError(
            f"{section}.enable_fsdp_float8_all_gather needs one scale for each weight, and recipe_name is "
            f"{float8.recipe_name}; set recipe_name tensorwise, or the former false"
        )
    _check_hardware(float8.recipe_name or "tensorwise", float8.emulate, config.training.device)
    model = build()
    names = [name for name, _ in _linears(model)]
    known = [*names, "lm_head", "output"]  # the head is never converted; torchtitan calls it output
    if useless := [part for part in float8.filter_fqns if not any(part in name for name in known)]:
        raise UserError(
            f"{section}.filter_fqns: {useless[0]!r} is in no name of a linear layer; the first block has "
            f"{', '.join(name for name in names if name.startswith('layers.0.'))} (the head is never converted)"
        )
    for name, linear in _converted(model, float8.filter_fqns):
        if linear.out_features % (MULTIPLE * tp) or linear.in_features % (MULTIPLE * tp):
            raise UserError(
                f"float8 products need sizes that are multiples of {MULTIPLE} on every rank: {name} is "
                f"{linear.out_features} x {linear.in_features} over {tp} tensor-parallel ranks; add it to "
                f'{section}.filter_fqns, lower tp, or take "float8" out of model.converters'
            )
    tokens = config.training.local_batch_size * config.training.seq_len // cp
    if config.parallelism.pipeline_parallel_degree > 1:
        tokens = config.parallelism.pipeline_parallel_microbatch_size * config.training.seq_len // cp
    if tokens % MULTIPLE:
        raise UserError(
            f"float8 products need a multiple of {MULTIPLE} tokens on every rank, for the weights' gradients; a "
            f"microbatch has {tokens}: change training.seq_len or the batch"
        )


def _check_hardware(recipe: str, emulate: bool, device_type: str) -> None:
    if emulate:
        return
    mend = "set quantize.linear.float8.emulate = true to compute its rounding slowly, or leave float8 out"
    if device_type != "cuda":
        raise UserError(f"float8 needs a GPU with float8 matrix units, and the device is {device_type}; {mend}")
    if torch.cuda.is_available() and not torch.version.hip:
        have, need = torch.cuda.get_device_capability(), CAPABILITY[recipe]
        if have < need:
            raise UserError(
                f"float8 {recipe} needs compute capability {need[0]}.{need[1]}, and {torch.cuda.get_device_name()} has "
                f"{have[0]}.{have[1]}; {mend}"
            )
