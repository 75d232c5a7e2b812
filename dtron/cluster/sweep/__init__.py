"""`scripts/sweep.py SWEEP.toml`: run a list of layouts, batch sizes, recompute modes, models, and say which is best.

Every point is a normal run of train.py in a folder of its own. The same command again goes on where it ended.

file.py    SWEEP.toml                                results.py  rows, a CSV, a table, which layout to take
points.py  what a point is, and whether it can work  picture.py  speed and memory of all points
runner.py  run what is left, say how each ended      local.py, slurm.py  where points run
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
from dtron.cluster.sweep.results import Row, advice, as_table, in_common, label, loss_notes, make_rows, write_csv
from dtron.cluster.sweep.runner import ENDED, Record, Runner, Sweep
from dtron.cluster.sweep.slurm import SlurmRunner, slurm_options
from dtron.errors import UserError
from dtron.observe.console import human_bytes, human_count, human_seconds
from dtron.train.folder import lock_run_folder

__all__ = ["main"]

AT_ONCE = 4  # jobs of one sweep
OF_SUBMIT = (
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
    """Exit code: 0 when every point has ended and one of them is done, 1 for a user's mistake or none done, 130."""
    given = _parser().parse_args(argv)
    try:
        return _sweep(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run every point of SWEEP.toml and say which is best. The same command again goes on."
    )
    add = parser.add_argument
    add("sweep", metavar="SWEEP.toml", type=Path, help="which points there are")
    add("--out", metavar="DIR", type=Path, help="folder of the sweep (default: outputs/sweeps/NAME of NAME.toml)")
    add("--dry-run", action="store_true", help="list the points, those that cannot work with the reason, and end")
    add("--retry", metavar="STATES", default="", help=f"run points that ended so again, of {','.join(ENDED)}")
    add("--no-picture", action="store_true", help="make no picture, which needs matplotlib")
    slurm = parser.add_argument_group(
        "with Slurm", "options of scripts/slurm/submit.py, whose --help says what they are"
    )
    add = slurm.add_argument
    add("--slurm", action="store_true", help="submit each point as a job, and follow them")
    add("--nodes", type=int, metavar="N", help="nodes of a point")
    add("--at-once", type=int, metavar="N", help=f"jobs in the queue at the same time (default: {AT_ONCE})")
    add("--cpu", dest="gpus", action="store_const", const=False, help="ask for no GPUs")
    add("--sbatch", action="append", metavar="OPTION", help="one more of sbatch's, as --sbatch=--mem=0")
    add_options(slurm, OF_SUBMIT, defaults=False)
    return parser


def _sweep(given: argparse.Namespace) -> int:
    retry = _states(given.retry)
    options = _slurm_options(given)
    file = read_sweep(given.sweep, given.nodes)
    if file.nodes > 1 and not given.slurm:
        raise UserError(f"{file.path}: nodes = {file.nodes}, but this is one machine; set nodes = 1, or add --slurm")
    points = make_points(file, _device_type(given, file))
    if given.dry_run:
        return _show(points)
    _check_any(file, points)
    if not given.slurm:
        check_machine(points, file.ranks)
    if not given.no_picture:
        check_matplotlib()
    runner: Runner = LocalRunner(file.ranks)
    if given.slurm:
        cluster = slurm_options(options, file.nodes, file.ranks_per_node, file.limit_s)
        runner = SlurmRunner(cluster, given.at_once or AT_ONCE)
    out = given.out or Path("outputs/sweeps") / file.path.stem
    with _held(out):
        return _run(file, points, out, runner, retry, picture=not given.no_picture)


def _run(file: SweepFile, points: list[Point], out: Path, runner: Runner, retry: tuple[str, ...], picture: bool) -> int:
    progress = _Progress(points)
    sweep = Sweep(points, out, runner, file.limit_s, retry, progress.told)
    progress.begin(sweep)
    _stop_on_signals(
        "the jobs go on" if runner.goes_on else "stopping the point that runs, which can take half a minute"
    )
    try:
        sweep.run()
    finally:
        progress.end()
        rows = make_rows(points, sweep.records)
        _results(file, rows, out, picture)
    return 0 if any(row.done for row in rows) else 1


def _slurm_options(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of SlurmOptions that the command line gives. UserError for what has no effect."""
    names = ("gpus", "sbatch", *OF_SUBMIT)
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if not given.slurm and (useless := [*options, *(n for n in ("nodes", "at_once") if getattr(given, n) is not None)]):
        option = {"gpus": "cpu"}.get(useless[0], useless[0]).replace("_", "-")
        raise UserError(f"--{option} has no effect without --slurm")
    for name in ("nodes", "at_once"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)}: expected 1 or more")
    return options


def _device_type(given: argparse.Namespace, file: SweepFile) -> Literal["cpu", "cuda"] | None:
    """Of the machines that run the points; None: this one. UserError where a job would be given another."""
    asked = file.fixed.get("training.device", "auto")
    if not given.slurm:  # what a sweep for GPUs will do can be read on a machine without one
        return "cuda" if given.dry_run and asked == "cuda" else None
    gpus = given.gpus is None
    if asked == ("cpu" if gpus else "cuda"):
        jobs = "ask for GPUs: add --cpu" if gpus else "have CPUs only: leave --cpu out"
        raise UserError(f"{file.path}: training.device is {asked}, but the jobs {jobs}")
    return "cuda" if gpus else "cpu"


def _show(points: list[Point]) -> int:
    """What would be run, and what would not and why."""
    rows = make_rows(points, {p.name: Record("pruned", p.pruned) if p.pruned else Record() for p in points})
    print(as_table(rows))
    print(f"{len(points)} points, {sum(bool(p.pruned) for p in points)} of them pruned; nothing was run")
    return 0


def _states(text: str) -> tuple[str, ...]:
    states = tuple(filter(None, text.split(",")))
    if unknown := [state for state in states if state not in ENDED]:
        raise UserError(f"--retry {text}: {unknown[0]!r} is no end of a point; expected any of {','.join(ENDED)}")
    return states


def _check_any(file: SweepFile, points: list[Point]) -> None:
    if all(point.pruned for point in points):
        more = f" (and {len(points) - 1} more; --dry-run lists them)" if len(points) > 1 else ""
        raise UserError(
            f"{file.path}: none of its points can work with {file.ranks} ranks: {points[0].name}: "
            f"{points[0].pruned}{more}"
        )


def _held(out: Path) -> TextIO:
    """Keep other sweeps out of the folder while the file is open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return lock_run_folder(out)
    except UserError:
        raise UserError(
            f"another sweep is going on in {out}; wait for it, stop it, or give this one another folder by --out"
        ) from None
    except OSError as error:
        raise UserError(f"no sweep can be kept in {out}: {error}; name another folder by --out") from None


def _stop_on_signals(told: str) -> None:
    """SIGTERM and SIGHUP, as SIGINT, end the sweep in good order; a second one is not heard while that goes on."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        print(f"\ninterrupted: {told}", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


class _Progress:
    """A line for the end of every point; on a terminal, between them, where those are that go on."""

    def __init__(self, points: list[Point]) -> None:
        self._rows = {point.name: Row(point, Record()) for point in points}
        self._numbers = {point.name: number for number, point in enumerate(points, 1)}
        self._live = sys.stdout.isatty()
        self._going: dict[str, str] = {}

    def begin(self, sweep: Sweep) -> None:
        """Say what is to be done."""
        states = [record.state for record in sweep.records.values()]
        ended = sum(state in ENDED for state in states)
        kept = f", {ended} ended before" if ended else ""
        print(f"{len(states)} points: {states.count('pruned')} pruned{kept}, {sweep.left} to run", flush=True)

    def told(self, point: Point, record: Record) -> None:
        which = f"{self._numbers[point.name]} of {len(self._rows)}: {self._label(point)}"
        if record.state in ("running", "queued"):
            step = f"step {record.step or 0}/{point.config.training.steps}"
            self._going[point.name] = f"{which}: {step if record.state == 'running' else 'queued'}"
            self._show("; ".join(self._going.values()))
            return
        self._going.pop(point.name, None)
        self.end()
        print(f"point {which}: {_outcome(record)}", flush=True)

    def end(self) -> None:
        """Clear the live line."""
        self._show("")

    def _show(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def _label(self, point: Point) -> str:
        return label(self._rows[point.name], list(self._rows.values()))


def _outcome(record: Record) -> str:
    """How a point ended, in one line."""
    if record.state != "done":
        return f"{record.state}: {record.reason}"
    parts = [human_count(record.tokens_per_s or 0) + " tokens/s"]
    parts += [f"MFU {record.mfu:.1%}"] if record.mfu is not None else []
    parts += [f"step {record.step_s:.3g} s"] if record.step_s is not None else []
    parts += [human_bytes(record.max_memory_bytes)] if record.max_memory_bytes is not None else []
    took = (record.ended_unix_s or 0) - (record.began_unix_s or 0)
    return f"done in {human_seconds(took)}: {', '.join(parts)}"


def _results(file: SweepFile, rows: list[Row], out: Path, picture: bool) -> None:
    """The CSV and the picture in the sweep's folder; the table and what to take on the terminal."""
    write_csv(out / "results.csv", rows)
    files = [out / "results.csv"]
    if picture:
        models = ", ".join(dict.fromkeys(row.point.model for row in rows))
        drawn = [out / "results.svg", out / "results.png"]
        draw(rows, f"{file.path.stem}: {models} on {file.ranks} ranks", in_common(rows), drawn)
        files += drawn
    print(as_table(rows))
    for line in [*loss_notes(rows), *advice(rows)]:
        print(line)
    print(f"results in {', '.join(map(str, files))}", flush=True)
