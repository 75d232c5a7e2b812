"""What needs a GPU to be tested: programs of their own, as pytest's process and its ranks see none (conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_gpu = pytest.mark.skipif(not any(Path("/dev").glob("nvidia[0-9]*")), reason="needs a GPU")


def run_on_gpu(program: str) -> str:
    """The output of a Python program that finds the tests' modules and sees all GPUs; it must end well."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
    }
    folders = os.pathsep.join(str(path) for path in Path(__file__).resolve().parents[:2])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env | {"PYTHONPATH": folders}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
