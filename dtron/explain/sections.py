"""The facts as sections for a reader: each a few sentences, then tables and pictures; text and page show the same."""

from dataclasses import dataclass, field
from typing import Any

from dtron.explain import drawing

__all__ = ["Part", "Section", "sections"]

Facts = dict[str, Any]
SHOWN_RANKS = 64  # rows of the tokens' table
TITLES = {
    "forward": "Forward",
    "backward": "Backward",
    "elsewhere": "Other messages for this block: gathered ahead of it, or once a step",
}


@dataclass
class Part:
    """A table, a picture, or both. drawing: the picture's lines in a terminal; svg: on the page."""

    title: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    drawing: list[str] = field(default_factory=list)
    svg: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """text: what is seen and how to read it. file: of dtron, that does it."""

    title: str
    text: str
    file: str
    parts: list[Part]


def sections(facts: Facts, verify: str) -> list[Section]:
    """All of a layout. verify: the command that proves it."""
    found = [_mesh(facts), _parameters(facts), _block(facts), _tokens(facts)]
    found += [_pipeline(facts)] if facts["pipeline"] else []
    found += [_experts(facts)] if facts["experts"] else []
    text = (
        "This page shows what is done, not that it is right. The command below trains this layout, made small, beside "
        "one process, and compares loss, gradient norm and every parameter."
    )
    proof = Section("How to know that it is right", text, "docs/verify.md", [Part(drawing=[verify])])
    return [*found, _memory(facts), _messages(facts), proof]


def size(n: float) -> str:
    """Bytes for a reader."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= unit:
            return f"{n / unit:,.1f} {name}"
    return f"{n:,.0f} B"


def ranks(numbers: list[int] | None) -> str:
    """[0, 1, 2, 8] -> 0-2, 8; many in equal steps -> 0, 4, ..., 60; None -> all."""
    if not numbers:
        return "all"
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 6 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    return _spans(drawing.spans(numbers), ", ")


def _spans(spans: list[list[int]], between: str = " and ") -> str:
    texts = [f"{a}-{b}" if a < b else str(a) for a, b in spans]
    return between.join(texts if len(texts) < 7 else [*texts[:3], "...", texts[-1]])


def _mesh(facts: Facts) -> Section:
    rank, per_node = facts["rank"], facts["gpus_per_node"]
    text = (
        f"Every rank is a process with one GPU; {per_node} are a node. The ranks of a group exchange messages. These "
        f"are the groups of rank {rank}; every other rank has as many, with the same strides. dp_shard_cp: the ranks "
        "of dp and cp together, over which FSDP shards weights."
    )
    rows = [
        [d["name"], str(len(d["ranks"])), ranks(d["ranks"]), str(d["stride"]),
         "in one node" if d["nodes"] == 1 else f"over {d['nodes']:,} nodes", ", ".join(d["operations"])]
        for d in facts["dimensions"]
    ]  # fmt: skip
    header = ["dimension", "ranks", f"group of rank {rank}", "stride", "where", "exchanged"]
    left = -(-facts["world"] // per_node) - len(drawing.shown_nodes(facts))
    notes = [f"{left:,} nodes more are not drawn."] if left else []
    picture = Part(drawing=drawing.mesh_text(facts), svg=drawing.mesh(facts), notes=notes)
    return Section("Ranks and who talks to whom", text, "dtron/mesh.py", [Part(header=header, rows=rows), picture])


def _parameters(facts: Facts) -> Section:
    text = (
        "One row for each parameter, alike blocks together. tp: Shard(0): its rows are cut over the ranks of tp; "
        "Shard(1): its columns; Replicate: each has all. A rank keeps its shard, gradient and moments; FSDP gathers "
        "the others' of dp_shard_cp before use."
    )
    rows = []
    for p in facts["parameters"]:
        name = p["name"].replace("layers.N.", f"layers.{ranks(p['layers'])}.")
        name += f" = {p['tied_to']}" if p["tied_to"] else ""
        shapes = str(p["global_shape"]), _placed(p["placements"]), str(p["local_shape"])
        sizes = size(p["global_bytes"]), size(p["local_bytes"])
        rows.append([name, *shapes, *sizes, ranks(p["ranks"]), ranks(p["same_shard"])])
    header = ["parameter", "whole", "placements", "a shard", "bytes", "of a shard", "held by ranks"]
    header.append(f"rank {facts['rank']}'s part on")
    note = (
        "Ranks of the first of these blocks. Blocks of another stage are on that stage's ranks, in the same way (see "
        "the pipeline's stages)."
    )
    parts = [Part(header=header, rows=rows, notes=[note] if facts["pipeline"] else [])]
    return Section("Parameters: where each one is", text, "dtron/parallel/compose.py", parts)


def _placed(placements: dict[str, str]) -> str:
    return ", ".join(f"{dimension}: {how}" for dimension, how in placements.items()) or "the same on every rank"


def _block(facts: Facts) -> Section:
    block, rows = facts["block"], facts["sequences"]["per_microbatch"]
    text = (
        f"What rank {facts['rank']} does in {block['name']} with one microbatch ({rows} x {facts['seq_len']} tokens; a "
        f"step has {facts['microbatches']['of_a_step']}), from top to bottom. Rows with a dimension are messages among "
        "the ranks of its group. Bytes: of a gather's result, of a reduce-scatter's input, of what a rank gives to an "
        "all_to_all, all_reduce or send. Weights of another unit are gathered ahead of its use."
    )
    header = ["phase", "part", "operation", "dimension", "with ranks", "bytes", "of what"]
    groups = {d["name"]: ranks(d["ranks"]) for d in facts["dimensions"]}
    parts = []
    for title in ("forward", "backward", "elsewhere"):
        table = []
        for e in block[title]:
            dimension, what = e.get("dimension", ""), e.get("shapes", "")
            if "unit" in e:
                what = f"{'weights' if e['operation'] == 'all_gather' else 'gradients'} of {e['unit']}"
            operation = f"{e['count']} per {e['per']}: {e['operation']}" if "per" in e else e["operation"]
            message = [dimension, groups.get(dimension, ""), size(e["bytes"])] if dimension else ["", "", ""]
            table.append([e["phase"], e.get("part", ""), operation, *message, what])
        parts += [Part(TITLES[title], header, table)] if table else []
    return Section("One block, forward and backward", text, "dtron/parallel/tensor.py, data.py, context.py", parts)


def _tokens(facts: Facts) -> Section:
    d, sequences = facts["degrees"], facts["sequences"]
    text = f"Every sequence has {facts['seq_len']:,} tokens; a rank of cp has the same positions of each."
    if facts["tokens"]["head_tail"]:
        text += " It has an early and a late chunk, so that all do the same work under the causal mask."
    if d["tp"] > 1:
        text += " Outside of attention and feed-forward, for which tp gathers them, a rank of tp has a part of these."
    size_of_dp = d["cp"] * d["tp"]
    first = facts["rank"] // size_of_dp * size_of_dp
    rows = [
        [*map(str, (first + cp_rank * d["tp"] + tp_rank, cp_rank, tp_rank)), _spans(part["positions"]), _spans(own)]
        for cp_rank, part in enumerate(facts["tokens"]["held"])
        for tp_rank, own in enumerate(part["tp_parts"])
    ]
    each, dp_rank = sequences["per_dp_rank"], facts["rank"] // size_of_dp % d["dp"]
    note = (
        f"A step has {sequences['global_batch']:,} sequences, numbered from 0. The ranks above are dp rank {dp_rank}, "
        f"with sequences {dp_rank * each:,} to {dp_rank * each + each - 1:,}; another dp rank has others, cut in the "
        "same way. Every pipeline stage has the same."
    )
    header = ["rank", "cp rank", "tp rank", "tokens in attention", "outside (sequence parallel)"]
    parts = [Part(header=header, rows=rows[:SHOWN_RANKS], svg=drawing.tokens(facts), notes=[note])]
    return Section("Tokens: who holds which", text, "dtron/parallel/context.py", parts)


def _pipeline(facts: Facts) -> Section:
    p = facts["pipeline"]
    text = (
        f"{p['schedule']} with {p['microbatches']} microbatches. A row is a pipeline rank, time runs to the right, "
        f"numbers are microbatches; gaps are the bubble: {p['bubble']:.1%} of the time, if stages take equal time "
        "and a backward takes two forwards. In flight: forwards whose activations wait for their backward."
    )
    header = ["pp rank", "stage", "ranks", "modules", "microbatches in flight"]
    stages = []
    for s in p["stages"]:
        held = str(p["in_flight"][s["pp_rank"]])
        stages.append([str(s["pp_rank"]), str(s["stage"]), _spans([s["ranks"]]), _modules(s["modules"]), held])
    drawn, more = p["drawn_microbatches"], p["drawn_microbatches"] < p["microbatches"]
    notes = [f"Drawn with {drawn} microbatches; the others repeat those in the middle."] if more else []
    gantt = Part(drawing=drawing.gantt_text(p), svg=drawing.gantt(p), notes=notes)
    return Section("Pipeline: the schedule", text, "dtron/parallel/pipeline.py", [gantt, Part("", header, stages)])


def _modules(names: list[str]) -> str:
    layers = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
    return ", ".join(dict.fromkeys(f"layers {ranks(layers)}" if n.startswith("layers.") else n for n in names))


def _experts(facts: Facts) -> Section:
    e = facts["experts"]
    sent = [size(m["bytes"]) for m in facts["block"]["forward"] if m.get("dimension") == "ep"]
    text = f"Each of {e['experts']} experts is a feed-forward; a token takes {e['per_token']}."
    if sent:
        text += (
            " An all-to-all carries the number of rows to each rank, the next each token's rows to the ranks of its "
            f"experts, and the last brings them back: {', '.join(sent)} in a block's forward, if all experts are "
            "chosen equally often."
        )
    rows = [[str(rank), _spans([span])] for rank, span in zip(e["ranks"], e["experts_of_rank"], strict=True)]
    notes = [f"gate_proj of the experts: {_placed(e['placements'])}; {e['local_shape']} on a rank."]
    parts = [Part(header=["rank", "experts"], rows=rows, notes=notes)]
    return Section("Experts: where they live", text, "dtron/parallel/expert.py", parts)


def _memory(facts: Facts) -> Section:
    m = facts["memory"]
    where = f", in {m['module']} ({m['operation']})" if m["module"] else ""
    text = (
        f"What rank {facts['rank']} holds at the moment of a step when it holds most: {size(m['peak_bytes'])}, in the "
        f"{m['phase']}{where}. Between steps it holds {size(m['between_steps_bytes'])}. Temporaries of a "
        "backward include gradients of weights until they are reduced. Blocks are not compiled here; dtron plan takes "
        "them as configured, and adds what a GPU holds besides."
    )
    rows = [[part, size(n), f"{n / m['peak_bytes']:.1%}"] for part, n in m["parts"].items()]
    parts = [Part(header=["part", "bytes", "share"], rows=rows, svg=drawing.memory(m))]
    return Section("Memory of a rank", text, "dtron/plan/recorder.py", parts)


def _messages(facts: Facts) -> Section:
    text = (
        f"All that rank {facts['rank']} exchanges in one optimizer step, for all blocks and microbatches. A "
        "dimension with many bytes should be inside a node."
    )
    totals: dict[str, int] = {}
    for c in facts["collectives"]:
        totals[c["dimension"]] = totals.get(c["dimension"], 0) + c["bytes"]
    total = Part("By dimension", ["dimension", "bytes in a step"], [[d, size(n)] for d, n in totals.items()])
    header = ["dimension", "ranks", "operation", "phase", "messages", "bytes"]
    rows = [
        [c["dimension"], str(c["ranks"]), c["operation"], c["phase"], f"{c['count']:,}", size(c["bytes"])]
        for c in facts["collectives"]
    ]
    return Section("All messages of a step", text, "dtron/train/step.py", [total, Part("", header, rows)])
