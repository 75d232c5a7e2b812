"""What is counted for the metrics from one logged step to the next: each source's loss, the documents' lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.data.loader import IGNORE_INDEX, Batch
from dtron.data.order import Mixture
from dtron.train.forward import to_device

__all__ = ["Tally"]


class Tally:
    """Sums on every rank, reduced when a row of metrics is due. by_source: [loss, tokens] of each, on the device.

    sources: names of a mixture's sources, none without one; mixture: their shares. seq_len: tokens per sequence.
    attended: to how many tokens each layer attends at most. flops_per_token: of the model, given to how many tokens
    each layer attends in the mean; None: where these are seq_len.
    """

    def __init__(
        self,
        device: torch.device,
        sources: Sequence[str] = (),
        mixture: Mixture | None = None,
        seq_len: int = 0,
        attended: Sequence[int] = (),
        flops_per_token: Callable[[Sequence[float]], float] | None = None,
    ) -> None:
        self._device, self._sources, self._mixture, self._seq_len = device, sources, mixture, seq_len
        self._attended, self._flops_per_token = attended, flops_per_token
        self.by_source = torch.zeros(2, len(sources), dtype=torch.float64, device=device)
        # Tokens, and summed over them, to how many each kind of layer attends.
        self._kinds = {n: i + 1 for i, n in enumerate(sorted(set(attended)))}
        self._documents = torch.zeros(1 + len(self._kinds), dtype=torch.float64)

    def accumulate(self, batch: Batch, labels: list[Tensor], row_losses: list[Tensor] | None) -> None:
        """Add one step. labels: on the device, of each forward; row_losses: see `TokenMean.rows`."""
        if self._flops_per_token is not None:
            starts = torch.zeros_like(batch.tokens) if batch.document_start is None else batch.document_start
            ones = torch.ones_like(starts)
            # A document's length where it begins, else 0.
            lengths = torch.zeros_like(ones).scatter_add_(1, starts, ones)
            self._documents[0] += lengths.sum()
            for n, i in self._kinds.items():
                self._documents[i] += (lengths * lengths.clamp(max=n)).sum()
        if row_losses and batch.sources is not None:  # on ranks with the last pipeline stage
            sources = to_device(batch.sources, self._device)
            # The last ones: in its first step torch's pipeline also calls the loss once to learn its shape.
            self.by_source[0].index_add_(0, sources, torch.cat(row_losses)[-len(sources) :].double())
            valid = (torch.cat(labels) != IGNORE_INDEX).sum(1)
            self.by_source[1].index_add_(0, sources, valid.double())

    def reduce(self, consumed: int, by_source: Tensor) -> dict[str, Any]:
        """The metrics since the last call, on all ranks. consumed: global samples trained on so far.

        by_source: a copy of `by_source`, on the CPU, where all is reduced: nothing here waits for the device.
        """
        row: dict[str, Any] = {}
        if self._flops_per_token is not None:
            dist.all_reduce(self._documents)
            tokens, *sums = (self._documents / self._documents[0]).tolist()
            attended = [sums[self._kinds[n] - 1] for n in self._attended]  # by each layer
            row["attended_tokens"] = sum(attended) / len(attended)
            row["flops_per_token"] = self._flops_per_token(attended)
            self._documents.zero_()
        if self._mixture is not None and self._sources:
            dist.all_reduce(by_source)
            taken = self._mixture.before(consumed) * self._seq_len
            for name, loss, valid, tokens in zip(self._sources, *by_source.tolist(), taken, strict=True):
                row |= {f"source_loss/{name}": loss / valid if valid else None, f"source_tokens/{name}": int(tokens)}
            self.by_source.zero_()
        return row
