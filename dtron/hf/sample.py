"""The command `dtron sample`: text from a model, written as it is generated. torch is only imported when it runs."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from dtron.data.tokenizer import TextEncoder
from dtron.errors import UserError

if TYPE_CHECKING:
    import torch

    from dtron.hf.generate import SampleOptions
    from dtron.hf.read import OpenedModel

__all__ = ["add_arguments", "run", "sample", "stream_text"]

UNFINISHED = "\ufffd"  # what a decoder makes of the bytes of a character that is not whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dtron sample`, with `run` as what it does."""
    parser.description = "Let MODEL continue text, and report how fast it did."
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint, run folder or Hugging Face folder")
    prompt = "text to continue, or - to read it from stdin; may be repeated (default: start a new text)"
    add("--prompt", metavar="TEXT", action="append", help=prompt)
    add("--max-new-tokens", type=int, default=100, metavar="N", help="at most (default: %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the most likely (default: %(default)s)")
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="of the K most likely tokens; 0: of all (default: %(default)s)",
    )
    top_p = "only the most likely tokens that together have probability P (default: %(default)s, all)"
    add("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    add("--seed", type=int, default=0, metavar="N", help="the same gives the same text (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on cpu, bfloat16 on cuda)")
    parser.set_defaults(run=run, parser=parser)


def run(given: argparse.Namespace) -> None:
    """What `add_arguments` describes. Raises UserError."""
    import torch

    from dtron.hf.generate import SampleOptions
    from dtron.hf.read import open_model

    options = SampleOptions(given.max_new_tokens, given.temperature, given.top_k, given.top_p, given.seed)
    device = _device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    prompts = _prompts(given.prompt or [""], given.parser)
    sample(open_model(given.model, device, dtype), prompts, options, sys.stdout)


def _device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; expected cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _prompts(given: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The texts, that of stdin without its last newline, which `echo` and editors put there."""
    if given.count("-") > 1:
        parser.error("--prompt - may be given once: stdin can be read once")
    try:
        texts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in given]
        for text in texts:
            text.encode()
    except UnicodeError as error:
        raise UserError(f"--prompt is not UTF-8 ({error}): expected text") from error
    return texts


def sample(opened: "OpenedModel", prompts: Sequence[str], options: "SampleOptions", out: TextIO) -> None:
    """Write each prompt, its continuation as it is generated, and a line that says how fast that was.

    A prompt without tokens, such as the empty one, starts from the token that begins a text, or else from the one that
    ends a text. Every prompt has the same seed, so its text does not depend on those before it. Raises UserError.
    """
    if opened.encoder is None:
        raise UserError(
            f"{opened.name} has no tokenizer: expected tokenizer.json (and tokenizer_config.json) beside its weights"
        )
    for number, prompt in enumerate(prompts):
        out.write("\n" if number else "")
        _sample_one(opened, opened.encoder, prompt, options, out)


def _sample_one(
    opened: "OpenedModel", encoder: TextEncoder, prompt: str, options: "SampleOptions", out: TextIO
) -> None:
    from dtron.hf.generate import generate

    ids = encoder.encode_prompt(prompt) or [encoder.eos_id if opened.bos_id is None else opened.bos_id]
    length, known = len(ids) + options.max_new_tokens, opened.max_positions
    if known is not None and length > known:
        out.write(
            f"warning: prompt and new tokens are up to {length:,}, the model was made for {known:,}: "
            "what lies beyond may be worse\n"
        )
    tokens = generate(opened.model, ids, **asdict(options), stop_ids=opened.stop_ids)
    out.write(prompt)
    out.flush()
    arrivals: list[float] = []
    start = time.perf_counter()
    for piece in stream_text(encoder, ids, _noting(tokens, arrivals)):
        out.write(piece)
        out.flush()
    ended = len(arrivals) < options.max_new_tokens
    out.write(f"\n--- {opened.name}: {_speed(start, arrivals)}{'; the model ended the text' if ended else ''}\n")


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
