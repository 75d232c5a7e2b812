"""Blocks that are alike are recorded once: what one did to memory is written again for the others.

A stage runs the same block for every layer and microbatch, and to the recorder all are equal. So of each kind of block
the first one's forward and the last one's backward (which come first in a step) are run in the first microbatch; each
further call is one autograd node that repeats their log: allocations and their ends in the same order, messages and
FLOPs. What enters and leaves a block stays real, and so do FSDP's hooks, the pipeline and the head.

A log says for each change whose memory it is: `forward` and `backward`, of what the block itself allocated, by number;
`input` and `gradient`, of what it was given. UnlikeError: blocks are not alike after all; record without replay.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtron.compat import planning
from dtron.plan.record import Message
from dtron.plan.recorder import Allocation, Recorder

__all__ = ["Replay", "UnlikeError"]

Whose = Literal["forward", "backward", "input", "gradient"]
Change = tuple[Whose, int, int]  # whose memory, its number, change in bytes


class _Mark(torch.autograd.Function):
    """The tensor unchanged; `reached` is called with its gradient, after FSDP's hooks at a block's begin."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reached: Callable[[Tensor], None]) -> Tensor:
        ctx.reached = reached
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.reached(gradient)
        return gradient, None


class UnlikeError(Exception):
    """Blocks that should be alike are not, or are called in an unusual order."""


@dataclass
class Log:
    """One direction of a block: allocations it made, changes, messages, FLOPs."""

    allocations: list[Allocation] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Shape:
    """Of a tensor that a block gives back; spec: of a DTensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    spec: Any

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Shape | None":
        if tensor is None:
            return None
        local, spec = planning.local_and_spec(tensor)
        return cls(local.size(), local.stride(), local.dtype, spec)

    def empty(self) -> Tensor:
        local = torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        return local if self.spec is None else planning.dtensor(local, self.spec)


class _Span:
    """From here to `log()`: what was recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.first = len(recorder.allocations)
        self._event, self._message = len(recorder.events), len(recorder.messages)
        self._flops = Counter(recorder.flops)

    def log(self, given: dict[int | None, tuple[Whose, int]], before: tuple[int, int] = (0, 0)) -> Log:
        """given: index of an allocation made before -> whose, and its number. before: range of the block's forward."""
        r = self._recorder
        changes: list[Change] = []
        for index, change in r.events[self._event :]:
            if index >= self.first:
                changes.append(("backward" if before[1] else "forward", index - self.first, change))
            elif before[0] <= index < before[1]:
                changes.append(("forward", index - before[0], change))
            elif index in given:
                changes.append((*given[index], change))
            else:
                raise UnlikeError(f"a block frees {r.allocations[index]}, which is not its own")
        return Log(r.allocations[self.first :], changes, r.messages[self._message :], r.flops - self._flops)


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Whether what runs inside keeps `tensor` for its backward. A recomputation, which keeps all it is given, does."""

    def __init__(self, tensor: Tensor) -> None:
        looked_for, self._seen, self._any = planning.storage_of(tensor)._cdata, False, False

        def pack(saved: Tensor) -> Tensor:
            self._any = True
            self._seen |= planning.storage_of(saved)._cdata == looked_for
            return saved

        super().__init__(pack, lambda saved: saved)

    @property
    def has_it(self) -> bool:
        return self._seen or not self._any  # a recomputation has hooks of its own


class _Kind:
    """Blocks of one kind in one part of a model, and what was recorded of them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.calls: Counter[str] = Counter()
        self.given: tuple[torch.Size, ...] = ()
        self.forward: Log | None = None
        self.backward: Log | None = None
        self.output: Shape | None = None
        self.output_slot = 0
        self.keeps_input = True
        self.gradients: list[Shape | None] = []


class Replay:
    """Use `tap` on every block of one part, in order, before the first step."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.replayed = recorder, 0
        self._kinds: dict[Any, _Kind] = {}

    def tap(self, name: str, block: nn.Module) -> Callable[..., Tensor]:
        """The forward to give `block` instead of its own."""
        run = block.forward
        names = tuple((n, type(m).__name__) for n, m in block.named_modules())
        kind = self._kinds.setdefault((names, tuple(p.shape for p in block.parameters())), _Kind())
        kind.names.append(name)

        def forward(x: Tensor, *given: Any) -> Tensor:
            shapes = tuple(t.shape for t in (x, *given) if isinstance(t, Tensor))
            kind.calls[name] += 1
            real = kind.calls[name] == 1 and name in (kind.names[0], kind.names[-1])
            if real or shapes != (kind.given or shapes):
                kind.given = kind.given or shapes
                return self._record(name, block, kind, run, x, *given)
            if kind.forward is None:
                raise UnlikeError(f"{name} is called before {kind.names[0]}")
            self.replayed += 1
            out: Tensor = _Node.apply(self, kind, name, x, given, *block.parameters())
            return out

        return forward

    def _record(
        self, name: str, block: nn.Module, kind: _Kind, run: Callable[..., Tensor], x: Tensor, *given: Any
    ) -> Tensor:
        """Run a block, and note its forward if it is the first of its kind, its backward if it is the last."""
        recorder, parameters = self.recorder, list(block.parameters())
        inputs = enumerate(t for t in (x, *given) if isinstance(t, Tensor))
        whose: dict[int | None, tuple[Whose, int]] = {recorder.live_index(t): ("input", i) for i, t in inputs}
        span: _Span | None = None

        def begin_backward(gradient: Tensor) -> None:
            nonlocal span
            recorder.backward_module = name
            whose[recorder.live_index(gradient)] = "gradient", 0
            span = _Span(recorder)

        def end_backward(gradient: Tensor) -> None:
            recorder.backward_module = ""
            if kind.backward is None and span is not None and name == kind.names[-1]:
                kind.backward = span.log(whose, forward_range)
                kind.gradients = [Shape.of(gradient), *(Shape.of(p.grad) for p in parameters)]

        recorder.forward_modules.append(name)
        marked = _Mark.apply(x, end_backward)
        forward = _Span(recorder)
        saved = _Saved(x)
        with saved:
            out = run(marked, *given)
        kind.keeps_input = saved.has_it
        log = forward.log({})
        forward_range = forward.first, len(recorder.allocations)
        recorder.forward_modules.pop()
        if kind.forward is None:
            kind.forward, kind.output = log, Shape.of(out)
            kind.output_slot = (recorder.live_index(out) or 0) - forward.first
        elif len(log.allocations) != len(kind.forward.allocations):
            raise UnlikeError(f"{name} allocates otherwise than {kind.names[0]}")
        return _Mark.apply(out, begin_backward)

    def write(self, log: Log, name: str, starts: dict[Whose, int], free: Callable[[int], None]) -> int:
        """Repeat a log for the block `name`; the index of its first allocation, whose numbers follow.

        starts: index of number 0 of what was there before. free: called with the number of an input that is dropped.
        """
        recorder = self.recorder
        start = len(recorder.allocations)
        recorder.allocations += [Allocation(0, a.kind, a.phase, name, a.operation, a.stream) for a in log.allocations]
        recorder.messages += [m._replace(module=name) for m in log.messages]
        recorder.flops.update(log.flops)
        for whose, number, change in log.changes:
            if whose == "input":
                free(number)
            else:
                recorder.events.append((starts.get(whose, start) + number, change))
        return start


class _Node(torch.autograd.Function):
    """A block that is not run: (replay, kind, name, x, other inputs, parameters) -> what the block would return."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, kind: _Kind, name: str, x: Tensor, given: Any, *parameters: Tensor) -> Tensor:
        assert kind.forward is not None and kind.output is not None
        ctx.replay, ctx.kind, ctx.name, ctx.parameters = replay, kind, name, len(parameters)
        # Storages, not tensors, which would keep the graph behind them.
        inputs = [planning.storage_of(t) for t in (x, *given) if isinstance(t, Tensor)]
        ctx.inputs = inputs if kind.keeps_input else [None, *inputs[1:]]
        ctx.start = replay.write(kind.forward, name, {}, lambda _: None)
        events, slot = replay.recorder.events, ctx.start + kind.output_slot
        events.append((slot, -kind.forward.allocations[kind.output_slot].bytes))
        replay.recorder.forward_modules.append(name)
        out = kind.output.empty()
        replay.recorder.forward_modules.pop()
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        replay, kind = ctx.replay, ctx.kind
        recorder, log = replay.recorder, kind.backward
        if log is None:
            raise UnlikeError(f"the backward of {ctx.name} comes before that of {kind.names[-1]}")
        recorder.backward_module = ctx.name

        def free(number: int) -> None:
            ctx.inputs[number] = None

        given = recorder.live_index(gradient) or 0
        start = replay.write(log, ctx.name, {"forward": ctx.start, "gradient": given}, free)
        ctx.inputs = None
        # What the log leaves is what the block returns: in its place come tensors.
        left: Counter[int] = Counter()
        for whose, number, change in log.changes:
            if whose == "backward":
                left[start + number] += change
        recorder.events += [(index, -size) for index, size in left.items() if size]
        results = [shape and shape.empty() for shape in kind.gradients]
        freed = sum(change for whose, _, change in log.changes if whose == "gradient")
        if freed:  # it is freed when this returns
            recorder.quiet.add(len(recorder.events))
            recorder.events.append((given, -freed))
        recorder.backward_module = ""
        return None, None, None, results[0], None, *results[1:]
