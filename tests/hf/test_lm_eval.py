"""lm-eval, as docs/huggingface.md shows it, on an exported model: offline, on a task of local files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf.models import save_random

from dtron.__main__ import main
from dtron.data.tokenizer import train_bpe
from dtron.hf.read import OpenedModel, open_model

TASK = """task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: text.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""
TEXTS = ["the quick brown fox jumps over the lazy dog", "weights that cannot leave or enter are a toy's", "a third"]


@torch.no_grad()
def nats(opened: OpenedModel, text: str) -> float:
    """-log p of a text after the token that ends the one before."""
    assert opened.encoder is not None
    ids = torch.tensor([[opened.encoder.eos_id, *opened.encoder.encode_prompt(text)]])
    return F.cross_entropy(opened.model(ids)[0, :-1], ids[0, 1:], reduction="sum").item()


@pytest.mark.long
def test_lm_eval_gives_the_perplexity_that_we_compute(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install -e '.[eval]', as `make test-long` does")
    folder = save_random("Meta-Llama-3-8B", tmp_path / "weights")
    encoder = train_bpe(TEXTS * 9, 320)
    encoder.save(folder)
    assert main(["convert", str(folder), str(tmp_path / "checkpoint")]) == 0
    assert main(["convert", str(tmp_path / "checkpoint"), str(tmp_path / "exported")]) == 0
    (tmp_path / "own_text.yaml").write_text(TASK)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=exported,dtype=float32"]
    command += ["--tasks", "own_text", "--include_path", ".", "--device", "cpu", "--output_path", "results"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (results,) = tmp_path.glob("results/**/results*.json")
    found = json.loads(results.read_text())["results"]["own_text"]["byte_perplexity,none"]
    opened = open_model(str(tmp_path / "checkpoint"), torch.device("cpu"), torch.float32)
    expected = math.exp(sum(nats(opened, text) for text in TEXTS) / sum(len(text.encode()) for text in TEXTS))
    assert found == pytest.approx(expected, rel=1e-4)
