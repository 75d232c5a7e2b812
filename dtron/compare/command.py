"""The command `dtron compare`: runs of dtron, torchtitan and picotron side by side."""

import argparse
import json
import math
from pathlib import Path

from dtron.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `dtron compare`."""
    parser.description = (
        "Compare runs with the first one: loss, gradient norm, throughput, memory and goodput, from which step they "
        "part, and in which keys, versions and commits they differ."
    )
    parser.epilog = (
        "Exit code: 0; 1 if --rtol is given and loss or gradient norm of a run differ from the first run's by more "
        "than that at a common step, or if a run cannot be read."
    )
    add = parser.add_argument
    text = "run folder of dtron (outputs/NAME), or a log file of torchtitan or picotron"
    add("runs", nargs="+", metavar="RUN", help=text)
    text = "exit with 1 where loss or gradient norm at a common step differ by more than X times the first run's value"
    add("--rtol", type=_tolerance, metavar="X", help=text)
    add("--picture", type=Path, metavar="FILE", help="draw the curves to a .png or .svg file; needs matplotlib")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0, such as 1e-3")
    return number


def run(given: argparse.Namespace) -> None:
    """Run the command. UserError for what cannot be read, and where runs differ by more than --rtol."""
    from dtron.compare.picture import check_picture, draw_runs  # with the others, imports torch
    from dtron.compare.report import as_dict, as_text, common_steps, part
    from dtron.compare.runs import name_runs, read_run

    if len(given.runs) < 2:
        raise UserError(f"one run was given, {given.runs[0]}: name two or more to compare")
    if given.picture:
        check_picture(given.picture)
    runs = [read_run(Path(path)) for path in given.runs]
    name_runs(runs)
    common_steps(runs)
    partings = [part(runs[0], other, given.rtol) for other in runs[1:]]
    if given.json:
        print(json.dumps(as_dict(runs, partings, given.rtol), indent=1))
    else:
        print(as_text(runs, partings, given.rtol))
    if given.picture:
        draw_runs(runs, [parting.step for parting in partings], given.picture)
    beyond = [other.name for other, parting in zip(runs[1:], partings, strict=True) if parting.step is not None]
    if given.rtol is not None and beyond:
        raise UserError(f"beyond --rtol {given.rtol:g} of {runs[0].name}: {', '.join(beyond)}")
