"""What saving and loading cost: a Llama of 100M parameters with AdamW's state, sharded by FSDP over some worlds.

    OMP_NUM_THREADS=1 python scripts/bench/checkpoint.py [--ranks 1 2 4 8 16] [--saves 5] [--step stand-in]
        [--folder DIR] [--out FILE]
    python scripts/bench/checkpoint.py --device cuda
    torchrun --standalone --nproc-per-node 8 scripts/bench/checkpoint.py --device cuda

On a CPU it forks the ranks itself, one thread each; on GPUs it is one rank, or torchrun's. For every mode of
checkpoint.async_mode one line of JSON on stdout (and in --out). Each save is preceded by a step and by a plain copy of
the state into CPU memory that is there already, so that all three meet the same machine; while a save runs, steps go
on, as many on all ranks. A step is dtron's model and optimizer on one sequence a rank. As the gathered weights and
gradients of 16 ranks need more memory than a machine may have (over 24 GiB), --step stand-in has in their place matrix
products, STAND_IN_FLOPS shared out over the ranks, the optimizer's update and a barrier. Of a figure that differs by
rank the largest is taken, then the median over the saves but the first, which allocates and so has its own.

    bytes, bytes_a_rank   of the tensors' files in all, and of the largest; index_bytes: of DCP's list of pieces
    save_s, save_cpu_s    until all is durable and checked; CPU seconds of all ranks together (steps excluded: disabled)
    stall_s               the training thread stands still; stall_cpu_s: its own CPU seconds meanwhile
    copy_s, copy_cpu_s    the same of the plain copy; first_copy_s: with allocating
    stall_over_copy, stall_cpu_over_copy    medians of the saves' own ratios
    stall_over_sync       stall_s over save_s of mode disabled
    step_s, beside_s      a step alone, and one that begins while a save runs; slowdown: their ratio; beside: how many
    delay_s               how much longer the training takes for one save, in the mean: stall and slower steps
    verify_s, load_s      reading all files for their checksums, shared out; reading weights and state into the shards
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's dtron, also where another is installed

from dtron import registry  # noqa: E402
from dtron.checkpoint.files import Progress  # noqa: E402
from dtron.checkpoint.load import load, verify_on_all_ranks  # noqa: E402
from dtron.checkpoint.save import Saver, named_tensors  # noqa: E402
from dtron.checkpoint.storage import StoragePath  # noqa: E402
from dtron.config import Config, replace  # noqa: E402
from dtron.config.sections import Checkpoint  # noqa: E402
from dtron.mesh import Degrees, Mesh  # noqa: E402
from dtron.models.llama import LlamaConfig  # noqa: E402
from dtron.parallel.compose import ParallelModel, parallelize  # noqa: E402
from dtron.train.optimizer import build_optimizers  # noqa: E402

MODELS = {
    "100M": LlamaConfig(vocab_size=32000, dim=640, n_layers=12, n_heads=10, n_kv_heads=10, ffn_dim=1728),
    "1B": LlamaConfig(vocab_size=32000, dim=2048, n_layers=18, n_heads=16, n_kv_heads=16, ffn_dim=5632),
    "tiny": LlamaConfig(vocab_size=512, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=128),
}
READS = 3  # timed verifications and loads
STAND_IN_FLOPS = 40e9  # 64 tokens of 100M parameters, forward and backward
STAND_IN_SIDE = 512  # of the square matrices


class Clock:
    """Wall and CPU seconds of the calling thread, and of all threads of its process, over a `with` block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "Clock":
        self.wait()
        dist.barrier()
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.s, self.thread_cpu_s, self.process_cpu_s = (b - a for a, b in zip(self._began, self._now(), strict=True))

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.thread_time(), time.process_time()

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Training:
    """A rank's part of the model and its optimizer, and the steps they make."""

    def __init__(self, model: LlamaConfig, tokens: int, stand_in: bool, device: torch.device) -> None:
        world = dist.get_world_size()
        config = replace(Config(), "parallelism.data_parallel_shard_degree", world)
        config = replace(config, "activation_checkpoint.mode", "none")
        if device.type == "cpu":
            config = replace(config, "training.mixed_precision_param", "float32")
        spec = registry.look_up("model", "llama3", "model.name")
        mesh, loss = Mesh(Degrees(dp_shard=world), device.type), registry.cross_entropy
        self.model: ParallelModel = parallelize(spec, model, config, mesh, device, loss, [])
        self.optimizers = build_optimizers(self.model, config.optimizer)
        text = torch.randint(0, model.vocab_size, (1, tokens + 1), device=device)
        self._arguments = text[:, :-1], text[:, 1:], torch.arange(tokens, device=device).expand(1, -1)
        self.model.loss.valid_tokens = torch.tensor(float(world * tokens), device=device)
        self._device, self._stand_in = device, stand_in

    def step(self, before_update: Callable[[], None]) -> Clock:
        """One optimizer step, with what a Saver wants called before weights change."""
        with Clock(self._device) as clock:
            if self._stand_in:
                self._multiply()
            else:
                self.model.forward_backward(*self._arguments, last=True)
                self.model.finish_gradients()
            before_update()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=not self._stand_in)
            clock.wait()
        return clock

    def _multiply(self) -> None:
        for _, p in self.model.named_parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        matrix = torch.ones(STAND_IN_SIDE, STAND_IN_SIDE, device=self._device)
        for _ in range(round(STAND_IN_FLOPS / dist.get_world_size() / (2 * STAND_IN_SIDE**3))):
            matrix @ matrix
        dist.barrier()

    def shards(self) -> list[Tensor]:
        tensors = (tensor for _, tensor, _ in named_tensors(self.model, self.optimizers))
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@dataclasses.dataclass
class Save:
    """What one rank saw of one save, and of the copy and the step before it."""

    step_s: float
    copy_s: float
    copy_cpu_s: float
    stall_s: float = 0.0
    stall_cpu_s: float = 0.0
    save_s: float = 0.0
    save_cpu_s: float = 0.0
    beside_s: list[float] = dataclasses.field(default_factory=list)


# --- measuring, on every rank


def measure_save(training: Training, saver: Saver, buffers: list[Tensor], number: int, device: torch.device) -> Save:
    """A step, a copy, a save, and steps until all ranks have ended the save."""
    step = training.step(saver.before_update)
    with Clock(device) as copy:
        for buffer, shard in zip(buffers, training.shards(), strict=True):
            buffer.copy_(shard)
    save = Save(step.s, copy.s, copy.thread_cpu_s)
    with Clock(device) as stall:
        ended = saver.save(training.model, training.optimizers, Progress(step=number))
    save.stall_s, save.stall_cpu_s = stall.s, stall.thread_cpu_s
    while agree_busy(not ended, device):
        save.beside_s.append(training.step(saver.before_update).s)
        ended += saver.poll()
    if ended[0].error:
        raise SystemExit(f"the save failed: {ended[0].error}")
    save.save_s, save.save_cpu_s = ended[0].save_s, stall.process_cpu_s
    return save


def agree_busy(busy: bool, device: torch.device) -> bool:
    """Whether any rank is: all then make the same steps."""
    flag = torch.tensor(float(busy), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def measure_mode(
    training: Training, mode: str, folder: StoragePath, saves: int, device: torch.device
) -> dict[str, Any]:
    """Saves and loads of one mode; what this rank saw."""
    saver = Saver(folder, Checkpoint(async_mode=mode, keep_latest_k=1))
    with Clock(device) as first_copy:
        buffers = [torch.empty_like(shard, device="cpu").copy_(shard) for shard in training.shards()]
    seen = [measure_save(training, saver, buffers, number, device) for number in range(1, saves + 2)]
    last, verify_s, load_s = folder / f"step-{saves + 1}", [], []
    for _ in range(READS):
        with Clock(device) as clock:
            manifest = verify_on_all_ranks(last)
        verify_s.append(clock.s)
        with Clock(device) as clock:
            load(last, training.model, training.optimizers)
        load_s.append(clock.s)
    return {
        "saves": [dataclasses.asdict(save) for save in seen],
        "first_copy_s": first_copy.s,
        "verify_s": statistics.median(verify_s),
        "load_s": statistics.median(load_s),
        "files": {name: size for name, (size, _) in manifest.files.items()},
        "state_bytes": sum(shard.nbytes for shard in training.shards()),
    }


# --- what the ranks saw, as one line


def summarize(ranks: list[dict[str, Any]], mode: str, sync_save_s: float | None) -> dict[str, Any]:
    """One mode's figures as the head of this file has them."""
    saves = [
        {key: max(rank["saves"][i][key] for rank in ranks) for key in ranks[0]["saves"][0] if key != "beside_s"}
        | {"beside_s": ranks[0]["saves"][i]["beside_s"], "all_cpu_s": sum(r["saves"][i]["save_cpu_s"] for r in ranks)}
        for i in range(len(ranks[0]["saves"]))
    ]
    first, rest = saves[0], saves[1:]

    def median(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(of, rest))

    files = ranks[0]["files"]
    tensors = [size for name, size in files.items() if name.endswith(".distcp")]
    step_s, save_s = median(lambda s: s["step_s"]), median(lambda s: s["save_s"])
    beside = [seconds for save in rest for seconds in save["beside_s"]]
    delays = [save["stall_s"] + sum(seconds - step_s for seconds in save["beside_s"]) for save in rest]
    stall_s = median(lambda s: s["stall_s"])
    figures = {
        "state_bytes": sum(rank["state_bytes"] for rank in ranks),
        "bytes": sum(tensors),
        "bytes_a_rank": max(tensors),
        "index_bytes": files[".metadata"],
        "save_s": save_s,
        "save_cpu_s": median(lambda s: s["all_cpu_s"]) if mode == "disabled" else None,
        "stall_s": stall_s,
        "stall_cpu_s": median(lambda s: s["stall_cpu_s"]),
        "first_stall_s": first["stall_s"],
        "copy_s": median(lambda s: s["copy_s"]),
        "copy_cpu_s": median(lambda s: s["copy_cpu_s"]),
        "first_copy_s": max(rank["first_copy_s"] for rank in ranks),
        "stall_over_copy": median(lambda s: s["stall_s"] / s["copy_s"]),
        "stall_cpu_over_copy": median(lambda s: s["stall_cpu_s"] / s["copy_cpu_s"]),
        "stall_over_sync": stall_s / sync_save_s if sync_save_s else None,
        "step_s": step_s,
        "beside_s": statistics.median(beside) if beside else None,
        "slowdown": statistics.median(beside) / step_s if beside else None,
        "beside": len(beside),
        "delay_s": statistics.mean(delays),
        "verify_s": max(rank["verify_s"] for rank in ranks),
        "load_s": max(rank["load_s"] for rank in ranks),
        "stalls_s": [save["stall_s"] for save in saves],
        "copies_s": [save["copy_s"] for save in saves],
    }
    return {name: rounded(value) for name, value in figures.items()}


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# --- the program


def modes_of(device: str) -> list[str]:
    """On a CPU no memory is pinned, and the two kinds of async are one."""
    return ["disabled", "async", *(["async_with_pinned_mem"] if device == "cuda" else [])]


def serve(rank: int, world: int, store: str | None, folder: str, options: argparse.Namespace) -> None:
    """One rank's life: every mode, each printed by rank 0. store: a file for the ranks to meet at; None: torchrun's."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(options.device, local_rank) if options.device == "cuda" else torch.device("cpu")
    if options.device == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
    meet = {"init_method": f"file://{store}"} if store else {}
    dist.init_process_group(backend, rank=rank, world_size=world, **meet)
    training = Training(MODELS[options.model], options.tokens, options.step == "stand-in", device)
    sync_save_s = None
    training.step(lambda: None)  # makes AdamW's state
    for mode in modes_of(options.device):
        mine = measure_mode(training, mode, StoragePath.at(f"{folder}/{world}-{mode}"), options.saves, device)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, mine)
        figures = summarize(everyone, mode, sync_save_s)
        sync_save_s = sync_save_s or figures["save_s"]
        if rank == 0:
            tell(facts(options, world) | {"mode": mode} | figures, options.out)
    dist.barrier()
    dist.destroy_process_group()


def facts(options: argparse.Namespace, world: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": name,
        "model": options.model,
        "step": options.step,
        "ranks": world,
    }


def tell(result: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(result)
    print(line, flush=True)
    if out:
        with out.open("a") as file:
            file.write(line + "\n")


def fork(world: int, folder: str, options: argparse.Namespace) -> None:
    """Run `world` ranks on this machine's CPU; exits with a message if one fails."""
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (world, f"{meeting}/store", folder, options)
        mp.start_processes(serve, arguments, nprocs=world, start_method="fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="worlds to fork on a CPU")
    parser.add_argument("--saves", type=int, default=5, help="saves a mode, besides the first")
    parser.add_argument("--tokens", type=int, default=16, help="of the sequence a rank trains on")
    parser.add_argument("--step", choices=["real", "stand-in"], default="real", help="what goes on beside a save")
    parser.add_argument("--model", choices=MODELS, default="100M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", help="where the checkpoints go, deleted in the end; default: for temporary files")
    parser.add_argument("--out", type=Path, help="also add the lines to this file")
    options = parser.parse_args()
    if min(*options.ranks, options.saves, options.tokens) < 1:
        parser.error("--ranks, --saves and --tokens are 1 or more")
    if "RANK" in os.environ:
        folder = f"{options.folder or tempfile.gettempdir()}/bench-{os.environ.get('TORCHELASTIC_RUN_ID', 'torchrun')}"
        serve(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, folder, options)
        if os.environ["RANK"] == "0":
            shutil.rmtree(folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.device == "cuda":
            serve(0, 1, f"{folder}/store", folder, options)
        else:
            for world in options.ranks:
                fork(world, folder, options)


if __name__ == "__main__":
    main()
