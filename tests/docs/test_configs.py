"""The example configurations and the README say what is true of the repository."""

import re
import shlex
from pathlib import Path

import pytest

from dtron.config import Config, load
from dtron.mesh import resolve_degrees
from dtron.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
# What a checkout holds that is not the repository's.
NOT_OURS = {".git", ".venv", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "outputs"}


def parse_launch(command: str) -> tuple[int, list[str]]:
    """The ranks a torchrun command starts and the arguments it gives to train.py."""
    words = shlex.split(command)
    torchrun = words.index("torchrun")
    assert all("=" in word for word in words[:torchrun]), f"only variables may stand before torchrun: {command}"
    script = words.index("train.py")
    launcher = words[torchrun + 1 : script]
    options = {name: launcher[i + 1] for i, name in enumerate(launcher[:-1])}
    assert "--standalone" in launcher or {"--nnodes", "--rdzv-endpoint"} <= options.keys(), command
    return int(options.get("--nnodes", 1)) * int(options["--nproc-per-node"]), words[script + 1 :]


def check_fits(config: Config, ranks: int) -> None:
    """The degrees make up the ranks, and the batch, the sequence and the heads divide by them."""
    degrees = resolve_degrees(config.parallelism, ranks)
    training = config.training
    at_once = training.local_batch_size * degrees.dp
    assert training.global_batch_size == -1 or training.global_batch_size % at_once == 0, (degrees, at_once)
    assert training.seq_len % (2 * degrees.cp * degrees.tp) == 0
    shape = FAMILIES[config.model.name][config.model.flavor]
    assert (config.model.n_kv_heads or shape.n_kv_heads) % degrees.tp == 0
    assert (config.model.n_layers or shape.n_layers) >= degrees.pp
    if degrees.pp > 1:
        microbatches, rest = divmod(training.local_batch_size, config.parallelism.pipeline_parallel_microbatch_size)
        assert rest == 0 and microbatches >= degrees.pp and microbatches % max(1, microbatches // degrees.pp) == 0


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def torchrun_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.match(r"\s*([A-Z_]+=\S+ )*torchrun ", line)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_launches_its_own_file_on_the_ranks_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (launch,) = [line for line in header(path) if line.startswith("Launch")]
    ranks, arguments = parse_launch(launch.split(": ", 1)[1])
    assert arguments[:2] == ["--job.config_file", f"configs/{path.name}"]
    needs = re.search(r"^Needs: +(\d+) (CPU ranks?|GPUs)\b", "\n".join(header(path)), re.MULTILINE)
    assert needs and int(needs[1]) == ranks
    check_fits(load(arguments), ranks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_stand_in_data_is_called_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    needs_gpus = any(re.match(r"Needs: +\d+ GPUs", line) for line in header(path))
    uses_stand_in = load(["--job.config_file", str(path)]).training.dataset == "stdlib"
    says_so = any("stdlib is a stand-in" in line for line in header(path))
    assert says_so == (needs_gpus and uses_stand_in)


@pytest.mark.parametrize("command", torchrun_lines(README))
def test_torchrun_commands_of_the_readme_are_legal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ranks, arguments = parse_launch(command)
    check_fits(load(arguments), ranks)


def test_make_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"```.*?```|`[^`]+`", README, re.DOTALL))))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert {"train", "test"} <= named <= targets
    assert torchrun_lines(README), "the README shows how to launch a layout"


def test_every_configuration_is_in_the_readme() -> None:
    assert [path.name for path in CONFIGS if f"](configs/{path.name})" not in README] == []


def test_links_of_the_readme_exist() -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert links and [target for target in links if not (ROOT / target).exists()] == []


def test_constraints_pin_the_torch_that_setup_installs() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    installed = re.search(r"^TORCH=(\S+)$", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert installed and pins["torch"] == installed[1]
    assert "setuptools" not in pins, "torch 2.11 needs one below 82, torch 2.13 one of at least 77.0.3"


def test_nothing_outside_the_repository_is_named() -> None:
    foreign = ["../" + "shared", "/wo" + "rk/"]  # in two parts, so that this file does not name them
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if NOT_OURS.intersection(parts) or parts[0].startswith(".venv-") or path.suffix == ".log" or not path.is_file():
            continue
        text = path.read_bytes().decode(errors="replace")
        found += [f"{path.relative_to(ROOT)} names {name}" for name in foreign if name in text]
    assert found == []
