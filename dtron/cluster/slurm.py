"""Slurm jobs: a configuration and options become a folder with everything that runs, a batch script and a job.

outputs/slurm/NAME-DATE/   job.sbatch, config.toml (resolved), code/, git.json, git.diff, environment.json
                           job.json: the job ID, and how it was submitted
                           control/: dtron/ranks/control.py; logs/: one per node and attempt; events.jsonl
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

from dtron.cluster.record import record_code, source_root
from dtron.cluster.secrets import find_secret
from dtron.config import Config, read, to_toml
from dtron.errors import UserError
from dtron.train.folder import saves
from dtron.train.resolve import resolve

__all__ = [
    "FOLDER",
    "SlurmJob",
    "SlurmOptions",
    "add_options",
    "prepare",
    "queue_states",
    "render",
    "submit",
    "time_limit_s",
]

FOLDER = "slurm"  # in job.dump_folder
TEMPLATE = Path("scripts/slurm/train.sbatch")  # in the checkout
MIN_TRAINING_S = 60  # that a job must have for training before it is requested to save
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class SlurmOptions:
    """What a job requests of the cluster. Empty values mean the template's or the cluster's default.

    gpus: False for ranks on CPUs. time: in one of sbatch's formats. save_s: seconds before the time limit at which to
    save. sbatch: further options, such as --mem=0. requeue: False ends the job where it would requeue itself. python:
    the interpreter on the nodes. prolog: a file to source there. container: command prefix that runs a command in it.
    interface: the network interface.
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
    """A submitted job."""

    folder: Path
    job_id: str

    @property
    def control(self) -> Path:
        """The run's control folder."""
        return self.folder / "control"


OPTION_HELP = {  # field of SlurmOptions -> help of its command-line option
    "nodes": "number of nodes",
    "ranks_per_node": "ranks, and GPUs, per node",
    "name": "name of the job and of its folder",
    "time": "time limit; the job requeues itself before it and resumes",
    "partition": "partition",
    "account": "account",
    "qos": "quality of service",
    "save_s": "seconds before the time limit at which the run saves",
    "retries": "consecutive retries from one checkpoint before the job fails",
    "python": "Python interpreter on the nodes",
    "modules": "arguments of module load",
    "prolog": "file that the batch script sources first",
    "container": "command that runs another in a container: 'apptainer exec --nv image.sif'",
    "srun_args": "options for every srun: '--container-image=image.sqsh'",
    "interface": "network interface of NCCL and gloo",
}


def add_options(
    parser: "argparse._ActionsContainer", names: Sequence[str] = tuple(OPTION_HELP), *, defaults: bool = True
) -> None:
    """Add options for fields of SlurmOptions to a parser or group; without defaults, options not given are None."""
    for option in fields(SlurmOptions):
        if option.name in names:
            default: Any = option.default if defaults else None
            text = OPTION_HELP[option.name] + (f" (default: {default})" if default else "")
            kind = type(option.default)
            flag = f"--{option.name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, default=default, metavar="X", help=text)


def submit(argv: list[str], options: SlurmOptions, log: Callable[[str], None]) -> SlurmJob:
    """Submit a training, given as train.py's command line. UserError for mistakes, before anything is submitted.

    The job gets its own folder with copies of the code and the resolved configuration, so changes to the checkout while
    it is queued do not affect it. It runs in the current folder, to which relative paths refer.
    """
    config, folder = prepare(argv, options)
    for note in read(argv).notes:  # the job reads the resolved configuration, which has none
        log(note)
    folder = _make_folder(folder)
    try:
        job = _submit(folder, config, options, log)
    except UserError:
        shutil.rmtree(folder)  # there is no job; after an interrupt there might be one
        raise
    about = {"job_id": job.job_id, "unix_s": time.time(), "command": argv, "cwd": str(Path.cwd())}
    about |= {"nodes": options.nodes, "ranks_per_node": options.ranks_per_node, "steps": config.training.steps}
    (folder / "job.json").write_text(json.dumps(about, indent=1) + "\n")
    return job


def _submit(folder: Path, config: Config, options: SlurmOptions, log: Callable[[str], None]) -> SlurmJob:
    record_code(folder, source_root(), log)
    (folder / "config.toml").write_text(to_toml(config))
    script = folder / "job.sbatch"
    script.write_text(render(folder, options))
    (folder / "logs").mkdir()  # Slurm writes its log here before the job starts
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not installed here; submit from a machine with Slurm's commands") from None
    if done.returncode:
        raise UserError(f"sbatch rejected the job: {done.stderr.strip()}")
    return SlurmJob(folder, done.stdout.strip().split(";")[0])  # the cluster's name may follow


def prepare(argv: list[str], options: SlurmOptions) -> tuple[Config, Path]:
    """The checked configuration of a job, and the path of its folder. UserError for mistakes."""
    for name, least in (("nodes", 1), ("ranks_per_node", 1), ("save_s", 1), ("retries", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected {least} or more")
    if options.prolog and not Path(options.prolog).is_file():
        raise UserError(f"--prolog: there is no file {options.prolog}")
    if time_limit_s(options.time) < options.save_s + MIN_TRAINING_S:
        raise UserError(
            f"--time {options.time} leaves less than {MIN_TRAINING_S} s for training before the {options.save_s} s for "
            "saving (--save-s); raise --time or lower --save-s"
        )
    if not re.fullmatch(r"[\w.+-]+", options.name):
        raise UserError(f"--name {options.name!r}; expected letters, digits and . _ + -, as it is also a folder's name")
    for name in ("container", "srun_args"):
        try:
            shlex.split(getattr(options, name))
        except ValueError as error:
            given = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise UserError(f"{given}: {error}; expected words quoted as in a shell") from None
    config, mistakes, _ = read(argv)
    world = options.nodes * options.ranks_per_node
    setup = resolve(config, world, "cuda" if options.gpus else "cpu", mistakes)
    if config.job.control_folder is not None:
        raise UserError("job.control_folder is set by the job: remove it from the configuration")
    if what := find_secret(to_toml(config)):
        raise UserError(
            f"the resolved configuration contains {what}; it is written next to the logs, so put the secret into an "
            "environment variable, which the job gets too"
        )
    device = config.training.device
    if device != "auto" and device != setup.device_type:
        raise UserError(
            f"training.device is {device}, but the job {'requests GPUs' if options.gpus else 'has only CPUs (--cpu)'}"
        )
    if options.requeue and not config.validation.only and not saves(config.checkpoint):
        raise UserError(
            "a job that requeues itself needs checkpoints to resume from: set checkpoint.enable = true (and load_only "
            "false), or add --no-requeue"
        )
    dump = Path(config.job.dump_folder).absolute()
    if "%" in str(dump):
        raise UserError(f"job.dump_folder {dump} contains %, which Slurm expands in the names of logs; choose another")
    return config, dump / FOLDER / f"{options.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _make_folder(folder: Path) -> Path:
    """Create it; a job submitted in the same second gets a number."""
    for number in range(1, 1000):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"job.dump_folder: {error}") from None
    raise UserError(f"{folder} and 998 numbered ones exist; choose another --name")


def render(folder: Path, options: SlurmOptions) -> str:
    """The batch script of a job: the template with its settings. UserError if it would contain a secret."""
    text = (source_root() / TEMPLATE).read_text()
    directives: dict[str, str | int] = {"job-name": options.name, "nodes": options.nodes, "time": options.time}
    directives |= {"signal": f"B:USR1@{options.save_s}", "output": f"{folder}/logs/batch.log"}
    directives |= {"gpus-per-node": options.ranks_per_node} if options.gpus else {}
    directives |= {name: value for name in ("partition", "account", "qos") if (value := getattr(options, name))}
    more = [
        f'#SBATCH --{key}="{value}"' if " " in str(value) else f"#SBATCH --{key}={value}"
        for key, value in directives.items()
    ]
    more += [f"#SBATCH {option if option.startswith('-') else '--' + option}" for option in options.sbatch]
    more += [] if options.requeue else ["#SBATCH --no-requeue"]
    lines = [
        line
        for line in text.splitlines()
        if not _is_replaced(line, [*directives, *([] if options.requeue else ["requeue"])])
    ]
    at = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) + 1
    script = "\n".join([*lines[:at], *more, *lines[at:]]) + "\n"
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
            f"the batch script would contain {what}, and Slurm shows scripts to other users: put the secret into an "
            "environment variable, which the job gets too"
        )
    return script


def _is_replaced(line: str, keys: Sequence[str]) -> bool:
    return any(re.match(rf"#SBATCH --{key}(=|$)", line) for key in keys)


def time_limit_s(text: str) -> float:
    """Seconds of a time limit in sbatch's formats: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED."""
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


def queue_states() -> dict[str, tuple[str, str]]:
    """Job ID -> (Slurm's state, reason) of this user's jobs in the queue; empty without Slurm."""
    lines = _run_slurm("squeue", "--me", "--noheader", "--states=all", "-o", "%i|%T|%r")
    rows = [line.split("|") for line in lines]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def _run_slurm(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
