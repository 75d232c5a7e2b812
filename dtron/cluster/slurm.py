"""Jobs of Slurm: a configuration and options -> a folder with all that runs, and a batch script -> a job.

outputs/slurm/NAME-DATE/   job.sbatch, config.toml (resolved), code/, git.json, git.diff, environment.json
                           job.json: the job's number, and how it was submitted
                           control/: dtron/ranks/control.py; logs/: one a node and attempt; events.jsonl
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dtron.cluster.record import checkout, record_code
from dtron.cluster.secrets import find_secret
from dtron.config import Config, load, to_toml
from dtron.errors import UserError
from dtron.train.folder import saves
from dtron.train.resolve import resolve

__all__ = ["FOLDER", "SlurmJob", "SlurmOptions", "add_options", "prepare", "render", "states", "submit", "time_limit_s"]

FOLDER = "slurm"  # in job.dump_folder
TEMPLATE = Path("scripts/slurm/train.sbatch")  # in the checkout
LEAST_S = 60  # that a job has for training before it is asked to save
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks of the cluster. Of those without a value the template's or the cluster's default is taken.

    gpus: False for ranks on CPUs. time: in a form of sbatch's. save_s: before the end, that a save may take. sbatch:
    further options, as --mem=0. requeue: False: the job ends where it would otherwise requeue itself. python: on the
    nodes. prolog: a file to source there. container: command that runs another in it. interface: of the network.
    """

    nodes: int = 1
    ranks_per_node: int = 8
    gpus: bool = True
    name: str = "dtron"
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    sbatch: list[str] = field(default_factory=list)
    save_s: int = 300
    requeue: bool = True
    retries: int = 3
    preflight: bool = True
    python: str = sys.executable
    modules: str = ""
    prolog: str = ""
    container: str = ""
    srun_args: str = ""
    interface: str = ""


@dataclass(frozen=True)
class SlurmJob:
    """A job that was submitted."""

    folder: Path
    job_id: str

    @property
    def control(self) -> Path:
        """Where the run says how it goes."""
        return self.folder / "control"


OPTIONS = {  # of the command line, with what they are
    "nodes": "number of nodes",
    "ranks_per_node": "ranks, and GPUs, of a node",
    "name": "of the job, and of its folder",
    "time": "time limit; the job goes on after it by requeueing itself",
    "partition": "partition",
    "account": "account",
    "qos": "quality of service",
    "save_s": "seconds before the end at which the run is told to save",
    "retries": "failures in a row from one checkpoint after which it gives up",
    "python": "on the nodes",
    "modules": "for module load",
    "prolog": "file that the batch script sources first",
    "container": "command that runs another in a container: 'apptainer exec --nv image.sif'",
    "srun_args": "options for every srun: '--container-image=image.sqsh'",
    "interface": "network interface of NCCL and gloo",
}


def add_options(
    parser: "argparse._ActionsContainer", names: Sequence[str] = tuple(OPTIONS), *, defaults: bool = True
) -> None:
    """Options for fields of SlurmOptions, to a parser or a group; without defaults one that is not given is None."""
    for option in fields(SlurmOptions):
        if option.name in names:
            default: Any = option.default if defaults else None
            text = OPTIONS[option.name] + (f" (default: {default})" if default else "")
            kind = type(option.default)
            flag = f"--{option.name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, default=default, metavar="X", help=text)


def submit(argv: list[str], options: SlurmOptions, say: Callable[[str], None]) -> SlurmJob:
    """Submit the training of a command line of train.py. UserError for what cannot work, before Slurm is asked.

    The job is given a folder of its own, where the code and the resolved configuration are kept: what the checkout
    becomes while it waits does not matter to it. It runs in the present folder, which relative paths count from.
    """
    config, folder = prepare(argv, options)
    folder = _make(folder)
    try:
        job = _submit(folder, config, options, say)
    except UserError:
        shutil.rmtree(folder)  # there is no job; after an interrupt there may be one
        raise
    about = {"job_id": job.job_id, "unix_s": time.time(), "command": argv, "cwd": str(Path.cwd())}
    about |= {"nodes": options.nodes, "ranks_per_node": options.ranks_per_node, "steps": config.training.steps}
    (folder / "job.json").write_text(json.dumps(about, indent=1) + "\n")
    return job


def _submit(folder: Path, config: Config, options: SlurmOptions, say: Callable[[str], None]) -> SlurmJob:
    record_code(folder, checkout(), say)
    (folder / "config.toml").write_text(to_toml(config))
    script = folder / "job.sbatch"
    script.write_text(render(folder, options))
    (folder / "logs").mkdir()  # Slurm's own log needs it before the job begins
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("there is no sbatch here; submit from a machine that has Slurm's commands") from None
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")
    return SlurmJob(folder, done.stdout.strip().split(";")[0])  # a cluster's name may follow


def prepare(argv: list[str], options: SlurmOptions) -> tuple[Config, Path]:
    """The checked configuration of a job, and the folder it is to have. UserError for what cannot work."""
    for name, least in (("nodes", 1), ("ranks_per_node", 1), ("save_s", 1), ("retries", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected {least} or more")
    if options.prolog and not Path(options.prolog).is_file():
        raise UserError(f"--prolog: there is no file {options.prolog}")
    if time_limit_s(options.time) < options.save_s + LEAST_S:
        raise UserError(
            f"--time {options.time} leaves less than {LEAST_S} s before the {options.save_s} s in which the run is to "
            "save (--save-s); raise the one or lower the other"
        )
    if not re.fullmatch(r"[\w.+-]+", options.name):
        raise UserError(f"--name {options.name!r}; expected letters, digits and . _ + -, as it names a folder too")
    for name in ("container", "srun_args"):
        try:
            shlex.split(getattr(options, name))
        except ValueError as error:
            said = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise UserError(f"{said}: {error}; expected words as in a shell") from None
    config = load(argv)
    if config.job.control_folder is not None:
        raise UserError("job.control_folder is the job's own, in its folder: take it out of the configuration")
    if what := find_secret(to_toml(config)):
        raise UserError(
            f"the configuration holds {what} of it, resolved; it is written beside the logs, so put it into a "
            "variable of the environment, which the job is given too"
        )
    setup = resolve(config, options.nodes * options.ranks_per_node, "cuda" if options.gpus else "cpu")
    device = config.training.device
    if device != "auto" and device != setup.device_type:
        raise UserError(
            f"training.device is {device}, but the job {'asks for GPUs' if options.gpus else 'has CPUs only (--cpu)'}"
        )
    if options.requeue and not config.validation.only and not saves(config.checkpoint):
        raise UserError(
            "a job that requeues itself needs checkpoints to go on from: set checkpoint.enable = true (and load_only "
            "false), or give --no-requeue"
        )
    dump = Path(config.job.dump_folder).absolute()
    if "%" in str(dump):
        raise UserError(f"job.dump_folder {dump} has a %, which Slurm takes for its own in the names of logs")
    return config, dump / FOLDER / f"{options.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _make(folder: Path) -> Path:
    """Another of the same second gets a number."""
    for number in range(1, 1000):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"job.dump_folder: {error}") from None
    raise UserError(f"there are 999 jobs as {folder}")


def render(folder: Path, options: SlurmOptions) -> str:
    """The batch script of a job: the template with its settings. UserError if a secret would stand in it."""
    text = (checkout() / TEMPLATE).read_text()
    asked: dict[str, str | int] = {"job-name": options.name, "nodes": options.nodes, "time": options.time}
    asked |= {"signal": f"B:USR1@{options.save_s}", "output": f"{folder}/logs/batch.log"}
    asked |= {"gpus-per-node": options.ranks_per_node} if options.gpus else {}
    asked |= {name: value for name in ("partition", "account", "qos") if (value := getattr(options, name))}
    more = [
        f'#SBATCH --{key}="{value}"' if " " in str(value) else f"#SBATCH --{key}={value}"
        for key, value in asked.items()
    ]
    more += [f"#SBATCH {option if option.startswith('-') else '--' + option}" for option in options.sbatch]
    more += [] if options.requeue else ["#SBATCH --no-requeue"]
    kept = [
        line
        for line in text.splitlines()
        if not _is_replaced(line, [*asked, *([] if options.requeue else ["requeue"])])
    ]
    at = max(i for i, line in enumerate(kept) if line.startswith("#SBATCH")) + 1
    script = "\n".join([*kept[:at], *more, *kept[at:]]) + "\n"
    prolog = Path(options.prolog).absolute() if options.prolog else ""
    values: dict[str, Any] = {
        "CONFIG": folder / "config.toml", "JOB": folder, "CODE": folder / "code", "PYTHON": options.python,
        "RANKS_PER_NODE": options.ranks_per_node, "MODULES": options.modules, "PROLOG": prolog,
        "CONTAINER": options.container, "SRUN_ARGS": options.srun_args, "INTERFACE": options.interface,
        "PREFLIGHT": int(options.preflight), "REQUEUE": int(options.requeue), "RETRIES": options.retries,
        "SAVE_S": options.save_s,
    }  # fmt: skip
    for name, value in values.items():
        line = re.search(rf"^{name}=.*$", script, re.MULTILINE)
        assert line, f"{TEMPLATE} has no setting {name}"
        script = f"{script[: line.start()]}{name}={shlex.quote(str(value))}{script[line.end() :]}"
    if what := find_secret(script):
        raise UserError(
            f"the batch script would hold {what}, and Slurm shows scripts to others: put it into a variable of the "
            "environment, which the job is given too"
        )
    return script


def _is_replaced(line: str, keys: Sequence[str]) -> bool:
    return any(re.match(rf"#SBATCH --{key}(=|$)", line) for key in keys)


def time_limit_s(text: str) -> float:
    """Seconds of a time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = _TIME.fullmatch(text)
    if not found:
        raise UserError(f"--time {text!r}; expected one of MINUTES, H:M:S, D-H, D-H:M, D-H:M:S (24:00:00, 2-12)")
    a, b, c = (int(found[name] or 0) for name in "abc")
    if found["days"] is not None:
        return int(found["days"]) * 86400 + a * 3600 + b * 60 + c
    if found["c"] is not None:
        return a * 3600 + b * 60 + c
    return a * 60 + b


def states() -> dict[str, tuple[str, str]]:
    """Job number -> (Slurm's state, its reason) of this user's jobs in the queue; empty where there is no Slurm."""
    lines = _slurm("squeue", "--me", "--noheader", "--states=all", "-o", "%i|%T|%r")
    rows = [line.split("|") for line in lines]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def _slurm(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
