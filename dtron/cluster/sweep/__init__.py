"""`scripts/sweep.py SWEEP.toml`: run a list of layouts, batch sizes, recompute modes or models, and report the best.

Every point is a normal run of train.py in its own folder. Running the same command again resumes the sweep.

file.py    SWEEP.toml                                results.py  rows, a CSV, a table, the recommended layout
points.py  what a point is, and whether it can run   picture.py  speed and memory of all points
runner.py  runs the points, records how each ended   local.py, slurm.py  where points run
"""

import argparse
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

from dtron.cluster.slurm import add_options
from dtron.cluster.sweep.file import SweepFile, read_sweep
from dtron.cluster.sweep.local import LocalRunner
from dtron.cluster.sweep.picture import check_matplotlib, draw
from dtron.cluster.sweep.points import Point, check_machine, make_points
from dtron.cluster.sweep.results import (
    Row,
    advice,
    common_settings,
    format_table,
    label,
    loss_notes,
    rank_points,
    write_csv,
)
from dtron.cluster.sweep.runner import ENDED, Record, Runner, Sweep
from dtron.cluster.sweep.slurm import SlurmRunner, slurm_options
from dtron.errors import UserError
from dtron.observe.console import human_bytes, human_count, human_seconds
from dtron.train.folder import lock_run_folder

__all__ = ["main"]

MAX_JOBS = 4  # default of --at-once
SUBMIT_OPTIONS = (
    "time",
    "partition",
    "account",
    "qos",
    "python",
    "modules",
    "prolog",
    "container",
    "srun_args",
    "interface",
)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if at least one point is done, 1 if none is or for a user's mistake, 130 when interrupted."""
    given = _parser().parse_args(argv)
    try:
        return _sweep(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run the same command again to resume", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run every point of SWEEP.toml and report the best. Running the same command again resumes."
    )
    add = parser.add_argument
    add("sweep", metavar="SWEEP.toml", type=Path, help="defines the points")
    add("--out", metavar="DIR", type=Path, help="folder of the sweep (default: outputs/sweeps/NAME of NAME.toml)")
    add("--dry-run", action="store_true", help="list the points, and why some cannot run; run nothing")
    add("--retry", metavar="STATES", default="", help=f"rerun points in these states: {','.join(ENDED)}")
    add("--no-picture", action="store_true", help="draw no picture, for which matplotlib is needed")
    slurm = parser.add_argument_group("with Slurm", "see also scripts/slurm/submit.py --help")
    add = slurm.add_argument
    add("--slurm", action="store_true", help="submit each point as a job and monitor them")
    add("--nodes", type=int, metavar="N", help="nodes per point")
    add("--at-once", type=int, metavar="N", help=f"jobs in the queue at a time (default: {MAX_JOBS})")
    add("--cpu", dest="gpus", action="store_const", const=False, help="request no GPUs")
    add("--sbatch", action="append", metavar="OPTION", help="another sbatch option, such as --sbatch=--mem=0")
    add_options(slurm, SUBMIT_OPTIONS, defaults=False)
    return parser


def _sweep(given: argparse.Namespace) -> int:
    retry = _retry_states(given.retry)
    options = _slurm_options(given)
    file = read_sweep(given.sweep, given.nodes)
    if file.nodes > 1 and not given.slurm:
        raise UserError(
            f"{file.path}: nodes = {file.nodes}, but a local sweep has one machine; set nodes = 1, or add --slurm"
        )
    points = make_points(file, _device_type(given, file))
    if given.dry_run:
        return _list_points(points)
    _check_any_can_run(file, points)
    if not given.slurm:
        check_machine(points, file.ranks)
    if not given.no_picture:
        check_matplotlib()
    runner: Runner = LocalRunner(file.ranks)
    if given.slurm:
        cluster = slurm_options(options, file.nodes, file.ranks_per_node, file.limit_s)
        runner = SlurmRunner(cluster, given.at_once or MAX_JOBS)
    out = given.out or Path("outputs/sweeps") / file.path.stem
    with _lock_sweep_folder(out):
        return _run(file, points, out, runner, retry, picture=not given.no_picture)


def _run(file: SweepFile, points: list[Point], out: Path, runner: Runner, retry: tuple[str, ...], picture: bool) -> int:
    progress = _Progress(points)
    sweep = Sweep(points, out, runner, file.limit_s, retry, progress.update)
    progress.begin(sweep)
    _interrupt_on_signals(
        "the jobs continue" if runner.outlives_sweep else "stopping the running point, which can take half a minute"
    )
    try:
        sweep.run()
    finally:
        progress.end()
        rows = rank_points(points, sweep.records)
        _write_results(file, rows, out, picture)
    return 0 if any(row.done for row in rows) else 1


def _slurm_options(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of SlurmOptions given on the command line. UserError for options without effect."""
    names = ("gpus", "sbatch", *SUBMIT_OPTIONS)
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if not given.slurm and (useless := [*options, *(n for n in ("nodes", "at_once") if getattr(given, n) is not None)]):
        option = {"gpus": "cpu"}.get(useless[0], useless[0]).replace("_", "-")
        raise UserError(f"--{option} has no effect without --slurm")
    for name in ("nodes", "at_once"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)}: expected 1 or more")
    return options


def _device_type(given: argparse.Namespace, file: SweepFile) -> Literal["cpu", "cuda"] | None:
    """Device of the machines that run the points; None: this machine's. UserError if the jobs would have another."""
    device = file.fixed.get("training.device", "auto")
    if not given.slurm:  # a GPU sweep can be listed on a machine without GPUs
        return "cuda" if given.dry_run and device == "cuda" else None
    gpus = given.gpus is None
    if device == ("cpu" if gpus else "cuda"):
        jobs = "request GPUs: add --cpu" if gpus else "have only CPUs: remove --cpu"
        raise UserError(f"{file.path}: training.device is {device}, but the jobs {jobs}")
    return "cuda" if gpus else "cpu"


def _list_points(points: list[Point]) -> int:
    """List the points, those that would not run with the reason."""
    rows = rank_points(points, {p.name: Record("pruned", p.pruned) if p.pruned else Record() for p in points})
    print(format_table(rows))
    print(f"{len(points)} points, {sum(bool(p.pruned) for p in points)} of them pruned; nothing was run")
    return 0


def _retry_states(text: str) -> tuple[str, ...]:
    states = tuple(filter(None, text.split(",")))
    if unknown := [state for state in states if state not in ENDED]:
        raise UserError(f"--retry {text}: unknown state {unknown[0]!r}; expected any of {','.join(ENDED)}")
    return states


def _check_any_can_run(file: SweepFile, points: list[Point]) -> None:
    if all(point.pruned for point in points):
        more = f" (and {len(points) - 1} more; --dry-run lists them)" if len(points) > 1 else ""
        raise UserError(
            f"{file.path}: no point can run with {file.ranks} ranks: {points[0].name}: {points[0].pruned}{more}"
        )


def _lock_sweep_folder(out: Path) -> TextIO:
    """Lock the folder against other sweeps while the file is open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return lock_run_folder(out)
    except UserError:
        raise UserError(
            f"another sweep is running in {out}; wait for it, stop it, or choose another folder with --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot use {out} as the sweep's folder: {error}; choose another with --out") from None


def _interrupt_on_signals(message: str) -> None:
    """SIGINT, SIGTERM and SIGHUP stop the sweep cleanly; further signals are ignored while it stops."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        print(f"\ninterrupted: {message}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


class _Progress:
    """One line per finished point; on a terminal, also the progress of running ones."""

    def __init__(self, points: list[Point]) -> None:
        self._rows = {point.name: Row(point, Record()) for point in points}
        self._numbers = {point.name: number for number, point in enumerate(points, 1)}
        self._live = sys.stdout.isatty()
        self._running: dict[str, str] = {}

    def begin(self, sweep: Sweep) -> None:
        """Print what there is to do."""
        states = [record.state for record in sweep.records.values()]
        ended = sum(state in ENDED for state in states)
        kept = f", {ended} already ended" if ended else ""
        print(f"{len(states)} points: {states.count('pruned')} pruned{kept}, {sweep.left} to run", flush=True)

    def update(self, point: Point, record: Record) -> None:
        which = f"{self._numbers[point.name]} of {len(self._rows)}: {self._label(point)}"
        if record.state in ("running", "queued"):
            step = f"step {record.step or 0}/{point.config.training.steps}"
            self._running[point.name] = f"{which}: {step if record.state == 'running' else 'queued'}"
            self._show("; ".join(self._running.values()))
            return
        self._running.pop(point.name, None)
        self.end()
        print(f"point {which}: {_describe_end(record)}", flush=True)

    def end(self) -> None:
        """Clear the live line."""
        self._show("")

    def _show(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def _label(self, point: Point) -> str:
        return label(self._rows[point.name], list(self._rows.values()))


def _describe_end(record: Record) -> str:
    """How a point ended, as one line."""
    if record.state != "done":
        return f"{record.state}: {record.reason}"
    parts = [human_count(record.tokens_per_s or 0) + " tokens/s"]
    parts += [f"MFU {record.mfu:.1%}"] if record.mfu is not None else []
    parts += [f"step {record.step_s:.3g} s"] if record.step_s is not None else []
    parts += [human_bytes(record.max_memory_bytes)] if record.max_memory_bytes is not None else []
    took = (record.ended_unix_s or 0) - (record.began_unix_s or 0)
    return f"done in {human_seconds(took)}: {', '.join(parts)}"


def _write_results(file: SweepFile, rows: list[Row], out: Path, picture: bool) -> None:
    """Write the CSV and the picture to the sweep's folder; print the table and the recommendation."""
    write_csv(out / "results.csv", rows)
    files = [out / "results.csv"]
    if picture:
        models = ", ".join(dict.fromkeys(row.point.model for row in rows))
        drawn = [out / "results.svg", out / "results.png"]
        draw(rows, f"{file.path.stem}: {models} on {file.ranks} ranks", common_settings(rows), drawn)
        files += drawn
    print(format_table(rows))
    for line in [*loss_notes(rows), *advice(rows)]:
        print(line)
    print(f"results in {', '.join(map(str, files))}", flush=True)
