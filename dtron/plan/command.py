"""The command `dtron plan`: the fastest layouts of a model on GPUs that need not be there. Imports torch when run."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `dtron plan`."""
    parser.description = (
        "Rank every layout of a run's model on a number of GPUs by its predicted speed, record the memory of the "
        "fastest by dry runs, and say why others do not fit. Keys of train.py, such as --tp 8, are kept as given; with "
        "all of them, one layout is predicted."
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the run's TOML file")
    add("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    text = "a100-40gb, a100, h100 (default), h200, b200, or a JSON file: of dtron preflight, or with figures"
    add("--hardware", default="h100", metavar="H", help=text)
    text = "tokens in an optimizer step (default: training.global_batch_size of CONFIG)"
    add("--global-batch-tokens", type=int, metavar="T", help=text)
    add("--top", type=int, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    add("--exact", type=int, default=3, metavar="N", help="of the fastest, record so many (default: %(default)s)")
    add("--out", metavar="FILE", help="write the fastest as a TOML file based on CONFIG, for train.py")
    add(
        "--picture", metavar="FOLDER", help="draw time.png, speed.png, steps.png and memory.png there; needs matplotlib"
    )
    add("--measured", metavar="FILE", help="metrics.jsonl of a run of CONFIG as it is: print it beside the prediction")
    add(
        "--as-configured",
        action="store_true",
        help="predict CONFIG's own layout alone, batch and recompute as they are",
    )
    add("--json", action="store_true", help="print JSON")
    add("--explain", action="store_true", help="show the arithmetic of the fastest")
    parser.set_defaults(run=run, takes_keys=True)


def run(given: argparse.Namespace) -> None:
    """Run the command. UserError for what cannot be planned."""
    from dtron.plan.report import main  # imports torch

    main(given, given.keys)
