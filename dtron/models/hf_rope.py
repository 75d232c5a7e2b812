"""Rotary settings of a Hugging Face config.json, in and out; `called` and `file` are what messages call it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from dtron.errors import UserError
from dtron.models.llama import LlamaConfig
from dtron.models.rope import SCALINGS, DynamicScaling, RopeScaling

__all__ = ["pattern_of", "read_rope", "read_scaling", "write_rope"]

Fields = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types


def pattern_of(kinds: Iterable[Any], plain: Any) -> tuple[Any, ...]:
    """The shortest pattern that, repeated, gives the kind of each layer; () where all are `plain`."""
    layers = tuple(kinds)
    if all(kind == plain for kind in layers):
        return ()
    return next(
        layers[:n] for n in range(1, len(layers) + 1) if all(kind == layers[i % n] for i, kind in enumerate(layers))
    )


def read_rope(hf: Fields, file: Path | str, *, partial: bool = False) -> Fields:
    """Of LlamaConfig: from `rope_parameters` of newer files, from `rope_theta` and `rope_scaling` of older ones.

    partial: whether models of this type may rotate a part of each head.
    """
    rope: Fields = {"rope_theta": hf["rope_theta"]}
    if (share := hf.get("partial_rotary_factor")) is not None:
        rope["partial_rotary_factor"] = share
    local: Fields = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = hf.get(name) or {}
        if not isinstance(given, dict):
            raise UserError(f"{file}: {name} = {given!r}; expected an object, or null")
        of_full, of_sliding = _by_kind_of_layer(given, name, hf.get("layer_types") or [], file)
        rope |= of_full
        local |= of_sliding
    theta = _number(rope, "rope_theta", file)
    share = 1.0 if rope.get("partial_rotary_factor") is None else _number(rope, "partial_rotary_factor", file)
    if share > 1 or (share != 1 and not partial):
        raise UserError(f"{file}: partial_rotary_factor = {share:g} cannot be represented; expected 1")
    scaling = read_scaling(_completed(hf, rope), str(file))
    fields: Fields = {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": share}
    if not local and hf.get("rope_local_base_freq"):
        local = {"rope_theta": hf["rope_local_base_freq"]}
    if not local:
        return fields
    kind = local.get("rope_type", local.get("type", "default"))
    if kind != "default":
        raise UserError(f"{file}: rope scaling {kind!r} of {SLIDING} layers cannot be represented; expected default")
    if local.get("partial_rotary_factor", share) != share:
        raise UserError(f"{file}: another partial_rotary_factor of {SLIDING} layers cannot be represented")
    fields["local_rope_theta"] = _number({"rope_theta": theta} | local, "rope_theta", file)
    kinds = ("local" if kind == SLIDING else "global" for kind in hf.get("layer_types") or [])
    return fields | {"ropes": pattern_of(kinds, "global")}


def _by_kind_of_layer(rope: Fields, name: str, layers: list[str], file: Path | str) -> tuple[Fields, Fields]:
    """Settings of most layers, and where those with a window have others, theirs."""
    nested = {kind: fields for kind, fields in rope.items() if isinstance(fields, dict)}
    if not nested:
        return rope, {}
    flat = [field for field, value in rope.items() if field not in nested and value is not None]
    if flat:
        raise UserError(
            f"{file}: {name} has settings by kind of layer ({', '.join(nested)}) and others beside ({flat[0]})"
        )
    first, *others = nested.values()
    if FULL not in nested and any(other != first for other in others):
        raise UserError(
            f"{file}: {name} has settings of {', '.join(nested)}, which differ and cannot be represented; expected "
            f"those of {FULL}"
        )
    full = nested.get(FULL, first)
    local = nested.get(SLIDING, full) if SLIDING in layers else full
    return full, {} if local == full else local


def _completed(hf: Fields, rope: Fields) -> Fields:
    """Scaling fields, with those that transformers takes from elsewhere in the config.json."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "yarn") and "short_factor" in rope:  # Phi-3's older names
        kind = "longrope"
    longest = hf.get("max_position_embeddings")
    trained = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
    if kind == DynamicScaling.rope_type:
        trained = longest
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope") and longest and trained:
        factor = longest / trained
    return rope | {"rope_type": kind, "factor": factor, "original_max_position_embeddings": trained}


def read_scaling(given: Mapping[str, Any], called: str) -> RopeScaling | None:
    """The scaling that the fields of a `rope_scaling` object describe; None: none. UserError, naming the field."""
    kind = given["rope_type"]
    if kind == "default":
        return None
    if kind not in SCALINGS:
        known = ["default", *SCALINGS]
        near = get_close_matches(str(kind), known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"{called}: rope scaling of type {kind!r} cannot be represented{hint}; expected one of {', '.join(known)}"
        )
    values: Fields = {}
    for field in dataclasses.fields(SCALINGS[kind]):
        value = given.get(field.name)
        if value is not None and field.name != "length":
            values[field.name] = _checked(field.name, field.type, value, called)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{called}: the {kind} rope scaling has no {field.name}; set it")
    return SCALINGS[kind](**values)


def _checked(name: str, kind: Any, value: Any, called: str) -> Any:
    """A field's value in its type."""
    if kind is bool:
        right, expected = isinstance(value, bool), "true or false"
    elif kind is int:
        right, expected = _is_positive(value) and value == int(value), "a whole number above 0"
    elif kind == tuple[float, ...]:
        right, expected = isinstance(value, list) and all(map(_is_positive, value)), "a list of positive numbers"
        return tuple(map(float, value)) if right else _refuse(called, name, value, expected)
    else:
        kind, right, expected = float, _is_positive(value), "a positive number"
    return kind(value) if right else _refuse(called, name, value, expected)


def _refuse(called: Path | str, name: str, value: Any, expected: str) -> NoReturn:
    raise UserError(f"{called}: {name} = {value!r}; expected {expected}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _number(fields: Fields, name: str, file: Path | str) -> float:
    if not _is_positive(fields[name]):
        _refuse(file, name, fields[name], "a positive number")
    return float(fields[name])


def write_rope(c: LlamaConfig, *, partial: bool = False) -> Fields:
    """What `read_rope` reads, by names that older and newer readers both know where there are such."""
    rope: Fields = {"rope_theta": c.rope_theta}
    if partial:
        rope["partial_rotary_factor"] = c.partial_rotary_factor
    scaling: Fields = {"rope_type": "default"}
    if s := c.rope_scaling:
        rope["rope_scaling"] = scaling = _written(s)
        if isinstance(s, DynamicScaling):  # readers take it from there
            rope["max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if "local" in c.ropes:
        rope["rope_local_base_freq"] = c.local_rope_theta  # Gemma 3's name
        local = {"rope_type": "default", "rope_theta": c.local_rope_theta}
        rope["rope_parameters"] = {FULL: scaling | {"rope_theta": c.rope_theta}, SLIDING: local}
    return rope


def _written(s: RopeScaling) -> Fields:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(s).items()}
    return {"rope_type": s.rope_type} | {n: value for n, value in values.items() if value is not None and n != "length"}
