"""Submit a training to Slurm: it resumes by itself until training.steps is reached. See docs/slurm.md.

    python scripts/slurm/submit.py configs/llama3-8b.toml --nodes 4 --time 24:00:00 [--section.key value ...]

Keys of the configuration may be overridden, as on train.py's command line.
"""

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dtron.cluster.slurm import SlurmOptions, prepare, render, submit  # noqa: E402
from dtron.config import HelpRequested  # noqa: E402
from dtron.errors import UserError  # noqa: E402

HELP = {
    "nodes": "number of nodes",
    "ranks_per_node": "ranks, and GPUs, of a node",
    "name": "of the job, and of its folder",
    "time": "time limit; the job goes on after it by requeueing itself",
    "partition": "partition",
    "account": "account",
    "qos": "quality of service",
    "save_s": "seconds before the end at which the run is told to save",
    "retries": "failures in a row from one checkpoint after which it gives up",
    "python": "on the nodes",
    "modules": "for module load",
    "prolog": "file that the batch script sources first",
    "container": "command that runs another in a container: 'apptainer exec --nv image.sif'",
    "srun_args": "options for every srun: '--container-image=image.sqsh'",
    "interface": "network interface of NCCL and gloo",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="TOML file of the run")
    for option in fields(SlurmOptions):
        if option.name in HELP:
            assert option.default is not MISSING
            text = f"{HELP[option.name]} (default: {option.default})" if option.default else HELP[option.name]
            kind = type(option.default)
            add(f"--{option.name.replace('_', '-')}", type=kind, default=option.default, metavar="X", help=text)
    add("--cpu", dest="gpus", action="store_false", help="ask for no GPUs: the ranks compute on CPUs")
    add("--no-requeue", dest="requeue", action="store_false", help="end where the job would requeue itself")
    add("--no-preflight", dest="preflight", action="store_false", help="do not check the nodes first")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="one more of sbatch's, as --sbatch=--mem=0")
    add("--dry-run", action="store_true", help="print the script; make and submit nothing")
    given, overrides = parser.parse_known_args()
    options = SlurmOptions(**{option.name: getattr(given, option.name) for option in fields(SlurmOptions)})
    argv = ["--job.config_file", given.config, *overrides]
    try:
        if given.dry_run:
            print(render(prepare(argv, options)[1], options), end="")
            return 0
        job = submit(argv, options, print)
    except HelpRequested as text:
        print(text)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"job {job.job_id} in {job.folder}")
    print(f"its state: python {Path(__file__).with_name('status.py')} {job.folder.parents[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
