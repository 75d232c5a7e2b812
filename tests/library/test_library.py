"""dtron as a library: trainings in this process, one after the other, and on ranks that are started for it."""

import gc
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
import torch.distributed as dist

import dtron
from dtron import library, registry
from dtron.compat import TORCH
from dtron.config import to_toml
from dtron.ranks.control import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model.n_layers": 1, "model.dim": 16, "model.n_heads": 2, "model.n_kv_heads": 2, "model.ffn_dim": 16,
    "model.vocab_size": 96, "training.dataset": "tiny_counting", "training.seq_len": 16, "training.local_batch_size": 2,
    "training.device": "cpu", "training.steps": 4, "metrics.log_freq": 1, "metrics.enable_tensorboard": False,
    "checkpoint.enable": False, "optimizer.weight_decay_exclude": ["*norm*", "*embed*"],
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dtron.Config:
    registry.register("dataset", "tiny_counting", tinyrun.counting)
    (tmp_path / "run.toml").write_text('[lr_scheduler]\nwarmup_steps = 2\n[job]\ndump_folder = "outputs"\n')
    monkeypatch.chdir(tmp_path)
    return dtron.load_config("run.toml", TINY)


def state() -> list[Any]:
    log = logging.getLogger("dtron")
    handlers = [signal.getsignal(number) for number in SIGNALS]
    return [log.handlers, log.propagate, log.level, handlers, gc.isenabled(), torch.get_rng_state().tolist()]


def test_import_is_light_and_names_are_there() -> None:
    program = "import sys, dtron; print(len(sys.modules), 'torch' in sys.modules, *dir(dtron))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    count, torch_too, *names = done.stdout.split()
    assert int(count) < 100 and torch_too == "False" and set(dtron.__all__) <= set(names)
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        dtron.fit  # type: ignore[attr-defined]  # noqa: B018


def test_a_configuration_from_a_file_or_another_one(config: dtron.Config) -> None:
    assert config.lr_scheduler.warmup_steps == 2 and config.optimizer.weight_decay_exclude == ["*norm*", "*embed*"]
    other = dtron.load_config(
        config, {"tp": 2, "training.steps": 9, "model.hf_assets_path": None, "checkpoint.enable": True}
    )
    assert (other.parallelism.tensor_parallel_degree, other.training.steps, other.checkpoint.enable) == (2, 9, True)
    assert other.model.dim == 16 and other.model.hf_assets_path is None
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"training.stepz": 1}, "training.steps"),
        ({"training": {"steps": 1}}, r"expected the keys with their section"),
        ({"training.steps": "ten"}, "an integer"),
    ]
    for overrides, message in mistakes:
        with pytest.raises(dtron.UserError, match=message):
            dtron.load_config(config, overrides)


def test_two_trainings_in_this_process_leave_it_as_it_was(
    config: dtron.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before, threads = state(), threading.active_count()
    first = dtron.train(config)
    said = capsys.readouterr().out
    again = dtron.train(config, {"training.steps": 6}, quiet=True)
    assert state() == before and not dist.is_initialized() and threading.active_count() <= threads + 1
    threads_of_gloo = [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
    assert not threads_of_gloo or TORCH < (2, 13)  # 2.11 keeps those of its groups until the process ends
    assert said.count("step 4/4") == 1 and "nothing: checkpoint.enable is false" in said
    assert "step 6/6" not in capsys.readouterr().out, "quiet"
    assert [row["step"] for row in first.rows] == [1, 2, 3, 4] and len(again.rows) == 6
    assert first.rows[0]["loss"] == again.rows[0]["loss"], "of the same seed and data"
    assert first.folder != again.folder and (first.folder / "config.toml").read_text().startswith("# versions: dtron=")
    tokens = torch.arange(16).expand(2, 16)
    logits = first.model(tokens)
    assert logits.shape == (2, 16, 96) and logits.isfinite().all() and type(first.model).__name__ == "Llama"


def test_the_examples_of_the_page_run(
    config: dtron.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    Path("configs").mkdir()
    Path("configs/debug.toml").write_text(to_toml(config))
    plot, in_a_test = re.findall(r"```python\n(import dtron.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    exec(plot, {})
    assert Path("losses.png").exists() and "parameters, in outputs/" in capsys.readouterr().out
    assert len(plot.strip().splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(in_a_test, names)
    names["test_my_data_can_be_learnt"](tmp_path / "test")


def test_the_model_is_that_of_the_checkpoint_and_a_resume_goes_on(config: dtron.Config) -> None:
    saving = {"checkpoint.enable": True, "checkpoint.interval": 4, "lr_scheduler.total_steps": 8}
    first = dtron.train(config, saving, quiet=True)
    loaded = dtron.load_model(first.folder)
    for (name, ours), theirs in zip(first.model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs), name
    more = dtron.train(config, saving | {"training.steps": 6}, quiet=True)
    assert more.folder == first.folder and [row["step"] for row in more.rows] == [1, 2, 3, 4, 5, 6]


def test_mistakes_are_user_errors_and_leave_nothing(config: dtron.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    for overrides, message in (
        ({"tp": 2}, "does not divide the world size 1"),
        ({"training.dataset": "nothere"}, "nothere"),
        ({"model.name": "lama"}, "did you mean 'llama"),
        ({"validation.only": True}, "dtron.train trains"),
    ):
        with pytest.raises(dtron.UserError, match=message):
            dtron.train(config, overrides, quiet=True)
    with pytest.raises(dtron.UserError, match="ranks = 0"):
        dtron.train(config, ranks=0)
    assert state() == before and not dist.is_initialized() and not list(Path("outputs").glob("*/metrics.jsonl"))
    caught: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            dtron.train(config)
        except dtron.UserError as error:
            caught.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert "called in a thread" in str(caught[0])


def test_what_the_training_raises_comes_through_and_the_folder_is_free_again(
    config: dtron.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"checkpoint.enable": True}
    with monkeypatch.context() as broken:
        broken.setattr(library.Trainer, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dtron.train(config, saving, quiet=True)
    assert gc.isenabled() and not dist.is_initialized()
    with monkeypatch.context() as stopped:
        step = library.Trainer.train_step

        def with_ctrl_c(trainer: Any, clock: Any) -> Any:
            if trainer.progress.step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return step(trainer, clock)

        stopped.setattr(library.Trainer, "train_step", with_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            dtron.train(config, saving, quiet=True)
    assert [row["step"] for row in dtron.train(config, saving, quiet=True).rows] == [1, 2, 3, 4], "resumed from step 2"


def test_ranks_are_started(config: dtron.Config, capfd: pytest.CaptureFixture[str]) -> None:
    Path("counting.py").write_text(
        "from dtron import registry\nimport tinyrun\nregistry.register('dataset', 'tiny_counting', tinyrun.counting)\n"
    )
    given = {"job.custom_import": ["counting"], "tp": 2, "checkpoint.enable": True}
    run = dtron.train(config, given, ranks=2)
    alone = dtron.train(config, quiet=True)
    assert [row["loss"] for row in run.rows] == pytest.approx([row["loss"] for row in alone.rows], rel=1e-2)
    out = capfd.readouterr().out
    assert "tp 2, on 2 x cpu" in out and "resume with   dtron.train(...), called as before" in out
    assert run.rows[0]["slowest_rank"] in (0, 1) and "control_folder" not in (run.folder / "config.toml").read_text()
    assert run.model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 96)
    (run.folder / "config.toml").write_text("[checkpoint]\nenable = false\n")  # as of a run that saved nothing
    with pytest.raises(dtron.UserError, match="set checkpoint.enable true"):
        _ = library.Run(run.folder, run.rows).model


def test_ranks_that_fail(config: dtron.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(failed: dict[str, str] | None) -> Any:
        def run(command: list[str], quiet: bool) -> tuple[int, list[str]]:
            if failed:
                Path(command[command.index("dtron.library") + 1], "FAILED").write_text(json.dumps(failed))
            return 1, ["the last line"]

        return run

    for failed, kind, message in (
        ({"kind": "mistake", "message": "tp 3 is odd"}, dtron.UserError, "^tp 3 is odd$"),
        ({"kind": "oom", "message": "out of memory"}, RuntimeError, "failed: out of memory.*\nthe last line"),
        (None, RuntimeError, "torchrun ended with 1"),
    ):
        monkeypatch.setattr(library, "_run", ends(failed))
        with pytest.raises(kind, match=message):
            dtron.train(config, ranks=2)
    program = "print('a', flush=True); print('b')"
    monkeypatch.undo()
    assert library._run([sys.executable, "-c", program], quiet=True) == (0, ["a", "b"])
