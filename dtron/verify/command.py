"""The command `dtron verify`: a proof of a layout against a single process, on CPU ranks. Imports torch when run."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `dtron verify`."""
    parser.description = (
        "Train a small copy of a run's model for a few steps twice, in its layout on CPU ranks and as a plain loop in "
        "one process, and compare loss, gradient norm and every parameter. Keys of train.py, such as --tp 2, are "
        "taken. The exit code is 0 where all are equal, else 1."
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the run's TOML file")
    text = "GPUs of the run (default: the fewest that its degrees need, with dp_shard 2 where that is open)"
    add("--gpus", type=int, metavar="N", help=text)
    text = "degrees are lowered until no more ranks than this are needed (default: %(default)s)"
    add("--ranks", type=int, default=16, metavar="N", help=text)
    add("--steps", type=int, default=3, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--full", action="store_true", help="take model, layout and batch as they are")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, takes_keys=True)


def run(given: argparse.Namespace) -> int:
    """Run the command; returns the exit code. UserError for what cannot be proved."""
    from dtron.verify.report import main  # imports torch

    return main(given, given.keys)
