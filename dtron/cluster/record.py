"""Records what runs: a copy of the code, so that a requeued job runs it again, its commit and diff, the environment.

    JOB/code/              the checkout's files as they are, without those ignored by git
    JOB/git.json, git.diff the commit, and the uncommitted changes
    JOB/environment.json   Python, packages, driver and the variables that configure libraries, of the job's first node

`python -m dtron.cluster.record JOB` writes the last, on that node. Secrets are refused or masked.
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
UNTRACKED = {".py", ".toml", ".csv", ".sh"}  # suffixes of untracked files that a run may need
VARIABLES = re.compile(r"^(SLURM_|NCCL_|GLOO_|UCX_|FI_|TORCH|PYTORCH|CUDA_|OMP_|MKL_|TRITON_)|^(PATH|LD_LIBRARY_PATH)$")


def source_root() -> Path:
    """The folder that contains the running dtron package, a checkout or site-packages."""
    return Path(dtron.__file__).resolve().parents[1]


def record_code(job: Path, root: Path, log: Callable[[str], None]) -> Path:
    """Copy the code in `root` to JOB/code and record its commit and diff; returns the copy.

    UserError, before anything is written, if a file contains a secret. Without git, train.py and the
    package are copied.
    """
    names = _files_to_copy(root)
    kept = []
    for name in names:
        path = root / name
        if path.is_symlink() and not path.exists():
            continue
        if path.is_dir() or is_secret_file(name):
            log(f"not copied with the code: {name}, its name looks like that of a secret or it is a folder")
        elif path.stat().st_size > MAX_FILE_BYTES:
            log(f"not copied with the code: {name}, over {MAX_FILE_BYTES >> 20} MiB")
        elif what := find_secret(path.read_bytes().decode(errors="replace")):
            raise UserError(
                f"{path} contains {what}, and the code is copied next to the job's logs: remove it (an environment "
                "variable reaches the job too), or add the file to .gitignore"
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


def _files_to_copy(root: Path) -> list[str]:
    tracked = _git(root, "ls-files", "-z").split("\0")
    if not any(tracked):
        found = [root / "train.py", *sorted((root / "dtron").rglob("*.py"))]
        return [str(path.relative_to(root)) for path in found if path.exists()]
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    there = [name for name in tracked if name and (root / name).exists()]
    return there + [name for name in new if Path(name).suffix in UNTRACKED]


def _git(root: Path, *arguments: str) -> str:
    """The output of git; empty if `root` is not the top of a checkout, or git is not installed."""
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def record_environment(job: Path) -> None:
    """Write this process's environment to JOB/environment.json."""
    variables = {name: mask(value) for name, value in sorted(os.environ.items()) if VARIABLES.search(name)}
    about = {
        "unix_s": time.time(),
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "dtron": dtron.__file__,
        "gpus": _command_output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "packages": sorted({_package(found) for found in importlib.metadata.distributions()}, key=str.lower),
        "variables": variables,
    }
    (job / "environment.json").write_text(json.dumps(about, indent=1) + "\n")


def _package(found: importlib.metadata.Distribution) -> str:
    """As pip freeze prints it."""
    source = found.read_text("direct_url.json")
    url = json.loads(source).get("url", "") if source else ""
    return mask(f"{found.name} @ {url}" if url else f"{found.name}=={found.version}")


def _command_output(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


if __name__ == "__main__":
    record_environment(Path(sys.argv[1]))
