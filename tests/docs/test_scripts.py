"""scripts/setup.sh and scripts/quickstart.sh, run with a stand-in for Python that records what it is asked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtron.config import load
from dtron.mesh import resolve_degrees

ROOT = Path(__file__).resolve().parents[2]
HAS_DRIVER = any(Path(path).exists() for path in ("/dev/nvidia0", "/proc/driver/nvidia")) or shutil.which("nvidia-smi")

# Makes "environments" that hold itself, refuses the pip commands that match $REFUSE, says it has $OWN_TORCH.
PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    "-m venv "*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
    "-m pip "*) [ -z "$REFUSE" ] || ! [[ "$*" =~ $REFUSE ]] ;;
    --version) echo "Python 3.11.0" ;;
    -) [ -n "$OWN_TORCH" ] && echo "$OWN_TORCH" ;;
    *device_count*) echo "$GPUS" ;;
esac
"""


class Clone:
    """A copy of the files that the scripts read, and a PATH whose Pythons are the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder / "clone", folder / "calls"
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh", "scripts/quickstart.sh"):
            shutil.copy(ROOT / name, self.folder / name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("python3", "python3.11"):
            self.add(name, PYTHON)

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """The finished script, and what Python was asked for meanwhile."""
        self.calls_file.write_text("")
        defaults = {"REFUSE": "", "OWN_TORCH": "", "GPUS": "0", "CALLS": str(self.calls_file)}
        env = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | defaults | variables
        command = ["bash", f"scripts/{script}", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)
        return done, self.calls_file.read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def installs(calls: list[str]) -> list[str]:
    """The requirement each pip call ends with."""
    return [call.split()[-1] for call in calls if call.startswith("-m pip")]


@pytest.mark.skipif(bool(HAS_DRIVER), reason="needs a machine without an NVIDIA driver")
class TestSetupWithoutDriver:
    def test_takes_the_cpu_build_and_is_instant_afterwards(self, clone: Clone) -> None:
        done, calls = clone.run("setup.sh")
        assert done.returncode == 0, done.stderr
        assert installs(calls) == ["torch==2.13.0+cpu", ".[dev]"]
        assert clone.run("setup.sh")[1] == []

    def test_says_so_before_it_takes_the_default_build(self, clone: Clone) -> None:
        done, calls = clone.run("setup.sh", REFUSE=r"\+cpu")
        assert done.returncode == 0, done.stderr
        assert installs(calls) == ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "torch==2.13.0", ".[dev]"]
        assert "--index-url https://download.pytorch.org/whl/cpu" in calls[-3]
        assert "the CPU build of torch 2.13.0 was not found" in done.stdout

    def test_half_made_environment_is_made_again(self, clone: Clone) -> None:
        done, _ = clone.run("setup.sh", REFUSE=r"\[dev\]")
        assert done.returncode != 0
        (clone.folder / ".venv" / "leftover").touch()
        done, calls = clone.run("setup.sh")
        assert done.returncode == 0 and installs(calls)
        assert not (clone.folder / ".venv" / "leftover").exists()

    @pytest.mark.parametrize("change", ["pins", "place", "driver"])
    def test_outdated_environment_is_made_again(self, clone: Clone, change: str) -> None:
        clone.run("setup.sh")
        if change == "pins":
            with open(clone.folder / "constraints.txt", "a") as file:
                file.write("extra==1.0\n")
        elif change == "place":
            clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
        else:
            clone.add("nvidia-smi", "#!/bin/sh\n")
        assert installs(clone.run("setup.sh")[1])[-1] == ".[dev]"


def pinned(environment: Path) -> list[str]:
    return (environment / "constraints.txt").read_text().splitlines()


def test_another_torch_has_an_environment_of_its_own(clone: Clone) -> None:
    done, calls = clone.run("setup.sh", "2.11.0", OWN_TORCH="2.12.0+cu130")
    assert done.returncode == 0, done.stderr
    assert installs(calls)[-2:] in (["torch==2.11.0+cpu", ".[dev]"], ["torch==2.11.0", ".[dev]"])
    pins = pinned(clone.folder / ".venv-torch-2.11.0")
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.11.0"]
    assert clone.run("setup.sh", "2.11.0")[1] == [], "instant afterwards"
    assert installs(clone.run("setup.sh")[1])[-1] == ".[dev]", "it is not .venv"
    assert clone.run("setup.sh", "2.11.0")[1] == []


class TestSetupWithDriver:
    @pytest.fixture(autouse=True)
    def driver(self, clone: Clone) -> None:
        clone.add("nvidia-smi", "#!/bin/sh\n")

    def test_takes_the_default_build(self, clone: Clone) -> None:
        done, calls = clone.run("setup.sh")
        assert done.returncode == 0, done.stderr
        assert installs(calls) == ["torch==2.13.0", ".[dev]"]
        assert "--system-site-packages" not in [call for call in calls if "venv" in call][-1]

    def test_keeps_the_torch_of_the_machine(self, clone: Clone) -> None:
        done, calls = clone.run("setup.sh", OWN_TORCH="2.11.0+cu130")
        assert done.returncode == 0, done.stderr
        assert installs(calls) == [".[dev]"]
        pins = pinned(clone.folder / ".venv")
        assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.11.0"]
        assert any(pin.startswith("numpy==") for pin in pins)

    def test_its_environment_serves_without_the_driver(self, clone: Clone) -> None:
        clone.run("setup.sh")
        (clone.bin / "nvidia-smi").unlink()
        assert clone.run("setup.sh")[1] == []


def test_setup_says_what_to_do_without_a_new_enough_python(clone: Clone) -> None:
    for version in ("", ".10", ".11", ".12", ".13"):
        clone.add(f"python3{version}", "#!/bin/sh\nexit 1\n")
    done, _ = clone.run("setup.sh")
    assert done.returncode != 0
    assert "no Python 3.10 or newer" in done.stderr and "Install one" in done.stderr


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 4), (1, 1), (2, 2), (3, 2), (4, 4), (8, 8), (10, 8)])
def test_quickstart_takes_the_same_batch_on_every_machine(
    clone: Clone, gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    clone.run("setup.sh")
    done, calls = clone.run("quickstart.sh", "--training.steps", "7", GPUS=str(gpus))
    assert done.returncode == 0, done.stderr
    started = re.fullmatch(r"-m torch.distributed.run --standalone --nproc-per-node (\d+) train.py (.*)", calls[-1])
    assert started and int(started[1]) == ranks
    config = load(started[2].split())
    degrees = resolve_degrees(config.parallelism, ranks)
    assert degrees.tp == (2 if gpus == 0 else 1)
    assert config.training.steps == 7
    assert config.training.local_batch_size * degrees.dp == config.training.global_batch_size == 8


@pytest.mark.parametrize("given", [[], ["--job.dump_folder", "elsewhere"]])
def test_quickstart_ends_with_a_sample_of_what_was_learnt(clone: Clone, given: list[str]) -> None:
    clone.run("setup.sh")
    folder = given[-1] if given else "outputs"
    (clone.folder / folder / "llama3-debugmodel-1a2b3c4d" / "checkpoint" / "step-7").mkdir(parents=True)
    done, calls = clone.run("quickstart.sh", *given, "--training.steps", "7")
    assert done.returncode == 0, done.stderr
    assert calls[-1] == f"-m dtron sample {folder} --prompt def "
    assert calls[-2].endswith("--training.steps 7")


def test_torchtitan_configs_counts_the_files_of_a_checkout_by_time(tmp_path: Path) -> None:
    repo = tmp_path / "titan"
    (repo / "train_configs").mkdir(parents=True)
    git = ["git", "-C", str(repo), "-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    files = {
        "2024-06-01": ("a.toml", "[training]\nbatch_size = 2\ndataset = 'c4'\n"),
        "2025-10-01": ("b.toml", "[model]\nconverters = ['mx']\n"),
        "2026-01-01": ("c.toml", "[model]\nname = 'llama4'\n"),
    }
    for date, (name, text) in files.items():
        (repo / "train_configs" / name).write_text(text)
        env = os.environ | {"GIT_COMMITTER_DATE": f"{date}T12:00:00", "GIT_AUTHOR_DATE": f"{date}T12:00:00"}
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", name], check=True, env=env)
    command = [sys.executable, str(ROOT / "scripts" / "torchtitan_configs.py"), str(repo), "--messages"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("| 20")
    }
    assert rows["2024-06"][:2] == ["1", "1"] and rows["2025-10"][:2] == ["2", "1"]
    assert [cell for cell in rows["2026-02"] if cell] == ["3", "1", "1", "1"]
    assert "batch_size is read as training.local_batch_size" in done.stdout and "MXFP8 is not built yet" in done.stdout
