"""Recording what a running step allocates, sends and computes, operation by operation.

A `Recorder` is a dispatch mode: it sees every operation below autograd and DTensor, so shapes are this rank's. An
allocation is the birth or the growth of a storage and ends with the storage's death. What else it must know to equal a
real allocator:

* a message that was sent keeps its tensor until its handle is dropped, a functional collective its input until it is
  waited for;
* FSDP frees and allocates gathered weights by resizing their storages;
* DTensor runs operators on whole tensors to learn shapes, which are nothing of the rank's;
* some operators work in a copy of what they are given (`Scratch`), which no tensor shows.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dtron.compat import clean_name, planning, ring
from dtron.plan.record import Collective, Message, Peak

__all__ = ["Allocation", "Recorder"]

aten, c10d, functional = torch.ops.aten, torch.ops.c10d, torch.ops._c10d_functional

# packet of operators -> (its name, position of the group, what is counted: an argument, or the result)
COLLECTIVES: dict[Any, tuple[str, int, int | None]] = {
    c10d.allreduce_: ("all_reduce", 1, 0),
    c10d.broadcast_: ("broadcast", 1, 0),
    c10d.send: ("send", 1, 0),
    c10d.recv_: ("receive", 1, 0),
    c10d._allgather_base_: ("all_gather", 2, 0),
    c10d._reduce_scatter_base_: ("reduce_scatter", 2, 1),
    c10d.alltoall_base_: ("all_to_all", 2, 1),
    functional.all_reduce: ("all_reduce", 2, 0),
    functional.all_reduce_: ("all_reduce", 2, 0),
    functional.broadcast: ("broadcast", 2, 0),
    functional.all_gather_into_tensor: ("all_gather", 2, None),
    functional.reduce_scatter_tensor: ("reduce_scatter", 3, 0),
    functional.all_to_all_single: ("all_to_all", 3, 0),
    torch.ops._dtensor.shard_dim_alltoall: ("all_to_all", 3, 0),
}


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """As torch counts the other kernels': in full, although half is masked."""
    batch, heads, queries, size = q.shape
    return int(4 * batch * heads * queries * k.shape[2] * size)


def _attention_backward_flops(gradient: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return _attention_flops(q, k, v) * 5 // 2


FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

Scratch = Mapping[Any, Callable[[tuple[Any, ...], dict[str, Any], Any], int]]  # packet -> bytes, of a call
GLOO_SCRATCH: Scratch = {
    aten._chunk_cat: lambda args, kwargs, out: kwargs["out"].nbytes,
    torch.ops.fsdp.chunk_cat: lambda args, kwargs, out: kwargs["out"].nbytes,
    c10d._reduce_scatter_base_: lambda args, kwargs, out: args[1].nbytes,
    c10d._allgather_base_: lambda args, kwargs, out: args[0].nbytes,
    functional.all_gather_into_tensor: lambda args, kwargs, out: out.nbytes,
    functional.reduce_scatter_tensor: lambda args, kwargs, out: args[0].nbytes,
}


@dataclass(slots=True)
class Allocation:
    """bytes: as it is now. The rest is of its birth or last growth. stream: on CUDA, 0 the first that was seen."""

    bytes: int
    kind: str
    phase: str
    module: str
    operation: str
    stream: int


class Recorder(TorchDispatchMode):
    """Use as a context manager around what is to be recorded, as often as needed.

    host_value: what a host that reads a number of the device is given; it has no value here. gloo: whether the device
    is a CPU, which holds what recomputation saves of the random numbers too, and works in copies.
    """

    def __init__(self, host_value: int = 1, gloo: bool = False) -> None:
        super().__init__()
        self._host_value, self._gloo = host_value, gloo
        # Name of a process group -> its dimensions, several if it is all ranks.
        self.groups: Mapping[str, Sequence[str]] = {}
        self._scratch: Scratch = GLOO_SCRATCH if gloo else {}
        self.allocations: list[Allocation] = []
        self.events: list[tuple[int, int]] = []  # (index of the allocation, change in bytes)
        self.quiet: set[int] = set()  # indices of events after which a peak is not looked for
        self.messages: list[Message] = []
        self.flops: Counter[str] = Counter()
        self.computing, self.computed = False, 0  # whether a step is before its update; events until the last that was
        self.forward_modules: list[str] = []
        self.backward_module = ""
        self._streams: list[Any] = []
        self._live: dict[int, int] = {}  # storage -> index of its allocation
        self._labels: list[str] = []  # of FSDP
        self._muted = 0
        self._waiting: dict[int, Any] = {}  # result of a functional collective -> its input
        self._patches = contextlib.ExitStack()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether Dynamo may compile under it."""
        return True

    def __enter__(self) -> "Recorder":
        enter = self._patches.enter_context
        enter(planning.storage_resize_seen(self._resized))
        enter(planning.shape_propagation_seen(lambda: self._mute(1), lambda: self._mute(-1)))
        enter(planning.kept_while_sent())
        if self._gloo:
            enter(planning.random_states_seen(lambda storage: self._track(storage, "get_rng_state")))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    # --- where a step is

    @property
    def phase(self) -> str:
        """See `Peak.phase`."""
        if planning.in_backward():
            return "recompute" if torch.is_grad_enabled() else "backward"
        if self._labels and "post_backward" in self._labels[-1]:
            return "backward"  # a pipeline's reduction, which it calls itself
        return "forward" if self.computing else "update"

    @property
    def module(self) -> str:
        """The child of the model, or its block, that is at work; empty for none."""
        if planning.in_backward():
            return self.backward_module
        return self.forward_modules[-1] if self.forward_modules else ""

    def _at_work(self) -> tuple[str, str]:
        """`Message.module` and `Message.part`."""
        return self.module, ""

    @property
    def _unit(self) -> str:
        label = next((label for label in reversed(self._labels) if label.startswith("FSDP::")), "")
        return clean_name(label.partition("(")[2].partition(")")[0] or "model") if label else ""

    def _dimension(self, group: str, operation: str, phase: str) -> str:
        """Of a message. Dimensions that have all ranks share one group with the world."""
        names = self.groups.get(group, (group,))
        if self._unit:
            names = [n for n in names if n.endswith(("fsdp", "replicate", "shard_cp"))] or names
        elif operation == "all_to_all" and "ep" in names:
            return "ep"
        return "world" if phase == "update" and "world" in names else names[0]

    @property
    def _stream(self) -> int:
        """FSDP changes streams on a CPU too, where they are names only."""
        current = torch.cpu.current_stream()
        for number, stream in enumerate(self._streams):
            if stream is current:
                return number
        self._streams.append(current)
        return len(self._streams) - 1

    def _kind(self, phase: str, module: str) -> str:
        label = self._labels[-1] if self._labels else ""
        if "all_gather" in label:
            return "gathered weights"
        if "post_backward" in label:
            return "reduction buffers" if "reduce" in label else "gradients"
        if module in ("loss", "lm_head"):
            return "logits and loss"
        if phase == "forward":
            return "activations"
        return "recomputed activations" if phase == "recompute" else "temporaries"

    # --- memory

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors are for, of which some may be new to the recorder."""
        for tensor in tensors:
            storage = planning.storage_of(tensor)
            self._track(storage, "")
            self.allocations[self._live[storage._cdata]].kind = kind

    def live_index(self, tensor: Tensor) -> int | None:
        """The allocation that holds a tensor."""
        return self._live.get(planning.storage_of(tensor)._cdata)

    def _track(self, storage: torch.UntypedStorage, operation: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        index = self._live.get(key)
        if index is None:
            phase, module = self.phase, self.module
            self._live[key] = index = len(self.allocations)
            kind = self._kind(phase, module)
            self.allocations.append(Allocation(size, kind, phase, module, operation, self._stream))
            weakref.finalize(storage, self._freed, key, index)
            if size:
                self.events.append((index, size))
        elif (known := self.allocations[index]).bytes != size:
            self.events.append((index, size - known.bytes))
            known.bytes, known.phase, known.module, known.stream = size, self.phase, self.module, self._stream

    def _freed(self, key: int, index: int) -> None:
        if self._live.get(key) == index:
            del self._live[key]
            if size := self.allocations[index].bytes:
                self.events.append((index, -size))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live:
            self._track(storage, "")

    def _mute(self, more: int) -> None:
        self._muted += more

    def _add_scratch(self, size: int, operation: str) -> None:
        index, phase, module = len(self.allocations), self.phase, self.module
        self.allocations.append(Allocation(0, self._kind(phase, module), phase, module, operation, self._stream))
        self.events += [(index, size), (index, -size)]

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point and float(self._host_value) or self._host_value
        packet = func._overloadpacket
        if packet is functional.wait_tensor:
            self._waiting.pop(args[0].untyped_storage()._cdata, None)
        if packet in ring.OPERATORS and not self._muted:
            with self._on_top():
                return ring.OPERATORS[packet](*args, **kwargs)
        out = func(*args, **kwargs)
        if self._muted:
            return out
        if packet is torch.ops.profiler._record_function_enter_new:
            self._labels.append(args[0])
        elif packet is torch.ops.profiler._record_function_exit:
            self._labels.pop()
        if packet in self._scratch:
            self._add_scratch(self._scratch[packet](args, kwargs, out), packet.__name__)
        if packet in COLLECTIVES:
            self._add_message(packet, args, out)
        if count := FLOPS.get(packet) or flop_registry.get(packet):
            self.flops[self.phase] += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            # A tensor around others has no memory: those others were made by operations of their own.
            if (
                isinstance(tensor, Tensor)
                and tensor.device.type != "meta"
                and not is_traceable_wrapper_subclass(tensor)
            ):
                self._track(tensor.untyped_storage(), packet.__name__)
        return out

    @contextlib.contextmanager
    def _on_top(self) -> Iterator[None]:
        """Within an operator, see what it does."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _add_message(self, packet: Any, args: tuple[Any, ...], out: Any) -> None:
        operation, group_at, counted = COLLECTIVES[packet]
        name = planning.group_name(args[group_at])
        group = planning.group_called(name)
        tensors = tree_leaves(out if counted is None else args[counted])
        size = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        phase, peer = self.phase, -1
        if operation in ("send", "receive"):
            phase = "pipeline" if self.computing else phase  # gradients of tied copies are exchanged after that
            peer = dist.get_global_rank(group, args[2])
        self.messages.append(
            Message(
                self._dimension(name, operation, phase), group.size(), operation, phase, size,
                *self._at_work(), self._unit, peer,
            )
        )  # fmt: skip
        if packet._qualified_op_name.startswith("_c10d_functional::") and isinstance(out, Tensor):
            self._waiting[out.untyped_storage()._cdata] = args[0]

    # --- results

    def collectives(self) -> tuple[Collective, ...]:
        """What was sent, by kind."""
        found: dict[tuple[str, int, str, str], list[int]] = {}
        for message in self.messages:
            if message.dimension:
                found.setdefault(message[:4], []).append(message.bytes)
        return tuple(Collective(*kind, len(sizes), sum(sizes)) for kind, sizes in found.items())

    def level(self, at: int) -> int:
        """Bytes held before event `at`."""
        return sum(change for _, change in self.events[:at])

    def peak(self, since: int) -> Peak:
        """The most that is held from event `since` on."""
        held, most, at = self.level(since), -1, 0
        for number, (_, change) in enumerate(self.events[since:], since):
            held += change
            if held > most and number not in self.quiet:
                most, at = held, number
        sizes: Counter[int] = Counter()
        for index, change in self.events[: at + 1]:
            sizes[index] += change
        parts: Counter[str] = Counter()
        activations: Counter[str] = Counter()
        for index, size in sizes.items():
            allocation = self.allocations[index]
            parts[allocation.kind] += size
            if allocation.kind == "activations":
                activations[allocation.module or "model"] += size
        last = self.allocations[self.events[at][0]]
        return Peak(
            most, last.phase, last.module, last.operation,
            {kind: size for kind, size in parts.most_common() if size}, {k: v for k, v in activations.items() if v},
        )  # fmt: skip
