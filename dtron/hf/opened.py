"""What opening a model gives, wherever it lay."""

from dataclasses import dataclass

from dtron.data.tokenizer import TextEncoder
from dtron.models.llama import Llama

__all__ = ["OpenedModel"]


@dataclass(frozen=True)
class OpenedModel:
    """A whole model on one device, ready to be called.

    encoder: None where no tokenizer lies beside the weights. stop_ids: tokens that end a text.
    bos_id: the token that begins one, None where the files name none. max_positions: the longest sequence it was made
    for, in tokens, None where not known. name: what was opened, for messages.
    """

    model: Llama
    encoder: TextEncoder | None
    stop_ids: list[int]
    bos_id: int | None
    max_positions: int | None
    name: str
