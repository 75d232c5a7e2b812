"""docs/models.md is what the registry says, and every model type that is read is tested."""

import sys
from pathlib import Path

import pytest
from hf.models import PUBLISHED

from dtron.models.hf_types import TYPES

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_of_these_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import models_table

    sys.modules.pop("models_table")
    text = models_table.PAGE.read_text()
    assert models_table.page_with_table(text) == text, "run `python scripts/models_table.py`"
    for name in models_table.FAMILIES:
        assert f"| {name} |" in text


def test_every_model_type_is_held_against_transformers() -> None:
    assert {config["model_type"] for config in PUBLISHED.values()} == set(TYPES)
