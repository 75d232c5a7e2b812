"""What ran: the code, copied so that a requeued job runs it again, its commit and diff, and the nodes' environment.

    JOB/code/              the checkout's files as they were, what is ignored by git left out
    JOB/git.json, git.diff the commit, and what the checkout had changed since
    JOB/environment.json   Python, packages, driver and the variables that steer libraries, of the job's first node

`python -m dtron.cluster.record JOB` writes the last, on that node. Nothing written here holds a secret.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dtron
from dtron.cluster.secrets import find_secret, is_secret_file, mask
from dtron.errors import UserError

__all__ = ["record_code", "record_environment"]

MAX_FILE_BYTES = 5 * 2**20
UNTRACKED = {".py", ".toml", ".csv", ".sh"}  # of files that git does not know yet, those that a run may need
VARIABLES = re.compile(r"^(SLURM_|NCCL_|GLOO_|UCX_|FI_|TORCH|PYTORCH|CUDA_|OMP_|MKL_|TRITON_)|^(PATH|LD_LIBRARY_PATH)$")


def checkout() -> Path:
    """The folder that holds the dtron package that is running."""
    return Path(dtron.__file__).resolve().parents[1]


def record_code(job: Path, root: Path, say: Callable[[str], None]) -> Path:
    """Copy the code in `root` to JOB/code, and note its commit and diff; returns the copy.

    UserError, before anything is written, if a file of it holds a secret. Without git, train.py and the package are
    copied.
    """
    names = _files(root)
    kept = []
    for name in names:
        path = root / name
        if path.is_symlink() and not path.exists():
            continue
        if path.is_dir() or is_secret_file(name):
            say(f"not in the copy of the code: {name}")
        elif path.stat().st_size > MAX_FILE_BYTES:
            say(f"not in the copy of the code: {name}, over {MAX_FILE_BYTES >> 20} MiB")
        elif what := find_secret(path.read_bytes().decode(errors="replace")):
            raise UserError(
                f"{path} holds {what}, and code that runs is copied beside its logs: take it out (a variable of the "
                "environment reaches the job too), or let git ignore the file"
            )
        else:
            kept.append(name)
    for name in kept:
        (job / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, job / "code" / name)
    if _git(root, "rev-parse", "HEAD"):
        status = _git(root, "status", "--short").splitlines()
        about = {
            "commit": _git(root, "rev-parse", "HEAD").strip(),
            "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD").strip(),
            "remote": mask(_git(root, "remote", "get-url", "origin").strip()),
            "changed": status,
        }
        (job / "git.json").write_text(json.dumps(about, indent=1) + "\n")
        (job / "git.diff").write_text(mask(_git(root, "diff", "HEAD")))
    return job / "code"


def _files(root: Path) -> list[str]:
    tracked = _git(root, "ls-files", "-z").split("\0")
    if not any(tracked):
        found = [root / "train.py", *sorted((root / "dtron").rglob("*.py"))]
        return [str(path.relative_to(root)) for path in found if path.exists()]
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    there = [name for name in tracked if name and (root / name).exists()]
    return there + [name for name in new if Path(name).suffix in UNTRACKED]


def _git(root: Path, *arguments: str) -> str:
    """What git prints; empty where `root` is no checkout of its own, or there is no git."""
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def record_environment(job: Path) -> None:
    """Write JOB/environment.json from this process."""
    variables = {name: mask(value) for name, value in sorted(os.environ.items()) if VARIABLES.search(name)}
    about = {
        "unix_s": time.time(),
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "dtron": dtron.__file__,
        "gpus": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "packages": sorted({_package(found) for found in importlib.metadata.distributions()}, key=str.lower),
        "variables": variables,
    }
    (job / "environment.json").write_text(json.dumps(about, indent=1) + "\n")


def _package(found: importlib.metadata.Distribution) -> str:
    """As pip freeze has it."""
    source = found.read_text("direct_url.json")
    url = json.loads(source).get("url", "") if source else ""
    return mask(f"{found.name} @ {url}" if url else f"{found.name}=={found.version}")


def _output(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


if __name__ == "__main__":
    record_environment(Path(sys.argv[1]))
