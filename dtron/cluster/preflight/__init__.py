"""The command `dtron preflight`: can these machines train, and is one of them slow? Imports torch when it runs.

facts.py    what has to be equal on all ranks         guard.py    stages with time limits
measure.py  rates, collectives, links                 machine.py  clocks, disks
stages.py   the order of it all                       report.py   what is made of the figures
"""

import argparse
import os
from typing import NoReturn

__all__ = ["add_arguments", "run"]

TIMEOUT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dtron preflight`, with `run` as what it does with it."""
    parser.description = (
        "Measure machines and the network between them, as a layout uses them. Started by torchrun, on the machines of "
        "the training: torchrun ... -m dtron preflight [...]; alone it is one rank. Every key of train.py may be "
        "given, such as --tp 2."
    )
    parser.epilog = (
        "Ends with 0 when these ranks can train, 2 when they cannot, 3 with --strict and warnings; torchrun makes 1 of "
        "2 and 3, and the file of --out holds exit_code."
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="a run's TOML file, checked as train.py does (default: the degrees alone)")
    add("--out", default="preflight.json", metavar="FILE", help="for the figures (default: %(default)s)")
    add("--disk", metavar="DIR", help="folder to write to (default: job.dump_folder)")
    add("--strict", action="store_true", help="end with 3 where there are warnings, such as a slow rank")
    limit = "longest time of any one check, after which it says which ranks it waits for (default: %(default)g)"
    add("--timeout", type=_seconds, default=TIMEOUT_S, metavar="S", help=limit)
    parser.set_defaults(run=run, takes_keys=True)


def _seconds(text: str) -> float:
    if not 1 <= (seconds := float(text)) <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 3600 seconds")
    return seconds


def run(given: argparse.Namespace) -> NoReturn:
    """What `add_arguments` describes; ends the process."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from dtron.cluster.preflight.stages import main

    main(given)
