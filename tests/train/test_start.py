"""Where a run starts: what it warns of, what it refuses, and what is said of a changed length."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks
from tinyrun import quiet_world, train_tiny

from dtron.config import load
from dtron.errors import UserError
from dtron.ranks.world import World
from dtron.train import start
from dtron.train.folder import choose_run_folder
from dtron.train.resolve import resolve


def said_at_start(folder: str, arguments: str) -> list[str]:
    """What rank 0 is told while the folder and the checkpoint are chosen."""
    world, said = quiet_world()
    config = load(["--training.device", "cpu", "--job.dump_folder", folder, *arguments.split()])
    point = start.start_run(resolve(config, world.size), world)
    assert point.resume_from is None and point.progress.step == 0
    return said


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        ("--training.steps 1001", True),
        ("--training.steps 1000", False),
        ("--training.steps 1001 --checkpoint.enable", False),
    ],
)
def test_a_long_run_without_checkpoints_is_warned_of_in_one_line(
    ranks: Ranks, tmp_path: Path, arguments: str, warned: bool
) -> None:
    said = ranks.run(2, said_at_start, str(tmp_path), arguments)[0]
    assert len(said) == warned
    if warned:
        assert said[0].startswith("warning: 1001 steps without checkpoints") and "\n" not in said[0]


def test_what_rank_0_finds_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in ("--checkpoint.enable", ""):
        with pytest.raises(RankError, match="UserError: job.dump_folder .*file/x: .*Not a directory"):
            ranks.run(2, said_at_start, str(tmp_path / "file" / "x"), arguments)


def one_rank_cannot_write(folder: str) -> str:
    """Local rank 0 of the second machine has a disk that is read-only."""
    original = start.check_writable

    def check(place: object, rank: int) -> None:
        if rank == 1:
            raise start.UserError("no checkpoint can be written here: read-only")
        original(place, rank)  # type: ignore[arg-type]

    start.check_writable = check  # type: ignore[assignment]
    rank, size = dist.get_rank(), dist.get_world_size()
    config = load(["--training.device", "cpu", "--job.dump_folder", folder, "--checkpoint.enable"])
    try:
        start.start_run(resolve(config, size), World(rank, 0, size, dist.HashStore()))
    except start.UserError as error:
        return str(error)
    finally:
        start.check_writable = original
    return ""


def test_a_machine_that_cannot_write_is_found_before_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, one_rank_cannot_write, str(tmp_path)) == ["no checkpoint can be written here: read-only"] * 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "there is no folder nowhere, or it is empty"),
        ("README.md", "README.md is no checkpoint"),
        (
            "run",
            "run is no checkpoint, it has neither dtron.json nor .metadata, nor safetensors; did you mean run/step-4?",
        ),
        ("nosuch://bucket/step-1", "nosuch"),
    ],
)
def test_initial_weights_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "run" / "step-4").mkdir(parents=True)
    config = load(["--training.device", "cpu", "--checkpoint.initial_load_path", path])
    with pytest.raises(UserError, match=re.escape(words)):
        choose_run_folder(config, resolve(config, 1).model_config)
    assert not (tmp_path / "outputs").exists()


# --- runs that have ended, and what they began with


def trained(folder: str, steps: int, arguments: str) -> tuple[list[str], int]:
    """What rank 0 is told by a run, and the step it came to."""
    usual = "--checkpoint.interval 2 --lr_scheduler.total_steps 9 --lr_scheduler.warmup_steps 2"
    trainer, said = train_tiny(folder, steps, f"{usual} {arguments}")
    return said, trainer.progress.step


def test_a_run_that_ended_with_its_weights_alone(ranks: Ranks, tmp_path: Path) -> None:
    alone = "--checkpoint.last_save_model_only"
    ranks.run(1, trained, str(tmp_path), 4, alone)
    said, step = ranks.run(1, trained, str(tmp_path), 4, alone)[0]
    assert step == 4 and "nothing to do: step 4 is done, of training.steps 4" in said[-1]
    with pytest.raises(RankError, match="step-4 ended this run and holds the weights only .*training.steps = 6"):
        ranks.run(1, trained, str(tmp_path), 6, alone)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_has_ended_has_nothing_to_do(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, trained, str(tmp_path), 4, "")
    said, step = ranks.run(1, trained, str(tmp_path), 3, "")[0]
    assert step == 4 and "nothing to do: step 4 is done, of training.steps 3" in said[-1]
    assert not any("learning rate" in line for line in said)


def test_going_back_is_refused_while_newer_ones_are_there(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, trained, str(tmp_path), 4, "")
    with pytest.raises(RankError, match="resuming from step 2 would later meet step 4 in .*move them away"):
        ranks.run(1, trained, str(tmp_path), 6, "--checkpoint.load_step 2")
    (newer,) = tmp_path.glob("*/checkpoint/step-4")
    newer.rename(newer.with_name("step-4.mine"))
    assert ranks.run(1, trained, str(tmp_path), 6, "--checkpoint.load_step 2")[0][1] == 6


def test_weights_of_another_run_in_part(ranks: Ranks, tmp_path: Path) -> None:
    """The head of the other run has another vocabulary: left out it fits, else it is named. More rows are no fault."""
    ranks.run(1, trained, str(tmp_path / "first"), 2, "--model.vocab_size 100")
    (source,) = (tmp_path / "first").glob("*/checkpoint/step-2")
    start = f"--checkpoint.initial_load_path {source}"
    with pytest.raises(RankError, match=r"model.embed_tokens.weight is \[100, 16\] there and \[96, 16\] in this model"):
        ranks.run(1, trained, str(tmp_path / "second"), 2, start)
    with pytest.raises(RankError, match=r"'head.\*' fits no parameter"):
        ranks.run(1, trained, str(tmp_path / "second"), 2, f"{start} --checkpoint.exclude_from_loading head.*")
    excluded = "--checkpoint.exclude_from_loading embed_tokens.* lm_head.*"
    said, step = ranks.run(1, trained, str(tmp_path / "second"), 2, f"{start} {excluded}")[0]
    assert f"weights from {source}" in said and step == 2
    said, step = ranks.run(1, trained, str(tmp_path / "third"), 2, f"{start} --model.vocab_size 104")[0]
    assert step == 2 and any("lm_head.weight has 100 rows in the initial weights and 104 here" in line for line in said)


def test_a_resume_says_what_it_changes_and_needs_no_initial_weights(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, trained, str(tmp_path / "first"), 2, "")
    (source,) = (tmp_path / "first").glob("*/checkpoint/step-2")
    start = f"--checkpoint.initial_load_path {source}"
    said, _ = ranks.run(1, trained, str(tmp_path / "second"), 2, start)[0]
    assert f"weights from {source}" in said
    source.rename(source.with_name("moved"))
    said, step = ranks.run(2, trained, str(tmp_path / "second"), 4, f"{start} --tp 2 --training.max_norm 1.0")[0]
    assert step == 4
    (line,) = [line for line in said if line.startswith("changed since the last attempt: ")]
    assert "training.steps (4 here, 2 there)" in line and "parallelism.tensor_parallel_degree (2 here, 1 there)" in line
    bf16 = "--training.mixed_precision_param float32"
    said, _ = ranks.run(2, trained, str(tmp_path / "second"), 5, f"{start} --tp 2 {bf16}")[0]
    assert any("training.mixed_precision_param ('float32' here, 'bfloat16' there)" in line for line in said)


def test_a_resume_with_nothing_changed_says_so_by_silence(ranks: Ranks, tmp_path: Path) -> None:
    """The recorded global batch is the resolved one; the configured -1 takes it, so it is no change."""
    ranks.run(2, trained, str(tmp_path), 2, "")
    said, step = ranks.run(2, trained, str(tmp_path), 2, "")[0]
    assert step == 2 and not any("changed since" in line for line in said)
    with pytest.raises(RankError, match=r"batch of 4 sequences \(the run's own, as its checkpoint records\) is not a"):
        ranks.run(1, trained, str(tmp_path), 4, "--training.local_batch_size 3")


def weights_and_said(folder: str, steps: int, arguments: str) -> tuple[list[torch.Tensor], list[str]]:
    usual = "--checkpoint.interval 2 --lr_scheduler.warmup_steps 0 --lr_scheduler.decay_ratio 0"
    trainer, said = train_tiny(folder, steps, f"{usual} {arguments}")
    return [p.detach().full_tensor() for _, p in trainer.model.named_parameters()], said  # type: ignore[attr-defined]


def test_a_run_continues_with_a_lower_learning_rate(ranks: Ranks, tmp_path: Path) -> None:
    """The new rate is in effect, AdamW's state is kept, the history has the change, and reruns find the run."""
    first, _ = ranks.run(1, weights_and_said, str(tmp_path), 2, "")[0]
    (run,) = tmp_path.iterdir()
    lower = f"--checkpoint.resume_run {run} --optimizer.lr 0.0"
    same, said = ranks.run(1, weights_and_said, str(tmp_path), 4, lower)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True)), "the learning rate is 0"
    assert any("optimizer.lr (0.0 here, 0.0008 there)" in line for line in said)
    history = (run / "config-attempt-2.toml").read_text()
    assert history.startswith("# changed since attempt 1: optimizer.lr (0.0 here, 0.0008 there)")
    assert load(["--job.config_file", str(run / "config-attempt-2.toml")]).optimizer.lr == 0.0
    _, said = ranks.run(1, weights_and_said, str(tmp_path), 5, "--optimizer.lr 0.0")[0]
    assert any(line.startswith("resuming from") and "step-4" in line for line in said)
    assert list(tmp_path.iterdir()) == [run]


def test_the_advice_on_the_length_of_the_schedule_keeps_the_run(ranks: Ranks, tmp_path: Path) -> None:
    usual = "--checkpoint.interval 2 --lr_scheduler.warmup_steps 0"
    ranks.run(1, train_and_said, str(tmp_path), 2, usual)
    said = ranks.run(1, train_and_said, str(tmp_path), 3, usual)[0]
    assert any("lr_scheduler.total_steps = 2 would keep it" in line for line in said)
    said = ranks.run(1, train_and_said, str(tmp_path), 4, f"{usual} --lr_scheduler.total_steps 2")[0]
    assert any("lr_scheduler.total_steps (2 here, None there)" in line for line in said)
    assert any(line.startswith("resuming from") and "step-3" in line for line in said)


def train_and_said(folder: str, steps: int, arguments: str) -> list[str]:
    return train_tiny(folder, steps, arguments)[1]
