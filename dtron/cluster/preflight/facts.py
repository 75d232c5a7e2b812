"""What has to be equal on all ranks before they may talk to each other: versions, drivers, devices, dtron's code."""

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

__all__ = ["code_hash", "compare", "facts", "hosts_text", "machines", "whose"]

PACKAGE = Path(dtron.__file__).parent
DRIVER = Path("/proc/driver/nvidia/version")
# What is compared, under the names that a message gives it.
EQUAL = {
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
    """Of this rank: `EQUAL`'s keys; git (commit of dtron's code, or None), host, node (of torchrun), threads."""
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
        "code": code_hash(PACKAGE),
        "git": _commit(PACKAGE),
        "host": socket.gethostname(),
        "node": int(os.environ.get("GROUP_RANK", 0)),
        "threads": torch.get_num_threads(),
    }


def code_hash(folder: Path) -> str:
    """Of every module's name and bytes: two machines with the same run the same code."""
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
    """For example 550.54.15, from the line of the kernel module."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None


def _commit(folder: Path) -> str | None:
    """None where there is no git, or the code is no checkout of it."""
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def compare(of_ranks: list[dict[str, Any]]) -> str:
    """A message that names every fact that is not equal, whose value is which and on which ranks; empty if all are.

    What most ranks have stands last, so that the odd one is read first.
    """
    hosts = [each["host"] for each in of_ranks]
    unequal = []
    for key, name in EQUAL.items():
        by_value: dict[Any, list[int]] = {}
        for rank, each in enumerate(of_ranks):
            by_value.setdefault(each[key], []).append(rank)
        if len(by_value) > 1:
            found = sorted(by_value.items(), key=lambda item: (len(item[1]), -item[1][0]))
            parts = [f"{_value(key, value, of_ranks[ranks[0]])} on {whose(ranks, hosts)}" for value, ranks in found]
            unequal.append(f"{name} is {' and '.join([', '.join(parts[:-1]), parts[-1]])}")
    if not unequal:
        return ""
    return f"the ranks are not equal: {'; '.join(unequal)}; install the same on every machine"


def _value(key: str, value: Any, of_rank: dict[str, Any]) -> str:
    if value is None:
        return "not there"
    return f"{value} (commit {of_rank['git']})" if key == "code" and of_rank["git"] else str(value)


def hosts_text(ranks: list[int], hosts: list[str], most: int = 4) -> str:
    """The hosts of some ranks, each once: "n1, n2 and 3 more"."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def whose(ranks: list[int], hosts: list[str]) -> str:
    """ "ranks 2-3 (n2)"; without the hosts as long as they are not known."""
    return f"{format_ranks(ranks)} ({hosts_text(ranks, hosts)})" if hosts else format_ranks(ranks)


def machines(of_ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The ranks of each machine, in order of its first. A host with several of torchrun's agents is several."""
    found: dict[tuple[str, int], list[int]] = {}
    for rank, each in enumerate(of_ranks):
        found.setdefault((each["host"], each["node"]), []).append(rank)
    return list(found.values())
