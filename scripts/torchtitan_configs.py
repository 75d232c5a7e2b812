"""How torchtitan's own TOML files fare here, by the time they are of: the table of docs/from-torchtitan.md.

    python scripts/torchtitan_configs.py CHECKOUT [--messages]

CHECKOUT is a clone of github.com/pytorch/torchtitan with its history, of which nothing is run. Each file is checked for
the least ranks its degrees allow, with the embedded data set in place of the one it names.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's dtron, even if another is installed

from dtron.config import Config, read  # noqa: E402
from dtron.config.torchtitan import EXPERTS, QWEN3_MOE  # noqa: E402
from dtron.errors import UserError  # noqa: E402
from dtron.train.resolve import resolve  # noqa: E402

ERAS = ("2024-06-30", "2024-12-31", "2025-06-30", "2025-10-15", "2025-11-30", "2026-02-20")
DATA = ["--training.dataset", "stdlib", "--training.dataset_path="]
# By what the messages say; of several the first counts.
REASONS = {
    "only Llama-like": "refused: another model",
    "transformers_modeling_backend": "refused: another model",
    EXPERTS: "refused: experts",
    QWEN3_MOE: "refused: experts",
    "torchft": "refused: torchft",
    "float8 all-gather and tensor parallel": "refused: float8 gather with tp",
}
COLUMNS = ("starts", *dict.fromkeys(REASONS.values()), "refused: else")


def git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git {' '.join(arguments)} in {checkout}: {done.stderr.strip()}")
    return done.stdout


def least_ranks(config: Config) -> int:
    p = config.parallelism
    shard = max(1, p.data_parallel_shard_degree) * p.data_parallel_replicate_degree
    return shard * p.tensor_parallel_degree * p.pipeline_parallel_degree * p.context_parallel_degree


def fate(path: Path) -> tuple[str, list[str]]:
    """The column a file counts in, and what is said of it."""
    reading = read(["--job.config_file", str(path), *DATA])
    try:
        resolve(reading.config, least_ranks(reading.config), "cuda", mistakes=reading.mistakes)
    except UserError as error:
        found = [column for words, column in REASONS.items() if words in str(error)]
        return (found or ["refused: else"])[0], [str(error)]
    return "starts", reading.notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="CHECKOUT", type=Path, help="clone of torchtitan with its history")
    parser.add_argument("--messages", action="store_true", help="also what is said of each file")
    given = parser.parse_args()
    print("| Files of |", " | ".join(("files", *COLUMNS)), "|\n|---|" + "---|" * (len(COLUMNS) + 1))
    for era in ERAS:
        commit = git(given.checkout, "rev-list", "-1", f"--before={era}", "HEAD").strip()
        names = git(given.checkout, "ls-tree", "-r", "--name-only", commit).splitlines() if commit else []
        counts: Counter[str] = Counter()
        said = []
        for name in [name for name in names if name.endswith(".toml") and "pyproject" not in name]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, Path(name).name)
                path.write_text(git(given.checkout, "show", f"{commit}:{name}"))
                column, lines = fate(path)
            counts[column] += 1
            said += [f"\n{era} {name}: {column}", *(f"    {line}" for line in lines)]
        cells = [era[:7], sum(counts.values()), *(counts[column] or "" for column in COLUMNS)]
        print("|", " | ".join(map(str, cells)), "|")
        if given.messages:
            print("\n".join(said), "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
