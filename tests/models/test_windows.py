"""Windows, the scale, the soft cap and the sinks of attention, against the formula over all pairs of tokens."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from parity.layout import with_keys
from parity.single import MODELS, SEQ, document_starts, plain_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dtron.config import Config
from dtron.data.loader import Batch
from dtron.models import attention
from dtron.models.attention import AttentionMask, CausalAttention, attention_mask
from dtron.models.families import FAMILIES
from dtron.models.flops import attention_flops_per_token, flops_per_token
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.spec import attended_tokens
from dtron.parallel.context import uses_masks
from dtron.train.tally import Tally

ROWS, TOKENS, WINDOW = 4, 256, 70  # two blocks of FlexAttention


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, visible: Callable[[int, int, int], bool], c: LlamaConfig, sinks: Tensor | None
) -> Tensor:
    """One query and one head at a time. visible(row, query, key)."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = [j for j in range(k.size(2)) if visible(b, i, j)]
        mine = h * k.size(1) // q.size(1)
        x = k[b, mine, keys].double() @ q[b, h, i].double() * (c.attention_scale or q.size(-1) ** -0.5)
        x = x if c.attention_softcap is None else c.attention_softcap * torch.tanh(x / c.attention_softcap)
        total = x.exp().sum() + (0 if sinks is None else sinks[h].double().exp())
        out[b, h, i] = ((x.exp() / total) @ v[b, mine, keys].double()).float()
    return out


@pytest.fixture(scope="module")
def qkv() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of two key/value heads, sinks."""
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, SEQ, 16, generator=g)
    return q, k[:, :2], v[:, :2], torch.randn(4, generator=g)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [1, 6, SEQ - 1, SEQ, None])
def test_a_token_attends_to_the_last_of_its_window(
    window: int | None, documents: bool, qkv: tuple[Tensor, ...]
) -> None:
    """The window counts the token itself, as in transformers: key > query - window."""
    starts = document_starts(0)[[1, 7]] if documents else None
    mask = attention_mask(window, torch.arange(SEQ).expand(2, -1), starts)
    assert (mask is None) == (not documents and window in (SEQ, None))

    def visible(b: int, i: int, j: int) -> bool:
        return max(i - (window or SEQ), -1 if starts is None else int(starts[b, i]) - 1) < j <= i

    q, k, v, _ = qkv
    torch.testing.assert_close(
        CausalAttention()(q, k, v, mask), by_hand(q, k, v, visible, MODELS["small"], None), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"attention_scale": 0.7},
        {"attention_softcap": 0.8},
        {"attention_sinks": True},
        {"attention_scale": 0.7, "attention_softcap": 0.8, "attention_sinks": True},
    ],
)
def test_scale_soft_cap_and_sinks_are_the_formula(change: dict[str, float], qkv: tuple[Tensor, ...]) -> None:
    c = replace(MODELS["small"], **change)
    q, k, v, sinks = qkv
    mask = attention_mask(None, torch.arange(SEQ).expand(2, -1), torch.zeros(2, SEQ, dtype=torch.int64))
    got = CausalAttention(c.attention_scale, c.attention_softcap)(q, k, v, mask, sinks if c.attention_sinks else None)
    expected = by_hand(q, k, v, lambda b, i, j: j <= i, c, sinks if c.attention_sinks else None)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, CausalAttention()(q, k, v), atol=1e-2)


def test_every_layer_has_its_own_window() -> None:
    """Seen in the model: what a token far away changes, by the number of layers that see past the window."""
    tokens = torch.randint(0, 96, (1, SEQ), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 96
    for windows, reach in (((3,), 4 * 2), ((3, 5), 2 * 2 + 2 * 4), ((3, None), SEQ), ((), SEQ)):
        model = plain_model(replace(MODELS["small"], windows=windows))
        changed = (model(tokens) != model(other)).any(-1)[0]
        assert changed[: reach + 1].all() and not changed[reach + 1 :].any(), windows


def test_windows_of_the_sequence_or_more_are_plain_causal_attention() -> None:
    model, wide = (plain_model(replace(MODELS["small"], windows=w)) for w in ((), (SEQ, None, 2 * SEQ)))
    tokens = torch.randint(0, 96, (2, SEQ), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(tokens), model(tokens), rtol=0, atol=0)
    assert not wide.config.needs_masks(SEQ) and wide.config.needs_masks(SEQ + 1)
    assert all(MODELS["scores"].needs_masks(n) for n in (1, SEQ))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["windows", "scores"])
def test_attention_of_gpus_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, FlexAttention and its mask, here on the CPU, uncompiled and forward only; keys as under cp."""
    c = MODELS[name]
    starts = document_starts(0)[:ROWS].repeat(1, 8) + (torch.arange(TOKENS) // SEQ) * SEQ
    positions = torch.arange(TOKENS).expand(ROWS, -1)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, ROWS, 4, TOKENS, 16, generator=g)
    k, v, sinks = k[:, :2, order], v[:, :2, order], torch.randn(4, generator=g) if c.attention_sinks else None
    core = CausalAttention(c.attention_scale, c.attention_softcap)

    class OnGpu(torch.Tensor):
        is_cuda = True

    def masks(of: type[torch.Tensor]) -> list[AttentionMask | None]:
        inputs = torch.zeros_like(positions), starts
        return [
            attention_mask(w, positions, s.as_subclass(of), torch.stack((s, positions), 1)[..., order])
            for s in inputs
            for w in (None, WINDOW)
        ]

    monkeypatch.setattr(
        attention, "_compiled", {create_block_mask: create_block_mask, flex_attention: flex_attention}.get
    )
    for dense, block in zip(masks(torch.Tensor), masks(OnGpu), strict=True):
        assert isinstance(dense, Tensor) and not isinstance(block, Tensor)
        expected = core(q, k, v, dense, sinks)
        got = core(q, k, v, block, sinks)
        torch.testing.assert_close(torch.Tensor(got), expected, rtol=1e-4, atol=1e-5)
    compiled = CausalAttention(c.attention_scale, c.attention_softcap)
    compiled.compile(fullgraph=True, backend="aot_eager")  # as a compiled block has it; the backward needs a GPU

    def allowed(b, h, i, j):  # type: ignore[no-untyped-def]
        return dense[b, 0, i, j]

    with torch.no_grad():
        got = compiled(q, k, v, create_block_mask(allowed, ROWS, None, TOKENS, TOKENS, "cpu"), sinks)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_flops_count_the_window() -> None:
    """12 x heads x head size x min(window, seq_len) of each layer, beside the matrices."""
    config = replace(FAMILIES["llama3"]["8B"], windows=(1024, 4096, None, 16384))
    plain = attended_tokens(replace(config, windows=()), 8192)
    attended = attended_tokens(config, 8192)
    assert plain == [8192] * 32 and attended == [1024, 4096, 8192, 8192] * 8
    with torch.device("meta"):
        model = Llama(config)
    flops = [flops_per_token(model, [attention_flops_per_token(config, n) for n in part]) for part in (plain, attended)]
    assert flops[0] - flops[1] == 12 * 32 * 128 * 8 * (7168 + 4096)


def test_flops_of_documents_and_windows_are_those_of_the_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    config, seen = MODELS["windows"], []
    for documents in (True, False):
        tally = Tally(
            torch.device("cpu"), seq_len=SEQ, attended=attended_tokens(config, SEQ), flops_per_token=seen.append
        )
        lengths = []
        for step in range(2):
            starts = document_starts(step) if documents else torch.zeros(8, SEQ, dtype=torch.int64)
            tally.accumulate(Batch(starts, starts, starts if documents else None), [], None)
            lengths += [int(n) for row in starts for n in row.unique(return_counts=True)[1]]
        row = tally.reduce(0, tally.by_source)
        of_layer = [sum(n * min(n, w) for n in lengths) / sum(lengths) for w in (6, SEQ, 6, SEQ)]
        assert seen[-1] == pytest.approx(of_layer)
        assert row["attended_tokens"] == pytest.approx(sum(of_layer) / 4)


def test_a_run_has_masks_where_some_sequence_is_longer_than_a_window() -> None:
    config = replace(MODELS["small"], windows=(None, 64))
    for keys, expected in (
        ({"training.seq_len": 64}, False),
        ({"training.seq_len": 65}, True),
        ({"training.seq_len": 32, "validation.seq_len": 65}, False),
        ({"training.seq_len": 32, "validation.seq_len": 65, "validation.enable": True}, True),
        ({"training.seq_len": 32, "training.attention_mask": "document"}, True),
    ):
        assert uses_masks(with_keys(Config(), keys), config) == expected, keys
    outside = SimpleNamespace(n_layers=2)  # a config without windows
    assert attended_tokens(outside, 8) == [8, 8] and not uses_masks(Config(), outside)
