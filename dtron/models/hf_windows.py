"""Sliding windows in a Hugging Face config.json: which layers have one, in and out.

transformers counts as we do: a window of n is the token itself and the n - 1 before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models.hf_fields import Fields, is_count
from dtron.models.hf_rope import pattern_of
from dtron.models.llama import LlamaConfig

__all__ = [
    "CWM", "EVERYWHERE", "GEMMA2", "MINISTRAL", "NOWHERE", "QWEN", "QWEN_MOE", "Windows", "all_but_every",
    "read_windows", "write_windows",
]  # fmt: skip

NAMES = {False: "full_attention", True: "sliding_attention"}


@dataclass(frozen=True)
class Windows:
    """How a model_type says which layers have the window, `sliding_window`.

    default: (config.json with the defaults) -> which layers do. layer_types: whether a list of this name takes its
    place. switch: whether `use_sliding_window` turns them on.
    """

    default: Callable[[Fields], list[bool]]
    layer_types: bool = True
    switch: bool = False


def _by_layer(slides: Callable[[Fields, int], bool], **more: bool) -> Windows:
    return Windows(lambda hf: [slides(hf, i) for i in range(hf["num_hidden_layers"])], **more)


def all_but_every(n: int, *, optional: bool = False) -> Windows:
    """All layers but each n-th, unless `sliding_window_pattern` is another number. optional: or the window is null."""

    def slides(hf: Fields, i: int) -> bool:
        if optional and hf["sliding_window"] is None:
            return False
        return bool((i + 1) % (hf.get("sliding_window_pattern") or n))

    return _by_layer(slides)


NOWHERE = _by_layer(lambda hf, i: False)
EVERYWHERE = _by_layer(lambda hf, i: hf["sliding_window"] is not None, layer_types=False)
MINISTRAL = _by_layer(lambda hf, i: hf["sliding_window"] is not None)
GEMMA2 = _by_layer(lambda hf, i: i % 2 == 0)
CWM = _by_layer(lambda hf, i: i % 4 != 0)
QWEN_MOE = _by_layer(lambda hf, i: hf["use_sliding_window"], layer_types=False, switch=True)
QWEN = _by_layer(lambda hf, i: hf["use_sliding_window"] and i >= hf["max_window_layers"], switch=True)


def read_windows(hf: Fields, of: Windows, file: Path | str) -> Fields:
    """LlamaConfig's windows. UserError where a list of layers is not one that we, and transformers, read."""
    if of.switch and (not hf["use_sliding_window"] or hf["sliding_window"] is None):
        hf = {**hf, "use_sliding_window": False, "sliding_window": None}
    given, layers = hf.get("layer_types"), hf["num_hidden_layers"]
    slides = of.default(hf) if not given or not of.layer_types else []
    if given:
        known = isinstance(given, list) and set(given) <= set(NAMES.values())
        if not known or (of is NOWHERE and NAMES[True] in given):
            expected = "full_attention only" if of is NOWHERE else "full_attention and sliding_attention"
            raise UserError(f"{file}: layer_types = {given!r} cannot be represented; expected {expected}")
        wanted = [kind == NAMES[True] for kind in given]
        if of is not NOWHERE and len(given) != layers:
            raise UserError(f"{file}: layer_types names {len(given)} layers; expected num_hidden_layers {layers}")
        slides = slides or wanted
        if slides != wanted:
            raise UserError(
                f"{file}: layer_types = {given!r}, which transformers does not read for model_type {hf['model_type']}: "
                f"sliding_window {hf['sliding_window']!r} is every layer's; expected one of the two"
            )
    window: Any = hf.get("sliding_window")
    if any(slides) and not is_count(window):
        raise UserError(f"{file}: sliding_window = {window!r}, and layers have one; expected a whole number above 0")
    return {"windows": pattern_of((window if slide else None for slide in slides), None)}


def write_windows(c: LlamaConfig, of: Windows) -> Fields:
    """What `read_windows` reads, where the type can say it."""
    slides = [c.window(i) is not None for i in range(c.n_layers)]
    if of is NOWHERE or (of.switch and not any(slides)):
        return {}
    fields: Fields = {"sliding_window": max((w for w in c.windows if w), default=None)}
    if of.layer_types:
        fields["layer_types"] = [NAMES[slide] for slide in slides]
    if of.switch:  # older transformers read no layer_types
        fields |= {"use_sliding_window": True, "max_window_layers": slides.index(True)}
    return fields
