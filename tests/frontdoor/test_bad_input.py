"""A user's mistake is one message: what was given, what was expected, how to mend it; before any training."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frontdoor import CONFIG, ROOT, TIMEOUT_S, environment, torchrun
from warm import Warm, without_times

from dtron.config import Config, load, read
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.models.hf import from_hf_config
from dtron.models.moe import MoEConfig
from dtron.parallel.expert import check_experts
from dtron.train.resolve import resolve

# llama3 debugmodel: 6 layers, 8 heads, 4 key/value heads, vocabulary 4096.
TINY = '[training]\ndevice = "cpu"\nseq_len = 64\n'
PP = "--pp 2 --parallelism.pipeline_parallel_schedule"
EP = "--parallelism.expert_parallel_degree"

# What it is about: (ranks, arguments, what the message must say).
REFUSED = {
    "world size": (6, "--tp 2 --cp 2", ["cp 2 x tp 2 = 4", "world size 6", "multiple of 4"]),
    "world size, all given": (2, "--dp 2 --tp 2", ["dp_shard 2 x cp 1 x tp 2 = 4", "world size is 2", "4 ranks"]),
    "shard degree": (2, "--dp 0", ["data_parallel_shard_degree = 0", "-1"]),
    "sequence and cp": (2, "--cp 2 --training.seq_len 66", ["seq_len 66", "divisible by 4", "twice that"]),
    "sequence and tp": (4, "--tp 4 --training.seq_len 66", ["66", "tensor_parallel_degree 4"]),
    "validation sequence": (2, "--cp 2 --validation.enable --validation.seq_len 66", ["validation.seq_len 66", "4"]),
    "global batch": (
        2,
        "--training.local_batch_size 4 --training.global_batch_size 12",
        ["12 sequences", "4 x 2 data-parallel ranks = 8", "change training.global_batch_size"],
    ),
    "layers and stages": (8, "--pp 8", ["8 stages", "6 layers", "lower pp"]),
    "layers a stage": (2, f"{PP} GPipe --parallelism.pipeline_parallel_layers_per_stage 2", ["3 stages", "pp 2"]),
    "stages of 1F1B": (2, f"{PP} 1F1B --parallelism.pipeline_parallel_layers_per_stage 1", ["exactly 1", "gives 3"]),
    "stages of a V": (
        2,
        f"{PP} DualPipeV --parallelism.pipeline_parallel_layers_per_stage 3",
        ["exactly 2", "gives 1"],
    ),
    "microbatches of 1F1B": (
        4,
        "--pp 4 --training.local_batch_size 3",
        ["1F1B needs at least 4 microbatches", "training.local_batch_size 3", "= 3 microbatches"],
    ),
    "microbatches of DualPipeV": (
        2,
        f"{PP} DualPipeV --training.local_batch_size 2",
        ["at least 4", "= 2 microbatches"],
    ),
    "rounds of Interleaved1F1B": (
        2,
        f"{PP} Interleaved1F1B --training.local_batch_size 5",
        ["Interleaved1F1B", "2 equal rounds", "= 5 microbatches"],
    ),
    "microbatch size": (
        2,
        "--pp 2 --parallelism.pipeline_parallel_microbatch_size 3",
        ["8 is not a multiple", "size 3"],
    ),
    "microbatches of validation": (
        4,
        "--pp 4 --validation.enable --validation.local_batch_size 2",
        ["validation.local_batch_size 2", "at least 4"],
    ),
    "schedule file": (2, "--pp 2 --parallelism.pipeline_parallel_schedule_csv no.csv", ["no.csv", "cannot read"]),
    "heads": (16, "--tp 16", ["tensor_parallel_degree 16", "n_heads 8", "1, 2, 4, 8"]),
    "kv heads": (8, "--tp 8", ["tensor_parallel_degree 8", "n_kv_heads 4", "1, 2, 4"]),
    "vocabulary": (2, "--tp 2 --model.vocab_size 4097", ["tensor_parallel_degree 2", "vocab_size 4097"]),
    "GPT-2's vocabulary": (
        2,
        "--tp 2 --model.vocab_size 50257",
        ["vocab_size 50257", "or set model.vocab_size 50304", "allowed and usual"],
    ),
    "shard degree of one node": (8, "--dp 2", ["world size is 8", "--dp -1 gives dp_shard the other 8"]),
    "spike factor": (1, "--training.spike_factor 0.5", ["spike_factor is 0.5", "above 1"]),
    "undecayed parameters": (
        1,
        "--optimizer.weight_decay_exclude *emb* *norm* *out*",
        ["optimizer.weight_decay_exclude: '*out*' fits no parameter", "lm_head.weight"],
    ),
    "feed-forward": (4, "--tp 4 --model.ffn_dim 770", ["tensor_parallel_degree 4", "ffn_dim 770"]),
    "head size": (1, "--model.dim 72", ["head size 9", "pairs"]),
    "heads and width": (1, "--model.dim 100", ["dim 100", "8 heads"]),
    "query and kv heads": (1, "--model.n_kv_heads 3", ["8 query heads", "3 key/value heads"]),
    "model": (1, "--model.name lama3", ["'lama3'", "did you mean 'llama3'", "smollm"]),
    "flavor": (1, "--model.flavor 9B", ["'9B'", "llama3", "debugmodel, 8B"]),
    "schedule": (2, f"{PP} 1F2B", ['"1F2B"', 'did you mean "1F1B"', "GPipe"]),
    "schedule like no other": (2, f"{PP} x", ['"x": expected "GPipe"']),
    "dataset": (1, "--training.dataset stdlb", ["training.dataset", "did you mean 'stdlib'"]),
    "validation dataset": (
        1,
        "--validation.enable --validation.dataset c4",
        ["validation.dataset", "known: ", "stdlib"],
    ),
    "optimizer": (1, "--optimizer.name AdmW", ["optimizer.name", "did you mean 'AdamW'"]),
    "loss": (1, "--training.loss mse", ["training.loss", "known: cross_entropy"]),
    "converter": (1, "--model.converters flaot8", ["model.converters", "did you mean 'float8'"]),
    "float8 on a CPU": (1, "--model.converters float8", ["needs a GPU with float8", "emulate = true"]),
    "custom import": (1, "--job.custom_import no_such_module", ["job.custom_import", "'no_such_module'"]),
    "hf config": (1, "--model.hf_config_path no.json", ["no.json"]),
    "warm-up and decay": (
        1,
        "--training.steps 10 --lr_scheduler.warmup_steps 6 --lr_scheduler.decay_ratio 0.5",
        ["6 warm-up steps", "10 steps", "lower"],
    ),
    "beta": (1, "--optimizer.beta2 1.0", ["optimizer.beta2 is 1.0", "[0, 1)"]),
    "recompute": (1, "--activation_checkpoint.selective_ac_option 0", ["selective_ac_option", '"0"', '"op"']),
    "compile": (1, "--compile.components optimizer", ["compile.components", "optimizer", '"model" or "loss"']),
    "load balancer": (2, "--cp 2 --parallelism.context_parallel_load_balancer zigzag", ['"zigzag"', "headtail"]),
    "data workers": (
        1,
        "--training.dataloader.persistent_workers",
        ["persistent_workers", "no effect"],
    ),
    "data path": (
        1,
        "--validation.enable --validation.dataset_path x",
        ["validation.dataset_path", "no effect", "stdlib"],
    ),
    "load step": (1, "--checkpoint.load_step -2", ["checkpoint.load_step = -2", "-1"]),
    "validation steps": (1, "--validation.steps 0", ["validation.steps = 0", "-1"]),
    "zero bubble, compiled": (
        2,
        f"{PP} InterleavedZeroBubble --compile.enable",
        ["zero-bubble", "compile.enable false"],
    ),
    # qwen3_moe debugmodel: 16 experts of size 128, 4 per token.
    "ep and experts": (
        32,
        f"{EP} 32 --model.name qwen3_moe",
        ["expert_parallel_degree 32", "16 experts", "divisor"],
    ),
    "ep and the ranks it borrows": (
        4,
        f"{EP} 4 --model.name qwen3_moe --dp-replicate 2",
        ["expert_parallel_degree 4", "dp_shard 2 x cp 1 x tp 1 = 2", "lower it"],
    ),
    "ep and stages": (4, f"{EP} 4 --model.name mixtral --pp 2", ["dp_shard 2 x cp 1 x tp 1 = 2"]),
    "ep of a dense model": (2, f"{EP} 2", ["expert_parallel_degree is 2", "llama3 has no experts", "mixtral"]),
    "ep of none": (1, f"{EP} 0 --model.name mixtral", ["expert_parallel_degree = 0", "1"]),
    "hidden size of experts": (
        1,
        "--model.name mixtral --model.dim 244 --model.n_heads 2 --model.n_kv_heads 2",
        ["hidden size 244 in bfloat16", "16 bytes", "multiple of 8"],
    ),
    "few experts and many ranks": (
        96,
        "--model.name mixtral --dp 96 --training.global_batch_size -1",
        ["8 experts", "96 ranks", "256", "raise expert_parallel_degree"],
    ),
    "expert tensor parallel": (
        2,
        "--model.name mixtral --tp 2 --parallelism.expert_tensor_parallel_degree 2",
        ["parallelism.expert_tensor_parallel_degree", "not supported", "different tokens"],
    ),
    "balance loss below zero": (
        1,
        "--model.name mixtral --training.expert_balance_loss -0.1",
        ["training.expert_balance_loss = -0.1", "0"],
    ),
    "missing file": (1, "--job.config_file no.toml", ["no.toml"]),
    "wrong type": (1, "--training.steps ten", ["training.steps", '"ten"', "an integer"]),
    "unknown key": (1, "--training.sequence_len 8", ['"training.sequence_len"', "did you mean", "training.seq_len"]),
    "no file of preflight": (1, "--metrics.plan_hardware nothere.json", ["no file nothere.json", "dtron preflight"]),
    "a GPU's rates for a CPU": (1, "--metrics.plan_hardware h100", ["h100", "the device is cpu", "preflight.json"]),
    "not supported": (1, "--metrics.save_for_all_ranks", ["metrics.save_for_all_ranks", "not supported"]),
}


def refusal(folder: Path, world: int, arguments: str, text: str = TINY) -> str:
    (folder / "x.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(load(["--job.config_file", str(folder / "x.toml"), *arguments.split()]), world)
    return str(caught.value)


@pytest.mark.parametrize("about", REFUSED)
def test_mistake_is_explained(about: str, tmp_path: Path) -> None:
    world, arguments, says = REFUSED[about]
    message = refusal(tmp_path, world, arguments)
    assert [part for part in says if part not in message] == [], message
    assert "\n" not in message


# A tiny Qwen3-MoE's config.json, and what is wrong with it when a field is another.
EXPERTS = {
    "model_type": "qwen3_moe", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
UNFIT = {
    "every second layer": ({"decoder_sparse_step": 2}, ["decoder_sparse_step = 2", "expected 1"]),
    "a dense layer between": ({"mlp_only_layers": [1]}, ["mlp_only_layers = [1]", "the first layers only"]),
    "dense layers only": ({"mlp_only_layers": [0, 1, 2, 3]}, ["mlp_only_layers = [0, 1, 2, 3]"]),
    "dense layers, not a list": ({"mlp_only_layers": 2}, ["mlp_only_layers = 2", "the first layers only"]),
    "top-k above the experts": ({"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "8 experts"]),
    "no experts": ({"num_experts": 0}, ["num_experts missing or not a whole number above 0"]),
    "no number of experts": ({"num_experts": None}, ["num_experts missing"]),
    "no top-k": ({"num_experts_per_tok": "2"}, ["num_experts_per_tok missing or not"]),
    "size of an expert": ({"moe_intermediate_size": 12.5}, ["moe_intermediate_size missing or not"]),
    "no size of an expert": ({"moe_intermediate_size": None}, ["moe_intermediate_size missing"]),
    "clipped queries": ({"model_type": "olmoe", "clip_qkv": 8.0}, ["clip_qkv = 8.0", "expected null"]),
    "a shared expert": ({"shared_expert_intermediate_size": 64}, ["shared_expert_intermediate_size = 64"]),
    "router noise": ({"model_type": "mixtral", "router_jitter_noise": 0.1}, ["router_jitter_noise = 0.1"]),
    "a window": ({"model_type": "mixtral", "sliding_window": 0}, ["sliding_window = 0", "a whole number above 0"]),
    "a size that no product takes": ({"moe_intermediate_size": 20}, ["20 in bfloat16", "multiple of 8"]),
}


def dimensions(folder: Path, **fields: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(EXPERTS | fields))
    config = load(["--job.config_file", str(folder / "x.toml"), "--model.hf_config_path", str(folder)])
    return resolve(config, 1).model_config


@pytest.mark.parametrize("about", UNFIT)
def test_experts_that_cannot_be_represented_are_named(about: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(TINY)
    fields, says = UNFIT[about]
    with pytest.raises(UserError) as caught:
        dimensions(tmp_path, **fields)
    message = str(caught.value)
    assert [part for part in says if part not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize("top_k", [0, 9])
def test_experts_per_token_of_a_registered_family(top_k: int) -> None:
    with pytest.raises(UserError, match=f"{top_k} experts per token of 8; expected 1 to 8"):
        check_experts(Config(), MoEConfig(8, top_k, 16), 32, Degrees())


def test_experts_are_read_in_both_spellings(tmp_path: Path) -> None:
    """And the same without the mistakes is accepted."""
    (tmp_path / "x.toml").write_text(TINY)
    hub = dimensions(tmp_path)
    assert hub.moe == MoEConfig(8, 2, 16)
    own = {name: value for name, value in EXPERTS.items() if name != "num_experts"}
    for spelling in ({"num_local_experts": 8}, {"num_local_experts": 8, "num_experts": None}):
        (tmp_path / "config.json").write_text(json.dumps(own | spelling))
        assert from_hf_config(tmp_path) == hub
    mixtral = dimensions(tmp_path, model_type="mixtral", num_local_experts=8, moe_intermediate_size=None)
    assert mixtral.moe == MoEConfig(8, 2, 64)
    assert dimensions(tmp_path, mlp_only_layers=[0, 1]).moe.n_dense_layers == 2
    assert not dimensions(tmp_path, norm_topk_prob=False).moe.normalize_top_k


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    arguments = "--training.dataset stdlb --optimizer.name AdmW --optimizer.beta1 1 --model.n_kv_heads 3 --tp 3"
    message = refusal(tmp_path, 1, arguments)
    for part in ("5 mistakes", "'stdlib'", "'AdamW'", "beta1 is 1.0", "3 key/value heads", "world size"):
        assert part in message, message
    reading = read(["--training.dataset", "stdlb", "--training.steps", "many", "--tp", "3"])
    with pytest.raises(UserError) as caught:
        resolve(reading.config, 1, mistakes=reading.mistakes)
    message = str(caught.value)
    assert "2 mistakes" in message and "'stdlib'" in message and "training.steps" in message, message


def test_the_same_without_the_mistakes_is_accepted(tmp_path: Path) -> None:
    """So the refusals above are of what they name."""
    (tmp_path / "x.toml").write_text(TINY)
    for world, arguments in ((1, ""), (4, "--tp 2 --cp 2"), (2, f"{PP} DualPipeV"), (4, "--pp 4 --validation.enable")):
        setup = resolve(load(["--job.config_file", str(tmp_path / "x.toml"), *arguments.split()]), world)
        assert setup.degrees.world == world


def test_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    message = refusal(tmp_path, 1, "", "[training]\nsteps = = 3\n")
    assert "x.toml" in message and "line 2, column 9" in message


def test_wrong_type_and_unknown_key_in_a_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, 1, "", '[training]\nsteps = "ten"\n')
    assert "x.toml" in message and 'training.steps = "ten" (a string)' in message and "an integer" in message
    message = refusal(tmp_path, 1, "", "[training]\nsequence_len = 3\n")
    assert "x.toml" in message and "training.seq_len" in message


def test_cuda_asked_for_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(tmp_path, 1, "--training.device cuda")
    assert "training.device = cuda" in message and "no GPU" in message and "set training.device cpu or auto" in message


# --- the same, as a user sees it

SEEN = {
    "world size": (3, "--tp 2", "multiple of 2"),
    "layers": (2, "--pp 2 --model.n_layers 1", "lower pp"),
    "unknown key": (2, "--training.step 3", "did you mean"),
    "syntax": (2, None, "line 2, column"),
}
LATER = ("layers", "unknown key")  # each is like its neighbour, and costs as much


@pytest.mark.parametrize(
    "about", [pytest.param(about, marks=[pytest.mark.long] if about in LATER else []) for about in SEEN]
)
def test_one_message_from_rank_0(about: str, tmp_path: Path) -> None:
    ranks, arguments, says = SEEN[about]
    config = CONFIG if arguments is not None else "[training]\nsteps = = 3\n"
    run = torchrun(tmp_path, ranks, *(arguments or "").split(), config=config)
    assert run.code != 0
    assert run.err[0].startswith("error: ") and run.err[0].count("error") == 1, run.everything()
    assert says in run.err[0] and "Traceback" not in run.err[0]
    assert run.err[1:] == [""] * (ranks - 1) and run.out == [""] * ranks, run.everything()
    summary = run.agent.split("Root Cause (first observed failure):")[1]
    assert says in summary and "Traceback" not in summary, run.agent
    assert not (tmp_path / "outputs").exists()


def test_mistake_found_late_and_on_rank_0_only(tmp_path: Path) -> None:
    """When the others wait for rank 0 in a collective already, losing it is not their message."""
    run = torchrun(tmp_path, 2, "--training.dataset", "failing", "--training.dataset_path", "refuse 0 1",
                   "--training.local_batch_size", "4")  # fmt: skip
    assert run.code != 0
    assert run.err == ["error: the data of rank 0 is missing; copy it there\n", ""], run.everything()
    assert "the data of rank 0 is missing" in run.agent.split("Root Cause")[1]


# --- without torchrun, as Slurm's srun starts the ranks


def by_hand(folder: Path, *arguments: tuple[str, ...]) -> tuple[list[int], list[str], list[str]]:
    """Exit code, stdout and stderr of each rank; rank r has the r-th arguments."""
    (folder / "x.toml").write_text(CONFIG)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = []
    for rank, own in enumerate(arguments):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments))}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "tests/frontdoor/frontdoor_quick.py"), "--job.config_file", "x.toml"]
        files = folder / f"out-{rank}", folder / f"err-{rank}"
        processes.append(Warm([*command, *own], folder, environment() | env, *files))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, err = (
        [without_times((folder / f"{name}-{rank}").read_text()) for rank in range(len(codes))]
        for name in ("out", "err")
    )
    return codes, out, err


@pytest.mark.long
def test_ranks_with_different_configurations(tmp_path: Path) -> None:
    key = "--training.local_batch_size"
    codes, out, err = by_hand(tmp_path, (key, "4"), (key, "2"))
    assert codes == [2, 2], (out, err)
    assert out == ["", ""]
    assert err[0].startswith("error: the ranks have different configurations") and err[0].count("\n") == 1
    assert "training.local_batch_size is 2 on rank 1 and 4 on rank 0" in err[0]
    assert err[1] == ""


def test_mistake_of_another_rank_alone_is_told_by_that_rank(tmp_path: Path) -> None:
    """And rank 0, which loses contact when that rank ends, adds nothing."""
    data = (
        "--training.local_batch_size",
        "4",
        "--training.dataset",
        "failing",
        "--training.dataset_path",
        "refuse 1 1",
    )
    codes, out, err = by_hand(tmp_path, data, data)
    assert codes == [1, 2], (out, err)
    assert err == ["", "error on rank 1: the data of rank 1 is missing; copy it there\n"]
