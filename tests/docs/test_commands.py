"""Every command of README, docs and the headers of configs is legal as typed: run dry, on stand-ins for files."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dtron.__main__
from dtron.cluster import preflight
from dtron.cluster import sweep as sweeps
from dtron.compare import command as compare
from dtron.config import load, read, to_toml
from dtron.data.prepare import prepare
from dtron.data.sources import SourceSpec, open_source
from dtron.data.tokenizer import train_bpe
from dtron.explain import command as explain
from dtron.hf import sample
from dtron.models.families import FAMILIES
from dtron.models.hf import to_hf_config
from dtron.plan import command as plan
from dtron.plan import single
from dtron.train.resolve import resolve
from dtron.verify import command as verify

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "scripts/bench/README.md"]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
# Programs of others, and of the shell.
OTHERS = (
    "tensorboard",
    "lm_eval",
    "hf",
    "pip",
    "export",
    "git",
    "touch",
    "kill",
    "source",
    ".",
    "cat",
    "tail",
    "ls",
    "cd",
)
OTHERS += ("squeue", "scancel", "sbatch", "echo", "rm", "mkdir", "curl")
ON_CPU = ("configs/quickstart.toml", "configs/debug.toml", "outputs/RUN/config.toml")


def commands_of(path: Path) -> list[str]:
    """The lines of shell blocks and of indented ones that begin with a program, continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".toml":
        return [re.split(r": +", line, maxsplit=1)[1] for line in text.splitlines() if line.startswith("# Launch")]
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    programs = r"(?:[A-Z_]+=\S+ +)*(?:torchrun|python|dtron|make|srun|tensorboard|lm_eval)\b(?! \w+ \w+ \w+ \w+,)"
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line[4:] for line in outside.splitlines() if re.match(r"    " + programs, line)]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = sorted(
    {re.split(r" +#", command)[0]: path.name for path in [*PAGES, *CONFIGS] for command in commands_of(path)}.items()
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set that `dtron prepare` made."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.txt").write_text("a text of a few words, and one more\n")
    encoder = train_bpe(["a text of a few words"], 260)
    prepare(open_source(SourceSpec(str(folder / "a.txt")), folder), encoder, folder / "out", log=lambda _: None)
    return folder / "out"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Path:
    """A working directory as the commands expect it: a checkout with data, a run and a downloaded model in it."""
    for name in ("configs", "scripts", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("outputs/RUN", "checkpoints/titan", "Llama-3.1-8B"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for name in ("mine", "mine-validation"):
        shutil.copytree(prepared, tmp_path / "data" / name)
    config = load(["--job.config_file", str(ROOT / "configs/debug.toml"), "--validation.enable"])
    (tmp_path / "outputs/RUN/config.toml").write_text(to_toml(config))
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "Llama-3.1-8B/config.json").write_text(json.dumps(to_hf_config(FAMILIES["llama3.1"]["8B"])))
    (tmp_path / "Llama-3.1-8B/model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEAD", "node1")
    return tmp_path


def check_train(launcher: list[str], arguments: list[str]) -> None:
    options = dict(zip(launcher, launcher[1:], strict=False))
    nodes = int(options.get("--nnodes", "1").split(":")[-1])
    reading = read(arguments)
    device = "cpu" if arguments[1] in ON_CPU else "cuda"
    resolve(reading.config, nodes * int(options["--nproc-per-node"]), device, mistakes=reading.mistakes)  # type: ignore[arg-type]


def check_tool(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of `dtron`, as far as its command line."""
    for module, name in (
        (dtron.__main__, "_prepare"),
        (dtron.__main__, "_convert"),
        (sample, "run"),
        (preflight, "run"),
        (plan, "run"),
        (verify, "run"),
        (compare, "run"),
        (explain, "run"),
    ):
        monkeypatch.setattr(module, name, lambda given: int(bool(given.keys and not load(given.keys))))
    assert dtron.__main__.main(arguments) == 0


def check_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """submit.py and sweep.py dry; of the others, which only measure, that they have the options."""
    main: Callable[[], int] = sweeps.main
    if script.endswith("submit.py"):
        # tests/cluster/test_submit.py has what a plan says; recording these models takes half a minute each.
        monkeypatch.setattr(single, "describe_run", lambda setup, hardware: [])
        spec = importlib.util.spec_from_file_location("submit", ROOT / script)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        main = module.main
    elif not script.endswith("sweep.py"):
        text = (ROOT / script).read_text()
        options = [word.split("=")[0] for word in arguments if re.match(r"--\w[\w-]*$", word.split("=")[0])]
        short = [word for word in options if word not in ("--dp", "--tp", "--cp", "--pp", "--ep")]
        assert [word for word in short if f'"{word}"' not in text and f'"{word[2:]}"' not in text] == []
        if "--job.config_file" in arguments:
            load(arguments[arguments.index("--job.config_file") :])
        return
    monkeypatch.setattr(sys, "argv", [script, *arguments, *(["--dry-run"] if "--dry-run" not in arguments else [])])
    assert main() == 0


@pytest.mark.parametrize(("command", "page"), COMMANDS, ids=[f"{page} {command[:60]}" for command, page in COMMANDS])
def test_commands_are_legal_as_typed(
    command: str, page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = shlex.split(re.sub(r"\[--[^\]]*\]", "", command).replace("FILE.toml", "configs/debug.toml"), comments=True)
    words = [word for word in words if word not in ("[--section.key", "value", "...]", "...")]
    ends = [at for at, word in enumerate(words) if re.match(r"\|\|?$|&$|2?>", word)]  # of the shell
    words = words[: min(ends, default=len(words))]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:1] == ["srun"]:
        words = words[1:]
    if not words or words[0] in OTHERS or "--job.custom_import" in words:  # tests/extending runs those
        return
    if words[0] == "torchrun" and "train.py" in words:
        at = words.index("train.py")
        check_train(words[1:at], words[at + 1 :])
    elif "dtron" in words[:20] and (words[0] == "dtron" or words[words.index("dtron") - 1] == "-m"):
        check_tool(words[words.index("dtron") + 1 :], monkeypatch)
    elif words[0] in ("python", "torchrun") and (scripts := [w for w in words if w.endswith(".py") and "/" in w]):
        check_script(scripts[0], words[words.index(scripts[0]) + 1 :], monkeypatch)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert words[:2] in (["python", "train.py"],), f"{page}: no check of {command!r}"


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 60
    assert any("submit.py configs/llama3-8b.toml --nodes 4" in command for command, _ in COMMANDS)
