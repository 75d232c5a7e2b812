"""The ring's traffic: which collectives each rotation makes, and how many bytes of keys and values are sent."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
from parity.layout import Case, build, build_config, local_batches
from parity.single import MODELS, ROWS, SEQ
from parity.table import ALLTOALL, CP2, CP4
from ranks import Ranks
from torch.distributed.tensor.debug import CommDebugMode

from dtron import registry
from dtron.config import load
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.parallel.context import local_positions
from dtron.train.resolve import resolve


def _collectives(case: Case) -> tuple[Counter[str], Counter[str], list[int]]:
    """Collectives of one forward and of one backward with their name, and the elements of each all-gather."""
    mesh, model = build(case, build_config(case))
    model.loss.valid_tokens, ((tokens, labels, positions),) = local_batches(0, case, mesh, True)
    counts, elements = [], []
    with Elements(elements) as forward:
        loss = model.loss(model.parts[0](tokens, positions), labels)
    counts.append(forward.by_name())
    with Elements([]) as backward:
        loss.backward()
    counts.append(backward.by_name())
    return counts[0], counts[1], elements


class Elements(CommDebugMode):
    """Counts collectives, and notes how many elements each functional one of the ring sends."""

    def __init__(self, sent: list[int]) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("_c10d_functional::all_"):
            self.sent.append(args[0].numel())
        return super().__torch_dispatch__(func, types, args, kwargs)

    def by_name(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for op, count in self.get_comm_counts().items():
            counts[str(op).rsplit(".", 1)[-1]] += count
        return counts


@pytest.mark.parametrize("degrees", [CP2, CP4])
def test_each_rotation_makes_its_own_collectives(degrees: Degrees, ranks: Ranks):
    layers, hops = MODELS["small"].n_layers, degrees.cp - 1
    gather, gather_back, _ = ranks.run(degrees.world, _collectives, Case("", degrees))[0]
    pass_on, pass_back, _ = ranks.run(degrees.world, _collectives, Case("", degrees, ALLTOALL))[0]
    name = "all_to_all_single"
    assert (gather[name], pass_on[name]) == (0, layers * hops)  # K and V are sent as one buffer
    assert gather["all_gather_into_tensor"] == layers
    assert pass_on["all_gather_into_tensor"] == 0
    assert pass_back[name] > gather_back[name]


def test_keys_and_values_are_sent_unexpanded(ranks: Ranks):
    """Both rotations send 2 (K and V) x the K/V heads, half as many as the query heads here."""
    c = MODELS["small"]
    assert c.n_heads == 2 * c.n_kv_heads
    expected = 2 * ROWS * c.n_kv_heads * (SEQ // 2) * c.head_size
    for keys in ({}, ALLTOALL):
        _, _, elements = ranks.run(2, _collectives, Case("", CP2, keys))[0]
        assert elements == [expected] * c.n_layers


@pytest.mark.parametrize("head_tail", [True, False])
def test_positions_of_all_ranks_are_the_sequence(head_tail: bool):
    parts = [local_positions(32, rank, 4, head_tail).tolist() for rank in range(4)]
    assert sorted(p for part in parts for p in part) == list(range(32))
    assert parts[1] == ([4, 5, 6, 7, 24, 25, 26, 27] if head_tail else list(range(8, 16)))
    if head_tail:  # the work of a causal mask, the sum of (position + 1), is the same on every rank
        assert len({sum(part) for part in parts}) == 1


def test_context_ranks_shard_the_weights_too(ranks: Ranks):
    """FSDP goes over the context ranks: a rank of fsdp 2 x cp 2 holds a quarter."""
    (whole,) = ranks.run(1, _held, Case("", Degrees()))
    assert sum(ranks.run(4, _held, Case("", Degrees(dp_shard=2, cp=2)))) == whole


def _held(case: Case) -> int:
    _, model = build(case, build_config(case))
    return sum(p.to_local().numel() for _, p in model.named_parameters())


def test_a_model_with_windows_that_takes_no_masks_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The ring would attend beyond the windows."""
    spec = dataclasses.replace(registry.look_up("model", "mistral", ""), document_masks=False)
    monkeypatch.setitem(registry._REGISTRY["model"], "outside", spec)
    arguments = ["--model.name", "outside", "--model.flavor", "debugmodel", "--cp", "2", "--training.seq_len"]
    with pytest.raises(UserError, match="model.name outside needs attention masks at training.seq_len 128"):
        resolve(load([*arguments, "128"]), 2)
    resolve(load([*arguments, "64"]), 2)
