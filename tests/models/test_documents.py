"""Document masks: a packed document is computed as if it stood alone."""

import warnings

import pytest
import torch
from parity.single import MODELS, SEQ, document_starts, plain_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dtron.models import attention, rope
from dtron.models.attention import attention_mask


def cuts(document_start: torch.Tensor) -> list[slice]:
    starts = sorted(set(document_start.tolist()))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(document_start)], strict=True)]


@pytest.mark.parametrize("name", ["small", "mha", "scaled"])
def test_every_document_is_computed_as_if_alone(name: str) -> None:
    model = plain_model(MODELS[name])
    tokens = torch.randint(0, 96, (8, SEQ), generator=torch.Generator().manual_seed(1))
    starts = document_starts(0)
    assert starts.max() > 0 and (starts[0] == 0).all()  # rows of many documents and of one
    together = model(tokens, document_start=starts)
    for row in range(8):
        for cut in cuts(starts[row]):
            alone = model(tokens[row : row + 1, cut])[0]
            torch.testing.assert_close(together[row, cut], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[7], model(tokens)[7], atol=1e-3)


def test_positions_restart_with_every_document() -> None:
    """Seen where the rotary embedding gets them: attention itself sees differences of positions only."""
    model = plain_model(MODELS["small"])
    seen = []
    model.layers["0"].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))  # cos [B, S, 1, D/2]
    starts = document_starts(0)
    model(torch.zeros(8, SEQ, dtype=torch.int64), document_start=starts)
    angles = (torch.arange(SEQ) - starts)[..., None, None] * rope.rope_frequencies(model.config.rope(0))
    torch.testing.assert_close(seen[0], angles.cos())


def test_one_document_is_plain_causal_attention() -> None:
    model = plain_model(MODELS["small"])
    tokens = torch.randint(0, 96, (2, SEQ), generator=torch.Generator().manual_seed(1))
    masked = model(tokens, document_start=torch.zeros_like(tokens))
    torch.testing.assert_close(masked, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_of_gpus_allows_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, FlexAttention and its mask, here on the CPU, uncompiled and forward only."""
    starts = document_starts(0)[:4].repeat(1, 8)  # 256 tokens: two blocks of 128
    starts += (torch.arange(256) // SEQ) * SEQ
    positions = torch.arange(256).expand(4, -1)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))  # keys in another order, as under cp
    keys = torch.stack((starts[:, order], positions[:, order]), 1)
    dense = attention_mask(None, positions, starts, keys)
    assert dense.shape == (4, 1, 256, 256) and 0 < dense.float().mean() < 0.5
    q, k, v = torch.randn(3, 4, 4, 256, 16, generator=torch.Generator().manual_seed(3))
    expected = attention.CausalAttention()(q, k[:, :2, order], v[:, :2, order], dense)

    def allowed(b, h, i, j):  # type: ignore[no-untyped-def]
        return dense[b, 0, i, j]

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(
        attention, "_compiled", {create_block_mask: create_block_mask, flex_attention: flex_attention}.get
    )
    block = attention_mask(None, positions, starts.as_subclass(OnGpu), keys)
    got = attention.CausalAttention()(q, k[:, :2, order], v[:, :2, order], block)
    torch.testing.assert_close(torch.Tensor(got), expected, rtol=1e-4, atol=1e-5)
    compiled = attention.CausalAttention()
    compiled.compile(fullgraph=True, backend="aot_eager")  # as a compiled block has it; the backward needs a GPU
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # fixed in 3.13.1
        got = compiled(q, k[:, :2, order], v[:, :2, order], create_block_mask(allowed, 4, None, 256, 256, "cpu"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_mask_and_attention_of_gpus_are_compiled_once_for_all_batches() -> None:
    """Both as CUDA runs them outside of compiled blocks, by inductor on the CPU, forward only."""
    graphs = []
    for step in range(3):
        starts = document_starts(step).repeat(1, 8) + (torch.arange(256) // SEQ) * SEQ
        positions = torch.arange(256).expand(8, -1)

        def allowed(b, h, i, j, starts=starts, positions=positions):  # type: ignore[no-untyped-def]
            return (starts[b, i] == starts[b, j]) & (positions[b, i] >= positions[b, j])

        mask = attention._compiled(create_block_mask)(allowed, 8, None, 256, 256, starts.device)
        dense = attention_mask(None, positions, starts)
        q = torch.randn(8, 4, 256, 16, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            got, expected = (attention.CausalAttention()(q, q, q, m) for m in (mask, dense))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
