"""The command `dtron sample`: text from a model, written as it is generated. torch is only imported when it runs."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from dtron.data.tokenizer import TextEncoder
from dtron.errors import UserError
from dtron.hf.prompts import ChatTemplate, Prompt, read_prompts

if TYPE_CHECKING:
    import torch

    from dtron.hf.generate import SampleOptions
    from dtron.hf.read import OpenedModel

__all__ = ["add_arguments", "run", "sample", "stream_text"]

# Those of SampleOptions, whose module imports torch.
DEFAULTS = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
UNFINISHED = "\ufffd"  # what a decoder makes of the bytes of a character that is not whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dtron sample`, with `run` as what it does."""
    parser.description = (
        "Let MODEL continue text. The text alone goes to stdout, how fast it came to stderr. What is not given is as "
        "MODEL's generation_config.json says, or else the default."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint, run folder or Hugging Face folder")
    prompt = "text to continue, or - to read it from stdin; may be repeated (default: start a new text)"
    add("--prompt", metavar="TEXT", action="append", help=prompt)
    file = 'file with a text to continue; or .jsonl, a {"prompt": ...} per line: then stdout is JSON lines too, each '
    add("--prompt-file", metavar="FILE", action="append", help=file + 'with its "completion"; may be repeated')
    chat = "the prompts are a user's messages, put into the form of MODEL's chat template; stdout has the answers alone"
    add("--chat", action="store_true", help=chat)
    add("--max-new-tokens", type=int, metavar="N", help=f"at most (default: {DEFAULTS['max_new_tokens']})")
    temperature = f"0: always the most likely (default: {DEFAULTS['temperature']})"
    add("--temperature", type=float, metavar="T", help=temperature)
    add("--top-k", type=int, metavar="K", help=f"of the K most likely tokens; 0: of all (default: {DEFAULTS['top_k']})")
    top_p = f"only the most likely tokens that together have probability P (default: {DEFAULTS['top_p']}, all)"
    add("--top-p", type=float, metavar="P", help=top_p)
    add("--seed", type=int, metavar="N", help=f"the same gives the same text (default: {DEFAULTS['seed']})")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on cpu, bfloat16 on cuda)")
    parser.set_defaults(run=run, parser=parser)


def run(given: argparse.Namespace) -> None:
    """What `add_arguments` describes. Raises UserError."""
    import torch

    from dtron.hf.generate import SampleOptions, options_of
    from dtron.hf.read import open_model

    texts, files = given.prompt or [], given.prompt_file or []
    if [*texts, *files].count("-") > 1:
        given.parser.error("- may be given once: stdin can be read once")
    if given.chat and not (texts or files):
        given.parser.error("--chat needs a message: --prompt or --prompt-file")
    options = {name: getattr(given, name) for name in DEFAULTS if getattr(given, name) is not None}
    SampleOptions(**options)  # before the model is read, which may take long
    device = _device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    prompts = read_prompts(texts if texts or files else [""], files, chat=given.chat)
    opened = open_model(given.model, device, dtype)
    chat = ChatTemplate(opened.assets, opened.name) if given.chat else None
    chosen = options_of(opened.generation, options, f"{opened.name}/generation_config.json")
    sample(opened, prompts, chosen, sys.stdout, sys.stderr, chat)


def _device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; expected cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def sample(
    opened: "OpenedModel",
    prompts: Sequence[Prompt],
    options: "SampleOptions",
    out: TextIO,
    err: TextIO,
    chat: ChatTemplate | None = None,
) -> None:
    """Write each prompt and its continuation, as it is generated, to `out`; warnings and how fast it was to `err`.

    With a chat template it is the answers alone. If any prompt is from JSON lines, `out` gets one JSON object per
    prompt, which is the line's with its "completion".
    A prompt without tokens, such as the empty one, starts from the token that begins a text, or else from the one that
    ends a text. Every prompt has the same seed, so its text does not depend on those before it. Raises UserError.
    """
    from dtron.hf.generate import generate

    if opened.encoder is None:
        raise UserError(
            f"{opened.name} has no tokenizer: expected tokenizer.json (and tokenizer_config.json) beside its weights"
        )
    if opened.warning:
        err.write(opened.warning + "\n")
    encoder, as_json = opened.encoder, any(prompt.line is not None for prompt in prompts)
    for number, prompt in enumerate(prompts):
        # A template has its own token that begins a text.
        ids = encoder.encode_with_specials(chat.render(prompt)) if chat else encoder.encode_prompt(prompt.text)
        ids = ids or [encoder.eos_id if opened.bos_id is None else opened.bos_id]
        _warn_of_length(opened, len(ids) + options.max_new_tokens, err)
        arrivals: list[float] = []
        start = time.perf_counter()
        tokens = generate(opened.model, ids, **asdict(options), stop_ids=opened.stop_ids)
        pieces = stream_text(encoder, ids, _noting(tokens, arrivals))
        if as_json:
            given = {"prompt": prompt.text} if prompt.line is None else prompt.line
            out.write(json.dumps(given | {"completion": "".join(pieces)}, ensure_ascii=False) + "\n")
            out.flush()
        else:
            first = ("\n" if number else "") + ("" if chat else prompt.text)
            for piece in itertools.chain([first], pieces, ["\n"]):
                out.write(piece)
                out.flush()
        ended = "; the model ended the text" if len(arrivals) < options.max_new_tokens else ""
        err.write(f"--- {opened.name}: {_speed(start, arrivals)}{ended}\n")


def _warn_of_length(opened: "OpenedModel", length: int, err: TextIO) -> None:
    known = opened.max_positions
    if known is not None and length > known:
        err.write(
            f"warning: prompt and new tokens are up to {length:,}, the model was made for {known:,}: "
            "what lies beyond (its max_position_embeddings) may be worse\n"
        )


def _noting(tokens: Iterable[int], arrivals: list[float]) -> Iterator[int]:
    for token in tokens:
        arrivals.append(time.perf_counter())
        yield token


def _speed(start: float, arrivals: list[float]) -> str:
    """Time to the first token, in which the prompt is read, and the rate of those after it."""
    after = len(arrivals) - 1
    if after < 0:
        return "0 tokens"
    first_s = arrivals[0] - start
    if not after:
        return f"1 token, after {first_s:.3f} s"
    rate = after / (arrivals[-1] - arrivals[0])
    return f"{len(arrivals):,} tokens, the first after {first_s:.3f} s, then {rate:,.1f} tokens/s"


def stream_text(encoder: TextEncoder, prompt_ids: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids`, which follow `prompt_ids`, in pieces as the tokens come.

    A token's text depends on its neighbours: a character may need several, a space may vanish at the beginning. So a
    piece is what the decoded text has grown by, and waits for whole characters. The tokens of the piece before are
    decoded with it, so that it is not at the beginning, and the cost does not grow with the text.
    """
    window, done = list(prompt_ids), len(prompt_ids)  # the text of the first `done` tokens of the window is out
    written = text = encoder.decode(window)
    for token in ids:
        window.append(token)
        text = encoder.decode(window)
        whole = text.rstrip(UNFINISHED)
        if len(whole) <= len(written):
            continue
        yield whole[len(written) :]
        written = whole
        if whole == text:
            del window[:done]
            done = len(window)
            written = text = encoder.decode(window)
    if len(text) > len(written):
        yield text[len(written) :]
