"""dtron as a library: `dtron.train(config)` in a script, a notebook or a test, without torchrun.

One rank is this process, which is left as it was: no process group, no signal handlers, no other logging. More are
started by torchrun, as `train.py` would be.
"""

import contextlib
import functools
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dtron import compat
from dtron.cluster.runs import read_control_file
from dtron.config import Config, load, read, to_toml
from dtron.config.cli import SHORT_FORMS
from dtron.config.keys import KEYS
from dtron.errors import UserError
from dtron.models.spec import meta_model
from dtron.observe.metrics import read_metrics
from dtron.parallel.tensor import tied_parameters
from dtron.ranks.control import SIGNALS, Control, StopBeforeStartError
from dtron.ranks.logs import setup_logging
from dtron.ranks.world import World, start_process_group
from dtron.train.resolve import resolve
from dtron.train.trainer import Trainer

__all__ = ["Run", "load_config", "load_model", "train"]

COMMAND = "dtron.train(...), called as before"  # what resumes such a run
TAIL = 30  # lines of output in the error of ranks that failed


@dataclass(frozen=True)
class Run:
    """A training that has ended. folder: its run folder. rows: of its metrics.jsonl, one per logged step, by step."""

    folder: Path
    rows: list[dict[str, Any]]
    _model: nn.Module | None = field(default=None, repr=False)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained model, plain: tokens [B, S] -> logits [B, S, V].

        Of one rank, as it was at the last step, on the device it was trained on. Of several ranks, the newest
        checkpoint, on the CPU: UserError where checkpoint.enable was false.
        """
        if self._model is not None:
            return self._model
        if not load(["--job.config_file", str(self.folder / "config.toml")]).checkpoint.enable:
            raise UserError(
                f"{self.folder} has no checkpoint to read the model of several ranks from: set checkpoint.enable true"
            )
        return load_model(self.folder)


def load_config(config: str | Path | Config, overrides: Mapping[str, Any] | None = None) -> Config:
    """The checked configuration of a TOML file, or of another configuration, with other values of some keys.

    overrides: key -> value, such as {"training.steps": 20, "tp": 2}; the short forms are those of the command line.
    UserError with all that is wrong.
    """
    with _arguments(config, overrides) as arguments:
        return load(arguments)


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a run folder (its newest checkpoint), a checkpoint, or a Hugging Face folder, without gradients.

    tokens [B, S] -> logits [B, S, V]. UserError where there is none, or it is of no family that dtron knows.
    """
    from dtron.hf.read import open_model

    _check_no_group("dtron.load_model")
    return open_model(str(path), torch.device(device), dtype).model


def train(
    config: str | Path | Config, overrides: Mapping[str, Any] | None = None, *, ranks: int = 1, quiet: bool = False
) -> Run:
    """Train as `train.py` would, and return when it has ended.

    config: a TOML file, or a configuration; overrides: as for `load_config`. ranks: 1 is this process; more are
    processes that torchrun starts here, one per GPU, or on the CPU. quiet: only warnings are logged.
    UserError for a mistake in the configuration, the data or the layout, before anything is trained; RuntimeError with
    the last lines of the log where a rank of several failed; otherwise what the training itself raises. Ctrl-C saves,
    where checkpoints are enabled, and is a KeyboardInterrupt then.
    """
    if ranks < 1:
        raise UserError(f"ranks = {ranks}: expected 1 or more")
    with _arguments(config, overrides) as arguments:
        if load(arguments).validation.only:
            raise UserError("validation.only = true evaluates, and dtron.train trains: start train.py for it")
        if ranks > 1:
            return _train_ranks(arguments, ranks, quiet)
        try:
            return _train_here(arguments, quiet)
        finally:
            gc.collect()  # what FSDP leaves in cycles holds the groups, and gloo's threads with them


@contextlib.contextmanager
def _arguments(config: str | Path | Config, overrides: Mapping[str, Any] | None) -> Iterator[list[str]]:
    """The command line that gives a configuration, for as long as the context lasts."""
    words = [word for name, value in (overrides or {}).items() for word in _words(name, value)]
    if not isinstance(config, Config):
        yield ["--job.config_file", str(config), *words]
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.toml")
        file.write_text(to_toml(config))
        yield ["--job.config_file", str(file), *words]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        raise UserError(f"{name} = {value!r}: expected the keys with their section, such as {{'{name}.KEY': ...}}")
    if isinstance(value, (list, tuple)):
        key = KEYS.get(SHORT_FORMS.get(name, name))
        if value and key is not None and key.is_list_of_words:
            return [f"--{name}", *map(str, value)]
        return [f"--{name}={json.dumps(value) if value else ''}"]
    return [f"--{name}={'' if value is None else str(value).lower() if isinstance(value, bool) else value}"]


def _check_no_group(what: str) -> None:
    if dist.is_initialized():
        raise UserError(f"{what} makes a process group of its own, and this process is in one: call it outside of it")


# --- one rank: this process


def _train_here(arguments: list[str], quiet: bool) -> Run:
    _check_no_group("dtron.train")
    if threading.current_thread() is not threading.main_thread():
        raise UserError("dtron.train was called in a thread: signals reach the main thread only; call it there")
    mistake, interrupted = "", False
    with _process_as_it_was():
        setup_logging(0, "warning" if quiet else "info")
        trainer = Trainer.__new__(Trainer)  # what it has opened is to be closed, however its start ends
        control = Control(0)
        try:
            reading = read(arguments)
            control = Control(0, reading.config.job.control_folder)
            setup = resolve(reading.config, 1, mistakes=reading.mistakes)
            for note in reading.notes:
                logging.getLogger("dtron").warning(note)
            world = World(0, 0, 1, dist.HashStore(), control=control, command=COMMAND)
            start_process_group(world, setup.config, setup.device_type)
            trainer.__init__(setup, world)  # type: ignore[misc]
            trainer.run()
            interrupted = world.stop.signal_name == "SIGINT"
            run = Run(trainer.run_folder, read_metrics(trainer.run_folder / "metrics.jsonl"), _plain_model(trainer))
        except StopBeforeStartError as stop:
            mistake = str(stop)
        except UserError as error:
            control.failed(error)
            mistake = str(error)
        except BaseException as error:
            control.failed(error)
            raise
        finally:
            _close(trainer)
    if mistake:
        raise UserError(mistake)  # anew: the frames of the first would keep what the run held
    if interrupted:
        raise KeyboardInterrupt
    return run


def _close(trainer: Trainer) -> None:
    if hasattr(trainer, "watchdog"):
        trainer.watchdog.stop()
    if hasattr(trainer, "report"):
        trainer.report.close()
    if hasattr(trainer, "start"):
        for lock in trainer.start.locks:
            lock.close()
    if dist.is_initialized():
        dist.destroy_process_group()
        compat.forget_meshes()


def _plain_model(trainer: Trainer) -> nn.Module | None:
    """The whole model with the trained weights, not copied; None where a converter has changed it."""
    setup = trainer.setup
    plain = meta_model(setup.spec, setup.model_config)
    shards = ((name, p.detach()) for name, p in trainer.model.named_parameters())  # of one rank: the whole
    state = {name: nn.Parameter(p.to_local() if isinstance(p, DTensor) else p) for name, p in shards}
    for first, copy in tied_parameters(plain):
        state[copy] = state[first]
    if state.keys() != plain.state_dict().keys():
        return None
    plain.load_state_dict(state, assign=True)
    return plain.eval()


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Afterwards logging, signal handlers, garbage collection, determinism and random numbers are as before."""
    log = logging.getLogger("dtron")
    logged = log.handlers, log.propagate, log.level
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    collects, deterministic = gc.isenabled(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[0] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            if collects:
                gc.enable()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            log.handlers, log.propagate = logged[:2]
            log.setLevel(logged[2])


# --- several ranks: processes of torchrun


def _train_ranks(arguments: list[str], ranks: int, quiet: bool) -> Run:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        # How the run went is read from its control files, wherever the run's folder will be.
        control = Path(load(arguments).job.control_folder or folder)
        code, tail = _run([sys.executable, *launcher, "-m", "dtron.library", str(control), *arguments], quiet)
        beat = read_control_file(control / "HEARTBEAT") or {}
        failed = read_control_file(control / "FAILED")
    if code or "run_folder" not in beat:
        if failed and failed["kind"] == "mistake":
            raise UserError(failed["message"])
        what = failed["message"] if failed else f"torchrun ended with {code}"
        raise RuntimeError("\n".join([f"the training failed: {what}; the log ends with", *tail]))
    run_folder = Path(beat["run_folder"])
    return Run(run_folder, read_metrics(run_folder / "metrics.jsonl"))


def _run(command: list[str], quiet: bool) -> tuple[int, list[str]]:
    """The exit code and the last lines; the output is printed as it comes, into a notebook's cell too."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *(entry or os.getcwd() for entry in sys.path)])
    tail: deque[str] = deque(maxlen=TAIL)
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal and a notebook signal whole groups, and torchrun is to get one signal
    )  # fmt: skip
    assert process.stdout
    try:
        for line in process.stdout:
            tail.append(line.rstrip("\n"))
            if not quiet:
                print(line, end="", flush=True)
        return process.wait(), list(tail)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # torchrun asks the ranks to save and end
        process.communicate()
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


if __name__ == "__main__":  # a rank that `_train_ranks` started
    from dtron.train.launch import main

    main(sys.argv[2:], control_folder=sys.argv[1], command=COMMAND)
