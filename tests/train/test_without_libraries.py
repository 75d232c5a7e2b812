"""Prepared data is trained on without the libraries that read and tokenize other data, and without a home folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtron.data.prepare import prepare
from dtron.data.sources import SourceSpec, open_source
from dtron.data.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import os, sys
for name in ("datasets", "transformers", "tokenizers", "torchdata", "pyarrow", "huggingface_hub"):
    sys.modules[name] = None  # an import of it is an ImportError
end = os._exit

def note_modules(code):
    with open("modules.json", "w") as file:
        json.dump([name for name, module in sys.modules.items() if module], file)
    end(code)

import json
os._exit = note_modules
from dtron.train.launch import main
main()
"""
MOST_MODULES = 2600  # torch's own are 1,180 and sympy's, which its compiler brings, 420: 2,200 in all with torch 2.13


@pytest.mark.parametrize("prepared", [True, False])
def test_run_on_prepared_data_needs_no_library(prepared: bool, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 20}) + "\n" for i in range(40)))
    encoder = train_bpe(["line 1 2 3 4 5 6 7 8 9 0"] * 9, 280)
    source = open_source(SourceSpec(str(tmp_path / "text.jsonl")), tmp_path)
    prepare(source, encoder, tmp_path / "prepared", log=lambda _: None)
    (tmp_path / "block.py").write_text(BLOCK)
    data = ["--training.dataset", "prepared" if prepared else "text.jsonl", "--model.hf_assets_path"]
    command = [sys.executable, "block.py", "--job.config_file", str(ROOT / "configs/debug.toml"), *data]
    command += ["" if prepared else "prepared", "--training.steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    if prepared:
        assert done.returncode == 0 and "step 2/2" in done.stdout, done.stdout + done.stderr
        written = {path.name for path in tmp_path.iterdir()}
        assert written == {"text.jsonl", "prepared", "block.py", "outputs", "modules.json"}  # no home, no cache
        modules = set(json.loads((tmp_path / "modules.json").read_text()))
        assert len(modules) < MOST_MODULES, "a start-up of 3 CPU-seconds: import what only some runs need where they do"
        assert not modules & {"torch._inductor.compile_fx", "torchao", "tensorboard", "matplotlib", "dtron.plan"}
    else:  # the same without a prepared set does need one: the blocker blocks
        assert done.returncode != 0 and "tokenizers" in done.stderr, done.stdout + done.stderr
