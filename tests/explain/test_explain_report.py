"""`dtron explain` shows the same facts as text, page and JSON, and they are those of the ranks."""

import contextlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.tensor import DTensor, distribute_tensor

import dtron.__main__
from dtron.compat import clean_name
from dtron.config import load
from dtron.data.loader import Batch
from dtron.explain.facts import explain, setup_of
from dtron.explain.sections import ranks as ranks_text
from dtron.explain.sections import size
from dtron.mesh import fewest_ranks
from dtron.parallel.tensor import SEQUENCE
from dtron.plan.dryrun import build_step, dry_run
from dtron.train.forward import local_batches

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs/debug.toml")
LAYOUT = ["--dp", "2", "--tp", "2", "--cp", "2", "--pp", "2"]
SMALL = (
    "--model.n_layers 2 --model.dim 32 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 48 --model.vocab_size 96"
)
SMALL += " --training.seq_len 32 --training.local_batch_size 2 --training.device cpu"


class Reader(HTMLParser):
    """Its text, what it would load, and whether each element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[:1] != "#"]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """Facts, text and page of the debug model in five dimensions."""
    page = tmp_path_factory.mktemp("explain") / "page.html"
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: texts.append(" ".join(map(str, words))))
        # One recording for both forms of output.
        known: list[dict[str, Any]] = []
        patch.setattr(
            "dtron.explain.report.explain", lambda *a: known[0] if known else known.append(explain(*a)) or known[0]
        )
        for more in (["--json", "--out", str(page)], []):
            assert dtron.__main__.main(["explain", DEBUG, *LAYOUT, *more]) == 0
    text = next(text for text in texts[1:] if text)
    return json.loads(texts[0]), text, page.read_text()


def numbers_of(facts: dict[str, Any]) -> list[str]:
    """What the text and the page must show of the facts."""
    shown = [d["name"] for d in facts["dimensions"]] + [ranks_text(d["ranks"]) for d in facts["dimensions"]]
    for p in facts["parameters"]:
        shown += [
            p["name"].split("layers.N.")[-1],
            str(p["global_shape"]),
            str(p["local_shape"]),
            size(p["local_bytes"]),
        ]
        shown += [ranks_text(p["same_shard"]), ranks_text(p["ranks"])]
    for event in (*facts["block"]["forward"], *facts["block"]["backward"], *facts["block"]["elsewhere"]):
        shown += [event["operation"], event.get("part", ""), event.get("shapes", "")]
        shown += [size(event["bytes"])] if "dimension" in event else []
    for held in facts["tokens"]["held"]:
        shown += [f"{a}-{b}" for a, b in held["positions"]]
    shown += [size(n) for n in facts["memory"]["parts"].values()] + list(facts["memory"]["parts"])
    shown += [f"{facts['pipeline']['bubble']:.1%}", facts["pipeline"]["schedule"]]
    for c in facts["collectives"]:
        shown += [c["dimension"], c["operation"], c["phase"], f"{c['count']:,}", size(c["bytes"])]
    return shown


def test_text_and_page_have_what_the_json_has(outputs: tuple[dict[str, Any], str, str]) -> None:
    facts, text, page = outputs
    reader = Reader(page)
    assert (reader.open, reader.loads) == ([], [])
    assert re.search(r"https?:|@import|url\(", page) is None
    words = " ".join(reader.words)
    for fact in numbers_of(facts):
        assert fact in text, fact
        assert fact in words, fact
    files = re.findall(r"Done by <code>([^<]*)</code>", page)
    assert len(files) == page.count("<section") == len(re.findall(r"^\d\. ", text, re.MULTILINE)) == 8
    assert [file for file in (files[0], *files[3:]) if not (ROOT / file).exists()] == []
    assert f"dtron verify {DEBUG} --gpus 16 {' '.join(LAYOUT)}" in text  # of as many ranks, whatever it takes by itself
    assert "prefers-color-scheme:dark" in page


def test_the_facts_of_a_layout_in_five_dimensions(outputs: tuple[dict[str, Any], str, str]) -> None:
    facts = outputs[0]
    assert facts["degrees"] | {"pp": 2, "dp": 2, "cp": 2, "tp": 2} == facts["degrees"]
    assert {d["name"]: d["ranks"] for d in facts["dimensions"]} == {
        "tp": [0, 1], "cp": [0, 2], "dp_shard_cp": [0, 2, 4, 6], "pp": [0, 8]
    }  # fmt: skip
    query = next(p for p in facts["parameters"] if p["name"].endswith("q_proj.weight"))
    assert (query["layers"], query["ranks"], query["same_shard"]) == ([0, 1], list(range(8)), [0])
    # Sequence parallel's gathers before attention and feed-forward, its scatters behind; the ring's gather between.
    sent = [(e["dimension"], e["operation"]) for e in facts["block"]["forward"] if "dimension" in e]
    around = [("tp", "all_gather"), ("tp", "reduce_scatter")]
    assert sent == [around[0], ("cp", "all_gather"), around[1], *around]
    # What a pipeline does once, before the first microbatch or after the last, is of no microbatch.
    once = [(e["operation"], e["count"], e["per"]) for e in facts["block"]["elsewhere"]]
    assert once == [("all_gather", 1, "step"), ("all_reduce", 2, "step"), ("reduce_scatter", 1, "step")]
    products = [e["part"] for e in facts["block"]["forward"] if e["operation"] == "matmul"]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    assert products == [*names, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    # In the backward each has two products, of the gradients of its input and of its weight.
    assert sorted(e["part"] for e in facts["block"]["backward"] if e["operation"] == "matmul") == sorted(2 * products)
    assert (facts["pipeline"]["bubble"], facts["pipeline"]["in_flight"]) == (pytest.approx(1 / 3), [2, 1])


def held_by_a_rank(
    arguments: str,
) -> tuple[dict[str, tuple[list[int], list[int]]], list[list[int]], dict[str, list[int]]]:
    """Of each parameter here its shape and the elements it holds, by their number in the whole; the tokens of a forward
    and of them those that sequence parallel leaves here; the group in each dimension.
    """
    s = setup_of(load(arguments.split()), dist.get_world_size(), [])
    step = build_step(s, contextlib.nullcontext)
    found = {}
    for part in step.model.parts:
        for name, p in part.named_parameters():
            assert isinstance(p, DTensor)
            numbers = torch.arange(p.numel()).view(p.shape)
            local = distribute_tensor(numbers, p.device_mesh, p.placements, src_data_rank=None).to_local()
            found[clean_name(name)] = list(local.shape), local.flatten().tolist()
    tokens = torch.arange(s.config.training.seq_len).expand(2, -1)
    forwards = local_batches(Batch(tokens, tokens), 2, s.config.parallelism, step.mesh, torch.device("cpu"))
    meshes = [mesh for mesh in (step.mesh.pp, step.mesh.tp, step.mesh.cp, step.mesh.fsdp) if mesh]
    groups = {n: sorted(dist.get_process_group_ranks(m.get_group(n))) for m in meshes for n in m.mesh_dim_names or ()}
    mine = forwards[0][0][:1]
    part = distribute_tensor(mine, step.mesh.tp, [SEQUENCE], src_data_rank=None).to_local()
    return found, [mine.flatten().tolist(), part.flatten().tolist()], groups


def test_a_pipeline_of_several_stages_gathers_a_block_once(capsys: pytest.CaptureFixture) -> None:
    """Before its first forward, when FSDP has not named its units by itself."""
    keys = "--dp 2 --pp 2 --model.n_layers 8 --training.local_batch_size 4"
    schedule = "--parallelism.pipeline_parallel_schedule Interleaved1F1B"
    assert (
        dtron.__main__.main(
            ["explain", DEBUG, "--gpus", "4", "--rank", "3", "--json", *keys.split(), *schedule.split()]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    gathers = [e for e in facts["block"]["elsewhere"] if e["operation"] == "all_gather"]
    assert [(e["unit"], e["count"], e["per"]) for e in gathers] == [(facts["block"]["name"], 1, "step")]


def test_the_tokens_are_those_of_the_rank(capsys: pytest.CaptureFixture) -> None:
    assert (
        dtron.__main__.main(["explain", DEBUG, "--gpus", "8", "--dp", "2", "--cp", "2", "--tp", "2", "--rank", "6"])
        == 0
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "6 1 0 16-47 16-31 7 1 1 16-47 32-47" in text
    assert "The ranks above are dp rank 1, with sequences 2 to 3" in text


@pytest.mark.parametrize("layout", ["--tp 2 --pp 2 --parallelism.data_parallel_replicate_degree 2", "--tp 2 --cp 2"])
def test_shards_and_tokens_are_where_it_says(ranks: Ranks, layout: str) -> None:
    arguments = f"{SMALL} {layout}"
    world = 8 if "pp" in layout else 4
    real = ranks.run(world, held_by_a_rank, arguments)
    facts = explain(setup_of(load(arguments.split()), world, []), world - 1, 8)
    for p in facts["parameters"]:
        name = p["name"].replace("layers.N", f"layers.{p['layers'][0]}" if p["layers"] else "")
        holders = [rank for rank, (parameters, *_) in enumerate(real) if name in parameters]
        same_place = holders[0] + (world - 1) % len(holders)
        shape, elements = real[same_place][0][name]
        assert (holders, shape) == (p["ranks"], p["local_shape"]), name
        assert [rank for rank in holders if real[rank][0][name][1] == elements] == p["same_shard"], name
    d = facts["degrees"]
    for rank, (_, tokens, groups) in enumerate(real):
        for dim in facts["dimensions"]:  # as the page's pictures of other ranks have them
            n, stride = len(dim["ranks"]), dim["stride"]
            first = rank - rank // stride % n * stride
            assert [first + i * stride for i in range(n)] == groups[dim["name"]]
        held = facts["tokens"]["held"][rank // d["tp"] % d["cp"]]
        spans = held["positions"], held["tp_parts"][rank % d["tp"]]
        assert [[t for a, b in part for t in range(a, b + 1)] for part in spans] == tokens


def test_memory_is_that_of_a_dry_run(outputs: tuple[dict[str, Any], str, str]) -> None:
    """The journal of operations changes nothing of what is recorded."""
    setup = setup_of(load(["--job.config_file", DEBUG, *LAYOUT]), 16, [])
    peak = dry_run(setup, 0).peak
    memory = outputs[0]["memory"]
    assert (memory["peak_bytes"], memory["parts"], memory["phase"]) == (peak.total, peak.parts, peak.phase)


def test_experts_and_what_their_exchange_carries() -> None:
    arguments = f"{SMALL} --model.name qwen3_moe --ep 4".split()
    config = load(arguments)
    assert fewest_ranks(config.parallelism) == 4
    facts = explain(setup_of(config, 4, []), 1, 8)
    n, top_k = facts["experts"]["experts"], facts["experts"]["per_token"]
    assert facts["experts"]["ranks"] == [0, 1, 2, 3]
    assert facts["experts"]["experts_of_rank"] == [[e * n // 4, (e + 1) * n // 4 - 1] for e in range(4)]
    assert {c["dimension"] for c in facts["collectives"] if c["operation"] == "all_to_all"} == {"ep"}
    rows = [e["bytes"] for e in facts["block"]["forward"] if e["operation"] == "all_to_all"]
    assert rows == [8 * n, *2 * [2 * 32 * top_k * 32 * 2]]  # counts in int64; rows of 32 in bf16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "there is no file nowhere.toml"),
        ([DEBUG, "--tp", "3"], "tensor_parallel_degree 3 does not divide model.n_heads 4"),
        ([DEBUG, "--gpus", "6", "--tp", "4"], "tp 4 = 4 does not divide the world size 6"),
        ([DEBUG, "--gpus", "0"], "--gpus and --gpus-per-node must be 1 or more"),
        ([DEBUG, "--rank", "9"], "--rank is 9; expected 0 to 0"),
        ([DEBUG, "--model.nlayers", "3"], 'unknown key "model.nlayers"'),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert dtron.__main__.main(["explain", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err


def test_only_a_page_of_its_own_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine")
    assert dtron.__main__.main(["explain", DEBUG, "--out", str(file)]) == 1
    assert "exists and is no page of dtron explain" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert dtron.__main__.main(["explain", DEBUG, "--out", str(file), "--force"]) == 0
    assert dtron.__main__.main(["explain", DEBUG, "--out", str(file)]) == 0
    assert Reader(file.read_text()).open == []


def test_the_example_of_the_page_is_printed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "explain.md").read_text()
    ((command, example),) = re.findall(r"```bash\ndtron ([^\n]*)\n```\n\n```text\n([^`]*)```", page)
    assert dtron.__main__.main(command.split()) == 0
    assert example in capsys.readouterr().out


@pytest.mark.long
def test_the_largest_model_on_16384_ranks_takes_seconds(capsys: pytest.CaptureFixture) -> None:
    start = time.process_time()
    keys = ["--gpus", "16384", "--dp", "128", "--training.global_batch_size", "-1"]
    assert dtron.__main__.main(["explain", str(ROOT / "configs/llama3-405b.toml"), *keys]) == 0
    used = time.process_time() - start
    with capsys.disabled():
        print(f"\nLlama 3 405B on 16,384 ranks: explained in {used:.1f} CPU-seconds")
    assert used < 60
