"""The outputs of a model's modules in one step, so that the first that a layout gets wrong can be named.

Parts of an output are on several ranks, by sequences, tokens, heads or columns. So what is compared is what adds up
over the ranks whatever the split: the sum of squares, and the number of elements, of which ranks of tensor parallel
that hold the same make tp times as many.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtron.compat import clean_name, planning

__all__ = ["Outputs", "first_that_differs", "recorded_outputs"]

Outputs = dict[str, tuple[int, float]]  # module -> elements, sum of their squares; in the order in which they end
RTOL = 1e-4  # of a sum of squares: rounding makes 1e-6


@contextlib.contextmanager
def recorded_outputs(parts: Sequence[nn.Module]) -> Iterator[Outputs]:
    """Of all forwards inside, by module; those of recomputations are not counted."""
    found: Outputs = {}

    def note(name: str, output: object) -> None:
        name = clean_name(name)
        if isinstance(output, Tensor) and output.is_floating_point() and not planning.in_backward():
            local = (output.to_local() if isinstance(output, DTensor) else output).detach()
            elements, squares = found.get(name, (0, 0.0))
            found[name] = elements + local.numel(), squares + local.double().square().sum().item()

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: note(name, output))
        for part in parts
        for name, module in part.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def first_that_differs(expected: Outputs, ranks: Sequence[Mapping[str, tuple[int, float]]], tp: int) -> str:
    """The name of the module that ends first, of those whose outputs can be compared and are not equal; or empty."""
    for name, (elements, squares) in expected.items():
        seen = [of_rank[name] for of_rank in ranks if name in of_rank]
        copies, left = divmod(sum(n for n, _ in seen), elements)
        if left or copies not in (1, tp):  # such as rows of experts, and a head that gives hidden states
            continue
        if abs(sum(value for _, value in seen) / copies - squares) > RTOL * squares:
            return name
    return ""
