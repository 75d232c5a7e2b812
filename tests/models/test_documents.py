"""Document masks: a packed document is computed as if it stood alone."""

import pytest
import torch
from parity.single import MODELS, SEQ, documents, plain_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dtron.models import llama
from dtron.models.llama import document_mask


def cuts(begins: torch.Tensor) -> list[slice]:
    starts = sorted(set(begins.tolist()))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(begins)], strict=True)]


@pytest.mark.parametrize("name", ["small", "mha", "scaled"])
def test_every_document_is_computed_as_if_alone(name: str) -> None:
    model = plain_model(MODELS[name])
    tokens = torch.randint(0, 96, (8, SEQ), generator=torch.Generator().manual_seed(1))
    begins = documents(0)
    assert begins.max() > 0 and (begins[0] == 0).all()  # rows of many documents and of one
    together = model(tokens, documents=begins)
    for row in range(8):
        for cut in cuts(begins[row]):
            alone = model(tokens[row : row + 1, cut])[0]
            torch.testing.assert_close(together[row, cut], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[7], model(tokens)[7], atol=1e-3)


def test_one_document_is_plain_causal_attention() -> None:
    model = plain_model(MODELS["small"])
    tokens = torch.randint(0, 96, (2, SEQ), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens, documents=torch.zeros_like(tokens)), model(tokens), rtol=1e-5, atol=1e-5)


def test_the_block_mask_of_gpus_allows_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, FlexAttention and its mask, here on the CPU, uncompiled and forward only."""
    begins = documents(0)[:4].repeat(1, 8)  # 256 tokens: two blocks of 128
    begins += (torch.arange(256) // SEQ) * SEQ
    positions = torch.arange(256).expand(4, -1)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))  # keys in another order, as under cp
    keys = torch.stack((begins[:, order], positions[:, order]), 1)
    dense = document_mask(begins, positions, keys)
    assert dense.shape == (4, 1, 256, 256) and 0 < dense.float().mean() < 0.5
    q, k, v = torch.randn(3, 4, 4, 256, 16, generator=torch.Generator().manual_seed(3))
    expected = llama.CausalAttention()(q, k[:, :2, order], v[:, :2, order], dense)

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(llama, "_compiled", {create_block_mask: create_block_mask, flex_attention: flex_attention}.get)
    block = document_mask(begins.as_subclass(OnGpu), positions, keys)
    got = llama.CausalAttention()(q, k[:, :2, order], v[:, :2, order], block)
    torch.testing.assert_close(torch.Tensor(got), expected, rtol=1e-4, atol=1e-5)
