"""What `dtron sample` continues: texts, files of text, JSON lines, and conversations in a model's own form."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.errors import UserError

__all__ = ["ChatTemplate", "Prompt", "read_prompts", "unpacked"]

JSON_LINES = (".jsonl", ".ndjson")  # how files of JSON lines are named; any other is one text

Messages = list[dict[str, Any]]  # of a conversation, each with role and content


@dataclass(frozen=True)
class Prompt:
    """A text or, where there are messages, a conversation. line: the object of its JSON line, if it is from one."""

    text: str
    messages: Messages | None = None
    line: dict[str, Any] | None = None


def read_prompts(texts: Sequence[str], files: Sequence[str], *, chat: bool) -> list[Prompt]:
    """The prompts of the command line, then those of files; `-` is stdin, whose last newline `echo` put there.

    chat: JSON lines may hold messages. UserError for what cannot be read, naming the line of JSON lines.
    """
    prompts = []
    for text in texts:
        with _utf8("--prompt"):
            prompts.append(Prompt(sys.stdin.read().removesuffix("\n") if text == "-" else text))
            prompts[-1].text.encode()
    for name in files:
        with _utf8(f"--prompt-file {name}"):
            content = sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8-sig")
        if not content.strip():
            raise UserError(f"--prompt-file {name} is empty: expected a text, or JSON lines in a file named .jsonl")
        if name.endswith(JSON_LINES):
            for number, line in enumerate(content.split("\n"), 1):  # splitlines would also cut inside of texts
                if line.strip():
                    prompts.append(_json_prompt(line, f"--prompt-file {name}, line {number}", chat))
        else:
            prompts.append(Prompt(content.removesuffix("\n")))
    return prompts


@contextlib.contextmanager
def _utf8(option: str) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        raise UserError(f"{option} is not UTF-8 ({error}): expected text") from error
    except OSError as error:
        raise UserError(f"{option} cannot be read ({error.strerror}): expected a file of text or JSON lines") from None


def _json_prompt(line: str, place: str, chat: bool) -> Prompt:
    expected = 'expected an object such as {"prompt": "Once upon a time"}'
    if chat:
        expected += ' or {"messages": [{"role": "user", "content": "Hello"}]}'
    try:
        given = json.loads(line)
        line.encode(), json.dumps(given, ensure_ascii=False).encode()  # a lone surrogate is no text
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error}): {expected}") from None
    if isinstance(given, str):
        given = {"prompt": given}
    if isinstance(given, dict):
        text, messages = given.get("prompt"), given.get("messages")
        if isinstance(text, str) and messages is None:
            return Prompt(text, None, given)
        if chat and text is None and isinstance(messages, list) and messages and _are_messages(messages):
            return Prompt("", messages, given)
        if messages is not None and not chat:
            raise UserError(f"{place} holds messages: give --chat to put them into the model's form")
    raise UserError(f"{place}: {expected}")


def _are_messages(messages: list[Any]) -> bool:
    return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)


@contextlib.contextmanager
def unpacked(assets: Mapping[str, bytes]) -> Iterator[Path]:
    """The files beside a model's weights in a local folder, since their readers take nothing else."""
    with tempfile.TemporaryDirectory(prefix="dtron-") as folder:
        for name, content in assets.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


class ChatTemplate:
    """The chat template of a model's tokenizer, as transformers applies it. UserError where there is none."""

    def __init__(self, assets: Mapping[str, bytes], name: str) -> None:
        from transformers import AutoTokenizer

        self._name = name
        with unpacked(assets) as folder:
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            except Exception as error:  # the libraries raise all kinds
                raise UserError(f"--chat: transformers cannot read the tokenizer of {name}: {error}") from error
        if not self._tokenizer.chat_template:
            raise UserError(
                f"--chat: {name} has no chat template: expected chat_template.jinja, or chat_template in "
                "tokenizer_config.json, beside its weights; leave --chat out for a base model"
            )

    def render(self, prompt: Prompt) -> str:
        """The conversation up to where the model answers: the prompt's messages, or its text as the user's one."""
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises
            raise UserError(f"--chat: the template of {self._name} refuses the messages: {error}") from error
        return str(text)
