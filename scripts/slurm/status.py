"""List the jobs that submit.py made: state, last step, loss, tokens/s, MFU, goodput, and why a failed job failed.

python scripts/slurm/status.py [outputs]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dtron.cluster.status import list_jobs, table  # noqa: E402
from dtron.errors import UserError, quiet_broken_pipe  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dump_folder", nargs="?", default="outputs", help="job.dump_folder of the jobs (default: outputs)"
    )
    try:
        with quiet_broken_pipe():
            print(table(list_jobs(Path(parser.parse_args().dump_folder))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
