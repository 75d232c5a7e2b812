"""The parity matrix as data: every layout and feature that must equal the single process, and what must be in it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from parity.layout import Case

from dtron.mesh import Degrees

Keys = Mapping[str, Any]


def schedule(name: str, **more: Any) -> Keys:
    return {"parallelism.pipeline_parallel_schedule": name} | {f"parallelism.{k}": v for k, v in more.items()}


def compiled(backend: str = "aot_eager", *components: str) -> Keys:
    return {
        "compile.enable": True,
        "compile.backend": backend,
        "compile.components": list(components) or ["model", "loss"],
    }


def recompute(mode: str, option: str = "2") -> Keys:
    return {"activation_checkpoint.mode": mode, "activation_checkpoint.selective_ac_option": option}


def budget(value: float) -> Keys:
    return {"activation_checkpoint.mode": "memory_budget", "activation_checkpoint.memory_budget": value}


FULL, SECOND, OP = recompute("full"), recompute("selective", "2"), recompute("selective", "op")
ALLTOALL = {"parallelism.context_parallel_rotate_method": "alltoall"}
CONTIGUOUS = {"parallelism.context_parallel_load_balancer": None}
ALWAYS, NEVER = ({"parallelism.fsdp_reshard_after_forward": value} for value in ("always", "never"))
EVERY, LAST = ({"parallelism.gradient_reduce": f"{value}_microbatch"} for value in ("every", "last"))
OFFLOAD = {"training.enable_cpu_offload": True}
GATHERED_LOGITS = {"parallelism.disable_loss_parallel": True}
WHOLE_LOGITS = {"training.loss_chunk_tokens": 0}
DOCUMENTS = {"training.attention_mask": "document"}
PAIRS = {"parallelism.pipeline_parallel_microbatch_size": 2}

ONE = Degrees()
FSDP2, FSDP4, DDP2, HSDP = Degrees(dp_shard=2), Degrees(dp_shard=4), Degrees(dp_replicate=2), Degrees(1, 2, 2)
TP2, CP2, CP4, PP2, PP4 = Degrees(tp=2), Degrees(cp=2), Degrees(cp=4), Degrees(2), Degrees(4)
FSDP2_TP2, FSDP2_CP2, TP2_CP2 = Degrees(dp_shard=2, tp=2), Degrees(dp_shard=2, cp=2), Degrees(cp=2, tp=2)
PP2_FSDP2, PP2_TP2, PP2_CP2 = Degrees(2, dp_shard=2), Degrees(2, tp=2), Degrees(2, cp=2)
PP2_HSDP = Degrees(2, 2, 2)
FOUR_D = Degrees(pp=2, dp_shard=2, cp=2, tp=2)

# Every layout with nothing else changed; the most expensive with two layers, which tests/checkpoint/test_resume.py and
# the long case of 32 ranks train with four.
# The last needs 32 processes.
LAYOUTS = [
    Case("one", ONE),
    Case("fsdp2", FSDP2),
    Case("fsdp4", FSDP4),
    Case("ddp2", DDP2),
    Case("hsdp2x2", HSDP),
    Case("tp2", TP2),
    Case("cp2", CP2),
    Case("cp4", CP4),
    Case("pp2", PP2),
    Case("pp4", PP4),
    Case("fsdp2 tp2", FSDP2_TP2),
    Case("fsdp2 cp2", FSDP2_CP2),
    Case("tp2 cp2", TP2_CP2),
    Case("pp2 fsdp2", PP2_FSDP2),
    Case("pp2 tp2", PP2_TP2),
    Case("pp2 cp2", PP2_CP2),
    Case("fsdp2 tp2 cp2", Degrees(dp_shard=2, cp=2, tp=2)),
    Case("pp2 tp2 cp2", Degrees(2, cp=2, tp=2), model="shallow"),
    Case("hsdp2x2 tp2", Degrees(1, 2, 2, 1, 2), model="shallow"),
    Case("hsdp2x2 cp2 tp2", Degrees(1, 2, 2, 2, 2), model="shallow"),
    Case("pp2 fsdp2 cp2 tp2", FOUR_D, model="shallow"),
    Case("pp2 hsdp2x2 cp2 tp2", Degrees(2, 2, 2, 2, 2), long=True),
]

ONE_STAGE, LOOPED = ("GPipe", "1F1B"), ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SCHEDULES = (*ONE_STAGE, *LOOPED, *V_SHAPED)
# Two stages per rank in V order, both halves of the backward apart on rank 1 only: no schedule of torch's is like it.
CSV = """0F0,0F1,3F0,3B0,3F1,3B1,0B0,0B1
1F0,2F0,1F1,2F1,2I0,1B0,2I1,1B1,2W0,2W1
"""
BY_NAME = [["embed_tokens", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "lm_head"]]
QUARTERS = {"parallelism.pipeline_parallel_microbatch_size": 4}

PIPELINES = [
    *[Case(f"pp2 {name}", PP2, schedule(name), evaluate=True, batches=2) for name in SCHEDULES],
    *[Case(f"pp4 {name}", PP4, schedule(name), "deep") for name in ("Interleaved1F1B", "DualPipeV")],
    *[
        Case(f"pp4 {name}", PP4, schedule(name), "deep", long=True)
        for name in ("LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble")
    ],
    *[Case(f"pp2 fsdp2 {name}", PP2_FSDP2, schedule(name), evaluate=True, long=name == "GPipe") for name in SCHEDULES],
    Case("pp2 tp2 ZBVZeroBubble", PP2_TP2, schedule("ZBVZeroBubble")),
    Case("pp2 tp2 Interleaved1F1B", PP2_TP2, schedule("Interleaved1F1B"), long=True),
    Case("pp2 ddp2 ZBVZeroBubble", Degrees(2, 2), schedule("ZBVZeroBubble")),
    Case("pp2 cp2 InterleavedZeroBubble", PP2_CP2, schedule("InterleavedZeroBubble")),
    Case("pp2 cp2 DualPipeV", PP2_CP2, schedule("DualPipeV"), long=True),
    Case("pp2 hsdp2x2", PP2_HSDP, long=True),
    Case("pp2 ddp2 cp2 accumulation", Degrees(2, 2, cp=2), batches=2),
    Case("pp2 csv", PP2, QUARTERS, csv=CSV),
    Case("pp2 csv evaluation", PP2, PAIRS, batches=2, evaluate=True, csv=CSV),
    Case("pp2 four layers per stage", PP2, schedule("1F1B", pipeline_parallel_layers_per_stage=4), "deep"),
    Case(
        "pp2 stages by name",
        PP2,
        {"parallelism.module_fqns_per_model_part": BY_NAME},
    ),
    Case("pp2 reshard always", PP2_FSDP2, ALWAYS),
    Case("pp2 microbatches of 2", PP2, PAIRS),
]  # fmt: skip

DATA = [
    *[
        Case(f"{name} {mode} {reshard}", degrees, {**reduce, **keep}, batches=4 if degrees.dp < 4 else 2)
        for name, degrees in (("fsdp2", FSDP2), ("hsdp2x2", HSDP), ("ddp2", DDP2))
        for mode, reduce in (("every", EVERY), ("last", LAST))
        for reshard, keep in (("always", ALWAYS), ("never", NEVER))
    ],
    Case("fsdp4 uneven", FSDP4, model="uneven"),
    Case("fsdp4 tp2 uneven", Degrees(dp_shard=4, tp=2), model="uneven", long=True),
    Case("one accumulation", ONE, batches=4, evaluate=True),
    Case("fsdp2 tp2 last", FSDP2_TP2, LAST, batches=2, evaluate=True, long=True),
    Case("fsdp2 cp2 last", FSDP2_CP2, LAST, batches=2),
    Case("fsdp2 evaluation", FSDP2, EVERY, batches=2, evaluate=True),
    Case("hsdp2x2 evaluation", HSDP, LAST, batches=2, evaluate=True, long=True),
    Case("tp2 evaluation", TP2, batches=2, evaluate=True),
    Case("tp2 cp2 evaluation", TP2_CP2, batches=2, evaluate=True, long=True),
    Case("fsdp2 offload", FSDP2, OFFLOAD, batches=2),
    Case("fsdp2 tp2 offload", FSDP2_TP2, OFFLOAD, batches=2, long=True),
]

CONTEXT = [
    Case("cp2 alltoall", CP2, ALLTOALL),
    Case("cp2 contiguous", CP2, CONTIGUOUS),
    Case("cp2 contiguous alltoall", CP2, {**CONTIGUOUS, **ALLTOALL}),
    Case("cp4 alltoall", CP4, ALLTOALL, long=True),
    Case("pp2 cp2 alltoall", PP2_CP2, ALLTOALL, long=True),
    Case("tp2 cp2 alltoall contiguous", TP2_CP2, {**CONTIGUOUS, **ALLTOALL}, long=True),
    Case("cp2 heads alike", CP2, model="mha"),
    Case("tp4 heads alike", Degrees(tp=4), model="mha", long=True),
    Case("rope scaling", ONE, model="scaled"),
    Case("cp2 rope scaling", CP2, model="scaled"),
    Case("pp2 rope scaling", PP2, model="scaled"),
    Case("tp2 rope scaling", TP2, model="scaled"),
    Case("tp2 kinds of rope compiled", TP2, compiled(), "ropes"),
    Case("pp2 cp2 kinds of rope", PP2_CP2, model="ropes"),
    Case("cp2 kinds of rope documents", CP2, DOCUMENTS, "ropes", long=True),
    Case("cp2 rope by length", CP2, model="longrope"),
]

TIED = [
    Case("tied", ONE, model="tied"),
    Case("fsdp2 tied", FSDP2, model="tied"),
    Case("tp2 tied", TP2, model="tied"),
    Case("pp2 tied", PP2, model="tied", batches=2),
    Case("pp4 tied", PP4, model="tied"),
    *[Case(f"pp2 tied {name}", PP2, schedule(name), "tied") for name in (*LOOPED[1:], *V_SHAPED)],
    Case("pp2 fsdp2 tied V", PP2_FSDP2, schedule("ZBVZeroBubble"), "tied", batches=2),
    Case("pp2 fsdp2 tp2 tied", Degrees(2, dp_shard=2, tp=2), model="tied"),
    Case("tp2 gathered logits", TP2, GATHERED_LOGITS),
    Case("tp2 whole logits", TP2, WHOLE_LOGITS),
    Case("tp2 whole logits compiled loss", TP2, {**WHOLE_LOGITS, **compiled("aot_eager", "loss")}),
    Case("pp2 fsdp2 tp2 whole logits", Degrees(2, dp_shard=2, tp=2), WHOLE_LOGITS, "tied", long=True),
    Case("tp2 gathered logits compiled loss", TP2, {**GATHERED_LOGITS, **compiled("aot_eager", "loss")}, long=True),
]

QWEN = [
    Case("one qwen2", ONE, model="qwen2"),
    Case("fsdp2 tp2 qwen2", FSDP2_TP2, model="qwen2"),
    Case("pp2 tp2 qwen2", PP2_TP2, model="qwen2", long=True),
    Case("tp2 biases", TP2, model="biases"),
    Case("fsdp2 tp2 biases compiled op", FSDP2_TP2, {**compiled(), **OP}, "biases"),
    Case("pp2 tp2 cp2 biases", Degrees(2, cp=2, tp=2), model="biases", long=True),
    Case("one qwen3", ONE, model="qwen3"),
    Case("fsdp2 tp2 qwen3", FSDP2_TP2, model="qwen3"),
    Case("pp2 tp2 cp2 qwen3", Degrees(2, cp=2, tp=2), model="qwen3", long=True),
    Case("tp2 cp2 qwen3 compiled op", TP2_CP2, {**compiled(), **OP}, "qwen3", long=True),
]

RECOMPUTE = [
    Case(f"{name} recompute {mode}", degrees, keys)
    for mode, keys in (("full", FULL), ("every second", SECOND), ("op", OP))
    for name, degrees in (("fsdp2", FSDP2), ("tp2", TP2), ("pp2", PP2), ("cp2", CP2))
] + [
    Case("one recompute op", ONE, OP),
    Case("pp2 recompute full ZBVZeroBubble", PP2, {**FULL, **schedule("ZBVZeroBubble")}, long=True),
    Case("pp2 recompute every second DualPipeV", PP2, {**SECOND, **schedule("DualPipeV")}),
    Case("pp2 recompute op Interleaved1F1B", PP2, {**OP, **schedule("Interleaved1F1B")}, long=True),
    Case("pp2 tp2 recompute op Interleaved1F1B", PP2_TP2, {**OP, **schedule("Interleaved1F1B")}, long=True),
]

COMPILE = [
    Case("one compiled", ONE, compiled()),
    Case("fsdp2 compiled", FSDP2, compiled(), batches=2),
    Case("tp2 compiled", TP2, compiled()),
    Case("fsdp2 tp2 compiled", FSDP2_TP2, compiled()),
    Case("cp2 compiled", CP2, compiled()),
    Case("cp2 compiled alltoall", CP2, {**compiled(), **ALLTOALL}),
    Case("cp4 compiled alltoall op", CP4, {**compiled(), **ALLTOALL, **OP}, "shallow"),
    Case("cp4 compiled alltoall contiguous", CP4, {**compiled(), **ALLTOALL, **CONTIGUOUS}, long=True),
    Case("cp4 inductor alltoall", CP4, {**compiled("inductor"), **ALLTOALL}, long=True),
    Case("pp2 compiled", PP2, compiled()),
    Case("pp2 tp2 compiled tied", PP2_TP2, compiled(), "tied", long=True),
    Case("pp2 compiled Interleaved1F1B", PP2, {**compiled(), **schedule("Interleaved1F1B")}, long=True),
    Case("tp2 compiled model only", TP2, compiled("aot_eager", "model"), long=True),
    Case("tp2 compiled loss only", TP2, compiled("aot_eager", "loss")),
    Case("fsdp2 compiled full", FSDP2, {**compiled(), **FULL}, long=True),
    Case("fsdp2 compiled every second", FSDP2, {**compiled(), **SECOND}, long=True),
    Case("fsdp2 compiled op", FSDP2, {**compiled(), **OP}),
    Case("tp2 compiled full", TP2, {**compiled(), **FULL}),
    Case("tp2 compiled every second", TP2, {**compiled(), **SECOND}),
    Case("tp2 compiled op", TP2, {**compiled(), **OP}),
    Case("cp2 compiled op", CP2, {**compiled(), **OP}, long=True),
    Case("pp2 compiled op", PP2, {**compiled(), **OP}, long=True),
    Case("fsdp2 tp2 cp2 compiled op", Degrees(dp_shard=2, cp=2, tp=2), {**compiled(), **OP}, long=True),
    Case("pp2 fsdp2 cp2 tp2 compiled", FOUR_D, compiled(), long=True),
    *[
        Case(f"{name} memory budget {value}", degrees, {**compiled(), **budget(value)}, long=name != "tp2")
        for name, degrees, value in (
            ("one", ONE, 0.3),
            ("fsdp2", FSDP2, 0.75),
            ("tp2", TP2, 0.3),
            ("cp2", CP2, 0.75),
            ("pp2", PP2, 0.3),
            ("fsdp2 tp2", FSDP2_TP2, 0.75),
        )
    ],
    # Graphs are those of aot_eager; what inductor makes of them costs up to a minute a case.
    *[
        Case(f"{name} inductor", degrees, compiled("inductor"), long=degrees != ONE)
        for name, degrees in (
            ("one", ONE),
            ("tp2", TP2),
            ("fsdp2", FSDP2),
            ("fsdp2 tp2", FSDP2_TP2),
            ("cp2", CP2),
            ("pp2", PP2),
        )
    ],
    Case("fsdp2 tp2 inductor op", FSDP2_TP2, {**compiled("inductor"), **OP}, long=True),
    Case("fsdp2 tp2 cp2 inductor", Degrees(dp_shard=2, cp=2, tp=2), compiled("inductor"), long=True),
]

MASKED = [
    Case(f"documents {name}", degrees, {**DOCUMENTS, **keys}, **more)
    for name, degrees, keys, more in (
        ("one", ONE, {}, {"batches": 2}),
        ("fsdp2", FSDP2, {}, {"batches": 2, "evaluate": True}),
        ("tp2", TP2, {}, {}),
        ("cp2", CP2, {}, {}),
        ("cp4 contiguous", CP4, CONTIGUOUS, {}),
        ("pp2", PP2, PAIRS, {"evaluate": True}),
        ("pp2 cp2 ZBVZeroBubble", PP2_CP2, schedule("ZBVZeroBubble"), {}),
        ("heads alike cp2", CP2, {}, {"model": "mha", "long": True}),
        ("fsdp2 tp2 cp2", Degrees(dp_shard=2, cp=2, tp=2), {}, {"long": True}),
        ("pp2 fsdp2 cp2 tp2", FOUR_D, PAIRS, {"model": "shallow"}),
        ("compiled fsdp2", FSDP2, compiled(), {"long": True}),
        ("compiled tp2", TP2, compiled(), {}),
        ("compiled tp2 cp2", TP2_CP2, compiled(), {"long": True}),
        ("compiled cp2 op", CP2, {**compiled(), **OP}, {}),
        ("compiled pp2", PP2, compiled(), {}),
        ("recompute op cp2", CP2, OP, {}),
        ("recompute full tp2", TP2, FULL, {}),
        ("inductor cp2", CP2, compiled("inductor"), {"long": True}),
        ("inductor fsdp2 tp2", FSDP2_TP2, compiled("inductor"), {"long": True}),
    )
]

# Windows, as masks; a scale of the scores, with which the ring remains; a soft cap and sinks.
WINDOWS = [
    Case("windows one", ONE, model="windows", batches=2),
    Case("windows tp2", TP2, model="windows"),
    Case("windows cp2", CP2, model="windows", evaluate=True),
    Case("windows cp4 contiguous", CP4, CONTIGUOUS, "windows", long=True),
    Case("windows pp2", PP2, PAIRS, "windows", evaluate=True),
    Case("windows documents tp2 cp2", TP2_CP2, DOCUMENTS, "windows"),
    Case("windows compiled cp2 op", CP2, {**compiled(), **OP}, "windows"),
    Case("windows pp2 fsdp2 cp2 tp2 documents", FOUR_D, {**DOCUMENTS, **PAIRS}, "windows", long=True),
    Case("windows inductor tp2 cp2", TP2_CP2, compiled("inductor"), "windows", long=True),
    Case("scores tp2 cp2", TP2_CP2, model="scores"),
    Case("scores pp2 fsdp2 documents", PP2_FSDP2, {**DOCUMENTS, **PAIRS}, "scores", long=True),
    Case("scores compiled fsdp2 tp2 op", FSDP2_TP2, {**compiled(), **OP}, "scores"),
    Case("scale cp2", CP2, model="scale"),
    Case("scale compiled tp2 cp2 alltoall", TP2_CP2, {**compiled(), **ALLTOALL}, "scale", long=True),
]

# Models with experts, all with the balance loss; "moe all" has every part: groups, a shared expert, a dense layer, the
# bias.
EP2, FSDP2_EP2, HSDP_EP2 = Degrees(dp_shard=2, ep=2), Degrees(dp_shard=4, ep=2), Degrees(1, 2, 2, ep=2)
TP2_EP2, CP2_EP2, PP2_EP2 = Degrees(tp=2, ep=2), Degrees(cp=2, ep=2), Degrees(2, dp_shard=2, ep=2)
FSDP2_TP2_EP4 = Degrees(dp_shard=2, tp=2, ep=4)
EXPERTS = [
    Case("experts one", ONE, model="moe"),
    Case("experts fsdp2", FSDP2, model="moe", batches=2),
    Case("experts tp2", TP2, model="moe"),
    Case("experts cp2", CP2, model="moe"),
    Case("ep2", EP2, model="moe", batches=4, evaluate=True),
    Case("ep2 last never", EP2, {**LAST, **NEVER}, "moe", batches=2),
    Case("fsdp2 ep2", FSDP2_EP2, model="moe"),
    Case("fsdp8 ep2", Degrees(dp_shard=8, ep=1), model="moe", long=True),
    Case("hsdp2x2 ep2", HSDP_EP2, model="moe"),
    Case("tp2 ep2", TP2_EP2, model="moe"),
    Case("cp2 ep2", CP2_EP2, model="moe"),
    Case("cp2 ep2 documents", CP2_EP2, DOCUMENTS, "moe"),
    Case("cp2 tp2 ep4", Degrees(cp=2, tp=2, ep=4), model="moe", long=True),
    Case("pp2 ep2", PP2_EP2, model="moe", evaluate=True),
    *[
        Case(
            f"pp2 ep2 {name}",
            PP2_EP2,
            schedule(name),
            "moe",
            evaluate=name == "ZBVZeroBubble",
            long=name == "LoopedBFS",
        )
        for name in (*LOOPED, *V_SHAPED)
    ],
    Case("fsdp2 tp2 ep4", FSDP2_TP2_EP4, model="moe"),
    Case("pp2 fsdp2 tp2 ep4", Degrees(2, dp_shard=2, tp=2, ep=4), model="moe"),
    Case("pp2 fsdp2 cp2 tp2 ep4", Degrees(2, dp_shard=2, cp=2, tp=2, ep=4), model="moe", long=True),
    Case("olmoe one", ONE, model="olmoe"),
    Case("olmoe tp2", TP2, model="olmoe"),
    Case("olmoe cp2 tp2 ep4 compiled", Degrees(cp=2, tp=2, ep=4), compiled(), "olmoe", long=True),
    Case("qwen3 moe fsdp2 tp2 ep4", FSDP2_TP2_EP4, model="qwen3 moe"),
    Case("gpt oss one", ONE, model="gpt oss"),
    Case("gpt oss tp2 ep2", TP2_EP2, model="gpt oss"),
    Case("gpt oss pp2 cp2 ep2", Degrees(2, cp=2, ep=2), model="gpt oss"),
    Case("gpt oss fsdp2 tp2 ep4 compiled op", FSDP2_TP2_EP4, {**compiled(), **OP}, "gpt oss", long=True),
    Case("moe all one", ONE, model="moe all"),
    Case("moe all ep2", EP2, model="moe all", batches=2),
    Case("moe all fsdp2 tp2 ep4", FSDP2_TP2_EP4, model="moe all"),
    Case("moe all cp2 ep2", CP2_EP2, model="moe all"),
    Case("moe all pp2 ep2 ZBVZeroBubble", PP2_EP2, schedule("ZBVZeroBubble"), "moe all"),
    *[
        Case(f"fsdp2 tp2 ep4 recompute {mode}", FSDP2_TP2_EP4, keys, "moe")
        for mode, keys in (("full", FULL), ("every second", SECOND), ("op", OP))
    ],
    Case("ep2 compiled", EP2, compiled(), "moe", batches=2),
    Case("fsdp2 tp2 ep4 compiled op", FSDP2_TP2_EP4, {**compiled(), **OP}, "moe all", long=True),
    Case("ep2 compiled full", EP2, {**compiled(), **FULL}, "moe", long=True),
    Case("ep2 inductor", EP2, compiled("inductor"), "moe", long=True),
    Case("ep2 offload", EP2, OFFLOAD, "moe"),
]

VARIANTS = [
    *[Case(f"{name} tp2", TP2, model=name) for name in ("gemma", "cohere", "nemotron", "apertus")],
    Case("gemma compiled fsdp2 tp2 op", FSDP2_TP2, {**compiled(), **OP}, "gemma"),
    Case("gemma pp2 cp2", PP2_CP2, model="gemma", long=True),
    Case("gemma fsdp2 tp2 gathered logits", FSDP2_TP2, GATHERED_LOGITS, "gemma", long=True),
    Case("cohere pp2 cp2", PP2_CP2, PAIRS, "cohere", evaluate=True),
    Case("cohere inductor tp2 cp2", TP2_CP2, compiled("inductor"), "cohere", long=True),
    Case("nemotron fsdp2 cp2 op", FSDP2_CP2, OP, "nemotron"),
    Case("nemotron compiled tp2 cp2 op", TP2_CP2, {**compiled(), **OP}, "nemotron", long=True),
    Case("apertus compiled fsdp2 tp2 op", FSDP2_TP2, {**compiled(), **OP}, "apertus", long=True),
    Case("apertus pp2 fsdp2 cp2 tp2", FOUR_D, PAIRS, "apertus", long=True),
]


def _with(optimizer: str) -> list[Case]:
    """One of `SECTIONS` on every layout, few of them short."""
    short = [
        Case("pp2 fsdp2 tied V", PP2_FSDP2, schedule("ZBVZeroBubble"), "tied"),
        Case("fsdp2 tp2 ep4", FSDP2_TP2_EP4, model="moe all"),
        Case("fsdp2 tp2 compiled", FSDP2_TP2, compiled()),
    ]
    fast = [Case("fsdp2 inductor", FSDP2, compiled("inductor")), Case("fsdp2 offload", FSDP2, OFFLOAD, batches=2)]
    others = [
        *(fast if optimizer != "Muon" else []),
        Case("fsdp4 uneven", FSDP4, model="uneven"),
        Case("ep2", EP2, model="moe"),
        Case("hsdp2x2 ep2", HSDP_EP2, model="moe"),
        Case("pp2 ep2", PP2_EP2, model="moe"),
        Case("fsdp8 experts", Degrees(dp_shard=8), model="moe"),
    ]
    long = [replace(case, long=True) for case in (*LAYOUTS, *others)]
    return [replace(case, name=f"{optimizer} {case.name}", optimizers=(optimizer,)) for case in (*short, *long)]


CASES = [
    *LAYOUTS, *PIPELINES, *DATA, *CONTEXT, *TIED, *QWEN, *RECOMPUTE, *COMPILE, *MASKED, *WINDOWS, *VARIANTS, *EXPERTS,
    *_with("AdamW bf16"), *_with("Muon"),
]  # fmt: skip

# --- what must be in the table


def _is(keys: Keys, **more: Any) -> Callable[[Case], bool]:
    """Cases with these configuration keys; more: fields of their degrees, each a minimum."""
    return lambda case: (
        all(case.keys.get(key) == value for key, value in keys.items())
        and all(getattr(case.degrees, name) >= least for name, least in more.items())
    )


def _model(name: str, keys: Keys | None = None, **more: Any) -> Callable[[Case], bool]:
    return lambda case: case.model == name and _is(keys or {}, **more)(case)


# The layouts of the project's promise, each with nothing else changed; the last may run among the long tests.
REQUIRED_LAYOUTS = [
    ONE, FSDP2, HSDP, DDP2, TP2, CP2, CP4, PP2, FSDP2_TP2, FSDP2_CP2, TP2_CP2, PP2_FSDP2, PP2_TP2, PP2_CP2,
    Degrees(dp_shard=2, cp=2, tp=2), Degrees(2, cp=2, tp=2), Degrees(1, 2, 2, 1, 2), Degrees(1, 2, 2, 2, 2),
    FOUR_D, Degrees(2, 2, 2, 2, 2),
]  # fmt: skip

REQUIRED: dict[str, Callable[[Case], bool]] = {
    **{f"{name} evaluating": lambda c, n=name: _is(schedule(n), pp=2)(c) and c.evaluate for name in SCHEDULES[2:]},
    **{f"{name} with fsdp": _is(schedule(name), pp=2, dp_shard=2) for name in SCHEDULES[1:]},
    **{f"{name} with pp4": _is(schedule(name), pp=4) for name in ("Interleaved1F1B", "DualPipeV")},
    **{f"{name} tied": _model("tied", schedule(name), pp=2) for name in V_SHAPED},
    "biases of queries, keys and values": _model("qwen2", dp_shard=2, tp=2),
    "biases of every matrix": _model("biases", tp=2),
    "biases of every matrix, compiled, recomputed by operation": _model("biases", {**compiled(), **OP}, tp=2),
    "norms of queries and keys": _model("qwen3", dp_shard=2, tp=2),
    "zero bubble with tp": _is(schedule("ZBVZeroBubble"), pp=2, tp=2),
    "zero bubble with cp": _is(schedule("InterleavedZeroBubble"), pp=2, cp=2),
    "zero bubble with replicas": _is(schedule("ZBVZeroBubble"), pp=2, dp_replicate=2),
    "a csv schedule": lambda c: bool(c.csv),
    **{
        f"accumulation {reduce} {reshard} {dims}": lambda c, k={**reduce, **reshard}, d=dims: (
            c.batches > 1 and _is(k, **d)(c)
        )
        for reduce in (EVERY, LAST)
        for reshard in (ALWAYS, NEVER)
        for dims in ({"dp_shard": 2}, {"dp_shard": 2, "dp_replicate": 2}, {"dp_replicate": 2})
    },
    **{
        f"recompute {keys} {dim}": _is(keys, **{dim: 2})
        for keys in (FULL, SECOND, OP)
        for dim in ("dp_shard", "tp", "pp", "cp")
    },
    **{f"compiled {dim}": _is(compiled(), **{dim: 2}) for dim in ("dp_shard", "tp", "cp", "pp")},
    **{f"compiled {keys}": _is({**compiled(), **keys}, **{"tp": 2}) for keys in (FULL, SECOND, OP)},
    "memory budget": _is({**compiled(), **budget(0.3)}, tp=2),
    "compiled fsdp and tp": _is(compiled(), dp_shard=2, tp=2),
    "compiled alltoall": _is({**compiled(), **ALLTOALL}, cp=2),
    "compiled loss alone": _is(compiled("aot_eager", "loss"), tp=2),
    "inductor": _is(compiled("inductor")),
    "alltoall": _is(ALLTOALL, cp=2),
    "alltoall contiguous": _is({**ALLTOALL, **CONTIGUOUS}, cp=2),
    "contiguous": _is(CONTIGUOUS, cp=2),
    "tied, one": _model("tied"),
    "tied, tp": _model("tied", tp=2),
    "tied, pp": _model("tied", pp=2),
    "tied, pp fsdp tp": _model("tied", pp=2, dp_shard=2, tp=2),
    "rope scaling": _model("scaled"),
    "rope scaling, cp": _model("scaled", cp=2),
    "kinds of rope, tp": _model("ropes", compiled(), tp=2),
    "kinds of rope, pp cp": _model("ropes", pp=2, cp=2),
    "rope by length, cp": _model("longrope", cp=2),
    "heads alike": _model("mha", cp=2),
    "shards of different sizes": _model("uneven", dp_shard=4),
    "offload": _is(OFFLOAD, dp_shard=2),
    "gathered logits": _is(GATHERED_LOGITS, tp=2),
    "whole logits": _is(WHOLE_LOGITS, tp=2),
    "whole logits compiled": _is({**WHOLE_LOGITS, **compiled("aot_eager", "loss")}, tp=2),
    **{f"documents {dim}": _is(DOCUMENTS, **{dim: 2}) for dim in ("dp_shard", "tp", "cp", "pp")},
    **{f"documents compiled {dim}": _is({**DOCUMENTS, **compiled()}, **{dim: 2}) for dim in ("tp", "cp", "pp")},
    **{f"experts {dim}": _model("moe", **{dim: 2}, ep=2) for dim in ("dp_shard", "dp_replicate", "tp", "cp", "pp")},
    **{f"experts {name}": _model("moe", schedule(name), pp=2, ep=2) for name in (*LOOPED[1:], *V_SHAPED)},
    **{f"experts recompute {keys}": _model("moe", keys, tp=2, ep=4) for keys in (FULL, SECOND, OP)},
    "norms over all heads": _model("olmoe", tp=2),
    **{f"{name}'s parts, tp": _model(name, tp=2) for name in ("gemma", "cohere", "nemotron", "apertus")},
    "variants compiled": _model("gemma", {**compiled(), **OP}, tp=2),
    **{f"biased experts {dim}": _model("gpt oss", **{dim: 2}, ep=2) for dim in ("tp", "cp", "pp")},
    "experts compiled": _model("moe", compiled(), ep=2),
    "experts in four dimensions": _model("moe", pp=2, dp_shard=2, tp=2, ep=4),
    **{f"every part of a router {dim}": _model("moe all", **{dim: 2}, ep=2) for dim in ("dp_shard", "tp", "cp", "pp")},
    **{f"windows {dim}": _model("windows", **{dim: 2}) for dim in ("tp", "cp", "pp")},
    **{f"documents and windows {dim}": _model("windows", DOCUMENTS, **{dim: 2}) for dim in ("tp", "cp")},
    "windows compiled": _model("windows", {**compiled(), **OP}, cp=2),
    **{f"soft cap and sinks {dim}": _model("scores", **{dim: 2}) for dim in ("tp", "cp", "dp_shard")},
    "scale on the ring": _model("scale", cp=2),
    "documents everywhere": _is(DOCUMENTS, pp=2, dp_shard=2, cp=2, tp=2),
}
