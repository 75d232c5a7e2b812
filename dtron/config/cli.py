"""The command line: `--section.key value` to settings, and the help that lists every key."""

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from dtron.config.keys import COMMAND_LINE, KEYS, SECTIONS, Key, Setting, checked, suggestion
from dtron.config.toml import toml_value
from dtron.config.torchtitan import RENAMED
from dtron.errors import Mistakes, UserError

__all__ = ["HelpRequested", "SHORT_FORMS", "help_text", "parse_arguments"]

SHORT_FORMS = {
    "dp": "parallelism.data_parallel_shard_degree",
    "dp_replicate": "parallelism.data_parallel_replicate_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
}

USAGE = """\
Usage: train.py --job.config_file FILE.toml [--section.key VALUE ...]

A file may begin with base = "other.toml" (relative to itself) and then states only what differs.
The command line overrides the file:
  --training.seq_len 128      or --training.seq-len=128; the last one counts
  --compile.enable            or --compile.enable true; off: --compile.no_enable or --compile.enable false
  --compile.components a b    or a,b, or --compile.components=a,b; an empty list: --compile.components=
  --training.dataset_path=    none, where a key may be unset; the word none does the same
Lists of lists and of tables are written as JSON."""


class HelpRequested(Exception):
    """The command line asked for --help; the message is the text to print."""


def parse_arguments(argv: list[str], mistakes: Mistakes) -> dict[str, Setting]:
    """The overrides of the command line by dotted name, checked; of a repeated key, the last value counts.

    mistakes: takes what is wrong with each argument. Raises HelpRequested where --help or -h is among them.
    """
    if "--help" in argv or "-h" in argv:
        raise HelpRequested(help_text())
    settings: dict[str, Setting] = {}
    start = 0
    while start < len(argv):
        end = start + 1
        while end < len(argv) and not argv[end].startswith("--"):
            end += 1
        with mistakes.collect():
            _check_utf8(argv[start:end])
            key, value = _option(argv[start], argv[start + 1 : end])
            settings[key.name] = Setting(checked(key, value, COMMAND_LINE), COMMAND_LINE, -1)
        start = end
    return settings


def _check_utf8(words: list[str]) -> None:
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python represents bytes that are not UTF-8
            raise UserError(f"{COMMAND_LINE}: {word!r} is not UTF-8 text; expected names and values in UTF-8")


def _option(token: str, words: list[str]) -> tuple[Key, Any]:
    """The key that `token` names, and its value: the text after the token's `=`, or the words after the token."""
    if not token.startswith("--") or token == "--":
        raise _stray(token)
    option, equals, attached = token.partition("=")
    if equals and words:
        raise _stray(words[0])
    key, negated = _find(option, [attached, *words])
    if negated:
        if equals or words:
            raise UserError(f"{COMMAND_LINE}: {option} takes no value; {option} alone sets {key.name} to false")
        return key, False
    if key.is_list_of_words:
        items = [item for word in ([attached] if equals else words) for item in word.split(",") if word]
        if not (equals or words):
            raise UserError(f"{COMMAND_LINE}: {option} needs at least one value; an empty list is {option}=")
        as_in_a_file = _from_text(key, attached if equals else words[0])
        if isinstance(as_in_a_file, list):
            return key, as_in_a_file
        return key, items
    if len(words) > 1:
        raise _stray(words[1])
    if not (equals or words):
        if key.kind is bool:
            return key, True
        raise UserError(f"{COMMAND_LINE}: {option} needs a value: {option} {type_text(key)}")
    return key, _from_text(key, attached if equals else words[0])


def _stray(word: str) -> UserError:
    expected = "--section.key value, or --help"
    if word.endswith(".toml"):
        expected = f"a configuration file as --job.config_file {word}"
    return UserError(f"{COMMAND_LINE}: stray argument {word!r}; expected {expected}")


def _find(option: str, words: list[str]) -> tuple[Key, bool]:
    """The key of `--section.key` or of a short form; and whether it is a negated boolean, `--section.no_key`.

    words: that follow, for the hint of an unknown option.
    """
    name = option[2:].replace("-", "_")
    name = SHORT_FORMS.get(name, name)
    if name in KEYS:
        return KEYS[name], False
    section, _, leaf = name.rpartition(".")
    positive = KEYS.get(f"{section}.{leaf.removeprefix('no_')}")
    if positive and positive.kind is bool:
        return positive, True
    if name in SECTIONS:
        raise UserError(f"{COMMAND_LINE}: {option} is a section; expected one of its keys: {option}.key value")
    if renamed := RENAMED.get(name):
        raise UserError(f'{COMMAND_LINE}: "{name}" is torchtitan\'s old name of "{renamed.name}"; use that')
    files = [word for word in words if word.endswith(".toml")]
    if "." not in name and (files or name.startswith("conf")):
        file = files[0] if files else "FILE.toml"
        raise UserError(f'{COMMAND_LINE}: unknown key "{name}"; did you mean --job.config_file {file}?')
    raise UserError(f'{COMMAND_LINE}: unknown key "{name}"{suggestion(name, KEYS)}')


def _from_text(key: Key, text: str) -> Any:
    """`text` as a value of the key's type; text that is none is returned unchanged, for `checked` to reject."""
    if key.optional and text.lower() in ("", "none", "null"):
        return None
    if key.kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if key.kind in (int, float):
            return key.kind(text)
        return json.loads(text) if get_origin(key.kind) is list else text
    except (ValueError, RecursionError):
        return text


def type_text(key: Key) -> str:
    """The key's type for the help: `int>=1`, `linear|sqrt|cosine`, `str|none`."""
    choices = get_args(key.kind)
    if get_origin(key.kind) is list and key.is_list_of_words:
        text = "list[str]" if choices[0] is str else f"list[{'|'.join(get_args(choices[0]))}]"
    elif get_origin(key.kind) is Literal:
        text = "|".join(choices)
    else:
        text = str(key.kind).replace("dtron.config.sections.", "") if get_origin(key.kind) else key.kind.__name__
    least = "" if key.minimum is None else f">={key.minimum}"
    return text + least + ("|none" if key.optional else "")


def help_text() -> str:
    """Usage, short forms, and every section and key with type, default and meaning, 120 columns wide."""
    lines = [USAGE, "", "Short forms:"]
    lines += [f"  --{short.replace('_', '-') + ' N':<17} --{name} N" for short, name in SHORT_FORMS.items()]
    section = ""
    for key in KEYS.values():
        its_section, _, leaf = key.name.rpartition(".")
        if its_section != section:
            section = its_section
            lines += ["", f"[{section}]"]
        default = "none" if key.default is None else toml_value(key.default)
        left = f"  {leaf}: {type_text(key)} = {default}"
        if len(left) > 120:
            left = f"  {leaf}: {type_text(key)}\n      = {default}"
        meaning = f"(not supported: {key.unsupported}; only {default} accepted)" if key.unsupported else key.help
        right = textwrap.wrap(meaning, 68)
        if len(left) > 50:  # too long for its column: the meaning starts on the next line
            lines.append(left)
            left = ""
        lines += [f"{a:<50}  {b}" for a, b in zip([left] + [""] * len(right), right, strict=False)]
    return "\n".join(lines)
