"""Weights and AdamW state from a checkpoint of torchtitan's Llama 3, a folder of DCP files.

What differs from ours:

* Names. `layers.0.attention.wq.weight` is our `layers.0.self_attn.q_proj.weight`; the optimizer's state is flattened
  by name, `optimizer.state.<parameter>.<state>`, `step` too. torchtitan of 2024 put `model.` before the weights.
* Rotary pairs. torchtitan, as Meta's Llama, turns neighbours (2i, 2i + 1) of a head's D dimensions together; we, as
  Hugging Face's, the halves (i, i + D/2). So the rows of wq and wk, and of AdamW's moments of them, change their
  order within each head. Scores do not, as q and k change alike; v and o have no part in it.
* Tied embeddings. torchtitan writes the one matrix twice, its AdamW state once, under tok_embeddings. A model of ours
  that is tied has no lm_head: both matrices are then read and must be equal, else the checkpoint is another model's.

DCP reads every tensor straight into the shards of the layout at hand. Only the reordering needs rows of other ranks:
it gathers wq, wk and their moments one at a time.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from dtron.errors import UserError
from dtron.ranks.agree import from_all_ranks

__all__ = ["is_torchtitan", "load"]

THEIRS = {  # module of ours -> of torchtitan's, inside a layer or outside
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "norm": "norm",
    "lm_head": "output",
}
OURS = {theirs: ours for ours, theirs in THEIRS.items()}
RIGHT_MODEL = "choose the model.flavor (or model.hf_config_path) that was trained"
EMBEDDING = "model.embed_tokens.weight"


def is_torchtitan(names: Iterable[str]) -> bool:
    """Whether these keys of DCP metadata are those of a Llama by torchtitan."""
    return not {"tok_embeddings.weight", "model.tok_embeddings.weight"}.isdisjoint(names)


def load(
    reader: dcp.StorageReader,
    tensors: Mapping[str, Tensor],
    n_heads: int,
    n_kv_heads: int,
    excluded: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fill this rank's `tensors` in place from the checkpoint behind `reader`; all ranks call it.

    tensors: `model.<parameter>` and `optimizer.<parameter>.<state>`, plain or DTensors of any layout. Their dtype may
    differ from the checkpoint's.
    excluded: (name, as in `tensors`) -> whether this weight is left out of `tensors`, on every rank, on purpose.
    UserError, the same on all ranks and before anything is read, naming the first tensor that the checkpoint lacks or
    has in another shape, and the first weight of the checkpoint that the model lacks; UserError after reading, where
    the model is tied and the checkpoint is not. DCP's CheckpointException where a file cannot be read.
    """
    saved = reader.read_metadata().state_dict_metadata
    shapes = {name: list(entry.size) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    prefix = "" if "tok_embeddings.weight" in shapes else "model."
    where = str(getattr(reader, "checkpoint_id", "the torchtitan checkpoint"))
    unused = _check(shapes, prefix, tensors, excluded, where)
    state = {_their_name(name, prefix): tensor for name, tensor in tensors.items()}
    second = {name: torch.empty_like(tensors[EMBEDDING]) for name in unused if EMBEDDING in tensors}
    dcp.load({**state, **second}, storage_reader=reader)
    if unused and not all(from_all_ranks(all(_equal(tensors[EMBEDDING], tensor) for tensor in second.values()))):
        raise UserError(
            f"{where}: output.weight differs from tok_embeddings.weight, but the model's embeddings are tied; "
            f"{RIGHT_MODEL}, one whose embeddings are not"
        )
    heads = {"q_proj": n_heads, "k_proj": n_kv_heads}
    for name, tensor in tensors.items():
        rotary = re.search(r"\.self_attn\.([qk]_proj)\.", name)
        if rotary and tensor.dim():  # AdamW's step is a number
            _pairs_to_halves(tensor, heads[rotary[1]])


def _check(
    shapes: dict[str, list[int]],
    prefix: str,
    tensors: Mapping[str, Tensor],
    excluded: Callable[[str], bool],
    where: str,
) -> list[str]:
    """The second of two tied matrices if the model has but one, else none. UserError, on all ranks, if one misfits."""
    weights_first = sorted(tensors.items(), key=lambda item: item[0].startswith("optimizer."))
    mistakes = (_mistake(name, tensor, shapes, prefix) for name, tensor in weights_first)
    first = next((mistake for mistake in mistakes if mistake), None)
    # It takes all ranks to tell what none asks for: as bits, 1 kB a rank at 8,000 weights.
    pattern = re.compile(re.escape(prefix) + r"(tok_embeddings|layers\.\d+|norm|output)\.")
    weights = [name for name in shapes if pattern.match(name)]
    asked = {_their_name(name, prefix) for name in tensors}
    answers = from_all_ranks((first, sum(1 << i for i, name in enumerate(weights) if name in asked)))
    if mistake := next((mistake for mistake, _ in answers if mistake), None):
        raise UserError(f"{where} does not fit this model: {mistake}")
    used = reduce(or_, (bits for _, bits in answers))
    unused = [name for i, name in enumerate(weights) if not used >> i & 1 and not excluded(_our_name(name, prefix))]
    output, embedding = f"{prefix}output.weight", f"{prefix}tok_embeddings.weight"
    if unused and (unused != [output] or shapes[output] != shapes[embedding]):
        raise UserError(
            f"{where} does not fit this model, which has no {_our_name(unused[0], prefix) or unused[0]} "
            f"(torchtitan's name: {unused[0]}, of shape {shapes[unused[0]]} there); {RIGHT_MODEL}"
        )
    return unused


def _mistake(name: str, tensor: Tensor, shapes: dict[str, list[int]], prefix: str) -> str | None:
    """What keeps this tensor from being filled, and how to mend it."""
    theirs, ours = _their_name(name, prefix), list(tensor.shape)
    if (shape := shapes.get(theirs)) == ours:
        return None
    there = "is missing there" if shape is None else f"is of shape {shape} there"
    # The weights fit, or they would have been named before.
    alone = name.startswith("optimizer.") and shape is None
    mend = "set checkpoint.initial_load_model_only = true to take the weights alone" if alone else RIGHT_MODEL
    return f"{name} (torchtitan's name: {theirs or 'none'}) {there} and of shape {ours} in the model; {mend}"


def _their_name(name: str, prefix: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `layers.0.feed_forward.w3.weight`; empty if torchtitan has none."""
    kind, _, rest = name.partition(".")
    if kind == "model":
        theirs = _translate(rest, THEIRS)
        return theirs and prefix + theirs
    parameter, _, state = rest.rpartition(".")
    theirs = _translate(parameter, THEIRS)
    return theirs and f"optimizer.state.{theirs}.{state}"


def _our_name(weight: str, prefix: str) -> str:
    ours = _translate(weight.removeprefix(prefix), OURS)
    return ours and f"model.{ours}"


def _translate(parameter: str, modules: dict[str, str]) -> str:
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", parameter)
    module = modules.get(match[2]) if match else None
    return f"{match[1] or ''}{module}.weight" if match and module else ""


@torch.no_grad()
def _pairs_to_halves(tensor: Tensor, heads: int) -> None:
    """Reorder the rows of tensor [heads * D, E] within each head, in place: 2i goes to i, 2i + 1 to i + D/2.

    A DTensor's rows come from other ranks: the whole matrix is gathered, on its mesh's device, and cut again.
    """
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        whole = _halves(tensor.to(mesh.device_type).full_tensor(), heads)  # type: ignore[attr-defined]
        part = distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None)  # type: ignore[arg-type]
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(_halves(tensor, heads))


def _halves(whole: Tensor, heads: int) -> Tensor:
    return whole.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # [heads, D/2, 2, E] -> [heads, 2, D/2, E]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one layout hold the same values on this rank."""
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        return torch.equal(a.to_local(), b.to_local())
    return torch.equal(a, b)
