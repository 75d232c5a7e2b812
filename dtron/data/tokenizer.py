"""Text to token ids: any tokenizer of the Hugging Face family, or a byte-level BPE trained on the spot."""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dtron.data.sources import may_be_on_the_hub
from dtron.errors import UserError

__all__ = [
    "END_OF_TEXT",
    "TextEncoder",
    "documents_have_special_tokens",
    "holds_tokenizer",
    "read_tokenizer",
    "train_bpe",
]

END_OF_TEXT = "<|endoftext|>"  # where the tokenizer's files name no other
PIECE = 1 << 20  # characters encoded as one text
BATCH = 1 << 20  # characters encoded in one call, or a piece more: the library needs some 100 bytes for each


class TextEncoder:
    """A tokenizer with its end-of-text token, which ends every document. It can be pickled.

    json: the canonical text of tokenizer.json, without truncation and padding, which would lose or add text.
    eos, eos_id: the end-of-text token. vocab_size: one more than the largest id, for ids may have holes.
    begins_with, ends_with: ids before and after every document's text. With `add_special_tokens` they are those that
    the tokenizer's own `encode` adds, and eos_id at the end unless it is among them; else eos_id alone.
    dtype: uint16 where the ids fit, else uint32. fingerprint: see `tokenizer_fingerprint`.
    Raises UserError where the text is not a tokenizer or `eos` is none of its tokens.
    """

    def __init__(self, tokenizer_json: str, eos: str | None, add_special_tokens: bool = True) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json ({_short(error)}): expected what Tokenizer.save writes") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos_id = self._tokenizer.token_to_id(eos) if eos else None
        if eos is None or eos_id is None:
            raise UserError(
                f"the tokenizer has no end-of-text token {eos!r} to put between documents: "
                'name one of its tokens as "eos_token" in tokenizer_config.json'
            )
        self.json, self.eos = self._tokenizer.to_str(), eos
        self.eos_id: int = eos_id
        self.begins_with, after = self._specials_around() if add_special_tokens else ([], [])
        self.ends_with = after if eos_id in after else [*after, eos_id]
        self.add_special_tokens = add_special_tokens
        # Text that spells a special token, such as the "<s>" of HTML, stays text.
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple[type["TextEncoder"], tuple[str, str, bool]]:
        return TextEncoder, (self.json, self.eos, self.add_special_tokens)

    def _specials_around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        if not self._tokenizer.num_special_tokens_to_add(is_pair=False):
            return [], []
        # Whatever text has a token: a vocabulary may lack any one letter.
        encodings = (self._tokenizer.encode(text) for text in ("a", "0", *self._tokenizer.get_vocab()))
        ids, mask = next((e.ids, e.special_tokens_mask) for e in encodings if 0 in e.special_tokens_mask)
        return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]

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
        return tokenizer_fingerprint(self.json, self.eos, self.begins_with, self.ends_with)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each document's token ids [tokens] as `dtype`: `begins_with`, those of its text, `ends_with`.

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
        before, after = np.array(self.begins_with, self.dtype), np.array(self.ends_with, self.dtype)
        return [np.concatenate([before, *parts, after]) for parts in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a document that a model shall continue: `begins_with` and those of the text.

        Unlike in a document, text that spells a special token is that token, as in transformers' tokenizers.
        """
        return [*self.begins_with, *self.encode_with_specials(text)]

    def encode_with_specials(self, text: str) -> list[int]:
        """Token ids of a text alone, in which what spells a special token is that token."""
        return self._prompt_tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _prompt_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.json)  # one of its own: how specials are read is a state of the tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def files(self) -> dict[str, str]:
        """tokenizer.json and tokenizer_config.json, as transformers and `read_tokenizer` read them.

        What they add to a text is what documents have here, but for the end-of-text token.
        """
        return {"tokenizer.json": self.json_as_used(), "tokenizer_config.json": json.dumps(self._config())}

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos}
        if self.begins_with:  # lm-eval begins with a bos_token that is named, and one of no document is untrained
            config["bos_token"] = self._tokenizer.id_to_token(self.begins_with[0])
        return config

    def json_as_used(self) -> str:
        """`json`, whose post-processor adds nothing where documents have none of what it would add."""
        if self.add_special_tokens or not self._tokenizer.num_special_tokens_to_add(is_pair=False):
            return self.json
        content = json.loads(self.json)
        processor = content["post_processor"] or {}
        kept = [part for part in processor.get("processors", [processor]) if part.get("type") == "ByteLevel"]
        content["post_processor"] = kept[0] if kept else None
        return json.dumps(content, ensure_ascii=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json as it was read, and tokenizer_config.json, durably."""
        for name, content in (("tokenizer.json", self.json), ("tokenizer_config.json", json.dumps(self._config()))):
            with (folder / name).open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def tokenizer_fingerprint(tokenizer_json: str, eos: str, begins_with: list[int], ends_with: list[int]) -> str:
    """sha256 (hex) of what decides the tokens of a document; `ends_with` ends with the id of `eos` where that is all.

    Of JSON and eos alone where documents only end in it: data and runs of versions that added nothing else are known
    by that.
    """
    around = f" {begins_with} {ends_with}" if begins_with or len(ends_with) > 1 else ""
    return hashlib.sha256(f"{tokenizer_json} {eos}{around}".encode()).hexdigest()


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


def holds_tokenizer(names: Collection[str]) -> bool:
    """Whether a folder with files of these names holds a tokenizer."""
    return not {"tokenizer.json", "tokenizer.model", "vocab.json"}.isdisjoint(names)


def read_tokenizer(
    name: str, cache_folder: Path | str, key: str, *, add_special_tokens: bool | None = None
) -> TextEncoder:
    """The tokenizer in a local folder or tokenizer.json file, else the hub's by that name, kept in `cache_folder`.

    key: the option that named it, for messages. A hub token comes from HF_TOKEN in the environment alone.
    add_special_tokens: see `TextEncoder`; None: as the documents of a folder of `dtron prepare` are, else True.
    The end-of-text token is the one that transformers takes, see `_eos_token`. Raises UserError.
    """
    path = Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"bpe[\W_]?\d*\w?", name, re.IGNORECASE):  # before the hub is asked for it
        raise UserError(
            f"{key} = {name!r}: expected bpe:N with the number of tokens, as in --tokenizer bpe:4096, which "
            "`dtron prepare` trains on the source; anything else is a file, a folder or a name on the hub"
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists() and not may_be_on_the_hub(name):
        raise UserError(f"{key} = {name!r} is no local file or folder: expected a folder with tokenizer.json")
    try:
        if file.is_file():
            text, eos = _with_eos_token(file.read_text(encoding="utf-8"), file.parent)
        else:
            _check_libraries(path)
            text, eos = _converted(path if path.is_dir() else name, Path(cache_folder))
        if add_special_tokens is None:
            add_special_tokens = documents_have_special_tokens(file.parent)
    except UserError as error:
        raise UserError(f"{key} = {name!r}: {error}") from None
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, ImportError, ...
        if "trust_remote_code" in str(error) or _names_code(path / "tokenizer_config.json"):
            raise UserError(
                f"{key} = {name!r} needs code of its own to be read (auto_map in its tokenizer_config.json), which is "
                "never run (no trust_remote_code): expected a folder with tokenizer.json, as save_pretrained of a fast "
                "tokenizer writes it"
            ) from error
        missing = "" if path.exists() else "is no local file or folder, and "
        raise UserError(
            f"{key} = {name!r} {missing}holds no readable tokenizer ({_short(error)}): expected a folder with "
            "tokenizer.json, or files or a name on the hub from which transformers.AutoTokenizer makes a fast tokenizer"
        ) from error
    try:
        return TextEncoder(text, eos, add_special_tokens)
    except UserError as error:
        raise UserError(f"{key} = {name!r} holds no readable tokenizer: {error}") from error


def documents_have_special_tokens(folder: Path) -> bool:
    """Whether documents get a tokenizer's special tokens: as in the prepared data beside it, if there are any."""
    try:
        manifest = _object(folder / "manifest.json")
    except ValueError:
        manifest = {}  # of something else
    return bool(manifest.get("add_special_tokens", "shards" not in manifest))


def _names_code(config_file: Path) -> bool:
    """Whether a tokenizer_config.json names Python code that would read the tokenizer."""
    try:
        return "AutoTokenizer" in json.loads(config_file.read_text(encoding="utf-8")).get("auto_map", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _with_eos_token(tokenizer_json: str, folder: Path) -> tuple[str, str | None]:
    """(tokenizer.json, end-of-text token), from it and the files beside it, as transformers finds the token.

    tokenizer_config.json names it, unless that has no added_tokens_decoder and special_tokens_map.json names it. Where
    neither has the key it is <|endoftext|>, if that is a token; at last that of the model, see `_eos_id`. A token that
    only added_tokens_decoder defines is added to the vocabulary, after those there and those defined before it.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    config = _object(folder / "tokenizer_config.json")
    added = config.get("added_tokens_decoder") or {}
    named = [config, _object(folder / "special_tokens_map.json")]
    default = END_OF_TEXT if tokenizer.token_to_id(END_OF_TEXT) is not None else None
    order = named if "added_tokens_decoder" in config else named[::-1]
    eos = next((content["eos_token"] for content in order if "eos_token" in content), default)
    if isinstance(eos, dict):
        eos = eos["content"]
    if eos is None and (eos_id := _eos_id(folder)) is not None:
        eos = tokenizer.id_to_token(eos_id)
    if eos and tokenizer.token_to_id(eos) is None and eos in [token["content"] for token in added.values()]:
        tokenizer.add_tokens([AddedToken(**added[id_]) for id_ in sorted(added, key=int)])
        return tokenizer.to_str(), eos
    return tokenizer_json, eos


def _eos_id(folder: Path) -> int | None:
    """The eos_token_id, of several the first, of generation_config.json or else config.json in a model's folder."""
    for name in ("generation_config.json", "config.json"):
        given = _object(folder / name).get("eos_token_id")
        for id_ in given if isinstance(given, list) else [given]:
            if isinstance(id_, int):
                return id_
    return None


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. ValueError where it holds another thing."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds a JSON {type(content).__name__}; expected an object")
    return content


def _converted(name: Path | str, cache_folder: Path) -> tuple[str, str | None]:
    """(tokenizer.json, end-of-text token) of whatever files transformers reads. name: a folder, or a hub name."""
    # Read once, when the libraries are imported; without it they write to the home folder.
    os.environ.setdefault("HF_HOME", str(cache_folder / "huggingface"))
    from transformers import AutoTokenizer

    where: dict[str, Any] = {"local_files_only": True}
    never: dict[str, Any] = {"trust_remote_code": False}  # unset, transformers asks at a terminal
    if isinstance(name, str):
        # False: not even a token that lies in the home folder.
        where = {"cache_dir": str(cache_folder), "token": os.environ.get("HF_TOKEN") or False}
    tokenizer = AutoTokenizer.from_pretrained(name, **never, **where)
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
    if eos is None and isinstance(name, Path) and (eos_id := _eos_id(name)) is not None:
        eos = backend.id_to_token(eos_id)
    return backend.to_str(), eos


def _check_libraries(folder: Path) -> None:
    """UserError if transformers would lack a library for the tokenizer.model in a folder; its message is misleading."""
    if not (file := folder / "tokenizer.model").is_file():
        return
    with file.open("rb") as opened:
        # A protobuf message begins with a field's tag, tiktoken's lines with base64.
        kind, needed = ("sentencepiece", "google.protobuf") if opened.read(1) == b"\n" else ("tiktoken", "tiktoken")
    if missing := [name for name in dict.fromkeys((kind, needed)) if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"its tokenizer.model is of {kind}, which needs {missing[0]}, and that is not installed: "
            "pip install 'dtron[tokenizers]'"
        )


def _short(error: Exception) -> str:
    """On one line: some of the libraries' messages are whole pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__
