"""The private APIs of FSDP's units, 2.11 and 2.13."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

__all__ = ["copy_no_whole_units", "fsdp_groups"]


def fsdp_groups(part: nn.Module) -> Iterator[Any]:
    """The parameter groups of a part's units; those of modules which share a unit several times."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # of 2.13; 2.11 has one at most
            yield from [state._fsdp_param_group] if groups is None and state._fsdp_param_group else groups or ()


def copy_no_whole_units(part: nn.Module) -> None:
    """Leave out what FSDP copies where a shard is the whole: on one rank, and on replicas that shard nothing.

    Weights are computed with as they are, or are cast by the copy that FSDP makes. Gradients are reduced in the buffer
    they were collected in. Waits for a fully_shard that does so on a mesh of one.
    """
    for group in fsdp_groups(part):
        if group.mesh_info.shard_mesh_size > 1:
            continue
        group._reduce_scatter_comm = _OneBuffer()
        group.gradient_divide_factor = _NoDivision(1.0)
        for p in group.fsdp_params:
            if not p.offload_to_cpu and not hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather"):
                p.__class__ = _Whole


class _Whole(FSDPParam):
    """A parameter of which this rank has the whole. FSDP would cast it into one tensor, and copy that to another."""

    @property
    def all_gather_inputs(self) -> list[torch.Tensor]:
        return [self._sharded_param_data]

    def init_all_gather_outputs(
        self, all_gather_input_numels: Any, all_gather_input_dtypes: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.param_dtype is None:  # copied to itself, which is no copy
            self.all_gather_outputs = [self._sharded_param_data]
        else:
            super().init_all_gather_outputs(all_gather_input_numels, [self.param_dtype], *args, **kwargs)

    def free_unsharded_param(self) -> None:
        if self.param_dtype is not None:
            super().free_unsharded_param()


class _OneBuffer:
    """Memory for a unit's gradients where FSDP copies what it would reduce and scatter to what it would get: the same
    tensor is given for both, so that nothing is copied and less is held.
    """

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """FSDP asks for the input, and then, on the stream that reduces, for the output."""
        buffer, self._input = self._input, None
        if buffer is None:
            buffer = self._input = torch.empty(size, dtype=dtype, device=device)
        elif device.type == "cuda":
            buffer.record_stream(torch.cuda.current_stream())  # it is added to other gradients there, and then freed
        return buffer

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is scattered over one rank")


class _NoDivision(float):
    """1.0, by which FSDP would divide into a second tensor: divided by this a tensor is itself.

    None in its place would average over replicas.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.div else NotImplemented
