"""train.py started as a user starts it: by torchrun, on processes of its own, with a file and a command line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm import Warm, without_times

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400  # of a whole run: an idle machine needs a twentieth

# Tiny, but with everything that a layout can get wrong: grouped key/value heads, uneven masks, warm-up and decay.
CONFIG = """
[job]
custom_import = ["frontdoor_parts"]
[metrics]
log_freq = 1
enable_tensorboard = false
[model]
n_layers = 4
dim = 32
n_heads = 4
n_kv_heads = 2
ffn_dim = 64
vocab_size = 64
[optimizer]
lr = 3e-3
[lr_scheduler]
warmup_steps = 4
[training]
device = "cpu"
dataset = "uneven"
seq_len = 32
local_batch_size = 8
global_batch_size = 8
steps = 20
mixed_precision_param = "float32"
[validation]
dataset = "uneven"
local_batch_size = 4
freq = 100
"""


@dataclass
class Run:
    """A finished torchrun. `agent`: what torchrun itself printed; `out`, `err`: what each rank printed."""

    code: int
    agent: str
    out: list[str]
    err: list[str]
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the only metrics.jsonl."""
        (path,) = self.folder.glob("outputs/*/metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def everything(self) -> str:
        parts = [f"exit code {self.code}", self.agent]
        parts += [
            f"rank {r} out:\n{out}\nerr:\n{err}" for r, (out, err) in enumerate(zip(self.out, self.err, strict=True))
        ]
        return "\n".join(parts)


def environment() -> dict[str, str]:
    """This process's, with dtron and the parts of these tests to import."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/frontdoor"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(
    folder: Path,
    ranks: int,
    *arguments: str,
    config: str = CONFIG,
    program: tuple[str, ...] = (str(ROOT / "train.py"),),
    meanwhile: Callable[[Warm], None] | None = None,
    cold: bool = False,
    warnings: bool = False,
) -> Run:
    """Run `torchrun program --job.config_file x.toml arguments` in `folder`; `meanwhile` is called after the start.

    cold: by interpreters of its own, as it is outside of tests. warnings: are shown, as there.
    """
    env = environment() | ({"PYTHONWARNINGS": ""} if warnings else {})
    (folder / "x.toml").write_text(config)
    # Ranks write to files of their own, so that what dtron says and what torchrun says can be told apart.
    launcher = ["torch.distributed.run", "--standalone", "--redirects", "3", "--log-dir", str(folder / "logs")]
    command = [sys.executable, "-m", *launcher, "--nproc-per-node", str(ranks), *program]
    command += ["--job.config_file", str(folder / "x.toml"), *arguments]
    process: Any = None
    if cold:
        with (folder / "agent").open("wb") as agent:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=agent, stderr=agent)
    else:
        process = Warm(command, folder, env, folder / "agent")
    try:
        if meanwhile is not None:
            meanwhile(process)
        code = process.wait(TIMEOUT_S)
    finally:
        _end(process)
    out, err = ([_read(folder, rank, name) for rank in range(ranks)] for name in ("stdout.log", "stderr.log"))
    return Run(code, (folder / "agent").read_text(), out, err, folder)


def _read(folder: Path, rank: int, name: str) -> str:
    return without_times("".join(path.read_text() for path in folder.glob(f"logs/*/attempt_0/{rank}/{name}")))


def _end(process: Any) -> None:
    """torchrun's ranks are in sessions of their own: it has to be told to end them."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
