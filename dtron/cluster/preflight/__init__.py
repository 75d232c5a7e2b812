"""The command `dtron preflight`: can these machines train, and is one of them slow? Imports torch when it runs.

facts.py    versions that must match on all ranks     guard.py    stages with time limits
measure.py  rates, collectives, links                 machine.py  clocks, disks
stages.py   the stages, in their order                report.py   tables and warnings
"""

import argparse
import os
from typing import NoReturn

__all__ = ["add_arguments", "run"]

TIMEOUT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `dtron preflight`; it calls `run`."""
    parser.description = (
        "Measure machines and the network between them, as a layout uses them. Start it with torchrun on the machines "
        "of the training: torchrun ... -m dtron preflight [...]; without torchrun it runs as one rank. Accepts every "
        "key of train.py, such as --tp 2."
    )
    parser.epilog = (
        "Exit codes: 0 if these ranks can train, 2 if they cannot, 3 with --strict and warnings. torchrun turns 2 and "
        "3 into 1; the JSON written to --out has exit_code."
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="a run's TOML file, checked as train.py checks it (default: only the degrees)")
    add("--out", default="preflight.json", metavar="FILE", help="JSON file for the figures (default: %(default)s)")
    add("--disk", metavar="DIR", help="folder whose write speed is measured (default: job.dump_folder)")
    add("--strict", action="store_true", help="exit with 3 if there are warnings, such as a slow rank")
    limit = "time limit of each check in seconds; then the ranks it waits for are reported (default: %(default)g)"
    add("--timeout", type=_seconds, default=TIMEOUT_S, metavar="S", help=limit)
    parser.set_defaults(run=run, takes_keys=True)


def _seconds(text: str) -> float:
    if not 1 <= (seconds := float(text)) <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 3600 seconds")
    return seconds


def run(given: argparse.Namespace) -> NoReturn:
    """Run preflight; exits the process."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from dtron.cluster.preflight.stages import main

    main(given)
