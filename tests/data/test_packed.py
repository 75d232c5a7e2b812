"""Sequences cut from a run of tokens."""

from pathlib import Path

import numpy as np
import pytest

from dtron.data import packed
from dtron.data.packed import TokenDataset
from dtron.errors import UserError


class Run:
    """A token store in memory; documents end at `ends`."""

    fingerprint, tokenizer_fingerprint, tokenizer_json = "content", "tokenizer", Path("there/tokenizer.json")

    def __init__(self, tokens, ends=(), dtype=np.uint16):
        self.tokens, self.starts = np.array(tokens, dtype), np.array([0, *ends])
        self.n_tokens, self.vocab_size = len(tokens), int(max(tokens)) + 1

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.n_tokens
        return self.tokens[start:stop]

    def document_starts(self, start, stop):
        return self.starts[(start <= self.starts) & (self.starts < stop)]


def test_sequences_share_only_their_border():
    dataset = TokenDataset(Run(range(100, 131)), 10, name="it")
    assert len(dataset) == 3  # 31 tokens: three times ten, and the last label
    labels = []
    for i in range(3):
        x, y = dataset[i]
        assert x.dtype == y.dtype == np.int64 and x.tolist() == list(range(100 + 10 * i, 110 + 10 * i))
        labels += y.tolist()
    assert labels == list(range(101, 131))
    for bad in (-1, 3):
        with pytest.raises(IndexError):
            dataset[bad]
    assert len(TokenDataset(Run(range(30)), 10, name="it")) == 2
    assert (dataset.vocab_size, dataset.tokenizer_json) == (131, "there/tokenizer.json")
    assert (dataset.fingerprint, dataset.tokenizer_fingerprint) == ("content", "tokenizer")


def test_documents_are_marked_by_where_they_begin():
    dataset = TokenDataset(Run(range(31), ends=[3, 4, 10, 12, 30]), 10, documents=True, name="it")
    items = [dataset[i] for i in range(3)]
    assert [documents.tolist() for _, _, documents in items] == [
        [0, 0, 0, 3, 4, 4, 4, 4, 4, 4],
        [0, 0, 2, 2, 2, 2, 2, 2, 2, 2],  # one begins at its very first token
        [0] * 10,  # begun before; the next begins after it
    ]
    for i, (x, y, documents) in enumerate(items):
        assert documents.dtype == np.int64
        assert x.tolist() == list(range(10 * i, 10 * i + 10)) and y.tolist() == list(range(10 * i + 1, 10 * i + 11))


def test_too_few_tokens_are_the_users_error():
    TokenDataset(Run([0] * 11), 10, name="it")
    with pytest.raises(UserError, match="it has 10 tokens, but one sequence of seq_len = 10 needs 11"):
        TokenDataset(Run([0] * 10), 10, name="it")


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_unigram_entropy(monkeypatch, chunk):
    monkeypatch.setattr(packed, "CHUNK", chunk)

    def entropy(tokens, dtype=np.uint16):
        return TokenDataset(Run(tokens, dtype=dtype), 2, name="it").unigram_entropy

    assert entropy([3, 3, 3]) == 0
    assert entropy([0, 9, 70000, 5], np.uint32) == pytest.approx(np.log(4))
    assert entropy([1, 1, 1, 2]) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
