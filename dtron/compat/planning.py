"""The private torch APIs of dry runs. All checked on torch 2.13 only.

Wait for a public memory estimate that knows FSDP, DTensor and pipelines.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dtron.compat.units import fsdp_groups

__all__ = [
    "FakeTensorMode",
    "backward_number",
    "dtensor",
    "fake_world",
    "forward_number",
    "fsdp_gathered",
    "name_units",
    "fused_norms",
    "group_called",
    "group_name",
    "in_backward",
    "is_compiled",
    "kept_while_sent",
    "local_and_spec",
    "module_calls_seen",
    "random_states_seen",
    "received",
    "shape_propagation_seen",
    "storage_of",
    "storage_resize_seen",
    "world_name",
    "wrap_compiled",
]


@contextlib.contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """Be `rank` of `world` ranks whose collectives end at once. RuntimeError inside another world."""
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process without a process group; run it in a process of its own")
    environment = patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    with environment:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()
            # What torch caches by the shape of a mesh has the groups of this world in it.
            _clear_sharding_prop_cache()
            _gen_transform_infos.cache_clear()


def in_backward() -> bool:
    """Whether autograd runs a backward on this thread."""
    return torch._C._current_graph_task_id() != -1


def group_name(group: Any) -> str:
    """Of what an operation is given as its group: the name itself, or the group in a box."""
    return group if isinstance(group, str) else distributed_c10d.ProcessGroup.unbox(group).group_name


def group_called(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return distributed_c10d._resolve_process_group(cast(Any, name))


def world_name() -> str:
    """The name of the group of all ranks."""
    return distributed_c10d._get_default_group().group_name


def forward_number() -> int:
    """Of the autograd node that was made last on this thread."""
    return int(torch.autograd._get_sequence_nr()) - 1


def backward_number() -> int:
    """`forward_number` of what the running backward is of; -1 for none, and for the accumulation of gradients."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


@contextlib.contextmanager
def module_calls_seen(begins: Callable[[nn.Module], None], ends: Callable[[], None]) -> Iterator[None]:
    """Call `begins` and `ends` around each call of a module, its hooks included, which hooks of one's own would not."""
    call = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        begins(module)
        try:
            return call(module, *args, **kwargs)
        finally:
            ends()

    with patch.object(nn.Module, "__call__", called):
        yield


def is_compiled(module: nn.Module) -> bool:
    """Whether the module itself was compiled in place."""
    return module._compiled_call_impl is not None


def wrap_compiled(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put something around the call of a module that was compiled in place, its hooks included."""
    assert module._compiled_call_impl is not None
    module._compiled_call_impl = wrap(module._compiled_call_impl)


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Of this rank's part; of a tensor around another, such as torchao's float8 ones, what that has."""
    tensor = local_and_spec(tensor)[0]
    while is_traceable_wrapper_subclass(tensor):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return tensor.untyped_storage()


def local_and_spec(tensor: Tensor) -> tuple[Tensor, Any]:
    """This rank's part of a DTensor, and what describes the whole; a plain tensor and None."""
    return (tensor._local_tensor, tensor._spec) if isinstance(tensor, DTensor) else (tensor, None)


def dtensor(local: Tensor, spec: Any) -> DTensor:
    """The DTensor of that description whose part here is `local`."""
    return DTensor(local, spec, requires_grad=False)


@contextlib.contextmanager
def storage_resize_seen(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `seen` after each resize of a storage, by which FSDP frees and allocates gathered weights."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        seen(storage)
        return result

    with patch.object(torch.UntypedStorage, "resize_", resize_):
        yield


@contextlib.contextmanager
def shape_propagation_seen(begins: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """DTensor learns shapes by running operators on tensors as large as the whole: those are not the rank's."""
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagated(self: Any, schema: Any) -> Any:
        begins()
        try:
            return propagate(self, schema)
        finally:
            ends()

    with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated):
        yield


@contextlib.contextmanager
def fused_norms() -> Iterator[None]:
    """Let RMSNorm be one operator, as on CUDA: it keeps its input and one fp32 number a row. On a CPU it is several."""

    def forward(x: Tensor, shape: list[int], weight: Any = None, eps: Any = None) -> tuple[Tensor, Tensor]:
        rows = [*x.shape[: x.dim() - len(shape)], *(1 for _ in shape)]
        return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)

    def backward(grad: Any, x: Any, shape: Any, rstd: Any, weight: Any, wanted: list[bool]) -> tuple[Any, Any]:
        return torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm", forward, "CPU", allow_override=True)
        library.impl("_fused_rms_norm_backward", backward, "CPU", allow_override=True)
        yield


@contextlib.contextmanager
def random_states_seen(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `seen` with each saved state of the CPU's random numbers, which no operation makes."""
    get = torch.get_rng_state

    def get_rng_state() -> Tensor:
        state = get()
        seen(state.untyped_storage())
        return state

    with patch.object(torch, "get_rng_state", get_rng_state):
        yield


class _Sent:
    """The handle of a message, which keeps what is sent, as those of gloo and NCCL do and that of a fake group not."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self, *args: Any) -> Any:
        return self._work.wait(*args)

    def is_completed(self) -> bool:
        return True


@contextlib.contextmanager
def kept_while_sent() -> Iterator[None]:
    """Let the handle of an isend keep the tensor."""
    send = distributed_c10d.isend

    def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Sent(send(tensor, *args, **kwargs), tensor)

    # A P2POp takes no other function than these two names.
    with patch.object(distributed_c10d, "isend", isend), patch.object(dist, "isend", isend):
        yield


def name_units(part: nn.Module) -> None:
    """Let FSDP name its units now, and not in the first forward: a pipeline of several stages gathers before it."""
    if isinstance(part, FSDPModule):
        part._get_fsdp_state()._lazy_init()


def fsdp_gathered(part: nn.Module) -> Iterator[Tensor]:
    """What weights are gathered into, where it is not themselves; of modules which share a unit several times."""
    for group in fsdp_groups(part):
        for p in group.fsdp_params:
            yield from (t for t in getattr(p, "all_gather_outputs", ()) if t is not p._sharded_param_data)
            yield from getattr(p, "_unsharded_inner_tensors", ())


def received(schedule: Any) -> Iterator[Tensor]:
    """The buffers into which a pipeline schedule receives."""
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
            yield from (info.buffer for info in infos if getattr(info, "buffer", None) is not None)
