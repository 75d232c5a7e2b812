"""Sequences of one length cut from prepared tokens."""

from functools import cached_property

import numpy as np

from dtron.data.shards import TokenStore
from dtron.errors import UserError

__all__ = ["TokenDataset"]

CHUNK = 1 << 22  # tokens counted at a time


class TokenDataset:
    """Sequences cut from one run of tokens: sequence i is tokens[i*S : i*S + S + 1], S = seq_len.

    inputs [S] are its first S tokens and labels [S] its last S, both int64, so every token but the first is
    predicted at most once. A sequence may span documents, each of which ends in the end-of-text token. With
    `documents` an item has a third array, document_start [S] int64: for each position the index in this sequence of
    the first token of its document, 0 where that began in an earlier sequence.

    `fingerprint` names the tokens' content: equal on all ranks and on resume, or the data changed. `name` is for
    messages. Raises UserError when there are too few tokens for one sequence.
    """

    def __init__(self, store: TokenStore, seq_len: int, *, documents: bool = False, name: str) -> None:
        if store.n_tokens < seq_len + 1:
            raise UserError(
                f"{name} has {store.n_tokens} tokens, but one sequence of seq_len = {seq_len} needs {seq_len + 1}: "
                f"lower seq_len to {max(1, store.n_tokens - 1)} or less, or give more data"
            )
        self.store, self.seq_len, self.documents, self.name = store, seq_len, documents, name
        self.vocab_size, self.tokenizer_json = store.vocab_size, str(store.tokenizer_json)
        self.fingerprint, self.tokenizer_fingerprint = store.fingerprint, store.tokenizer_fingerprint

    def __len__(self) -> int:
        return (self.store.n_tokens - 1) // self.seq_len

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        start, stop = i * self.seq_len, (i + 1) * self.seq_len
        window = self.store.read(start, stop + 1).astype(np.int64)
        if not self.documents:
            return window[:-1], window[1:]
        documents = np.zeros(self.seq_len, np.int64)
        starts = self.store.document_starts(start, stop) - start
        documents[starts] = starts
        return window[:-1], window[1:], np.maximum.accumulate(documents)

    @cached_property
    def unigram_entropy(self) -> float:
        """Nats per token under the tokens' own frequencies: the lowest loss of a model that ignores context."""
        counts = np.zeros(self.vocab_size, np.int64)
        for start in range(0, self.store.n_tokens, CHUNK):
            tokens = self.store.read(start, min(start + CHUNK, self.store.n_tokens))
            counts += np.bincount(tokens, minlength=self.vocab_size)
        shares = counts[counts > 0] / self.store.n_tokens
        return float(-(shares * np.log(shares)).sum())
