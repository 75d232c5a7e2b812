"""docs/models.md is what the registry says."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_of_these_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import models_table

    sys.modules.pop("models_table")
    text = models_table.PAGE.read_text()
    assert models_table.page_with_table(text) == text, "run `python scripts/models_table.py`"
    for name in models_table.FAMILIES:
        assert f"| {name} |" in text
