"""The command `dtron explain`: what a layout does, as text, as one HTML page or as JSON. Imports torch when run."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `dtron explain`."""
    parser.description = (
        "Show what a run's layout does, without its GPUs: who talks to whom, where every parameter is, what a block "
        "sends forward and backward, who has which tokens, the pipeline's schedule, memory, all messages of a step. "
        "Keys of train.py, such as --tp 8, change the layout."
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the run's TOML file")
    add("--gpus", type=int, metavar="N", help="number of ranks (default: as few as the degrees allow)")
    add("--rank", type=int, default=0, metavar="R", help="whose step is shown (default: %(default)s)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add("--out", metavar="FILE.html", help="write one HTML page with pictures, which needs no network")
    add("--force", action="store_true", help="replace FILE.html whatever is in it; a page of this command is replaced")
    add("--json", action="store_true", help="print all facts as JSON")
    parser.set_defaults(run=run, takes_keys=True)


def run(given: argparse.Namespace) -> None:
    """Run the command. UserError for what cannot be explained."""
    from dtron.explain.report import main  # imports torch

    main(given, given.keys)
