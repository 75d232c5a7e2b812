"""Submit a training to Slurm; the job resumes automatically until training.steps is reached. See docs/slurm.md.

    python scripts/slurm/submit.py configs/llama3-8b.toml --nodes 4 --time 24:00:00 [--section.key value ...]

Keys of the configuration may be overridden, as on train.py's command line.
"""

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dtron.cluster.slurm import SlurmOptions, add_options, prepare, render, submit  # noqa: E402
from dtron.config import Config, HelpRequested  # noqa: E402
from dtron.errors import UserError, quiet_broken_pipe  # noqa: E402
from dtron.train.resolve import resolve  # noqa: E402


def describe_plan(config: Config, options: SlurmOptions, hardware: str) -> str:
    """Whether the run fits and what it costs, as comments of bash, so that the output stays a script."""
    from dtron.plan.single import describe_run

    try:
        setup = resolve(config, options.nodes * options.ranks_per_node, "cuda" if options.gpus else "cpu")
        lines = describe_run(setup, hardware)
    except UserError as error:
        lines = [f"none: {' '.join(str(error).split())}"]
    except Exception as error:  # of a registered model, for example; the script is what was asked for
        lines = [f"none: {type(error).__name__}: {' '.join(str(error).split())}"]
    return "\n".join(f"# plan: {line}" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="TOML file of the run")
    add_options(parser)
    add("--cpu", dest="gpus", action="store_false", help="request no GPUs: the ranks compute on CPUs")
    add("--no-requeue", dest="requeue", action="store_false", help="end the job where it would requeue itself")
    add("--no-preflight", dest="preflight", action="store_false", help="do not run preflight first")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another sbatch option, such as --sbatch=--mem=0",
    )
    add("--dry-run", action="store_true", help="print the batch script and the run's plan, and submit nothing")
    add("--hardware", default="h100", metavar="H", help="with --dry-run: the GPUs, as for dtron plan (default: h100)")
    with quiet_broken_pipe():
        given, overrides = parser.parse_known_args()
    options = SlurmOptions(**{option.name: getattr(given, option.name) for option in fields(SlurmOptions)})
    argv = ["--job.config_file", given.config, *overrides]
    try:
        if given.dry_run:
            config, folder = prepare(argv, options)
            print(render(folder, options), end="")
            print(describe_plan(config, options, given.hardware))
            return 0
        job = submit(argv, options, print)
    except HelpRequested as text:
        with quiet_broken_pipe():
            print(text)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"job {job.job_id} in {job.folder}")
    print(f"to see its state: python {Path(__file__).with_name('status.py')} {shlex.quote(str(job.folder.parents[1]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
