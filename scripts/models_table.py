"""Writes the table of docs/models.md: every family that dtron knows by name, from the registry and the model itself.

python scripts/models_table.py        # writes the page's table anew; tests/docs/test_models.py says when to
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dtron.models.families import FAMILIES
from dtron.models.hf import to_hf_config
from dtron.models.llama import Llama, LlamaConfig
from dtron.models.moe import MoEConfig

PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
BEGIN, END = "<!-- made by scripts/models_table.py -->\n", "<!-- end -->\n"
SIZES = {
    "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "head_dim", "rope_theta", "norm_eps",
    "init_std", "tie_embeddings",
}  # fmt: skip


def table() -> str:
    """A line for each family: its flavors with their parameters, the model type, and what is not as in Llama."""
    lines = [
        "| `model.name` | `model.flavor` (parameters) | `model_type` | What is different from Llama |",
        "|---|---|---|---|",
    ]
    for name, flavors in FAMILIES.items():
        published = {flavor: config for flavor, config in flavors.items() if flavor != "debugmodel"}
        sizes = ", ".join(f"{flavor} ({_parameters(config)})" for flavor, config in published.items())
        config = next(iter(published.values()), flavors["debugmodel"])
        kind = to_hf_config(config)["model_type"]
        lines.append(
            f"| {name} | {sizes or 'none by name'} | {kind} | {', '.join(_differences(config)) or 'nothing'} |"
        )
    return "\n".join(lines) + "\n"


def _parameters(config: LlamaConfig) -> str:
    least = 1 + (config.moe.n_dense_layers if config.moe else 0)  # from there on, layers have the same shapes
    one, two = (_count(replace(config, n_layers=n)) for n in (least, least + 1))
    n = one + (config.n_layers - least) * (two - one)
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.0f} M"


def _count(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def _differences(part: Any) -> list[str]:
    """The keys, and values, that a plain Llama does not have; those of its parts included."""
    found = []
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name in SIZES or value == field.default:
            continue
        if isinstance(value, MoEConfig):
            found.append(f"{value.n_experts} experts, {value.top_k} per token")
        elif is_dataclass(value):
            found += [f"`{field.name}`", *_differences(value)] if field.name == "variant" else [f"`{field.name}`"]
        elif isinstance(value, tuple):
            found.append(f"`{field.name}` {', '.join(map(str, value))}")
        else:
            found.append(f"`{field.name}`" if value is True else f"`{field.name}` {value}")
    return found


def page_with_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
