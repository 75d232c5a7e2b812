"""What one step does in order: its messages and, between them, the operations that take its time."""

from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from dtron.compat import clean_name, planning
from dtron.plan.record import Message
from dtron.plan.recorder import FLOPS, Recorder

__all__ = ["Journal", "block_events"]

# Beside those that are counted in FLOPs, which are products and attention.
NOTED = {
    "_fused_rms_norm": "rms_norm",
    "_fused_rms_norm_backward": "rms_norm backward",
    "grouped_product": "matmul of experts",
    "grouped_product_rows": "matmul of experts",
    "grouped_product_weight": "matmul of experts",
    "silu": "silu",
    "silu_backward": "silu backward",
    "embedding": "embedding",
    "embedding_dense_backward": "embedding backward",
}


class Journal(Recorder):
    """A recorder whose messages have operations between them and name the part of a block that each belongs to.

    An operation of the backward belongs to the part whose forward made its autograd node. Not for compiled blocks.
    """

    def __init__(self, host_value: int = 1, gloo: bool = False) -> None:
        super().__init__(host_value, gloo)
        self._calls: list[str] = []  # names of the modules that are being called
        self._names: dict[nn.Module, str] = {}
        self._parts: dict[int, str] = {}  # number of an autograd node -> the module whose forward made it

    def __enter__(self) -> "Journal":
        super().__enter__()
        self._patches.enter_context(planning.module_calls_seen(self._begin, self._end))
        return self

    def _begin(self, module: nn.Module) -> None:
        if module not in self._names:
            self._names.update((m, clean_name(f"{name}.").rstrip(".")) for name, m in module.named_modules())
        self._calls.append(self._names[module])

    def _end(self) -> None:
        self._calls.pop()

    @property
    def phase(self) -> str:
        """A module that is called in the backward is recomputed."""
        return "recompute" if self._calls and planning.in_backward() else super().phase

    def _at_work(self) -> tuple[str, str]:
        if planning.in_backward() and not self._calls:
            name = self._parts.get(planning.backward_number(), "")
        else:
            name = self._calls[-1] if self._calls else ""
        module = self.module or ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        return module, name.removeprefix(module).lstrip(".") if name.startswith(module) else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not planning.in_backward() and self._calls:
            self._parts.setdefault(planning.forward_number(), self._calls[-1])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet, name = func._overloadpacket, func._overloadpacket.__name__
        count = FLOPS.get(packet) or flop_registry.get(packet)
        if (count or name in NOTED) and out is not NotImplemented and not self._muted:
            flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
            shapes = " x ".join(str(list(t.shape)) for t in args[: 1 if "norm" in name else 2] if isinstance(t, Tensor))
            event = Message("", 1, _name(name), self.phase, 0, *self._at_work(), flops=flops, shapes=shapes)
            self.messages.append(event)
        return out


def _name(operation: str) -> str:
    if "attention" in operation:
        return "attention backward" if "backward" in operation else "attention"
    return NOTED.get(operation, "matmul")


def block_events(events: list[Message], block: str, phases: tuple[str, ...]) -> list[Message]:
    """Those of the first call of a block in some phases, with FSDP's gathers before and reduces after."""
    inside = [i for i, e in enumerate(events) if e.module == block and e.phase in phases]
    if not inside:
        return []
    first = inside[0]
    last = next((i for i, j in zip(inside, inside[1:], strict=False) if _leaves(events[i + 1 : j], block)), inside[-1])
    while first and not events[first - 1].module and events[first - 1].operation == "all_gather":
        first -= 1
    while last + 1 < len(events) and not events[last + 1].module and events[last + 1].unit == block:
        last += 1
    return events[first : last + 1]


def _leaves(between: list[Message], block: str) -> bool:
    """Whether another block's work is among these."""
    return any(e.module not in ("", block) for e in between)
