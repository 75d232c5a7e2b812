"""A run made small enough for CPU ranks, with everything kept that can make its layout wrong.

Kept: the model's parts, the pattern of its layers, its schedule, recomputation, masks, accumulation, and what divides
what. Changed: sizes, degrees (to their smallest factors, where there would be too many ranks), precision (fp32: then
two correct ways of adding up differ by 1e-6 and not by 1e-2) and the optimizer (SGD without momentum: its step is the
gradient, where AdamW's would hide a factor).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dtron.config import Config, replace
from dtron.config.optimizer import Optimizer
from dtron.config.sections import Checkpoint, LRScheduler, Metrics, Profiling, Validation
from dtron.errors import Mistakes, UserError
from dtron.mesh import Degrees, fewest_ranks
from dtron.models.init import Constant
from dtron.models.llama import LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.models.rope import for_length
from dtron.models.spec import meta_model
from dtron.parallel.float8 import FLOAT8
from dtron.parallel.incompatible import check_compatible
from dtron.parallel.schedules import SCHEDULES, schedule_stages
from dtron.train.resolve import check_batch, check_model, resolve
from dtron.train.setup import Setup

__all__ = ["NOISE", "NOISY", "Proof", "make_proof"]

# Of a GPU, of speed or of precision: key, the value that a proof takes, and how it is called where a run has another.
LEFT_OUT: list[tuple[str, Any, str]] = [
    ("training.mixed_precision_param", "float32", "bfloat16"),
    ("compile.enable", False, "torch.compile"),
    ("training.enable_cpu_offload", False, "CPU offload"),
    ("training.loss_kernel", "torch", "the loss in Triton"),
    ("parallelism.enable_async_tensor_parallel", False, "asynchronous tensor parallel"),
]
DEGREES = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
}
TOKENS, VOCABULARY, EXPERT_DIM, EXPERTS = 64, 128, 32, 8
# A matrix of standard deviation s makes a vector of E values s * sqrt(E) times as long. With 0.02 and a small E hidden
# states and attention would hardly depend on most weights, whose gradients would be lost in those of others.
LENGTHENS = 0.85
# Standard deviation of what is added to all initial values, made under each parameter's name with NOISY after it:
# biases that begin as zeros and norms that begin as ones would hide what a layout does with them.
NOISE, NOISY = 0.05, " + noise"


@dataclass(frozen=True)
class Proof:
    """What is compared. asked: the run as it is; setup: as it is proved. left_out: in words. widen: factor of the
    initial weights' standard deviations, so that smaller matrices act as much on their input as the large ones.
    """

    asked: Setup
    setup: Setup
    left_out: tuple[str, ...]
    widen: float

    def std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial values, see `ModelSpec.init_std`."""
        std = self.setup.spec.init_std(name, self.setup.model_config)
        return std if std is None or isinstance(std, Constant) else std * self.widen

    def with_learning_rate(self, lr: float, steps: int) -> "Proof":
        """The same, to be trained for `steps` steps."""
        config = replace(replace(self.setup.config, "optimizer.lr", lr), "training.steps", steps)
        return dataclasses.replace(self, setup=dataclasses.replace(self.setup, config=config))


def make_proof(config: Config, gpus: int | None, ranks: int, full: bool) -> Proof:
    """The same in every process. UserError where the run cannot work or cannot be made small."""
    config, left_out = _for_a_proof(config)
    asked = resolve(config, gpus or fewest_ranks(config.parallelism, least_shards=2), "cpu")
    if full:
        batch = check_batch(asked.config, asked.degrees, asked.config.training.global_batch_size)
        config = replace(asked.config, "training.global_batch_size", batch)
        return Proof(asked, dataclasses.replace(asked, config=config), left_out, 1.0)
    degrees = _fewer_ranks(asked, ranks)
    p = config.parallelism
    sections = {key: getattr(degrees, name) for name, key in DEGREES.items()}
    small = dataclasses.replace(asked.config, parallelism=dataclasses.replace(p, **sections))
    small = _small_batch(small, asked, degrees)
    found = Mistakes()
    for smaller in _small_models(asked, small, degrees):
        found = Mistakes()
        candidate = small
        if p.pipeline_parallel_layers_per_stage:
            per_stage = -(-smaller.n_layers // _stages(asked, degrees))
            candidate = replace(small, "parallelism.pipeline_parallel_layers_per_stage", per_stage)
        with found.collect():
            check_compatible(candidate)
        with found.collect():
            check_batch(candidate, degrees, candidate.training.global_batch_size)
        try:
            meta_model(asked.spec, smaller)
            check_model(candidate, asked.spec, smaller, degrees, found)
        except Exception as error:  # whatever a model from outside does with dimensions that it was not made for
            found.append(f"{type(error).__name__}: {error}")
        if not found:
            setup = Setup(candidate, degrees, "cpu", asked.spec, smaller)
            ratio = 1.0 if isinstance(smaller, LlamaConfig) else asked.model_config.dim / smaller.dim
            return Proof(asked, setup, left_out, math.sqrt(max(1.0, ratio)))
    raise UserError(
        f"no smaller copy of this run works ({found[0]}); --full takes it as it is, with "
        f"{asked.degrees.world} ranks on this machine"
    )


def _for_a_proof(c: Config) -> tuple[Config, tuple[str, ...]]:
    """The configuration of a short training that writes nothing; what is left out of it, in words."""
    left_out = [text for key, value, text in LEFT_OUT if _get(c, key) != value]
    for key, value, _ in LEFT_OUT:
        c = replace(c, key, value)
    if any(name in FLOAT8 for name in c.model.converters):
        left_out.append("float8")
        c = replace(c, "model.converters", [name for name in c.model.converters if name not in FLOAT8])
    if c.activation_checkpoint.mode == "memory_budget":
        left_out.append("the memory budget (by operation instead)")
        c = replace(
            replace(c, "activation_checkpoint.mode", "selective"), "activation_checkpoint.selective_ac_option", "op"
        )
    left_out.append(f"{c.optimizer.name} (SGD instead)")
    left_out.append("clipping")
    c = dataclasses.replace(
        c,
        optimizer=Optimizer(name="SGD", lr=1.0, beta1=0.0, weight_decay=0.0),
        lr_scheduler=LRScheduler(warmup_steps=0, decay_ratio=0.0),
        checkpoint=Checkpoint(),
        profiling=Profiling(),
        validation=Validation(),
        metrics=Metrics(),
    )
    keys = {"device": "cpu", "max_norm": 1e9, "spike_factor": 0.0, "dataset": "stdlib", "mixture": []}
    for key, value in keys.items():
        c = replace(c, f"training.{key}", value)
    return c, tuple(left_out)


def _get(c: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(c, section), name)


def _fewer_ranks(setup: Setup, most: int) -> Degrees:
    """Degrees above 1 stay so, and the largest are lowered first. A split that is written out keeps its pp."""
    d, p = setup.degrees, setup.config.parallelism
    fixed = {"pp"} if p.pipeline_parallel_schedule_csv or p.module_fqns_per_model_part else set()
    while d.world > most:
        sizes = {name: getattr(d, name) for name in DEGREES if name not in {"ep", *fixed}}
        lower = {name: _largest_divisor(size) for name, size in sizes.items()}
        open_ = [name for name, size in lower.items() if size > 1]
        if not open_:
            break
        name = max(open_, key=lambda name: sizes[name])
        d = dataclasses.replace(d, **{name: lower[name]})
        d = dataclasses.replace(d, ep=math.gcd(setup.degrees.ep, d.dp_shard * d.cp * d.tp))
    return d


def _stages(asked: Setup, d: Degrees) -> int:
    """Of a pipeline with fewer ranks: each has as many as before."""
    of_rank, _ = schedule_stages(asked.config.parallelism, asked.model_config.n_layers)
    return sum(map(len, of_rank)) // asked.degrees.pp * d.pp


def _largest_divisor(size: int) -> int:
    """Below size; 1 of a prime."""
    return next(size // factor for factor in range(2, size + 2) if size % factor == 0) if size > 1 else 1


def _small_batch(c: Config, asked: Setup, d: Degrees) -> Config:
    """Few short sequences: two in each forward or one in each of the microbatches that the schedule needs."""
    p, t = c.parallelism, asked.config.training
    size = p.pipeline_parallel_microbatch_size
    if d.pp == 1:
        local = min(2, t.local_batch_size)
    elif p.pipeline_parallel_schedule_csv:
        local = t.local_batch_size
    else:
        stages = _stages(asked, d)
        kind = SCHEDULES[p.pipeline_parallel_schedule]
        local, size = max(stages, 2 * d.pp) if kind.at_least_stages else 2 * d.pp, 1
    accumulated = t.global_batch_size > t.local_batch_size * asked.degrees.dp
    unit = 2 * d.cp * d.tp
    seq_len = min(-(-TOKENS // unit) * unit, t.seq_len)
    values = {
        "parallelism.pipeline_parallel_microbatch_size": size,
        "training.local_batch_size": local,
        "training.global_batch_size": local * d.dp * (2 if accumulated else 1),
        "training.seq_len": seq_len,
        "training.loss_chunk_tokens": 24 if t.loss_chunk_tokens else 0,  # several chunks, and unequal ones
    }
    for key, value in values.items():
        c = replace(c, key, value)
    return c


def _small_models(asked: Setup, c: Config, d: Degrees) -> Iterator[Any]:
    """Configurations to try, the smallest first; the last has only fewer layers."""
    m, p = asked.model_config, asked.config.parallelism
    n_layers = m.n_layers
    if not p.module_fqns_per_model_part:
        stages = _stages(asked, d) if d.pp > 1 else 1
        pattern = max(2, len(getattr(m, "windows", ())), len(getattr(m, "ropes", ())))
        n_layers = min(m.n_layers, max(stages, pattern))
    kv = min(m.n_kv_heads, max(2, d.tp))
    heads = kv * min(2, m.n_heads // m.n_kv_heads)
    vocab_size = -(-VOCABULARY // d.tp) * d.tp
    fields: dict[str, Any] = {"n_layers": n_layers, "n_heads": heads, "n_kv_heads": kv, "vocab_size": vocab_size}
    if isinstance(m, LlamaConfig):
        size = _head_size(m)
        fields |= {"dim": heads * size, "ffn_dim": 2 * heads * size, "head_dim": size if m.head_dim else None}
        fields["windows"] = tuple(_window(w, t=c.training.seq_len, of=asked.config.training.seq_len) for w in m.windows)
        if m.moe:
            fields |= {"moe": _experts(m.moe, d), "dim": max(heads * size, 8 * d.dp_shard * d.cp * d.tp)}
            fields["head_dim"] = size
        fields["init_std"] = LENGTHENS / math.sqrt(fields["dim"])
        yield for_length(dataclasses.replace(m, **fields), c.training.seq_len)
    else:
        fields |= {"dim": 16 * heads} | ({"ffn_dim": 32 * heads} if hasattr(m, "ffn_dim") else {})
        yield _replaced(m, fields)
    yield _replaced(m, {"n_layers": n_layers})


def _replaced(m: Any, fields: dict[str, Any]) -> Any:
    return dataclasses.replace(m, **{name: value for name, value in fields.items() if hasattr(m, name)})


def _head_size(m: LlamaConfig) -> int:
    """The smallest of which an even number of values is rotated; that of the model where its scaling names them."""
    if hasattr(m.rope_scaling, "short_factor"):
        return m.head_size
    return next(n for n in (16, 32, 64, m.head_size) if int(n * m.partial_rotary_factor) % 2 == 0)


def _window(window: int | None, t: int, of: int) -> int | None:
    """As large a part of a sequence of `t` tokens as of one of `of`."""
    return None if window is None else max(2, window * t // of)


def _experts(m: MoEConfig, d: Degrees) -> MoEConfig:
    unit = math.lcm(d.ep, m.n_groups)
    top_k = min(m.top_k, 2) if m.n_groups == 1 else m.top_k
    least = max(EXPERTS, top_k * m.n_groups // m.top_groups)
    return dataclasses.replace(
        m,
        n_experts=min(m.n_experts, -(-least // unit) * unit),
        top_k=top_k,
        expert_dim=max(EXPERT_DIM, 8 * d.dp_shard * d.cp * d.tp),
        shared_dim=EXPERT_DIM if m.shared_dim else 0,
        n_dense_layers=min(m.n_dense_layers, 1),
    )


def _widening(m: Any, small: Any) -> float:
    """See `Proof`; a Llama-like model has it in its configuration."""
    return 1.0 if isinstance(small, LlamaConfig) else math.sqrt(max(1.0, m.dim / small.dim))
