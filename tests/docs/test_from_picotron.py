"""A file of picotron becomes one that train.py takes, with the batch, steps and degrees that it asked for."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dtron.config import load
from dtron.models.families import FAMILIES
from dtron.models.hf import to_hf_config
from dtron.train.resolve import resolve

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "from_picotron.py"
THEIRS: dict[str, Any] = {
    "distributed": {
        "tp_size": 2, "cp_size": 1, "pp_size": 2, "dp_size": 2, "pp_engine": "afab", "backend": "gloo", "use_cpu": True,
    },
    "model": {
        "name": "MODEL", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "dtype": "bfloat16", "use_flash_attention": False, "use_fused_adam": True,
    },
    "training": {
        "seed": 42, "learning_rate": 3e-4, "total_train_steps": 200, "seq_length": 64, "micro_batch_size": 2,
        "gradient_accumulation_steps": 4, "num_samples": None, "max_tokens": None,
    },
    "dataset": {"name": "stdlib", "num_workers": 0, "num_proc": 1},
    "checkpoint": {"save_dir": "ckpt", "save_frequency": 30, "load_path": ""},
    "logging": {"use_wandb": False, "project_name": "picotron", "run_name": None},
    "environment": {"OMP_NUM_THREADS": "1"},
}  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, file: Path) -> int:
    spec = importlib.util.spec_from_file_location("from_picotron", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(file)])
    return module.main()


def converted(theirs: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[Any, str]:
    (folder / "theirs.json").write_text(json.dumps(theirs))
    assert run(monkeypatch, folder / "theirs.json") == 0
    text = capsys.readouterr().out
    (folder / "mine.toml").write_text(text)
    return load(["--job.config_file", str(folder / "mine.toml")]), text


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(FAMILIES["llama3"]["debugmodel"])))
    copy: dict[str, Any] = json.loads(json.dumps(THEIRS))
    copy["model"]["name"] = str(tmp_path)
    return copy


def test_a_pipeline_is_taken_over(theirs: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any):
    config, text = converted(theirs, tmp_path, monkeypatch, capsys)
    setup = resolve(config, 8, "cpu")
    c, p = setup.config, setup.config.parallelism
    assert (p.pipeline_parallel_schedule, p.pipeline_parallel_microbatch_size) == ("GPipe", 2)
    assert (setup.degrees.dp_shard, setup.degrees.tp, setup.degrees.pp) == (2, 2, 2)
    assert (c.training.local_batch_size, c.training.global_batch_size, c.training.steps) == (8, 16, 200)
    assert (c.optimizer.beta2, c.optimizer.weight_decay, c.checkpoint.interval, c.debug.seed) == (0.999, 0.01, 30, 42)
    assert setup.model_config.n_layers == 4 and "times too large" in text


def test_accumulation_tokens_and_what_is_unknown(theirs: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any):
    theirs["distributed"] |= {"pp_size": 1}
    theirs["training"] |= {"max_tokens": 64 * 16 * 3 - 1, "what": 1}
    config, text = converted(theirs, tmp_path, monkeypatch, capsys)
    c = resolve(config, 4, "cpu").config.training
    assert (c.local_batch_size, c.global_batch_size, c.steps) == (2, 16, 3)
    assert "# training.what is not known and was left out" in text


@pytest.mark.parametrize("text", ["{", "{}"])
def test_another_file_is_refused_in_one_line(text: str, tmp_path: Path, monkeypatch: Any, capsys: Any):
    (tmp_path / "a.json").write_text(text)
    assert run(monkeypatch, tmp_path / "a.json") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'a.json'}")
