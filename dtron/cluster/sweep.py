"""`scripts/sweep.py SWEEP.toml`: run a list of layouts, batch sizes, recompute modes, models, and say which is best.

Every point is a normal run of train.py in a folder of its own. The same command again goes on where it ended.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TextIO

from dtron.cluster.sweep_file import SweepFile, read_sweep
from dtron.cluster.sweep_local import LocalRunner
from dtron.cluster.sweep_picture import check_matplotlib, draw
from dtron.cluster.sweep_points import Point, check_machine, make_points
from dtron.cluster.sweep_results import Row, advice, as_table, in_common, label, loss_notes, make_rows, write_csv
from dtron.cluster.sweep_run import ENDED, Record, Sweep
from dtron.errors import UserError
from dtron.observe.console import human_bytes, human_count, human_seconds
from dtron.train.folder import hold

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when every point has ended and one of them is done, 1 for a user's mistake or none done, 130."""
    given = _parser().parse_args(argv)
    try:
        return _sweep(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the points that have ended", file=sys.stderr)
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
    return parser


def _sweep(given: argparse.Namespace) -> int:
    retry = _states(given.retry)
    file = read_sweep(given.sweep)
    if file.nodes > 1:
        raise UserError(f"{file.path}: nodes = {file.nodes}, but this is one machine; set nodes = 1")
    # What a sweep for GPUs will do can be read on a machine without one.
    elsewhere = given.dry_run and file.fixed.get("training.device") == "cuda"
    points = make_points(file, elsewhere)
    if given.dry_run:
        return _show(points)
    _check_any(file, points)
    check_machine(points, file.ranks)
    if not given.no_picture:
        check_matplotlib()
    out = given.out or Path("outputs/sweeps") / file.path.stem
    with _held(out):
        return _run(file, points, out, retry, picture=not given.no_picture)


def _run(file: SweepFile, points: list[Point], out: Path, retry: tuple[str, ...], picture: bool) -> int:
    progress = _Progress(points)
    sweep = Sweep(points, out, LocalRunner(file.ranks), file.limit_s, retry, progress.told)
    progress.begin(sweep)
    _stop_on_signals()
    try:
        sweep.run()
    finally:
        progress.end()
        rows = make_rows(points, sweep.records)
        _results(file, rows, out, picture)
    return 0 if any(row.done for row in rows) else 1


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
        return hold(out)
    except UserError:
        raise UserError(
            f"another sweep is going on in {out}; wait for it, stop it, or give this one another folder by --out"
        ) from None
    except OSError as error:
        raise UserError(f"no sweep can be kept in {out}: {error}; name another folder by --out") from None


def _stop_on_signals() -> None:
    """SIGTERM, as SIGINT, ends the sweep in good order; the second one is not heard while that goes on."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("\nstopping the point that runs, which can take half a minute", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


class _Progress:
    """A line for the start and the end of every point; on a terminal its step between them."""

    def __init__(self, points: list[Point]) -> None:
        self._rows = {point.name: Row(point, Record()) for point in points}
        self._numbers = {point.name: number for number, point in enumerate(points, 1)}
        self._live = sys.stdout.isatty()
        self._shown = ""

    def begin(self, sweep: Sweep) -> None:
        """Say what is to be done."""
        states = [record.state for record in sweep.records.values()]
        ended = sum(state in ENDED for state in states)
        kept = f", {ended} ended before" if ended else ""
        print(f"{len(states)} points: {states.count('pruned')} pruned{kept}, {sweep.left} to run", flush=True)

    def told(self, point: Point, record: Record) -> None:
        name = f"point {self._numbers[point.name]} of {len(self._rows)}: {self._label(point)}"
        if record.state == "running":
            self._show(f"{name}: step {record.step or 0}/{point.config.training.steps}")
        else:
            self.end()
            print(f"{name}: {_outcome(record)}", flush=True)

    def end(self) -> None:
        """Clear the live line."""
        if self._live and self._shown:
            print("\r\033[K", end="", flush=True)
        self._shown = ""

    def _show(self, text: str) -> None:
        if self._live and text != self._shown:
            print(f"\r\033[K{text}", end="", flush=True)
        self._shown = text

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
