"""Text to token ids: any tokenizer of the Hugging Face family, or a byte-level BPE trained on the spot."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dtron.data.sources import may_be_on_the_hub
from dtron.errors import UserError

__all__ = ["END_OF_TEXT", "TextEncoder", "eos_token", "read_tokenizer", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"  # where the tokenizer's files name no other
PIECE = 1 << 20  # characters encoded as one text
BATCH = 1 << 20  # characters encoded in one call, or a piece more: the library needs some 100 bytes for each


class TextEncoder:
    """A tokenizer with its end-of-text token, which ends every document. It can be pickled.

    json: the canonical text of tokenizer.json, without truncation and padding, which would lose or add text.
    eos, eos_id: the end-of-text token. vocab_size: one more than the largest id, for ids may have holes.
    dtype: uint16 where the ids fit, else uint32. fingerprint: sha256 (hex) of json and eos.
    Raises UserError where the text is not a tokenizer or `eos` is none of its tokens.
    """

    def __init__(self, tokenizer_json: str, eos: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json ({_short(error)}): expected what Tokenizer.save writes") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json, self.eos = self._tokenizer.to_str(), eos
        eos_id = self._tokenizer.token_to_id(eos) if eos else None
        if eos_id is None:
            raise UserError(
                f"the tokenizer has no end-of-text token {eos!r} to put between documents: "
                'name one of its tokens as "eos_token" in tokenizer_config.json'
            )
        self.eos_id: int = eos_id
        # Text that spells a special token, such as the "<s>" of HTML, stays text.
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple[type["TextEncoder"], tuple[str, str]]:
        return TextEncoder, (self.json, self.eos)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id, the special ones' included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        return max(self.vocabulary.values()) + 1

    @cached_property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @cached_property
    def fingerprint(self) -> str:
        return tokenizer_fingerprint(self.json, self.eos)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each document's token ids and `eos_id` [tokens], as `dtype`.

        A document of more than 2**20 characters is encoded in pieces, so that memory stays bounded: cut after
        a newline, else before a space, else anywhere. No text is lost, but a token that would span a cut is
        spelt by two.
        """
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _batches((i, piece) for i, text in enumerate(texts) for piece in _pieces(text)):
            encodings = self._tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (i, _), encoding in zip(batch, encodings, strict=True):
                ids[i].append(np.array(encoding.ids, self.dtype))
            del encodings, encoding  # before there are the next ones
        eos = np.array([self.eos_id], self.dtype)
        return [np.concatenate([*parts, eos]) for parts in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a text that a model shall continue, as transformers' tokenizers give them.

        Unlike in a document, text that spells a special token is that token, and what the tokenizer itself puts around
        a text, such as a token that begins it, is there.
        """
        return self._prompt_tokenizer.encode(text).ids

    @cached_property
    def _prompt_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.json)  # one of its own: how specials are read is a state of the tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def files(self) -> dict[str, str]:
        """tokenizer.json and tokenizer_config.json, as transformers and `read_tokenizer` read them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos}
        return {"tokenizer.json": self.json, "tokenizer_config.json": json.dumps(config)}

    def save(self, folder: Path) -> None:
        """Write `files` to a folder, durably."""
        for name, content in self.files().items():
            with (folder / name).open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def tokenizer_fingerprint(tokenizer_json: str, eos: str) -> str:
    """See `TextEncoder`."""
    return hashlib.sha256(f"{tokenizer_json} {eos}".encode()).hexdigest()


def _pieces(text: str) -> Iterator[str]:
    """`text` cut into pieces of at most PIECE characters."""
    start = 0
    while len(text) - start > PIECE:
        limit = start + PIECE
        end = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit)
        end = end if end > start else limit
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Lists of pieces with about BATCH characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextEncoder:
    """A byte-level BPE (Sennrich et al. 2016; bytes: Radford et al. 2019) that can spell any text.

    The same texts give the same tokenizer, however many threads train it. UserError below 257 tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"a byte-level BPE of {vocab_size} tokens: it needs at least 257 (256 bytes and end-of-text)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextEncoder(tokenizer.to_str(), END_OF_TEXT)


def read_tokenizer(name: str, cache_folder: Path | str, key: str) -> TextEncoder:
    """The tokenizer in a local folder or tokenizer.json file, else the hub's by that name, kept in `cache_folder`.

    key: the option that named it, for messages. A hub token comes from HF_TOKEN in the environment alone.
    The end-of-text token is tokenizer_config.json's eos_token, else <|endoftext|>. Raises UserError.
    """
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists() and not may_be_on_the_hub(name):
        raise UserError(f"{key} = {name!r} is no local file or folder: expected a folder with tokenizer.json")
    try:
        if file.is_file():
            text, eos = file.read_text(encoding="utf-8"), eos_token(file.with_name("tokenizer_config.json"))
        else:
            text, eos = _converted(path if path.is_dir() else name, Path(cache_folder))
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, ImportError, ...
        missing = "" if path.exists() else "is no local file or folder, and "
        raise UserError(
            f"{key} = {name!r} {missing}holds no readable tokenizer ({_short(error)}): expected a folder with "
            "tokenizer.json, or files or a name on the hub from which transformers.AutoTokenizer makes a fast tokenizer"
        ) from error
    try:
        return TextEncoder(text, eos)
    except UserError as error:
        raise UserError(f"{key} = {name!r} holds no readable tokenizer: {error}") from error


def eos_token(config_file: Path) -> str:
    """The end-of-text token that a tokenizer_config.json names, where there is one, else ours."""
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    eos = config.get("eos_token", END_OF_TEXT)
    return eos["content"] if isinstance(eos, dict) else eos


def _converted(name: Path | str, cache_folder: Path) -> tuple[str, str]:
    """(tokenizer.json, end-of-text token) of whatever files transformers reads. name: a folder, or a hub name."""
    # Read once, when the libraries are imported; without it they write to the home folder.
    os.environ.setdefault("HF_HOME", str(cache_folder / "huggingface"))
    from transformers import AutoTokenizer

    where: dict[str, Any] = {"local_files_only": True}
    if isinstance(name, str):
        # False: not even a token that lies in the home folder.
        where = {"cache_dir": str(cache_folder), "token": os.environ.get("HF_TOKEN") or False}
    tokenizer = AutoTokenizer.from_pretrained(name, **where)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token


def _short(error: Exception) -> str:
    """On one line: some of the libraries' messages are whole pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__
