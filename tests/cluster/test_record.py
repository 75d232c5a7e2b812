"""The copy of the code that runs, and the record of its environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtron.cluster.record import record_code
from dtron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def git(root: Path, *arguments: str) -> None:
    own = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"}
    own |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, env=os.environ | own)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a commit, a change, a new file, and an ignored folder."""
    at = tmp_path / "checkout"
    (at / "dtron").mkdir(parents=True)
    (at / "dtron/a.py").write_text("a = 1\n")
    (at / "gone.py").write_text("")
    (at / ".gitignore").write_text("outputs\n")
    git(at, "init", "-q")
    git(at, "remote", "add", "origin", "https://somebody:" + "apassword123@example.org/x.git")
    git(at, "add", "-A")
    git(at, "commit", "-qm", "first")
    (at / "dtron/a.py").write_text("a = 2\n")
    (at / "gone.py").unlink()
    (at / "new.py").write_text("b = 1\n")
    (at / "new.bin").write_text("no code\n")
    (at / "outputs").mkdir()
    (at / "outputs/big.py").write_text("")
    return at


def test_uncommitted_changes_are_copied(root: Path, tmp_path: Path) -> None:
    code = record_code(tmp_path / "job", root, print)
    assert {str(p.relative_to(code)) for p in code.rglob("*") if p.is_file()} == {".gitignore", "dtron/a.py", "new.py"}
    assert (code / "dtron/a.py").read_text() == "a = 2\n"
    about = json.loads((tmp_path / "job/git.json").read_text())
    assert len(about["commit"]) == 40 and " M dtron/a.py" in about["changed"] and "?? new.py" in about["changed"]
    assert about["remote"] == "https://somebody:***@example.org/x.git"
    assert "+a = 2" in (tmp_path / "job/git.diff").read_text()


def test_a_secret_is_an_error_with_file_and_line_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    (root / "new.py").write_text("b = 1\nt = 'hf_" + "abcdefGHIJKL0123456789xyz'\n")
    with pytest.raises(UserError, match=r"new\.py contains a Hugging Face token in line 2"):
        record_code(tmp_path / "job", root, print)
    assert not (tmp_path / "job").exists()


def test_a_removed_secret_is_masked_in_the_diff(root: Path, tmp_path: Path) -> None:
    secret = "hf_" + "abcdefGHIJKL0123456789xyz"
    (root / "dtron/a.py").write_text(f"t = '{secret}'\n")
    git(root, "commit", "-qam", "oops")
    (root / "dtron/a.py").write_text("t = None\n")
    record_code(tmp_path / "job", root, print)
    diff = (tmp_path / "job/git.diff").read_text()
    assert "-t = '***'" in diff and secret not in diff


def test_files_left_out_are_logged(root: Path, tmp_path: Path) -> None:
    for name, text in ((".env", "X=1"), ("large.py", "#" * (6 * 2**20)), ("key.pem", "")):
        (root / name).write_text(text)
    git(root, "add", "-fA")
    logged: list[str] = []
    code = record_code(tmp_path / "job", root, logged.append)
    assert not (code / ".env").exists() and not (code / "key.pem").exists() and not (code / "large.py").exists()
    assert len(logged) == 3 and any("large.py, over 5 MiB" in line for line in logged)


def test_without_git_the_package_is_copied(tmp_path: Path) -> None:
    (tmp_path / "site/dtron/sub").mkdir(parents=True)
    (tmp_path / "site/dtron/sub/a.py").write_text("")
    (tmp_path / "site/other.py").write_text("")
    (tmp_path / "site/train.py").write_text("")
    code = record_code(tmp_path / "job", tmp_path / "site", print)
    assert {str(p.relative_to(code)) for p in code.rglob("*.py")} == {"dtron/sub/a.py", "train.py"}
    assert not (tmp_path / "job/git.json").exists()


def test_secrets_of_the_environment_are_not_recorded(tmp_path: Path) -> None:
    secret = "a-secret-that-is-a-secret"
    own = {"HF_TOKEN": secret, "NCCL_NAME": f"x-{secret}", "NCCL_DEBUG": "WARN", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "dtron.cluster.record", str(tmp_path)], check=True, env=os.environ | own)
    text = (tmp_path / "environment.json").read_text()
    about = json.loads(text)
    assert secret not in text and about["variables"]["NCCL_NAME"] == "x-***" and "HF_TOKEN" not in about["variables"]
    assert about["variables"]["NCCL_DEBUG"] == "WARN"
    assert any(line.startswith("torch==2.") for line in about["packages"])
    assert about["python"] == sys.version.split()[0]
