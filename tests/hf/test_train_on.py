"""Training continues from Hugging Face weights as in transformers itself, on every layout from the first step."""

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf.models import train_plainly
from parity.layout import CPU, Case, build, build_config, problems, train
from parity.single import MODELS, OPTIMIZERS, STEPS, Run
from parity.table import (
    CP2,
    FOUR_D,
    FSDP2,
    FSDP2_TP2_EP4,
    FSDP4,
    HSDP,
    ONE,
    PP2,
    PP2_EP2,
    PP2_TP2,
    TP2,
    TP2_CP2,
    Degrees,
    schedule,
)
from ranks import RankError, Ranks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dtron import registry
from dtron.checkpoint.load import load_initial
from dtron.checkpoint.storage import StoragePath
from dtron.mesh import Mesh
from dtron.models.hf import to_hf_config
from dtron.models.llama import LlamaConfig
from dtron.models.spec import meta_model
from dtron.parallel.compose import ParallelModel, parallelize

NO_BALANCE = {"training.expert_balance_loss": 0.0}  # transformers' own balance loss is of a microbatch

CASES = [
    Case("one tied", ONE, model="tied"),
    Case("fsdp4 uneven", FSDP4, model="uneven"),
    Case("tp2 qwen3", TP2, model="qwen3"),
    Case("tp2 cp2 qwen2", TP2_CP2, model="qwen2"),
    Case("pp2 tied V", PP2, schedule("ZBVZeroBubble"), "tied"),
    Case("hsdp2x2 scaled", HSDP, model="scaled"),
    Case("fsdp2 tp2 ep4 qwen3 moe", FSDP2_TP2_EP4, NO_BALANCE, "qwen3 moe"),
    Case("pp2 ep2 mixtral", PP2_EP2, NO_BALANCE, "moe"),
    Case("pp2 fsdp2 tp2 ep4 qwen3 moe", Degrees(2, dp_shard=2, tp=2, ep=4), NO_BALANCE, "qwen3 moe", long=True),
    Case("fsdp2 tied", FSDP2, model="tied", long=True),
    Case("cp2 mha", CP2, model="mha", long=True),
    Case("ddp2 qwen2", Degrees(dp_replicate=2), model="qwen2", long=True),
    Case("pp2 tp2 tied", PP2_TP2, model="tied", long=True),
    Case("pp2 qwen3 interleaved", PP2, schedule("Interleaved1F1B"), "qwen3", long=True),
    Case("pp2 fsdp2 cp2 tp2 tied", FOUR_D, model="tied", long=True),
    Case("pp2 fsdp2 cp2 tp2 qwen3", FOUR_D, model="qwen3", long=True),
]
FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """A model of the parity matrix -> a folder of several files that transformers wrote, with weights of its own."""

    @cache
    def make(name: str) -> Path:
        config = AutoConfig.for_model(**to_hf_config(MODELS[name]), pad_token_id=None)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter, p in model.named_parameters():
                p.normal_(1.0 if "norm" in parameter else 0.0, 0.15, generator=g)
        path = tmp_path_factory.mktemp("weights") / name
        model.save_pretrained(path, max_shard_size="20KB")
        return path

    return make


def trained_by_transformers(folder: Path, optimizer_name: str) -> Run:
    """Loss, norm and weights of a plain loop over transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    losses, norms = train_plainly(model, optimizer, STEPS)
    named = {name.removeprefix("model."): p.detach().clone() for name, p in model.named_parameters()}
    for name in [name for name in named if name.endswith(".gate_up_proj")]:  # of experts, in transformers' memory
        gate, up = named.pop(name).chunk(2, 1)
        named |= {name.replace("gate_up", "gate"): gate.clone(), name.replace("gate_up", "up"): up.clone()}
    return Run(losses, norms, named, [[]], 0.0)


def read(folder: str, config: LlamaConfig, model: ParallelModel) -> None:
    whole = meta_model(registry.look_up("model", "llama3", ""), config)
    load_initial(StoragePath.at(folder), model, None, [], whole)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.long] if case.long else []) for case in CASES]
)
def test_every_layout_continues_like_transformers(case: Case, ranks: Ranks, folder_of: FolderOf) -> None:
    folder = folder_of(case.model)
    expected = {name: trained_by_transformers(folder, name) for name in OPTIMIZERS}
    arrays = {name: {n: w.numpy() for n, w in run.weights.items()} for name, run in expected.items()}
    prepare = partial(read, str(folder), MODELS[case.model])
    assert problems(case, ranks.run(case.degrees.world, train, case, arrays, prepare), expected) == []


# --- no rank holds the whole

BIG = LlamaConfig(vocab_size=4096, dim=512, n_layers=12, n_heads=8, n_kv_heads=4, ffn_dim=1536)
MIB = 1 << 20


def anonymous_bytes() -> int:
    """What this process holds in memory besides mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def peak_while(work: Callable[[], object]) -> int:
    """Most bytes that `work` held at once beyond those held before."""
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier job has freed could be taken again, unseen
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = work()
    finally:
        peak = max(peak, anonymous_bytes())
        done.set()
        watcher.join()
    del kept
    return peak - before


def peaks(folder: str) -> tuple[int, int]:
    """Of a rank: reading its shards; and, to see that the measure sees it, reading the whole."""
    case = Case("fsdp2 tp2", Degrees(dp_shard=2, tp=2))
    config = build_config(case)
    mesh = Mesh(case.degrees, "cpu")
    spec = registry.look_up("model", "llama3", "")
    model = parallelize(spec, BIG, config, mesh, CPU, registry.cross_entropy, [])
    shards = peak_while(lambda: read(folder, BIG, model))
    dist.barrier()
    files = sorted(Path(folder).glob("*.safetensors"))
    whole = peak_while(lambda: [{n: t.float() for n, t in load_file(file).items()} for file in files])
    return shards, whole


def test_a_rank_reads_its_slices_only(ranks: Ranks, tmp_path: Path) -> None:
    model = meta_model(registry.look_up("model", "llama3", ""), BIG)
    weights = {f"model.{n}": torch.randn(p.shape).bfloat16() for n, p in model.named_parameters()}
    weights["lm_head.weight"] = weights.pop("model.lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors")
    total = sum(4 * w.numel() for w in weights.values())
    assert total > 100 * MIB
    largest = max(4 * w.numel() for w in weights.values())
    for shards, whole in ranks.run(4, peaks, str(tmp_path)):
        assert whole > 0.5 * total > 10 * largest
        assert shards < largest, (shards, largest, total)  # its shards are there before: what is on its way counts


# --- faults


def test_faults_are_reported_on_all_ranks(ranks: Ranks, folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of("tied")
    for model, said in (("small", "it has no lm_head.weight"), ("qwen2", "it has no model.layers.0.self_attn.q_proj")):
        with pytest.raises(RankError, match=said):
            ranks.run(2, start, str(folder), model)


def start(folder: str, model: str) -> None:
    case = Case("fsdp2", FSDP2, model=model)
    _, built = build(case, build_config(case))
    read(folder, MODELS[model], built)
