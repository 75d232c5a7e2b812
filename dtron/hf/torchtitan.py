"""What `dtron convert` reads of torchtitan: a Llama 3's weights and AdamW state, from a folder of DCP files.

What differs from ours:

* Names. `layers.0.attention.wq.weight`, today `layers.0.attention.qkv_linear.wq.weight`, is our
  `layers.0.self_attn.q_proj.weight`; the optimizer's state is flattened by name, `optimizer.state.<parameter>.<state>`,
  `step` too. torchtitan of 2024 put `model.` before the weights.
* Rotary pairs. torchtitan, as Meta's Llama, rotates neighbours (2i, 2i + 1) of a head's D dimensions together; we, as
  Hugging Face's, the halves (i, i + D/2). So the rows of wq and wk, and of AdamW's moments of them, change their
  order within each head. Attention scores do not, as q and k change alike; v and o are left as they are.
* Tied embeddings. torchtitan writes the one matrix twice, its AdamW state once, under tok_embeddings. A tied model of
  ours has no lm_head: both matrices are then read and must be equal, else the checkpoint is another model's.
* Dimensions. No file holds the number of heads, the rotary base or the norm epsilon: a config.json has to be given.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtron.checkpoint.export import assets_of
from dtron.checkpoint.hf import EMBEDDING, check_fits
from dtron.checkpoint.hf_form import HEAD, HeadOrder
from dtron.checkpoint.reader import reader_of
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError
from dtron.hf.read import Found
from dtron.models.hf import from_hf_config
from dtron.models.llama import Llama

__all__ = ["find_torchtitan", "read_torchtitan"]

THEIRS = {  # module of ours -> torchtitan's in its last version configured by TOML, inside a layer or outside
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
TODAY = {"lm_head": "lm_head"} | {f"attention.qkv_linear.w{x}": f"self_attn.{x}_proj" for x in "qkv"}
OURS = {theirs: ours for ours, theirs in THEIRS.items()} | TODAY
NAME = re.compile(r"(model\.|optimizer\.state\.|)(layers\.\d+\.|)(.+?)\.weight(\.\w+|)")
OF_THE_MODEL = re.compile(r"(model\.|optimizer\.state\.|)(tok_embeddings|layers\.\d+|norm|output|lm_head)\.")


def find_torchtitan(folder: StoragePath, config: str | None) -> Found:
    """The model that torchtitan saved in `folder`, of the dimensions in `config`, a local config.json or its folder.

    What lies beside that config.json in a folder, such as a tokenizer, is taken along. UserError without `config`.
    """
    if config is None:
        raise UserError(
            f"{folder} is a checkpoint of torchtitan, which does not hold the number of heads, the rotary base and the "
            "norm epsilon; add --config FOLDER_OR_FILE, the Hugging Face config.json of this model"
        )
    path = Path(config).expanduser()
    dimensions = from_hf_config(path, "--config")
    assets = assets_of(StoragePath.at(path)) if path.is_dir() else {"config.json": path.read_bytes()}
    return Found(folder, "torchtitan", assets, dimensions)


def read_torchtitan(folder: StoragePath, model: Llama) -> dict[str, Tensor]:
    """All weights, and the optimizer's state where it was saved, as a dtron checkpoint has them; in memory.

    model: of the dimensions to expect; on meta. Tensors keep the dtype they were saved in.
    UserError, before anything is read, naming the first tensor that is missing, has another shape or has no counterpart
    in the model; after reading, where the model is tied and the checkpoint is not. DCP's CheckpointException where a
    file cannot be read.
    """
    reader = reader_of(folder)
    saved = {
        name: entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and OF_THE_MODEL.match(name)
    }
    _check(folder, {_our_name(theirs): (theirs, tuple(entry.size)) for theirs, entry in saved.items()}, model)
    state = {theirs: torch.empty(entry.size, dtype=entry.properties.dtype) for theirs, entry in saved.items()}
    dcp.load(state, storage_reader=reader)
    tensors = {_our_name(theirs): tensor for theirs, tensor in state.items()}
    if model.config.tie_embeddings and not torch.equal(tensors.get(HEAD, tensors[EMBEDDING]), tensors[EMBEDDING]):
        raise UserError(
            f"{folder}: output.weight differs from tok_embeddings.weight, but the embeddings are tied according to "
            "--config; set tie_word_embeddings to false in its config.json"
        )
    neighbours = HeadOrder(model.config.head_size, model.config.head_size, 0)
    for name, tensor in tensors.items():
        if re.search(r"\.self_attn\.[qk]_proj\.", name) and tensor.dim():  # AdamW's step is a number
            tensor.copy_(neighbours.read(tensor, (slice(0, len(tensor)),)))
    return {name: tensor for name, tensor in tensors.items() if not _is_second(name, model)}


def _is_second(name: str, model: Llama) -> bool:
    """Whether a tensor belongs to the second of two tied matrices, which is only compared with the first."""
    return model.config.tie_embeddings and ".lm_head." in name


def _check(folder: StoragePath, saved: Mapping[str, tuple[str, tuple[int, ...]]], model: Llama) -> None:
    """UserError if a tensor does not fit the model. saved: name of ours -> torchtitan's name, and shape."""
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {f"model.{name}": shape for name, shape in parameters.items()}
    for name, (_, shape) in saved.items():
        kind, _, rest = name.partition(".")
        parameter = rest.rpartition(".")[0]
        if kind == "optimizer" and parameter in parameters:
            expected[name] = parameters[parameter] if shape else shape  # AdamW's step is a number

    def both(name: str) -> str:
        return f"{name} (torchtitan's name: {saved[name][0] if name in saved else _their_name(name) or 'none'})"

    check_fits(
        folder,
        {both(name): shape for name, (_, shape) in saved.items() if not _is_second(name, model)},
        {both(name): shape for name, shape in expected.items()},
        hint="expected the config.json of the model that was trained as --config",
    )


def _our_name(theirs: str) -> str:
    """`layers.0.feed_forward.w3.weight` -> `model.layers.0.mlp.up_proj.weight`; unchanged where we have no such one."""
    match = NAME.fullmatch(theirs)
    if not match or match[3] not in OURS:
        return theirs
    kind, layer, module, state = match.groups()
    return f"{'optimizer.' if 'optimizer' in kind else 'model.'}{layer}{OURS[module]}.weight{state}"


def _their_name(ours: str) -> str:
    """torchtitan's name for a weight, as of its last version configured by TOML; empty if it has none."""
    match = NAME.fullmatch(ours)
    return f"{match[2]}{THEIRS[match[3]]}.weight" if match and match[3] in THEIRS else ""
