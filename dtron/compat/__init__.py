"""Every private torch API and version difference dtron uses, each with the versions it was checked on.

An entry is deleted when its public counterpart, named beside it, exists in all supported versions.
"""

import itertools
import os
import pickle
import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.tensor.experimental._context_parallel._attention as cp_impl
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed import distributed_c10d
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import _utils as pipelining_utils
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.experimental import register_sharding
from torch.serialization import _get_layout

from dtron.compat import tracing

__all__ = [
    "DCP_INDEX_CLASSES",
    "CsvSchedule",
    "FsspecReader",  # 2.11, 2.13; waits for a public module of the same
    "FsspecWriter",
    "Stage",
    "all_gather",
    "all_gather_single",
    "another_connection",
    "checkpoint_wrapper",  # 2.11, 2.13; waits for a public module wrapper in torch.utils.checkpoint
    "clean_name",
    "compile_without_autograd_cache",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "copy_of_dtensor",
    "csv_actions",
    "divide_gradients_by",
    "dump_flight_recorder",
    "enable_async_tensor_parallel",
    "enable_ring_attention",
    "forget_meshes",
    "flight_recorder_is_on",
    "group_ranks",
    "has_units_of_two_meshes",
    "keep_forward_only",
    "ring_attention_style",
    "schedule_actions",
    "set_memory_budget",
    "set_timeout",
    "skip_update_where",
    "splits_python_functions",
    "takes_scale_and_skip",
    "stages_of_rank",
    "start_flight_recorder",
    "start_without_messages",
    "unfinished_collectives",
    "unit_of_two_meshes",
    "warn_about_torch_version",
]

OLDEST, NEWEST = (2, 11), (2, 13)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
OWN_TIMEOUT = "checkpoint"  # description of the groups whose members may wait long for each other


def warn_about_torch_version() -> str | None:
    """A warning when the installed torch is outside the claimed range 2.11 to 2.13."""
    if OLDEST <= TORCH <= NEWEST:
        return None
    age = "newer than" if TORCH > NEWEST else "older than"
    return f"torch {torch.__version__} is {age} the versions dtron was checked on (2.11 to 2.13)"


def clean_name(name: str) -> str:
    """A parameter's name in the plain model, without the parts wrappers put in."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


# --- one FSDP unit with two meshes: 2.13; not in 2.11, where experts are a unit inside the block's. Waits for a public
# ShardPlacementResult.


has_units_of_two_meshes = TORCH >= (2, 13)


def unit_of_two_meshes(mesh: DeviceMesh, other: DeviceMesh, on_other: Iterable[nn.Parameter], placement: Shard) -> Any:
    """fully_shard's shard_placement_fn that shards the parameters `on_other` over the other mesh; None without such.

    placement: of those parameters; the rest are sharded along dimension 0.
    """
    if not has_units_of_two_meshes:
        return None
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
    from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info

    ids = {id(p) for p in on_other}
    # A mesh with shards has an FSDPMeshInfo, which the two sides' annotations do not say.
    here = ShardPlacementResult(Shard(0), cast(Any, _get_mesh_info(mesh)))
    there = ShardPlacementResult(placement, cast(Any, _get_mesh_info(other)))
    return lambda p: there if id(p) in ids else here


# --- the two halves of a zero-bubble schedule's backward, through a Python function (the loss in chunks): 2.13;
# 2.11 reads an attribute that such nodes do not have ("Attribute '_input_metadata' is invalid"). 2.12 was not tried.


splits_python_functions = TORCH >= (2, 13)


# --- ring attention: torch's own, 2.11 and 2.13; waits for a public module style and a CPU handler.
# The public manager context_parallel() shards buffers and patches F.scaled_dot_product_attention for the
# whole process, and its gradients are silently wrong when the backward runs outside of it; the module
# style below is the same ring without the patch.

cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SEQUENCE = 2  # dimension of q, k, v [B, H, S, D]


def ring_attention_style() -> Any:
    """The ParallelStyle that makes a module's q, k, v sequence shards of one attention."""
    return cp_impl._ContextParallel(_SEQUENCE, cp_impl._ContextParallel.AttentionType.SDPA)


def enable_ring_attention(rotate_method: str, load_balance: bool) -> None:
    """Route DTensor attention to torch's ring. Process-wide in torch; a run has one setting."""
    cp_impl.set_rotate_method(rotate_method)
    cp_impl._cp_options.enable_load_balance = load_balance
    if cpu_flash_attention not in cp_impl.custom_ops:
        _register_cpu_ring()
    cp_impl._enable_context_parallel_dispatcher()


def _register_cpu_ring() -> None:
    """Give the CPU flash operators the sharding rule and ring handler that the CUDA ones have."""
    shard = Shard(_SEQUENCE)
    register_sharding(cpu_flash_attention)(lambda *args, **kwargs: [([shard] * 2, [shard] * 3)])
    register_sharding(cpu_flash_attention_backward)(lambda *args, **kwargs: [([shard] * 3, [shard] * 6)])
    handlers: dict[Any, Any] = cp_impl.custom_ops
    handlers[cpu_flash_attention] = handlers[cpu_flash_attention_backward] = _cpu_ring


def _cpu_ring(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Handler of both CPU operators: unwrap the DTensors, run torch's ring on the shards, wrap the results."""
    dispatcher = DTensor._op_dispatcher
    info: Any = dispatcher.unwrap_to_op_info(op, args, kwargs)
    dispatcher.sharding_propagator.propagate(info)
    ring = _ring_forward if op is cpu_flash_attention else _ring_backward
    local = ring(info.compute_mesh, *info.local_args, **info.local_kwargs)
    return dispatcher.wrap(local, info.output_sharding.output_spec)


def _ring_forward(mesh, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):  # type: ignore[no-untyped-def]
    if attn_mask is not None or dropout_p:
        raise NotImplementedError("ring attention has no mask and no dropout")
    return cp_impl._templated_ring_attention(
        mesh.get_group(), _SEQUENCE, cpu_flash_attention, q, k, v, is_causal=is_causal, scale=scale
    )


def _ring_backward(  # type: ignore[no-untyped-def]
    mesh, grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    return cp_impl._templated_ring_attention_backward(
        mesh.get_group(), _SEQUENCE, cpu_flash_attention_backward, grad, "grad_out", q, k, v, out, lse, is_causal,
        dropout_p=dropout_p, scale=scale,
    )  # fmt: skip


# --- an all-gather with a gradient, 2.11 and 2.13 (the other name is that of 2.11 and 2.12); waits for a public one.

_gather: Any = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd


def all_gather(tensor: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """Every rank's tensor joined along `dim` in the order of the ranks; gradients are summed and scattered back."""
    gathered: torch.Tensor = _gather(tensor, dim, mesh)
    return gathered


# --- an all-gather without one, 2.11 and 2.13, under its public name of 2.13; the other is deprecated since.

all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# --- pipeline stages, 2.11 and 2.13; waits for a start without messages where every stage was given its shapes.


class Stage(PipelineStage):
    """A pipeline stage that is given the shape of the hidden states, or runs the model once to learn it.

    hidden: on meta, what a stage passes to the next. Then nothing is run or sent before the first microbatch. None: the
    stages run one microbatch and send each other the shapes and dtypes they see.
    """

    def __init__(
        self, module: torch.nn.Module, index: int, n_stages: int, device: torch.device, group: dist.ProcessGroup,
        hidden: torch.Tensor | None,
    ) -> None:  # fmt: skip
        # 2.13 takes from requires_grad whether a gradient comes back; with False, the ranks wait for each other.
        example = None if hidden is None else hidden.detach().requires_grad_()
        # Of the first stage's input and the last stage's output torch uses only the number.
        super().__init__(module, index, n_stages, device, input_args=example, output_args=example, group=group)
        self._hidden = hidden
        if hidden is not None and hasattr(pipelining_utils, "InferenceMode"):  # 2.13
            self._inference_mode = pipelining_utils.InferenceMode.STATIC
            self._runtime_validate = False  # checks the two that are only counted, too

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Named in traces, as the next two: 2.13 names some schedules' actions itself, others' not."""
        with tracing.span(f"forward of microbatch {fwd_chunk_id}, stage {self.stage_index}"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        of = "" if kwargs.get("full_backward", True) else " of inputs"
        with tracing.span(f"backward{of} of microbatch {bwd_chunk_id}, stage {self.stage_index}"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with tracing.span(f"backward of weights of microbatch {bwd_chunk_id}, stage {self.stage_index}"):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Sent into a buffer of another dtype or size, hidden states would become NaN or end the process."""
        output = super().forward_maybe_with_nosync(*args, **kwargs)
        expected = self._hidden
        if expected is None or self.is_last or (output.dtype, output.shape) == (expected.dtype, expected.shape):
            return output
        raise ValueError(
            f"stage {self.stage_index} returns {output.dtype} {tuple(output.shape)}, but the next one expects "
            f"{expected.dtype} {tuple(expected.shape)}; register the model with a ModelSpec whose "
            "standard_hidden_states is False"
        )

    def _validate_fwd_outputs(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """2.11 only, whose check is of the last stage's output too."""
        if self._hidden is None:
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc]

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """2.11 only: messages that open connections. With gloo a rank cannot send to itself, nor does it need to."""
        messages = super()._get_init_p2p_neighbors_ops() if self._hidden is None else []
        return [message for message in messages if message.group_peer != self.group_rank]


def start_without_messages(schedule: Any) -> None:
    """Leave out 2.13's vote of all stages on whether they were given shapes; 2.11 has none."""
    schedule._warmup_p2p = lambda *args: None


# --- pipeline schedules, 2.11 and 2.13; waits for public custom schedules and a public evaluation of every schedule.


def stages_of_rank(pp: int, n_stages: int, v_shape: bool) -> list[tuple[int, ...]]:
    """Stage indices of each pipeline rank: round robin, or (r, 2*pp-1-r) for the V-shaped schedules."""
    mapping = pipelining_utils.generate_rank_to_stage_mapping(pp, n_stages, "v" if v_shape else "loop")
    return [tuple(mapping[rank]) for rank in range(pp)]


_FORWARD = {
    _ComputationType.FORWARD,
    _ComputationType.SEND_F,
    _ComputationType.RECV_F,
    _ComputationType.UNSHARD,
    _ComputationType.RESHARD,
}


def keep_forward_only(schedule: Any) -> None:
    """Strip every backward action of a multi-stage schedule, so that V-shaped ones can evaluate too."""
    if isinstance(schedule, _PipelineScheduleRuntime):
        order = schedule.pipeline_order_with_comms
        schedule.pipeline_order_with_comms = {
            rank: [leaf for action in actions for leaf in _leaves(action) if leaf.computation_type in _FORWARD]
            for rank, actions in order.items()
        }


def _leaves(action: _Action) -> list[_Action]:
    """An action, or those an overlapped pair consists of."""
    return [leaf for sub in action.sub_actions for leaf in _leaves(sub)] if action.sub_actions else [action]


def csv_actions(rows: Sequence[Sequence[str]]) -> list[list[tuple[int, str, int]]]:
    """Each rank's (stage, kind, microbatch) from cells such as 0F3; ValueError on a cell that is none."""
    return _flat([_Action.from_str(cell.strip()) for cell in row if cell.strip()] for row in rows)


def schedule_actions(name: str, pp: int, n_stages: int, microbatches: int) -> list[list[tuple[int, str, int]]]:
    """Each rank's (stage, kind, microbatch) in the order in which torch's schedule of that name computes them.

    It is the order of the schedule object itself, made without stages. What is not computed, as messages and
    reductions, is left out.
    """
    cls = get_schedule_class(name)
    # The lowering to messages is left out: it takes most of the time, and is of no use without stages.
    lone = type(name, (cls,), {"_prepare_schedule_with_comms": lambda self, actions: None})
    stage = SimpleNamespace(num_stages=n_stages, group_size=pp, group_rank=0, is_last=False, submod=nn.Module())
    schedule: Any = lone(stage if issubclass(cls, PipelineScheduleSingle) else [stage] * (n_stages // pp), microbatches)
    rows = _flat(schedule.pipeline_order[rank] for rank in range(pp))
    rows = [[action for action in row if action[1] in ("F", "B", "I", "W")] for row in rows]
    if name == "1F1B":  # whose list, but not whose run, begins with microbatch 1 on the last rank
        numbers = [itertools.count() for _ in rows]
        rows = [[(s, k, next(n) if k == "F" else m) for s, k, m in row] for row, n in zip(rows, numbers, strict=True)]
    return rows


def _flat(rows: Iterable[Iterable[_Action | None]]) -> list[list[tuple[int, str, int]]]:
    leaves = [[leaf for action in row if action is not None for leaf in _leaves(action)] for row in rows]
    return [[(a.stage_index, a.computation_type.value, a.microbatch_index or 0) for a in row] for row in leaves]


class CsvSchedule(_PipelineScheduleRuntime):
    """A schedule whose compute actions are rows of cells, one row per pipeline rank."""

    def __init__(self, stages: list[Stage], n_microbatches: int, rows: Sequence[Sequence[str]], **kwargs: Any) -> None:
        super().__init__(stages, n_microbatches, **kwargs)
        self.pipeline_order = {
            rank: [_Action.from_str(cell.strip()) for cell in row if cell.strip()] for rank, row in enumerate(rows)
        }
        self._prepare_schedule_with_comms(self.pipeline_order)


# --- async tensor parallel, 2.13 (CUDA only: not run here); waits for a public switch.


def enable_async_tensor_parallel(tp_mesh: DeviceMesh) -> None:
    """Let inductor split tensor-parallel matmuls and overlap them with their collectives."""
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(tp_mesh.get_group().group_name)


# --- what torch caches by the shape of a mesh, 2.11 and 2.13; waits for caches that end with the process group.


def forget_meshes() -> None:
    """After the process group is destroyed: the next one's equal mesh would find the groups of this one."""
    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()


# --- timeouts, 2.11 and 2.13; waits for a public setter.


def set_timeout(seconds: int) -> None:
    """Let collectives of every group of this rank fail after `seconds`; gloo's point-to-point keeps its first.

    Groups that were described as `OWN_TIMEOUT` keep the one they were made with.
    """
    for group in list(distributed_c10d._world.pg_map):
        if group.group_desc != OWN_TIMEOUT:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


# --- a DTensor whose shard lies in CPU memory while its mesh is of GPUs, 2.11 and 2.13; from_local() would move it.


def copy_of_dtensor(like: DTensor, shard: torch.Tensor) -> DTensor:
    """`like` with another shard in place of its own."""
    return DTensor(shard, like._spec, requires_grad=False)


# --- gradients that are scaled, and steps that change nothing, inside the optimizer's own pass, 2.11 and 2.13: what
# torch.amp.GradScaler asks of an optimizer; waits for a public way.


def divide_gradients_by(optimizer: torch.optim.Optimizer, scale: torch.Tensor) -> None:
    """Let each step() from now on divide gradients by `scale`, a float32 scalar on the device."""
    optimizer.grad_scale = _beside_shards(optimizer, scale)  # type: ignore[attr-defined]


def skip_update_where(optimizer: torch.optim.Optimizer, found: torch.Tensor) -> None:
    """Let each step() from now on leave weights and state as they are if `found`, a float32 scalar, is 1."""
    optimizer.found_inf = _beside_shards(optimizer, found)  # type: ignore[attr-defined]


def takes_scale_and_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer does what the two functions above ask for: fused Adam and AdamW, and dtron's own."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _beside_shards(optimizer: torch.optim.Optimizer, scalar: torch.Tensor) -> torch.Tensor:
    """In CPU memory with CPU offload: torch itself would copy it there without waiting until it is written."""
    p = optimizer.param_groups[0]["params"][0]
    return scalar.to((p.to_local() if isinstance(p, DTensor) else p).device)


# --- the flight recorder, 2.11 and 2.13 on CPU; names of NCCL builds read from the source, not run here. Waits for a
# public one.

_RECORDER_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # the second is the older name
# gloo and NCCL have a recorder each: these are not two names of one.
_RECORDERS = ("_dump_fr_trace", "_dump_nccl_trace")


def start_flight_recorder(entries: int) -> None:
    """Let torch keep the last `entries` collectives; before any group is made. A size in the environment stays."""
    if not any(name in os.environ for name in _RECORDER_SIZE):
        os.environ[_RECORDER_SIZE[0]] = str(entries)


def flight_recorder_is_on() -> bool:
    """Whether the groups that are made record."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RECORDER_SIZE)


def dump_flight_recorder() -> bytes:
    """What torch's analyzer (torchfrtrace) reads: of the recorder with more in it, where there are two."""
    dump = pickle.loads(max(_dumps(stacks=True), key=len))
    groups = {tuple(entry["process_group"]) for entry in dump["entries"]}
    # gloo's groups come without names and ranks, which the analyzer wants.
    dump["pg_config"] |= {
        name: {"name": name, "desc": description, "ranks": str(group_ranks(name))}
        for name, description in groups
        if name not in dump["pg_config"]
    }
    return pickle.dumps(dump)


def unfinished_collectives() -> list[dict[str, Any]]:
    """Entries of collectives that this rank has begun and not ended, oldest first. 0.5 s with 20,000 entries.

    gloo's point-to-point is never recorded. Used of an entry: profiling_name ("gloo:all_reduce"), process_group
    (name, description), collective_seq_id, input_sizes, time_created_ns (of time.time_ns), timeout_ms.
    """
    entries = [entry for dump in _dumps(stacks=False) for entry in pickle.loads(dump)["entries"]]
    # NCCL never retires the single messages of a batch, only the batch. What comes later in a group ends later.
    ended: dict[str, int] = {}
    for entry in entries:
        if entry["retired"] and entry["profiling_name"].startswith("nccl"):
            ended[entry["process_group"][0]] = entry["record_id"]
    left = [e for e in entries if not e["retired"] and e["record_id"] > ended.get(e["process_group"][0], -1)]
    return sorted(left, key=lambda entry: entry["time_created_ns"])


def _dumps(stacks: bool) -> list[bytes]:
    found = [getattr(torch._C._distributed_c10d, name, None) for name in _RECORDERS]
    return [dump(includeCollectives=True, includeStackTraces=stacks, onlyActive=False) for dump in found if dump]


def group_ranks(name: str) -> list[int]:
    """The global ranks of the process group that the recorder calls `name`; none if it is gone."""
    groups = (group for group, given in distributed_c10d._world.pg_names.items() if given == name)
    return next((dist.get_process_group_ranks(group) for group in groups), [])


def another_connection(store: Any) -> Any:
    """The same store for another thread: a client is locked while one of its requests waits. Waits for a public one."""
    clone = getattr(store, "clone", None)
    return clone() if clone else store


# --- torch.compile, 2.13.


def compile_without_autograd_cache() -> None:
    """Turn off the cache of whole compiled functions; inductor's cache of kernels, the expensive part, stays on.

    Its key leaves out the names of process groups. They differ from rank to rank and from layout to layout,
    so a rank could find on disk a function that calls a group it is not in (seen with the compiled loss
    and tensor parallel). Waits for group names in the key.
    """
    import torch._functorch.config as functorch

    functorch.enable_autograd_cache = False


# --- the memory budget of compiled functions, 2.11 and 2.13; waits for an argument of torch.compile.


def set_memory_budget(budget: float) -> None:
    """What functions compiled from now on may keep for their backward, as a share between 0 (their inputs) and 1 (all).

    Process-wide in torch; a run has one setting. With tensor or context parallel a function holds its DeviceMesh, whose
    size 2.13 cannot tell unless it may take it for 0; 2.11 lacks that key and needs none.
    """
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = budget
    if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):
        functorch.unsafe_treat_script_objects_as_zero_size = True


# --- what the index of a DCP checkpoint is made of, 2.11 and 2.13; waits for a reader in torch that knows these alone.


def _memory_format(cls: type, name: str) -> Any:
    """In place of `getattr`, by which the first versions of Python 3.11 pickle the member of an enumeration."""
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


# By (module, name) in the pickle. None of them runs anything that it is given.
DCP_INDEX_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", cls.__name__): cls
        for cls in (
            dcp_metadata.BytesStorageMetadata, dcp_metadata.ChunkStorageMetadata, dcp_metadata.Metadata,
            dcp_metadata.MetadataIndex, dcp_metadata.StorageMeta, dcp_metadata.TensorProperties,
            dcp_metadata.TensorStorageMetadata, dcp_metadata._MEM_FORMAT_ENCODING,
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("builtins", "getattr"): _memory_format,
    # The folder that was written to, which nothing reads: a path of any kind.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}  # fmt: skip
