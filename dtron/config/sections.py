"""The typed tree of a run's configuration: one dataclass per TOML section, one field per key.

Names, types and defaults are the ones users of TOML-configured PyTorch trainers already know. Each key carries what it
alone must satisfy, and what changing it changes: that is the one place that says when two runs are the same training,
and what a resume may change: every key but those that change the training or the dimensions.
A key of a feature dtron lacks is declared with `unsupported=`: it is accepted at its default and refused by name
otherwise, so that an old file never seems to take effect when it does not.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dtron.config.declare import (
    Changes,
    PathText,
    checkpoint_folder,
    folder_in_run,
    key,
    minus_1_or_positive,
    positive,
    share,
    step_or_minus_1,
    timeout_s,
    traces_prefix,
)
from dtron.config.optimizer import Optimizer
from dtron.config.quantize import Quantize
from dtron.config.recompute import ActivationCheckpoint
from dtron.config.rope import RopeScalingKeys

__all__ = ["Config", "Dataset", "Optimizer", "Source"]


@dataclass(frozen=True)
class Job:
    config_file: PathText | None = key(None, "TOML file of the run (command line only)")
    dump_folder: PathText = key("./outputs", "folder that receives one run folder per run")
    description: str = key("default job", "free text, shown in the log and in TensorBoard")
    print_config: bool = key(False, "print the resolved configuration at start")
    save_config_file: PathText | None = key(
        None, "", unsupported="the resolved configuration is always in the run folder as config.toml"
    )
    control_folder: PathText | None = key(
        None,
        "folder of STOP, HEARTBEAT, SAVED, DONE and FAILED, by which scripts monitor a run; unset: the run folder",
    )
    custom_import: list[str] = key([], "modules imported first: they register models, datasets, losses, optimizers")
    cache_folder: PathText = key("./.cache", "tokenizers and tokenized corpora, keyed by a hash of their sources")


@dataclass(frozen=True)
class Profiling:
    enable_profiling: bool = key(False, "write torch.profiler traces")
    save_traces_folder: PathText = key(
        "profile_traces", "folder of the traces, inside the run folder", check=folder_in_run
    )
    profile_freq: int = key(10, "steps from one trace, or memory snapshot, to the next", minimum=1)
    profiler_active: int = key(1, "steps per trace", minimum=1)
    profiler_warmup: int = key(3, "steps of profiler warm-up before each trace", minimum=0)
    enable_memory_snapshot: bool = key(
        False, "write snapshots of CUDA memory every profile_freq steps, and when a step runs out of memory"
    )
    save_memory_snapshot_folder: PathText = key(
        "memory_snapshot", "folder of the memory snapshots, inside the run folder", check=folder_in_run
    )


@dataclass(frozen=True)
class Metrics:
    log_freq: int = key(10, "steps between logged rows; step 1 and the last step are always logged", minimum=1)
    enable_tensorboard: bool = key(True, "write TensorBoard events with a ready-made dashboard")
    log_level: Literal["info", "warning", "error"] = key(
        "info", "least level of what rank 0 logs to the console; the other ranks log from warning"
    )
    disable_color_printing: bool = key(False, "plain console lines")
    save_tb_folder: PathText = key("tb", "folder of the TensorBoard events, inside the run folder", check=folder_in_run)
    plan_hardware: PathText = key(
        "",
        "GPUs that the prediction is for, as for dtron plan --hardware, logged beside what is measured and at the end; "
        "empty: at the end only, for the run's own GPUs, none on a CPU",
    )
    save_for_all_ranks: bool = key(False, "", unsupported="metrics are reduced over all ranks and written once")
    enable_wandb: bool = key(
        False, "the same metrics in Weights & Biases too; needs the package wandb (pip install 'dtron[wandb]')"
    )


@dataclass(frozen=True)
class Model:
    CHANGES: ClassVar[Changes] = "dimensions"

    name: str = key(
        "llama3",
        "model family, such as llama3.1, qwen3 or gemma3 (docs/models.md has all), or a registered model",
        changes="training",
    )
    flavor: str = key("debugmodel", "size within the family, for example debugmodel, 8B, 70B")
    hf_assets_path: PathText | None = key(
        None, "local folder with the tokenizer; unset: the dataset's own tokenizer", changes="location"
    )
    add_special_tokens: bool | None = key(
        None,
        "documents have the special tokens that the tokenizer's own encode adds, such as a BOS (they always end in the "
        "end-of-text token); unset: as prepared data have them, else true",
        changes="training",
    )
    hf_config_path: PathText | None = key(
        None, "local Hugging Face config.json of a Llama-like model; replaces the flavor"
    )
    converters: list[str] = key(
        [], "registered model converters, applied to the meta model in order", changes="training"
    )
    n_layers: int | None = key(None, "overrides the flavor: transformer blocks", minimum=1)
    dim: int | None = key(None, "overrides the flavor: hidden size", minimum=1)
    n_heads: int | None = key(None, "overrides the flavor: query heads", minimum=1)
    n_kv_heads: int | None = key(None, "overrides the flavor: key/value heads", minimum=1)
    ffn_dim: int | None = key(None, "overrides the flavor: hidden size of the feed-forward", minimum=1)
    vocab_size: int | None = key(
        None,
        "overrides the flavor: rows of the embedding; at least the tokenizer's; more than initial weights have are new",
        minimum=1,
    )
    tie_embeddings: bool | None = key(None, "overrides the flavor: one matrix for embedding and head")
    rope_theta: float | None = key(None, "overrides the flavor: base of the rotary frequencies", check=positive)
    rope_scaling: RopeScalingKeys = field(default_factory=RopeScalingKeys)


@dataclass(frozen=True)
class LRScheduler:
    CHANGES: ClassVar[Changes] = "hyperparameters"

    warmup_steps: int = key(200, "steps of linear warm-up", minimum=0)
    total_steps: int | None = key(
        None, "steps of the whole schedule; unset: training.steps", minimum=1, changes="losses"
    )
    decay_ratio: float | None = key(None, "share of the steps that decays; unset: all after the warm-up", check=share)
    decay_type: Literal["linear", "sqrt", "cosine"] = key("linear", "shape of the decay")
    min_lr_factor: float = key(0.0, "learning rate at the end, as a share of the peak", check=share)


@dataclass(frozen=True)
class DataLoader:
    CHANGES: ClassVar[Changes] = "speed"

    num_workers: int = key(0, "worker processes per rank; never changes the order of the data", minimum=0)
    persistent_workers: bool = key(False, "keep the validation's workers from pass to pass (needs num_workers)")
    pin_memory: bool = key(False, "page-locked host memory for the copies to a GPU")
    prefetch_factor: int = key(2, "steps loaded ahead: by each worker, without workers by a thread", minimum=1)


@dataclass(frozen=True)
class Dataset:
    """What both the training and the validation set are named by, and every source of a mixture."""

    CHANGES: ClassVar[Changes] = "training"

    dataset: PathText = key(
        "stdlib",
        "stdlib (Python's own sources), a folder made by `dtron prepare`, a file or folder of text, JSON lines, "
        "CSV, parquet or arrow, a Hugging Face hub name, or a registered dataset",
        changes="location",
    )
    dataset_path: PathText | None = key(
        None, "where the dataset is read from, if not where its name says", changes="location"
    )
    dataset_subset: str | None = key(None, "subset (configuration) of a hub dataset")
    dataset_split: str | None = key(None, "split of a hub dataset; unset: train, of the validation set validation")
    text_column: str | None = key(None, "column that holds the text, of a dataset that is not prepared; unset: text")
    on_bad_document: Literal["refuse", "skip"] = key(
        "refuse",
        "a document that cannot be used, of a dataset that is not prepared: the run saves and ends, or leaves it out",
        changes="losses",
    )


@dataclass(frozen=True)
class Source(Dataset):
    """One of `training.mixture`."""

    CHANGES: ClassVar[Changes] = "training"

    weight: float = key(1.0, "share of the samples, relative to the other sources'", minimum=0)


@dataclass(frozen=True)
class Training(Dataset):
    CHANGES: ClassVar[Changes] = "losses"

    mixture: list[Source] = key(
        [],
        "sources mixed in exact proportions, each with the dataset keys above and a weight; replaces dataset",
        changes="location",
    )
    shuffle_documents: int = key(
        1000,
        "documents of a dataset that is not prepared that are shuffled at a time; 1: none",
        minimum=1,
        changes="training",
    )
    attention_mask: Literal["causal", "document"] = key(
        "causal",
        "document: attention stays inside each document of a sequence, and positions restart",
        changes="training",
    )
    loss: str = key("cross_entropy", "cross_entropy, or a registered loss", changes="training")
    loss_chunk_tokens: int = key(
        2048, "tokens whose logits cross_entropy makes at a time; 0: those of all", minimum=0, changes="speed"
    )
    loss_kernel: Literal["torch", "triton"] = key(
        "torch", "what computes a chunk's losses and gradients; torch is compiled with the loss", changes="speed"
    )
    local_batch_size: int = key(8, "sequences a data-parallel rank takes in one forward", minimum=1, changes="speed")
    global_batch_size: int = key(
        -1,
        "sequences per optimizer step; -1: local batch x data-parallel ranks",
        check=minus_1_or_positive,
    )
    seq_len: int = key(2048, "tokens per sequence", minimum=1, changes="training")
    max_norm: float = key(1.0, "the global gradient norm is clipped to this", minimum=0, changes="hyperparameters")
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        "a loss or gradient that is NaN or infinite ends the run, or its step changes nothing (fused Adam)",
    )
    spike_factor: float = key(0.0, "a gradient norm this many times its running mean is a spike; 0: none is", minimum=0)
    on_spike: Literal["skip", "stop"] = key("skip", "a spike's step changes nothing (fused Adam), or the run ends")
    expert_balance_loss: float = key(
        0.001,
        "mixture of experts: weight of the loss that spreads each sequence's tokens over the experts; 0: none",
        minimum=0,
        changes="hyperparameters",
    )
    expert_bias_rate: float = key(
        0.001,
        "mixture of experts: step of the bias that balances the experts, of models that have one; 0: it stays",
        minimum=0,
        changes="hyperparameters",
    )
    steps: int = key(10000, "optimizer steps of the whole run", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: CUDA where there is a GPU, else CPU")
    enable_cpu_offload: bool = key(
        False, "keep weights, gradients and optimizer state in CPU memory (CUDA only)", changes="speed"
    )
    dtype: Literal["bfloat16", "float32"] = key(
        "float32",
        "dtype of the master weights",
        unsupported="in bfloat16 weights near 1.0 never move; use mixed_precision_param",
    )
    mixed_precision_param: Literal["bfloat16", "float32"] = key("bfloat16", "dtype of compute and of gathered weights")
    mixed_precision_reduce: Literal["bfloat16", "float32"] = key(
        "float32", "", unsupported="gradients are always reduced in float32"
    )
    gc_freq: int = key(
        50, "steps between Python garbage collections, made on all ranks at once", minimum=1, changes="speed"
    )
    dataloader: DataLoader = field(default_factory=DataLoader)


@dataclass(frozen=True)
class Parallelism:
    CHANGES: ClassVar[Changes] = "speed"

    data_parallel_replicate_degree: int = key(
        1, "copies of the sharded model (HSDP; with shard degree 1: plain DP)", minimum=1
    )
    data_parallel_shard_degree: int = key(
        -1,
        "ranks that shard one copy (FSDP); -1: inferred from the world size",
        check=minus_1_or_positive,
    )
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = key(
        "default", "free gathered weights after the forward; default: not in a pipeline, nor on one shard that fits"
    )
    gradient_reduce: Literal["every_microbatch", "last_microbatch"] = key(
        "every_microbatch",
        "when accumulated gradients are reduce-scattered (ZeRO-3/2 against ZeRO-1 memory)",
    )
    tensor_parallel_degree: int = key(1, "ranks that split each matrix, with sequence parallel between them", minimum=1)
    disable_loss_parallel: bool = key(False, "gather the logits over the tensor-parallel ranks, not in chunks")
    enable_async_tensor_parallel: bool = key(False, "overlap tensor-parallel communication (CUDA with compile only)")
    pipeline_parallel_degree: int = key(1, "ranks that each hold a run of layers", minimum=1)
    module_fqns_per_model_part: list[list[str]] | None = key(None, "the modules of every pipeline stage, by name")
    pipeline_parallel_first_stage_less_layers: float | None = key(
        None, "layers the embedding counts for in the split; unset: by its cost", minimum=0
    )
    pipeline_parallel_last_stage_less_layers: float | None = key(
        None, "layers the head counts for in the split; unset: by its cost", minimum=0
    )
    pipeline_parallel_layers_per_stage: int | None = key(
        None, "layers per stage, in place of the schedule's usual stages", minimum=1
    )
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = key("1F1B", "the order of the microbatches' forwards and backwards")
    pipeline_parallel_schedule_csv: PathText = key(
        "", "file of a schedule's compute actions, a row per rank; empty: none"
    )
    pipeline_parallel_microbatch_size: int = key(1, "sequences per pipeline microbatch", minimum=1)
    context_parallel_degree: int = key(1, "ranks that split each sequence (ring attention)", minimum=1)
    context_parallel_load_balancer: Literal["headtail"] | None = key(
        "headtail", "headtail: rank r holds chunks r and 2*cp-1-r; unset: contiguous"
    )
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = key("allgather", "how keys and values travel")
    expert_parallel_degree: int = key(
        1, "ranks that share out the experts of a mixture; borrowed from dp_shard x cp x tp", minimum=1
    )
    expert_tensor_parallel_degree: int = key(
        1,
        "",
        unsupported="experts are not split by tensor parallel, whose ranks hold different tokens",
    )


@dataclass(frozen=True)
class Checkpoint:
    enable: bool = key(False, "save checkpoints, and resume from the newest")
    folder: PathText = key(
        "checkpoint",
        "folder of the checkpoints, inside the run folder; or an fsspec URL, which gets one per run",
        check=checkpoint_folder,
    )
    interval: int = key(500, "steps between checkpoints; the last step is always saved", minimum=1)
    initial_load_path: PathText | None = key(
        None,
        "initial weights: a checkpoint (.../step-N, also by fsspec URL), or a Hugging Face folder",
        changes="location",
    )
    initial_load_model_only: bool = key(True, "take the weights only; false: optimizer state too", changes="training")
    initial_load_in_hf: bool = key(
        False, "initial_load_path is a Hugging Face folder; unset, it is model.hf_assets_path"
    )
    initial_load_in_hf_quantized: bool = key(False, "", unsupported="quantized weights are not read yet")
    last_save_model_only: bool = key(False, "the last checkpoint holds the weights only; such a run cannot be resumed")
    last_save_in_hf: bool = key(
        False, "at the end of the run also write its weights as a Hugging Face folder, hf/step-N in the run folder"
    )
    export_dtype: Literal["float16", "bfloat16", "float32"] = key(
        "float32", "dtype of the weights that last_save_in_hf writes; checkpoints keep fp32"
    )
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = key(
        "disabled",
        "async: training continues from a copy in CPU memory; with_pinned_mem: without waiting for the copy (CUDA)",
    )
    keep_latest_k: int = key(10, "older checkpoints of this run are deleted; 0 keeps all", minimum=0)
    keep_every_n_steps: int = key(0, "checkpoints of these steps are never deleted; 0: none", minimum=0)
    resume_run: PathText | None = key(
        None,
        "run folder to continue with changed optimizer, schedule or clipping keys, or with its data elsewhere; unset: "
        "the run of this very training, if there is one",
    )
    allow_changed_data: bool = key(
        False, "a resume accepts training data that changed since the checkpoint, from the position it was at"
    )
    load_step: int = key(-1, "the step to resume from; -1: the newest", check=step_or_minus_1)
    allow_restart: bool = key(
        False, "begin again at step 1 where this run has saved before and none of its checkpoints is left"
    )
    exclude_from_loading: list[str] = key(
        [],
        "parameters of initial_load_path that are not loaded, by name or pattern, for example lm_head.*",
        changes="training",
    )
    enable_first_step_checkpoint: bool = key(False, "also save after step 1")
    create_seed_checkpoint: bool = key(
        False, "", unsupported="weights start equal on every layout; no seed checkpoint is needed"
    )
    load_only: bool = key(False, "load, never save")


@dataclass(frozen=True)
class Compile:
    CHANGES: ClassVar[Changes] = "speed"

    enable: bool = key(False, "torch.compile")
    components: list[Literal["model", "loss"]] = key(
        ["model", "loss"], "any of model (block by block, fullgraph) and loss"
    )
    backend: str = key("inductor", "torch.compile backend")


@dataclass(frozen=True)
class Comm:
    init_timeout_seconds: int = key(
        300, "longest wait for other ranks up to the end of the first step", minimum=1, check=timeout_s
    )
    train_timeout_seconds: int = key(
        100, "longest wait for other ranks after the first step", minimum=1, check=timeout_s
    )
    trace_buf_size: int = key(
        20000, "last collectives each rank remembers; 0: none, and a hang has no report", minimum=0
    )
    save_traces_folder: PathText = key(
        "comm_traces", "folder of what a hang leaves, inside the run folder", check=folder_in_run
    )
    save_traces_file_prefix: str = key(
        "rank_", "name, before the rank, of the files with the last collectives", check=traces_prefix
    )
    mode: Literal["default", "fake_backend", "local_tensor"] = key(
        "default", "", unsupported="only real process groups are built"
    )


@dataclass(frozen=True)
class Validation(Dataset):
    enable: bool = key(False, "evaluate on a validation set")
    only: bool = key(False, "train nothing: evaluate checkpoint.initial_load_path on the validation set")
    local_batch_size: int = key(8, "sequences a data-parallel rank takes in one forward", minimum=1)
    seq_len: int | None = key(None, "tokens per sequence; unset: training.seq_len", minimum=1)
    freq: int = key(10, "steps between evaluations; the last step is always evaluated", minimum=1)
    steps: int = key(-1, "batches per evaluation; -1: the whole validation set once", check=minus_1_or_positive)
    dataloader: DataLoader = field(default_factory=DataLoader)


@dataclass(frozen=True)
class Debug:
    seed: int = key(0, "seed of the weights and of the data order", minimum=0, changes="training")
    deterministic: bool = key(False, "deterministic algorithms only", changes="losses")


@dataclass(frozen=True)
class Config:
    """A whole run. `dtron.config.load` makes it; nothing changes it afterwards."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    comm: Comm = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    debug: Debug = field(default_factory=Debug)
