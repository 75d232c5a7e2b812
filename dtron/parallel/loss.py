"""The loss of a microbatch: of the model's logits, or of its last hidden states and its head, in chunks.

In chunks (`dtron/models/loss.py`) the model's forward ends before the head, and the loss applies the head's weights.
They are there: the head is in an FSDP unit that stays gathered from its forward to its backward, and the head is still
called, with the hidden states, so that FSDP's hooks run where they would. With tensor parallel each rank has a shard of
the vocabulary (`dtron/parallel/tensor.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtron import compat
from dtron.config.sections import Config
from dtron.models.loss import Kernel, VocabularyShard, cross_entropy, linear_cross_entropy
from dtron.models.spec import ModelSpec
from dtron.models.variants import Variant
from dtron.parallel.incompatible import FEATURES
from dtron.parallel.tensor import vocabulary_shard, whole_sequence

__all__ = [
    "ChunkedTokenMean",
    "TokenLoss",
    "TokenMean",
    "chunk_tokens",
    "chunked_head",
    "plain_loss",
    "return_hidden_states",
]

TokenLoss = Callable[[Tensor, Tensor], Tensor]  # logits [B, S, V], labels [B, S] -> loss of every token [B, S]


def plain_loss(loss: Tensor) -> Tensor:
    """A loss as an ordinary detached tensor; sharded logits give a DTensor."""
    loss = loss.detach()
    return loss.full_tensor() if hasattr(loss, "full_tensor") else loss


class TokenMean:
    """Loss of a microbatch as its share of the mean over all valid tokens of the global batch.

    `valid_tokens`, a tensor on the device, is set before a step's first forward. Dividing here makes
    gradients plain sums over ranks and microbatches, whatever the masks. `rows`, a list where there are several
    sources to tell apart, receives the loss of every row, summed over its tokens, microbatch after microbatch.
    """

    def __init__(self, token_loss: TokenLoss, device: torch.device) -> None:
        self.token_loss = token_loss
        self.valid_tokens = torch.ones((), device=device)
        self.rows: list[Tensor] | None = None

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        loss, losses = self.compute(output, labels)
        if self.rows is not None:
            self.rows.append(plain_loss(losses).sum(1))
        return loss

    def compute(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [], loss of every token [B, S]); output: of the model, logits [B, S, V]; labels [B, S]."""
        losses = self.token_loss(output, labels)
        return losses.sum() / self.valid_tokens, losses


class ChunkedTokenMean(TokenMean):
    """The same of hidden states [B, S, E]: cross-entropy with the head in chunks of at most `chunk_tokens` tokens."""

    def __init__(self, head: nn.Linear, variant: Variant, chunk_tokens: int, kernel: Kernel, device: torch.device):
        super().__init__(cross_entropy, device)
        self.head, self.variant, self.chunk_tokens, self.kernel = head, variant, chunk_tokens, kernel

    def compute(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        whole, shard = self.head.weight, VocabularyShard()
        if isinstance(whole, DTensor):
            output, shard = whole_sequence(output, whole.device_mesh), vocabulary_shard(whole)
        weight, bias = (p.to_local() if isinstance(p, DTensor) else p for p in (whole, self.head.bias))
        loss, losses = linear_cross_entropy(
            output.flatten(0, 1), weight, bias, labels.flatten(), 1 / self.valid_tokens, self.chunk_tokens,
            self.variant, shard, self.kernel,
        )  # fmt: skip
        return loss, losses.view(labels.shape)


def chunked_head(part: nn.Module, config: Config, spec: ModelSpec, token_loss: TokenLoss) -> nn.Linear | None:
    """The head of a model or stage whose loss is made in chunks: the standard loss, of a head that is known.

    None: it is given logits. A head that a converter replaced is not known.
    """
    head, p = getattr(part, "lm_head", None), config.parallelism
    if type(head) is not nn.Linear or spec.logits_variant is None or token_loss is not cross_entropy:
        return None
    gathered = p.tensor_parallel_degree > 1 and p.disable_loss_parallel
    chunked = chunk_tokens(config, FEATURES["zero-bubble schedule"](config)) and not gathered
    return head if chunked else None


def chunk_tokens(config: Config, zero_bubble: bool) -> int:
    """Tokens whose logits the standard loss makes at a time, under such a schedule or another; 0: those of all."""
    return 0 if zero_bubble and not compat.splits_python_functions else config.training.loss_chunk_tokens


def return_hidden_states(part: nn.Module, head: nn.Linear) -> None:
    """Let a model or stage return what its head is given."""
    head.forward = _unchanged  # type: ignore[method-assign,assignment]
    part.logits = lambda hidden: head(hidden)  # type: ignore[assignment]


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
