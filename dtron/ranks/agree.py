"""What all ranks must know alike: an answer of rank 0, the first problem of any of them."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dtron.errors import UserError

__all__ = ["from_all_ranks", "from_rank_0", "raise_first_problem", "warn_on_rank_0"]

log = logging.getLogger(__name__)

T = TypeVar("T")


def from_rank_0(what: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks, its UserError included: shared folders may show each machine something else."""
    answer: list[T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [what()]
        except (UserError, OSError) as error:
            answer = [error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def from_all_ranks(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on all of them; of this process alone without a process group."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_first_problem(problem: str, message: Callable[[str], str] = str) -> None:
    """UserError on all ranks if any rank has a problem, that of the lowest such rank; empty: this rank has none.

    message: makes the error's text of the problem.
    """
    if found := next(filter(None, from_all_ranks(problem)), ""):
        raise UserError(message(found))


def warn_on_rank_0(text: str) -> None:
    """A warning that all ranks have reason for; one of them is enough."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning(text)
