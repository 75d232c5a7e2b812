"""The picture in docs/experts.md is a run of the code."""

import re
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parents[2]


def test_picture_of_a_dispatch_is_what_its_script_prints() -> None:
    page = (ROOT / "docs" / "experts.md").read_text()
    (picture,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = warm.run([sys.executable, *launcher, "scripts/expert_dispatch.py"], ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == picture
