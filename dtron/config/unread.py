"""Keys that are read only in company: one table. A key that is set and that nothing reads is told at start."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dtron.config.keys import KEYS, Setting
from dtron.config.sections import Config

__all__ = ["RULES", "Rule", "unmet", "unread"]


class Rule(NamedTuple):
    """`keys` (names or patterns) are read only where `holds`, which `needs` says in words.

    switch: the key that turns them off. Where it is set after them, in a file on top of theirs or on the command line,
    they are meant to be unread; set beside them in a file, they are where they have their defaults.
    """

    keys: tuple[str, ...]
    needs: str
    holds: Callable[[Config], bool]
    switch: str = ""


RULES = [
    Rule(
        ("optimizer.*", "lr_scheduler.*", "training.steps", "training.max_norm", "training.global_batch_size",
         "training.dataset*", "training.text_column", "training.mixture", "training.shuffle_documents",
         "training.on_*", "training.spike_factor", "validation.freq", "checkpoint.interval"),
        "validation.only = false", lambda c: not c.validation.only, "validation.only",
    ),
    Rule(
        ("checkpoint.folder", "checkpoint.load_step", "checkpoint.load_only", "checkpoint.interval",
         "checkpoint.last_save_model_only", "checkpoint.async_mode", "checkpoint.keep_*",
         "checkpoint.enable_first_step_checkpoint", "checkpoint.allow_*"),
        "checkpoint.enable = true", lambda c: c.checkpoint.enable, "checkpoint.enable",
    ),
    Rule(
        ("checkpoint.interval", "checkpoint.last_save_model_only", "checkpoint.async_mode", "checkpoint.keep_*",
         "checkpoint.enable_first_step_checkpoint"),
        "checkpoint.load_only = false", lambda c: not c.checkpoint.load_only, "checkpoint.load_only",
    ),
    Rule(("checkpoint.export_dtype",), "checkpoint.last_save_in_hf = true", lambda c: c.checkpoint.last_save_in_hf,
         "checkpoint.enable"),
    Rule(("checkpoint.keep_every_n_steps",), "checkpoint.keep_latest_k above 0, which keeps all",
         lambda c: c.checkpoint.keep_latest_k > 0),
    Rule(("checkpoint.initial_load_model_only",), "checkpoint.initial_load_path",
         lambda c: bool(c.checkpoint.initial_load_path or c.checkpoint.initial_load_in_hf),
         "checkpoint.initial_load_path"),
    Rule(("checkpoint.initial_load_in_hf_quantized",), "checkpoint.initial_load_in_hf = true",
         lambda c: c.checkpoint.initial_load_in_hf),
    Rule(
        ("validation.dataset*", "validation.text_column", "validation.local_batch_size", "validation.seq_len",
         "validation.freq", "validation.steps", "validation.dataloader.*"),
        "validation.enable = true", lambda c: c.validation.enable or c.validation.only, "validation.enable",
    ),
    Rule(("model.flavor",), "model.hf_config_path left out, which replaces it", lambda c: not c.model.hf_config_path,
         "model.hf_config_path"),
    Rule(("model.rope_scaling.[!r]*",), "model.rope_scaling.rope_type", lambda c: bool(c.model.rope_scaling.rope_type)),
    Rule(("optimizer.eps", "optimizer.beta2"), "an optimizer.name other than SGD", lambda c: c.optimizer.name != "SGD"),
    Rule(("optimizer.muon.*",), "optimizer.name = Muon", lambda c: c.optimizer.name == "Muon", "optimizer.name"),
    Rule(("optimizer.weight_decay_exclude",), "optimizer.weight_decay above 0", lambda c: c.optimizer.weight_decay > 0,
         "optimizer.weight_decay"),
    Rule(("lr_scheduler.decay_type", "lr_scheduler.min_lr_factor"), "lr_scheduler.decay_ratio above 0",
         lambda c: c.lr_scheduler.decay_ratio != 0, "lr_scheduler.decay_ratio"),
    Rule(("training.loss_chunk_tokens", "training.loss_kernel"), "training.loss = cross_entropy",
         lambda c: c.training.loss == "cross_entropy", "training.loss"),
    Rule(("training.loss_kernel",), "training.loss_chunk_tokens above 0", lambda c: c.training.loss_chunk_tokens > 0,
         "training.loss_chunk_tokens"),
    Rule(("training.on_spike",), "training.spike_factor above 0", lambda c: c.training.spike_factor > 0,
         "training.spike_factor"),
    Rule(("profiling.save_traces_folder", "profiling.profiler_*"), "profiling.enable_profiling = true",
         lambda c: c.profiling.enable_profiling, "profiling.enable_profiling"),
    Rule(("profiling.profile_freq",), "profiling.enable_profiling or profiling.enable_memory_snapshot = true",
         lambda c: c.profiling.enable_profiling or c.profiling.enable_memory_snapshot, "profiling.enable_profiling"),
    Rule(("profiling.save_memory_snapshot_folder",), "profiling.enable_memory_snapshot = true",
         lambda c: c.profiling.enable_memory_snapshot, "profiling.enable_memory_snapshot"),
    Rule(("metrics.save_tb_folder",), "metrics.enable_tensorboard = true", lambda c: c.metrics.enable_tensorboard,
         "metrics.enable_tensorboard"),
    Rule(("compile.components", "compile.backend"), "compile.enable = true", lambda c: c.compile.enable,
         "compile.enable"),
    Rule(("activation_checkpoint.selective_ac_option",), "activation_checkpoint.mode = selective",
         lambda c: c.activation_checkpoint.mode == "selective", "activation_checkpoint.mode"),
    Rule(
        ("activation_checkpoint.early_stop", "activation_checkpoint.debug"),
        "activation_checkpoint.mode = selective or full",
        lambda c: c.activation_checkpoint.mode in ("selective", "full"),
        "activation_checkpoint.mode",
    ),
    Rule(("activation_checkpoint.preserve_rng_state",), "a model that draws random numbers, which always are repeated",
         lambda c: False),
    Rule(("activation_checkpoint.memory_budget",), "activation_checkpoint.mode = memory_budget",
         lambda c: c.activation_checkpoint.mode == "memory_budget", "activation_checkpoint.mode"),
    Rule(("parallelism.pipeline_parallel_[fls]*", "parallelism.pipeline_parallel_microbatch_size",
          "parallelism.module_fqns_per_model_part"), "parallelism.pipeline_parallel_degree above 1",
         lambda c: c.parallelism.pipeline_parallel_degree > 1, "parallelism.pipeline_parallel_degree"),
    Rule(("parallelism.pipeline_parallel_schedule",), "parallelism.pipeline_parallel_schedule_csv left out",
         lambda c: not c.parallelism.pipeline_parallel_schedule_csv, "parallelism.pipeline_parallel_schedule_csv"),
    Rule(("parallelism.pipeline_parallel_[fl]*_less_layers", "parallelism.pipeline_parallel_layers_per_stage"),
         "parallelism.module_fqns_per_model_part left out", lambda c: not c.parallelism.module_fqns_per_model_part,
         "parallelism.module_fqns_per_model_part"),
    Rule(("parallelism.context_parallel_[lr]*",), "parallelism.context_parallel_degree above 1",
         lambda c: c.parallelism.context_parallel_degree > 1, "parallelism.context_parallel_degree"),
    Rule(("parallelism.context_parallel_rotate_method",), "training.attention_mask = causal",
         lambda c: c.training.attention_mask == "causal"),
    Rule(("parallelism.disable_loss_parallel",), "parallelism.tensor_parallel_degree above 1",
         lambda c: c.parallelism.tensor_parallel_degree > 1, "parallelism.tensor_parallel_degree"),
    Rule(("comm.save_traces_*",), "comm.trace_buf_size above 0", lambda c: c.comm.trace_buf_size > 0,
         "comm.trace_buf_size"),
    Rule(("quantize.linear.float8.*",), "model.converters naming float8",
         lambda c: any("float8" in name for name in c.model.converters), "model.converters"),
    Rule(("quantize.linear.float8.precompute*",), "quantize.linear.float8.enable_fsdp_float8_all_gather = true",
         lambda c: c.quantize.linear.float8.enable_fsdp_float8_all_gather,
         "quantize.linear.float8.enable_fsdp_float8_all_gather"),
]  # fmt: skip


def unmet(name: str, config: Config) -> Rule | None:
    """The first rule by which nothing reads the key with this dotted name."""
    for rule in RULES:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in rule.keys) and not rule.holds(config):
            return rule
    return None


def unread(config: Config, settings: Mapping[str, Setting]) -> list[str]:
    """A line for each rule by which keys that were set are not read."""
    found: dict[Rule, list[str]] = {}
    for name, setting in settings.items():
        if rule := unmet(name, config):
            switch = settings.get(rule.switch)
            parked = setting.layer >= 0 and setting.value == KEYS[name].default
            meant = switch is not None and (switch.layer < setting.layer or (switch.layer == setting.layer and parked))
            if not meant:
                found.setdefault(rule, []).append(name)
    return [f"{_listed(names)} no effect: only read with {rule.needs}" for rule, names in found.items()]


def _listed(names: list[str]) -> str:
    """'optimizer.eps and beta2 have': the section is said once."""
    section = names[0].rpartition(".")[0] + "."
    short = [names[0], *(name.removeprefix(section) for name in names[1:])]
    return f"{', '.join(short[:-1])} and {short[-1]} have" if len(short) > 1 else f"{short[0]} has"
