"""The course says what `dtron explain` says: each output on its pages is of the command above it."""

import re
from pathlib import Path

import pytest

from dtron.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md"))


def outputs(page: str) -> list[tuple[str, str]]:
    """(command of dtron explain, a block that follows it): a block belongs to the last such command before it."""
    found, command = [], ""
    for indented, language, block in re.findall(
        r"^    (dtron [^\n]*)$|^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    ):
        if indented.startswith("dtron explain"):
            command = indented
        elif block and not language and command:
            found.append((command, block))
    return found


OUTPUTS = [(page.name, command, block) for page in PAGES for command, block in outputs(page.read_text())]
PRINTED: dict[str, list[str]] = {}  # a command is run once


def words(text: str) -> list[str]:
    """Lines, with one space where there are several: columns are as wide as their widest cell."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def said(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)
    if command not in PRINTED:
        assert main(command.split()[1:]) == 0
        PRINTED[command] = words(capsys.readouterr().out)
    return PRINTED[command]


@pytest.mark.parametrize(("page", "command", "block"), OUTPUTS, ids=[f"{p} {i}" for i, (p, _, _) in enumerate(OUTPUTS)])
def test_an_output_is_what_the_command_prints(
    page: str, command: str, block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = said(command, capsys, monkeypatch)
    for line in words(block):
        if line != "...":
            assert any(printed.startswith(line) for printed in lines), f"{page}: {command} does not print {line!r}"


def test_every_chapter_has_what_a_chapter_has() -> None:
    chapters = [page for page in PAGES if page.name != "index.md"]
    assert len(chapters) == 8 and len(OUTPUTS) > 25
    for page in chapters:
        text, number = page.read_text(), page.name[0]
        assert "dtron explain" in text and "<details><summary>Answer</summary>" in text, page.name
        assert "```diff" in text or number in "148", page.name
        assert "## What it sends" in text or number in "18", page.name
        assert "## Read next" in text or number == "8", page.name


def test_a_wrong_figure_is_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said("dtron explain configs/debug.toml --gpus 1", capsys, monkeypatch)
    head = "lm_head.weight [4096, 64] dp_shard_cp: Shard(0)"
    assert any(line.startswith(f"{head} [4096, 64]") for line in lines)
    assert not any(line.startswith(f"{head} [4096, 63]") for line in lines)


def test_the_arithmetic_of_the_first_exercise() -> None:
    e, f, v, layers, hd, kd = 64, 128, 4096, 2, 64, 32
    block = e * hd + 2 * e * kd + hd * e + 3 * e * f + 2 * e
    assert block == 36_992
    assert layers * block + 2 * v * e + e == 598_336 and 598_336 * 4 == 2_393_344
