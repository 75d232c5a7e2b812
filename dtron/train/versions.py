"""The versions of what a run was computed with, kept as a comment in the config.toml of each attempt."""

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import dtron

__all__ = ["read_versions", "versions_comment"]

GIT_S = 10  # a checkout on a slow network file system is not waited for any longer


def versions_comment() -> str:
    """`# versions: dtron=0.1.0 torch=2.13.0 python=3.11.2 commit=...`, with cuda and nccl on a build that has them.

    commit: of the checkout that this package is in, `-changed` behind it if tracked files differ; of a Slurm job, that
    of the copied code. Left out where it is not known.
    """
    found = {"dtron": dtron.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if commit := _commit(Path(dtron.__file__).resolve().parents[1]):
        found["commit"] = commit
    return f"# versions: {' '.join(f'{name}={version}' for name, version in found.items())}\n"


def read_versions(config_text: str) -> dict[str, str]:
    """What `versions_comment` put into the text of a config.toml; empty if it is of a version without it."""
    line = re.search(r"^# versions: (.*)$", config_text, re.MULTILINE)
    return dict(word.split("=", 1) for word in line[1].split()) if line else {}


def _commit(root: Path) -> str:
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-changed" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    try:
        about = json.loads((root.parent / "git.json").read_text())  # JOB/code beside JOB/git.json
        return str(about["commit"]) + ("-changed" if about["changed"] else "")
    except (OSError, ValueError, KeyError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # status writes nothing
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
