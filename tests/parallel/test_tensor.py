"""Tensor parallel: what a rank holds and what it must never hold."""

import math
from typing import Any

import torch
from parity.layout import Case, build, build_config, local, local_batches
from parity.single import MODELS, SEQ
from parity.table import GATHERED_LOGITS, PP2_TP2, TP2
from ranks import Ranks
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VOCABULARY = MODELS["small"].vocab_size
LARGEST_CHUNK = 37  # of ROWS * SEQ = 256 tokens in 7 chunks, of at most 40


class Shapes(TorchDispatchMode):
    """The shapes of all plain tensors that operations give on this rank; not those DTensor only plans with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the DTensor comes first, then the operations on its shard come here
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if type(t) is torch.Tensor}
        return out


def _shapes(case: Case) -> tuple[set[tuple[int, ...]], Any, Any, list[str]]:
    """Shapes seen in a step; the embedding's gradient shape and placement; parameters whose gradient is whole."""
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, (part,) = local_batches(0, case, mesh, True)
    with Shapes() as shapes:
        model.forward_backward(*part, last=True)
    named = dict(model.named_parameters())
    gradient = named["embed_tokens.weight"].grad
    assert isinstance(gradient, DTensor)
    whole = [name for name, p in named.items() if p.dim() == 2 and local(p.grad).numel() == p.numel()]
    return shapes.seen, tuple(local(gradient).shape), gradient.placements[-1], whole


def test_the_vocabulary_is_never_gathered_and_gradients_stay_sharded(ranks: Ranks):
    for seen, gradient, placement, whole in ranks.run(2, _shapes, Case("", TP2)):
        assert any(VOCABULARY // 2 in shape for shape in seen)
        assert not any(VOCABULARY in shape for shape in seen)
        logits = [shape for shape in seen if shape[-1:] == (VOCABULARY // 2,)]
        assert max(math.prod(shape) for shape in logits) == LARGEST_CHUNK * VOCABULARY // 2  # of ROWS * SEQ tokens
        assert (gradient, placement) == ((VOCABULARY // 2, MODELS["small"].dim), Shard(0))
        assert whole == []


def test_without_loss_parallel_the_logits_are_whole(ranks: Ranks):
    seen, *_ = ranks.run(2, _shapes, Case("", TP2, GATHERED_LOGITS))[0]
    assert any(shape[-2:] == (SEQ, VOCABULARY) for shape in seen)


def _split_dims(case: Case) -> dict[str, int | None]:
    """The dimension that tensor parallel splits of every parameter; None: whole on every rank."""
    _, model = build(case, build_config(case))
    return {name: getattr(p.placements[-1], "dim", None) for name, p in model.named_parameters()}


def test_every_matrix_is_split_and_only_norms_are_whole(ranks: Ranks):
    for dims in ranks.run(4, _split_dims, Case("", PP2_TP2)):
        for name, dim in dims.items():
            split = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            assert dim == (None if "norm" in name else split), name
