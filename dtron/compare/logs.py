"""The lines of other trainers' logs, read to the keys of metrics.jsonl: torchtitan's and picotron's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["read_log"]

NUMBER = r"([-+]?(?:[\d,]*\.?\d+(?:[eE][-+]?\d+)?|nan|inf))"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
POWERS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _plain(text: str) -> float:
    return float(text.replace(",", ""))


def _percent(text: str) -> float:
    return _plain(text) / 100


def _gib(text: str) -> float:
    return _plain(text) * 2**30


def _gb(text: str) -> float:
    return _plain(text) * 1e9


def _readable(text: str) -> float:
    """12.34K -> 12340."""
    return _plain(text.rstrip("KMBT")) * POWERS[text.lstrip("0123456789.,-+")]


Field = tuple[str, Callable[[str], float]]

# step:  10  loss:  7.1234  grad_norm:  1.2345  memory:  1.23GiB(1.50%)  tps: 12,345  tflops: 12.34  mfu: 12.34%
# Its tps (wps before 2025) is of one GPU.
TORCHTITAN: dict[str, Field] = {
    "loss": (rf"(?<![\w])loss: *{NUMBER}", _plain),
    "grad_norm": (rf"\bgrad_norm: *{NUMBER}", _plain),
    "max_memory_bytes": (rf"\bmemory: *{NUMBER} *GiB", _gib),
    "tokens_per_s_per_gpu": (rf"\b[tw]ps: *{NUMBER}", _plain),
    "mfu": (rf"\bmfu: *{NUMBER}%", _percent),
}
# [rank 0] Step: 10    | Loss: 9.1234 | Global batch size:   16.38K | Tokens/s:  12.34K | Tokens/s/GPU: ...
# | Tokens:  163.84K | MFU: 12.34% | Memory usage:   1.23GB
READABLE = r"([\d.,]+[KMBT]?)"
PICOTRON: dict[str, Field] = {
    "loss": (rf"\bLoss: *{NUMBER}", _plain),
    "tokens_per_s": (rf"\bTokens/s: *{READABLE}", _readable),
    "tokens_per_s_per_gpu": (rf"\bTokens/s/GPU: *{READABLE}", _readable),
    "tokens": (rf"\bTokens: *{READABLE}", _readable),
    "mfu": (rf"\bMFU: *{NUMBER}%", _percent),
    "max_memory_bytes": (rf"\bMemory usage: *{NUMBER} *GB", _gb),
}
STEP = re.compile(r"\b(validate )?([Ss])tep: *([\d,]+)")


def read_log(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """(torchtitan or picotron, rows sorted by step, with the keys and units of metrics.jsonl); no rows: ("", []).

    Colours, time stamps and prefixes in front are passed over, and so are lines that are of no step. Of a step that
    was logged twice, by several ranks or after a resume, the last line counts.
    """
    kind, rows = "", dict[int, dict[str, Any]]()
    for line in path.read_text(errors="replace").splitlines():
        text = ANSI.sub("", line)
        step = STEP.search(text)
        if step is None:
            continue
        fields = PICOTRON if step[2] == "S" else TORCHTITAN
        found = {
            key: number_of(match[1]) for key, (form, number_of) in fields.items() if (match := re.search(form, text))
        }
        if "loss" not in found:
            continue
        kind, number = ("picotron" if step[2] == "S" else "torchtitan"), int(step[3].replace(",", ""))
        read = {"validation_loss": found["loss"]} if step[1] else found
        rows.setdefault(number, {"step": number}).update(read)
    return kind, [rows[number] for number in sorted(rows)]
