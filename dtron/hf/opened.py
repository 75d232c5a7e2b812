"""What a tool needs of a model."""

from dataclasses import dataclass

from dtron.data.tokenizer import TextEncoder
from dtron.models.llama import Llama

__all__ = ["OpenedModel"]


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory, its tokenizer, and the ids that end or begin a text. `name`: the folder it is from."""

    model: Llama
    encoder: TextEncoder | None
    stop_ids: list[int]
    bos_id: int | None
    max_positions: int | None
    name: str
