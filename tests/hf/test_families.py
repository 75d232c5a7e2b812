"""What every family of Hugging Face that dtron reads is held to; a family in `PUBLISHED` is tested by being there.

tests/hf/test_convert.py does the rest: logits of transformers, and the same bits there and back.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hf.models import PUBLISHED, config_json, load_random, save_random, train_plainly
from parity.layout import CPU, Case, build_config, local, with_keys
from parity.single import ROWS, SEQ, batch, off
from ranks import Ranks

from dtron import registry
from dtron.checkpoint.files import Progress
from dtron.checkpoint.load import load_initial
from dtron.checkpoint.storage import StoragePath
from dtron.data.loader import Batch
from dtron.hf.generate import generate
from dtron.hf.read import open_model
from dtron.mesh import Degrees, Mesh
from dtron.models.hf import from_hf_config
from dtron.models.rope import for_length
from dtron.models.spec import meta_model
from dtron.parallel.compose import ParallelModel, parallelize
from dtron.train.guard import StepGuard
from dtron.train.step import Step
from dtron.train.tally import Tally

STEPS, LR = 5, 0.1  # a larger rate makes rounding choose other experts
LAYOUTS = {"fsdp2 tp2": Degrees(dp_shard=2, tp=2), "pp2 cp2": Degrees(2, cp=2)}
# Families whose parts are in the parity matrix, each with another layout here; all the others are long.
SHORT = [("Qwen3-8B", "pp2 cp2"), ("Mixtral-8x7B-v0.1", "fsdp2 tp2")]
CASES = [
    pytest.param(name, layout, id=f"{name} {layout}", marks=[] if (name, layout) in SHORT else [pytest.mark.long])
    for name in PUBLISHED
    for layout in LAYOUTS
    if config_json(name)["num_attention_heads"] % LAYOUTS[layout].tp == 0
]


@dataclass
class Continued:
    """What a rank saw: losses and norms of the whole world, and its shards of the weights against transformers'."""

    losses: list[float]
    norms: list[float]
    moved: float  # how far its weights went, in multiples of the tolerance
    wrong: dict[str, float]  # name -> largest difference in multiples of the tolerance, where above 1


def trained_by_transformers(before: Path, after: Path) -> tuple[list[float], list[float]]:
    """Losses and norms of a plain loop over transformers' own model, which is then saved to `after`."""
    model = load_random(before).train()
    model.get_input_embeddings().padding_idx = None  # transformers never trains its row, which is text here
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, norms = train_plainly(model, optimizer, STEPS)
    model.save_pretrained(after)
    return losses, norms


def continue_training(before: str, after: str, degrees: Degrees) -> Continued:
    """The job of one rank: load a folder, train, and compare with the folder of the trained weights."""
    case = Case("", degrees, {"training.expert_balance_loss": 0.0, "training.expert_bias_rate": 0.0})
    config = with_keys(build_config(case), {"training.steps": STEPS, "optimizer.lr": LR})
    dimensions = for_length(from_hf_config(before), SEQ)
    mesh = Mesh(degrees, "cpu", dimensions.moe is not None)
    spec = registry.look_up("model", "llama3", "model.name")

    def load(folder: str) -> ParallelModel:
        model = parallelize(spec, dimensions, config, mesh, CPU, registry.cross_entropy, [])
        load_initial(StoragePath.at(folder), model, None, [], meta_model(spec, dimensions))
        return model

    model, expected = load(before), load(after)
    first = [local(p).detach().clone() for _, p in model.named_parameters()]
    optimizer = torch.optim.SGD([p for _, p in model.named_parameters()], lr=LR)
    guard = StepGuard(config.training, [optimizer], Progress(), CPU)
    step = Step(config, mesh, CPU, model, [optimizer], guard, Progress(), Tally(CPU))
    seen = Continued([], [], 0.0, {})
    mine = slice(mesh.dp_rank * ROWS // degrees.dp, (mesh.dp_rank + 1) * ROWS // degrees.dp)
    for number in range(STEPS):
        tokens, labels = batch(number)
        stats, _ = step(Batch(tokens[mine], labels[mine]))
        seen.losses.append(stats[0].item())
        seen.norms.append(stats[1].item())
    theirs = [local(p).detach() for _, p in expected.named_parameters()]
    seen.moved = max(off(start, end) for start, end in zip(first, theirs, strict=True))
    for (name, p), end in zip(model.named_parameters(), theirs, strict=True):
        if (worst := off(local(p).detach(), end)) > 1:
            seen.wrong[name] = worst
    return seen


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_training_continues_as_in_transformers(name: str, layout: str, ranks: Ranks, tmp_path: Path) -> None:
    before, after = save_random(name, tmp_path / "before"), tmp_path / "after"
    losses, norms = trained_by_transformers(before, after)
    for seen in ranks.run(LAYOUTS[layout].world, continue_training, str(before), str(after), LAYOUTS[layout]):
        assert seen.losses == pytest.approx(losses, rel=1e-5)
        assert seen.norms == pytest.approx(norms, rel=1e-4)
        assert seen.wrong == {} and seen.moved > 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path)
    ours, theirs = open_model(str(folder), CPU, torch.float32).model, load_random(folder)
    prompt = torch.randint(0, ours.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(2))
    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, max_new_tokens=20, **greedy)[0, 9:].tolist()
    assert len(set(expected)) > 1
    options = {"max_new_tokens": 20, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "stop_ids": []}
    assert [*generate(ours, prompt[0].tolist(), **options)] == expected
