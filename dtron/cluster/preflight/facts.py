"""What must match on all ranks before they communicate: versions, drivers, devices, dtron's code."""

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

import dtron
from dtron.observe.device import device_name
from dtron.ranks.hang_report import format_ranks

__all__ = ["compare_facts", "describe_ranks", "facts", "format_hosts", "hash_code", "machines"]

PACKAGE = Path(dtron.__file__).parent
DRIVER = Path("/proc/driver/nvidia/version")
# Compared facts, with their names in messages.
MUST_MATCH = {
    "python": "Python",
    "torch": "torch",
    "cuda": "torch's CUDA",
    "nccl": "NCCL",
    "triton": "triton",
    "driver": "the NVIDIA driver",
    "device": "the device",
    "dtron": "dtron",
    "code": "dtron's code",
}


def facts(device: torch.device) -> dict[str, Any]:
    """This rank's `MUST_MATCH` keys, git (dtron's commit, or None), host, node (torchrun's node rank), threads."""
    cuda = device.type == "cuda"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.version.cuda else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "nccl": nccl,
        "triton": _installed("triton"),
        "driver": _driver() if cuda else None,
        "device": device_name(device),
        "dtron": dtron.__version__,
        "code": hash_code(PACKAGE),
        "git": _commit(PACKAGE),
        "host": socket.gethostname(),
        "node": int(os.environ.get("GROUP_RANK", 0)),
        "threads": torch.get_num_threads(),
    }


def hash_code(folder: Path) -> str:
    """Hash of every module's name and bytes: machines with equal hashes run the same code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The kernel module's version, such as 550.54.15."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None


def _commit(folder: Path) -> str | None:
    """The commit; None without git, or if the code is not in a git checkout."""
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def compare_facts(of_ranks: list[dict[str, Any]]) -> str:
    """A message with every fact that differs, its values and their ranks; empty if all match.

    The value that most ranks have is last, so that the outlier is read first.
    """
    hosts = [each["host"] for each in of_ranks]
    differing = []
    for key, name in MUST_MATCH.items():
        by_value: dict[Any, list[int]] = {}
        for rank, each in enumerate(of_ranks):
            by_value.setdefault(each[key], []).append(rank)
        if len(by_value) > 1:
            found = sorted(by_value.items(), key=lambda item: (len(item[1]), -item[1][0]))
            parts = [
                f"{_value(key, value, of_ranks[ranks[0]])} on {describe_ranks(ranks, hosts)}" for value, ranks in found
            ]
            differing.append(f"{name} is {' and '.join([', '.join(parts[:-1]), parts[-1]])}")
    if not differing:
        return ""
    return f"the ranks differ: {'; '.join(differing)}; install the same versions on every machine"


def _value(key: str, value: Any, of_rank: dict[str, Any]) -> str:
    if value is None:
        return "not installed"
    return f"{value} (commit {of_rank['git']})" if key == "code" and of_rank["git"] else str(value)


def format_hosts(ranks: list[int], hosts: list[str], limit: int = 4) -> str:
    """The hosts of some ranks, without duplicates: "n1, n2 and 3 more"."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def describe_ranks(ranks: list[int], hosts: list[str]) -> str:
    """ "ranks 2-3 (n2)"; only the ranks while the hosts are unknown."""
    return f"{format_ranks(ranks)} ({format_hosts(ranks, hosts)})" if hosts else format_ranks(ranks)


def machines(of_ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The ranks of each machine, ordered by its first rank. A host with several torchrun agents counts as several."""
    found: dict[tuple[str, int], list[int]] = {}
    for rank, each in enumerate(of_ranks):
        found.setdefault((each["host"], each["node"]), []).append(rank)
    return list(found.values())
