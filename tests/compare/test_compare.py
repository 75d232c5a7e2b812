"""`dtron compare`: figures of runs side by side, where they part, how they differ; and logs of other trainers."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

import dtron
from dtron.__main__ import main
from dtron.compare.logs import read_log
from dtron.compare.report import relative_difference
from dtron.train import versions

STEPS = [1, *range(10, 101, 10)]
TITAN = (
    "[rank0]:[titan] 2026-05-18 16:04:46,338 - root - INFO - \x1b[31mstep: {step:2}  \x1b[32mloss: {loss:8.5f}  "
    "\x1b[38;2;180;60;0mgrad_norm: {norm:7.4f}  \x1b[38;2;54;234;195mmemory: 66.91GiB(37.51%)  \x1b[34mtps: 10,050  "
    "\x1b[36mtflops: 314.71  \x1b[35mmfu: 13.99%\x1b[39m"
)
PICOTRON = (
    "[rank 0] Step: {step:<5d} | Loss: {loss:6.4f} | Global batch size:  16.38K | Tokens/s:  12.34K | Tokens/s/GPU:"
    "   3.09K | Tokens:   1.64M | MFU: 12.34% | Memory usage:   1.50GB"
)


def loss(step: int) -> float:
    return 3 + 7 * math.exp(-step / 30)


def log(path: Path, form: str, steps: list[int] = STEPS) -> str:
    path.write_text("".join(form.format(step=s, loss=loss(s), norm=1 + 1 / s) + "\n" for s in steps))
    return str(path)


def run_folder(path: Path, rows: list[dict[str, Any]] | None = None, lr: float = 1e-3, torch: str = "2.13.0") -> str:
    path.mkdir(parents=True)
    usual = [
        {"step": s, "attempt": 1 + (s > 50), "loss": loss(s), "grad_norm": 1 + 1 / s, "tokens_per_s": 4000.0 + s}
        | {"tokens_per_s_per_gpu": 1000.0 + s / 10, "max_memory_bytes": 2**30 * (1 + (s == 20)), "goodput": s / 200}
        for s in STEPS
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (usual if rows is None else rows)))
    text = "# versions: dtron=0.1.0 torch={torch} commit=abc\n[optimizer]\nlr = {lr}\n[training]\nsteps = 100\n"
    (path / "config.toml").write_text(text.format(torch="2.12.0", lr=7.0))
    (path / "config-attempt-2.toml").write_text(text.format(torch=torch, lr=lr))
    return str(path)


def changed(path: str, step: int, **values: Any) -> None:
    file = Path(path) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | (values if row["step"] >= step else {})) + "\n" for row in rows))


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["compare", *arguments])
    return code, *capsys.readouterr()


def row(out: str, title: str) -> str:
    return next(line[len(title) :].strip() for line in out.splitlines() if line.startswith(title))


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", lr=2e-3, torch="2.11.0")
    changed(b, 60, loss=4.5, tokens_per_s_per_gpu=2000.0)
    code, out, err = compare(capsys, a, b)
    assert (code, err) == (0, "")
    assert row(out, "read from").split("  ")[0] == "dtron, 2 attempts"
    assert row(out, "loss, step 1 ").split() == [f"{loss(1):.4f}"] * 2
    assert row(out, "loss, step 100").split() == [f"{loss(100):.4f}", "4.5000"]
    # Medians leave out the first step of each attempt, steps 1 and 60.
    assert row(out, "median tokens/s per GPU").split() == ["1.0k", "1.0k", "(+0.0%)"]
    assert row(out, "peak memory").split() == ["2.00", "GiB", "2.00", "GiB", "(+0.0%)"]
    assert row(out, "goodput").split() == ["50.0%", "50.0%"]
    far = (4.5 - loss(100)) / loss(100)
    assert f"b parts from a at step 60, beyond 0.001: loss 4.5 against {loss(60):.6g}" in out
    assert f"largest relative difference {far:.2g}, of the loss at step 100" in out
    assert row(out, "optimizer.lr").split() == ["0.001", "0.002"], "of the newest attempt"
    assert row(out, "torch").split() == ["2.13.0", "2.11.0"]
    assert "training.steps" not in out and "commit" not in out


def test_exit_code_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    changed(b, 40, grad_norm=1.1)
    assert compare(capsys, a, b)[0] == 0, "without --rtol nothing is judged"
    assert compare(capsys, a, b, "--rtol", "0.1")[0] == 0
    code, out, err = compare(capsys, a, b, "--rtol", "1e-2", "--json")
    assert (code, err) == (1, "error: beyond --rtol 0.01 of a: b\n")
    found = json.loads(out)
    (parting,) = found["partings"]
    assert (parting["step"], parting["key"], parting["value"], parting["steps"]) == (40, "grad_norm", 1.1, len(STEPS))
    assert found["runs"][0]["at"]["loss"]["10"] == loss(10) and found["keys"] == found["versions"] == {}
    same = compare(capsys, a, a, "--rtol", "0")
    assert same[0] == 0 and "a (2) agrees with a (1)" in same[1] and "The keys are equal." in same[1]
    with pytest.raises(SystemExit):
        main(["compare", a, b, "--rtol", "-1"])
    assert "expected a number from 0" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    changed(b, 30, loss=None, nonfinite=["loss"])
    code, out, _ = compare(capsys, a, b, "--rtol", "0.5")
    assert code == 1 and "parts from a at step 30" in out and "one is not finite" in out
    assert row(out, "loss, step 100").endswith("not finite")
    changed(a, 30, loss=None, nonfinite=["loss"])
    assert compare(capsys, a, b, "--rtol", "0.5")[0] == 0
    assert relative_difference(0.0, 0.0) == 0 and relative_difference(0.0, 1.0) == math.inf


def test_logs_of_torchtitan_and_picotron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, titan = run_folder(tmp_path / "a"), log(tmp_path / "titan.log", TITAN)
    picotron = log(tmp_path / "picotron.log", PICOTRON)
    with Path(titan).open("a") as file:
        file.write("[titan] INFO - validate step: 100  loss:  7.2500  memory:  1.00GiB(1.50%)  tps: 9\n")
        file.write("[titan] INFO - Training starts at step 1, with loss: unknown\n")
    kind, rows = read_log(Path(titan))
    assert kind == "torchtitan" and rows[-1] == {
        "step": 100, "loss": round(loss(100), 5), "grad_norm": 1.01, "max_memory_bytes": 66.91 * 2**30,
        "tokens_per_s_per_gpu": 10050, "mfu": 0.1399, "validation_loss": 7.25,
    }  # fmt: skip
    kind, rows = read_log(Path(picotron))
    assert kind == "picotron" and rows[1] == {
        "step": 10, "loss": round(loss(10), 4), "tokens_per_s": 12340, "tokens_per_s_per_gpu": 3090, "tokens": 1.64e6,
        "mfu": 0.1234, "max_memory_bytes": 1.5e9,
    }  # fmt: skip
    code, out, _ = compare(capsys, a, titan, picotron, "--rtol", "1e-4")
    assert code == 0 and row(out, "gradient norm, step 1 ").split() == ["2.0000", "2.0000", "-"]
    assert "Configuration and versions are not recorded in titan.log, picotron.log." in out


def test_lines_of_older_torchtitan(tmp_path: Path) -> None:
    line = "2024-09-01 INFO - step: 1,000  loss:  nan  memory: 38.99GiB(41.04%)  wps: 7,323  mfu: 42.85%\n"
    (tmp_path / "log").write_text(line)
    (only,) = read_log(tmp_path / "log")[1]
    assert only["step"] == 1000 and math.isnan(only["loss"]) and only["tokens_per_s_per_gpu"] == 7323


def test_what_cannot_be_compared_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run_folder(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("step one: read the manual\n")
    for other, message in {
        str(tmp_path / "missing"): "does not exist; expected a run folder",
        str(tmp_path / "empty"): "is no run folder: it has no metrics.jsonl",
        str(tmp_path / "notes.txt"): "has no line that can be read as a step",
        run_folder(tmp_path / "c", rows=[{"step": 1, "attempt": 1}]): "has no row with a loss",
        log(tmp_path / "odd.log", PICOTRON, [3, 7]): "have no logged step in common: a logged 11 steps from 1 to 100; "
        "odd.log logged 2 steps from 3 to 7",
    }.items():
        code, out, err = compare(capsys, a, other)
        assert (code, out, err.count("\n")) == (1, "", 1) and message in err, other
    assert "name two or more" in compare(capsys, a)[2]
    assert "expected the name of a .png or .svg" in compare(capsys, a, a, "--picture", "x.pdf")[2]


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    a, b, file = run_folder(tmp_path / "a"), log(tmp_path / "picotron.log", PICOTRON), tmp_path / "runs.svg"
    assert compare(capsys, a, b, "--picture", str(file))[0] == 0
    assert file.read_text().startswith("<?xml")


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_folder(tmp_path / place / "run") for place in ("before", "after")]
    assert "after/run agrees with before/run" in compare(capsys, *runs)[1]


def test_versions_are_a_comment_that_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "code" / "dtron"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(dtron, "__file__", str(package / "__init__.py"))
    found = versions.read_versions("# changed\n" + versions.versions_comment() + "[training]\n")
    assert found.keys() >= {"dtron", "torch", "python"} and "commit" not in found
    (tmp_path / "git.json").write_text(json.dumps({"commit": "c0ffee", "changed": [" M train.py"]}))
    assert versions.read_versions(versions.versions_comment())["commit"] == "c0ffee-changed", "of a Slurm job"

    def git(*words: str) -> str:
        command = ["git", "-C", str(package.parent), "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert versions.read_versions(versions.versions_comment())["commit"] == commit
    (package / "__init__.py").write_text("x = 1\n")
    assert versions.read_versions(versions.versions_comment())["commit"] == f"{commit}-changed"
    assert versions.read_versions("[training]\n") == {}
