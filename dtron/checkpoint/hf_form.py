"""How the weights of a Hugging Face folder differ from ours: their names, and the order of rows.

Our names are those of most folders. Stacks are single tensors of ours and several there: the experts' matrices, and
norms with weights of their own for each head. Rotary embeddings of some types rotate neighbours (2i, 2i + 1) of a head
together, where ours rotate halves (i, i + R/2) of the R values that are rotated: the rows of q and k are then in
another order within each head, those of their biases and norms too. Scores do not change, as q and k change alike.
Fused projections are several of ours below one another in one tensor. gpt-oss stacks the experts as we do, but with
columns where ours have rows, and those of gate and up take turns in one tensor.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.models.hf import hf_dimensions
from dtron.models.hf_types import TYPES

__all__ = ["HEAD", "PLAIN", "ExpertColumns", "Form", "HeadOrder", "form_of", "form_of_folder", "stack_of", "their_name"]

HEAD = "model.lm_head.weight"
# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(
    r"^((module|_orig_mod)\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# One of the tensors of a stack, and the stack, by our names.
OF_STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.((?:gate|up|down)_proj)\.weight")
STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)((?:gate|up|down)_proj)")
NORM_OF_STACK = re.compile(r"(model\.layers\.\d+\.self_attn\.[qk]_norm)\.norms\.(\d+)\.weight")
# One of the experts' tensors where they are stacked there too, theirs and ours.
OF_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|gate|up|down)(_proj(?:_bias)?)")
NORMS = re.compile(r"(model\.layers\.\d+\.self_attn\.[qk]_norm)\.weight")


def stack_of(name: str) -> tuple[str, int] | None:
    """Of a tensor that is a part of one of ours, by our name: that of the whole, and the place in it."""
    if match := OF_STACK.fullmatch(name):
        return match[1] + match[3], int(match[2])
    match = NORM_OF_STACK.fullmatch(name)
    return (f"{match[1]}.weight", int(match[2])) if match else None


def their_name(ours: str) -> str:
    """The name in most folders: ours, with `model.` before all but the head."""
    return ours.removeprefix("model.") if ours.startswith("model.lm_head.") else ours


@dataclass(frozen=True)
class HeadOrder:
    """Rows that are in the other order within each head: of size head_size, the first `rotated` of which are rotated.

    dim: of the tensor, that of the rows.
    """

    head_size: int
    rotated: int
    dim: int

    @cached_property
    def _within(self) -> Tensor:
        """Of a head: our row -> theirs, [D]."""
        pairs = torch.arange(self.rotated).unflatten(0, (-1, 2))  # [R/2, 2]
        return torch.cat((pairs.t().flatten(), torch.arange(self.rotated, self.head_size)))

    def read(self, stored: Any, part: tuple[slice, ...]) -> Tensor:
        """The part of our tensor, from the whole of theirs or a slice of safetensors: whole heads are read."""
        size, rows = self.head_size, part[self.dim]
        first, last = rows.start // size * size, -(-rows.stop // size) * size
        heads: Tensor = stored[part[: self.dim] + (slice(first, last),) + part[self.dim + 1 :]]  # noqa: RUF005
        ours = torch.arange(rows.start, rows.stop)
        return heads.index_select(self.dim, ours // size * size + self._within[ours % size] - first)

    def written(self, ours: Tensor) -> Tensor:
        """Theirs, from the whole of our tensor."""
        within = ours.unflatten(self.dim, (-1, self.head_size))
        return within.index_select(self.dim + 1, self._within.argsort()).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class ExpertColumns:
    """Of all experts: ours [N, out, in] is the `at`-th of `every` matrices in theirs [N, in, every x out].

    Their columns take turns. Biases are [N, out] and [N, every x out].
    """

    at: int = 0
    every: int = 1

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """Of our tensor."""
        experts, *inputs, columns = theirs
        return (experts, columns // self.every, *inputs)

    def read(self, stored: Any, part: tuple[slice, ...]) -> Tensor:
        """The part of our tensor, from the whole of theirs or a slice of safetensors."""
        experts, rows, *inputs = part
        there = (experts, *inputs, slice(rows.start * self.every, rows.stop * self.every))
        turns = stored[there]
        ours: Tensor = turns[..., self.at :: self.every]
        return ours.mT if inputs else ours

    def written(self, ours: Tensor) -> Tensor:
        """Its columns, from the whole of our tensor."""
        return ours.mT if ours.dim() == 3 else ours


@dataclass(frozen=True)
class Form:
    """Of the weights of one folder.

    renames: their part of a name between dots -> ours. norm_lists: norms with weights of their own for each head are as
    many tensors. head_size, rotated: of heads whose rows are in the other order; 0: they are not. fused: of each of
    their fused projections the name, and the names and rows of ours in it, in their order. columns: the experts are as
    `ExpertColumns` says. constants: names within a layer, and values, of stored numbers that are not weights of ours.
    """

    renames: tuple[tuple[str, str], ...] = ()
    norm_lists: bool = False
    head_size: int = 0
    rotated: int = 0
    constants: tuple[tuple[str, float], ...] = ()
    fused: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    columns: bool = False

    def our_name(self, stored: str) -> str:
        """`model.` and the name in the plain model.

        As transformers does, it takes names without `model.`, as a base model saved alone has them; and what wrappers
        of torch have put into names is left out.
        """
        ours = dict(self.renames)
        name = re.sub(r"^(model\.)+", "", WRAPPERS.sub("", stored))
        return ".".join(("model", *(ours.get(part, part) for part in name.split("."))))

    def written(self, ours: str, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor by the names under which it is written: of a stack one for each of its tensors."""
        order, names = self.order(ours, tensor.dim()), self.their_names(ours, tensor.shape)
        tensor = order.written(tensor) if order else tensor
        parts = tensor.unbind() if self._is_stack(ours) else [tensor]
        constants = [torch.tensor(value, dtype=tensor.dtype) for value in self.beside(ours).values()]
        return dict(zip(names, [*parts, *constants], strict=True))

    def constant(self, ours: str) -> float | None:
        """The value of a stored number that is no weight, by its name as ours; None for a weight."""
        return next(
            (value for name, value in self.constants if re.fullmatch(rf"model\.layers\.\d+\.{name}", ours)), None
        )

    def beside(self, ours: str) -> dict[str, float]:
        """The numbers that are written beside our tensor, by name: a layer's with its first norm."""
        layer = re.fullmatch(r"(model\.layers\.\d+\.)input_layernorm\.weight", ours)
        return {f"{layer[1]}{name}": value for name, value in self.constants} if layer else {}

    def _is_stack(self, ours: str) -> bool:
        return bool((STACK.fullmatch(ours) and not self.columns) or (self.norm_lists and NORMS.fullmatch(ours)))

    def their_names(self, ours: str, shape: Sequence[int]) -> list[str]:
        """The names under which our tensor of this shape is written. Those of one fused projection are one name."""
        theirs = {our: their for their, our in self.renames}
        theirs |= {our: their for their, parts in self.fused for our, _ in parts}

        def renamed(name: str) -> str:
            every = "|".join(map(re.escape, theirs))  # at once: a new name may be another's old one
            return re.sub(rf"(?<![^.])({every})(?![^.])", lambda m: theirs[m[1]], name) if theirs else name

        if self.columns and (match := OF_EXPERTS.fullmatch(ours)):
            return [f"{match[1]}{'down' if match[2] == 'down' else 'gate_up'}{match[3]}"]
        ours = their_name(ours)
        if not self._is_stack(ours):
            return [renamed(ours), *map(renamed, self.beside(ours))]
        stack, norms = STACK.fullmatch(ours), ours.removesuffix(".weight")
        form = f"{stack[1]}%d.{stack[2]}.weight" if stack else f"{norms}.norms.%d.weight"
        return [renamed(form % i) for i in range(shape[0])]

    def split(self, name: str) -> list[tuple[str, int]]:
        """Of a fused projection, by its name with ours around it: our tensors in it and their rows; else nothing."""
        around, _, leaf = name.rpartition(".")
        around, _, module = around.rpartition(".")
        return [(f"{around}.{our}.{leaf}", rows) for our, rows in dict(self.fused).get(module, ())]

    def split_experts(self, name: str) -> list[str]:
        """Our tensors in one of all experts, by its name with ours around it; nothing where experts are not so."""
        match = OF_EXPERTS.fullmatch(name) if self.columns else None
        parts = {"gate_up": ("gate", "up"), "down": ("down",)}
        return [f"{match[1]}{part}{match[3]}" for part in parts.get(match[2], ())] if match else []

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Their tensor of this name, from what is written of each of ours in it."""
        if len(parts) == 1:
            return parts[0]
        return torch.stack(tuple(parts), -1).flatten(-2) if ".experts." in name else torch.cat(tuple(parts))

    def order(self, ours: str, dims: int) -> "HeadOrder | ExpertColumns | None":
        """The other order of rows of our tensor of so many dimensions; None: it has the same."""
        if self.columns and (match := OF_EXPERTS.fullmatch(ours)):
            return ExpertColumns() if match[2] == "down" else ExpertColumns(("gate", "up").index(match[2]), 2)
        if self.rotated and (match := re.search(r"\.self_attn\.[qk]_(proj|norm)\.(weight|bias)$", ours)):
            return HeadOrder(self.head_size, self.rotated, dims - 1 if match[1] == "norm" else 0)
        return None


PLAIN = Form()


def form_of(config: dict[str, Any], file: Path | str) -> Form:
    """Of weights beside this config.json, called `file` in messages; ours for a model type that is not known."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TYPES:
        return PLAIN
    of_type = TYPES[kind]
    form = Form(of_type.renames, of_type.norm_lists, constants=of_type.constants, columns=of_type.expert_columns)
    if not of_type.interleaved and not of_type.fused:
        return form
    c = hf_dimensions(config, file)
    queries, keys = c.n_heads * c.head_size, c.n_kv_heads * c.head_size
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": c.ffn_dim, "up_proj": c.ffn_dim}
    fused = tuple((their, tuple((our, rows[our]) for our in ours)) for their, ours in of_type.fused)
    rotated = int(c.head_size * c.partial_rotary_factor) if of_type.interleaved else 0
    return replace(form, head_size=c.head_size, rotated=rotated, fused=fused)


def form_of_folder(folder: Path) -> Form:
    """Ours where there is no config.json, or none that can be read."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return PLAIN
    return form_of(config, file) if isinstance(config, dict) else PLAIN
