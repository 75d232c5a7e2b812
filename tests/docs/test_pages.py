"""The pages under docs/ say what the code says."""

import re
from pathlib import Path

import pytest

from dtron.config.keys import KEYS
from dtron.config.torchtitan import RENAMED, absent
from dtron.parallel.incompatible import as_markdown
from dtron.parallel.schedules import SCHEDULES, read_schedule

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "scripts" / "bench" / "README.md"])
PARALLELISM = (ROOT / "docs" / "parallelism.md").read_text()


def test_composition_is_the_table_that_the_checks_read() -> None:
    page = (ROOT / "docs" / "composition.md").read_text()
    assert page.endswith("\n\n" + as_markdown()), (
        "docs/composition.md is out of date: its table is dtron.parallel.incompatible.as_markdown()"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_keys_exist(page: Path) -> None:
    text = page.read_text()
    if page.name == "coming-from.md":  # the first column has the others' keys
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    named = set(re.findall(r"`(?:--)?([a-z_]+\.[a-z_0-9.]+)(?: [^`]*)?`", text)) | set(
        re.findall(r"--([a-z_]+\.[a-z_0-9.]+)", text)
    )
    sections = {key.split(".")[0] for key in KEYS}
    named = {name.replace(".no_", ".") for name in named}  # --section.no_key turns a boolean off
    if page.name == "from-torchtitan.md":  # that page names torchtitan's as well
        named = {name for name in named if name not in RENAMED and absent(name) is None}
    unknown = {name for name in named if name.split(".")[0] in sections and name.rstrip(".") not in KEYS}
    assert {
        name for name in unknown if not name.endswith((".py", ".md", ".json", ".jsonl", ".toml", ".safetensors"))
    } == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`((?:dtron|tests|scripts|configs|docs)/[\w/.-]+\.\w+)(?:::\w+)?`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_schedule_is_in_its_table_with_its_constraints() -> None:
    rows = {
        row[0].strip("` "): row[1:]
        for row in re.findall(r"^\| (`\w+`) +\|([^|]*)\|([^|]*)\|", PARALLELISM, re.MULTILINE)
    }
    for name, kind in SCHEDULES.items():
        stages, microbatches = (cell.strip() for cell in rows[name])
        assert stages == ("2, in V order" if kind.v_shape else "1 or more, usually 2" if kind.multi else "1"), name
        wanted = "at least as many as stages" if kind.at_least_stages else "any number"
        wanted = "a multiple of the rounds" if kind.in_rounds else wanted
        assert microbatches == wanted, name


def test_csv_of_the_page_is_a_schedule(tmp_path: Path) -> None:
    (text,) = re.findall(r"```csv\n(.*?)```", PARALLELISM, re.DOTALL)
    (tmp_path / "schedule.csv").write_text(text)
    assert [len(row) for row in read_schedule(str(tmp_path / "schedule.csv"), 2)] == [8, 10]
