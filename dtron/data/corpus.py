"""The embedded corpus: this Python's own standard library, tokenized once and memory-mapped.

The way of the data: source files -> held-out split by file -> byte-level BPE trained on the training
files -> one run of token ids per split, with an end-of-text token after each file -> .npy files in a
cache folder named by a hash of all that shaped them -> sequences of seq_len tokens.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import uuid
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dtron.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TokenDataset", "load_stdlib", "prepare_stdlib", "unigram_entropy"]

FORMAT = 1  # of the cache folder; a change makes old folders unused, never misread
END_OF_TEXT = "<|endoftext|>"
TEST_FOLDERS = {"test", "tests", "idle_test"}
FILES_A_BATCH = 200

Log = Callable[[str], None]


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies of `tokens` itself: the least loss of a model blind to context."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / tokens.size
    return float(-(shares * np.log(shares)).sum())


class TokenDataset:
    """Sequences cut from one run of tokens: sequence i is tokens[i*S : i*S + S + 1], S = seq_len.

    inputs [S] are its first S tokens and labels [S] its last S, both int64, so every token but the
    first is predicted at most once. A sequence may span files; the end-of-text token marks the border.

    `fingerprint` names the tokens' content: equal on all ranks and on resume, or the data changed.
    Raises UserError when there are too few tokens for one sequence.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        *,
        vocab_size: int,
        tokenizer_json: str | None = None,
        fingerprint: str = "",
        name: str = "the data set",
    ) -> None:
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"{name} has {len(tokens)} tokens, but one sequence of seq_len = {seq_len} needs {seq_len + 1}: "
                f"lower seq_len to {max(1, len(tokens) - 1)} or less, or give more data"
            )
        self.tokens, self.seq_len = tokens, seq_len
        self.vocab_size, self.tokenizer_json, self.fingerprint = vocab_size, tokenizer_json, fingerprint

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        window = self.tokens[i * self.seq_len : (i + 1) * self.seq_len + 1].astype(np.int64)
        return window[:-1], window[1:]

    @cached_property
    def unigram_entropy(self) -> float:
        """Nats a token; see `unigram_entropy`."""
        return unigram_entropy(self.tokens)


def read_sources(source: Path | None = None) -> dict[str, bytes]:
    """The standard library's .py files, {relative posix path: content}, in sorted order.

    Only modules that Python itself lists as its standard library: that leaves out site-packages and
    files of one installation (build configuration, sitecustomize). Test suites are left out too.
    """
    root = source or Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for top in root.iterdir() if root.is_dir() else ():
        if top.stem in sys.stdlib_module_names:
            for path in [top] if top.is_file() else top.rglob("*.py"):
                relative = path.relative_to(root)
                if path.suffix == ".py" and not TEST_FOLDERS.intersection(relative.parts):
                    found[relative.as_posix()] = path
    if not found:
        raise UserError(
            f"no sources of the standard library under {root}: expected a folder with abc.py, json/ and so on; "
            "use a Python installed with its .py files, or another dataset"
        )
    return {name: found[name].read_bytes() for name in sorted(found)}


def is_held_out(name: str) -> bool:
    """Whether a file is validation text: 1 in 20, by a hash of its path, so that other files do not matter."""
    return int.from_bytes(hashlib.sha256(f"validation/{name}".encode()).digest()[:8], "big") % 20 == 0


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE (Sennrich et al. 2016; bytes: Radford et al. 2019) that can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    return tokenizer


def read_tokenizer(hf_assets_path: str) -> tuple["Tokenizer", str]:
    """The user's tokenizer and its end-of-text token, from a local folder in Hugging Face's format."""
    from tokenizers import Tokenizer

    folder = Path(hf_assets_path)
    given = f"model.hf_assets_path = {hf_assets_path!r}"
    if not folder.is_dir():
        raise UserError(f"{given} is not a folder: give a local folder that holds tokenizer.json, or leave it unset")
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config_file = folder / "tokenizer_config.json"
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
            eos = config.get("eos_token", END_OF_TEXT)
            eos = eos["content"] if isinstance(eos, dict) else eos
        else:
            from transformers import AutoTokenizer

            converted = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            tokenizer, eos = Tokenizer.from_str(converted.backend_tokenizer.to_str()), converted.eos_token
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, ImportError, ...
        reason = " ".join(str(error).split())[:200]  # some of the libraries' messages are whole pages
        raise UserError(
            f"{given} holds no readable tokenizer ({reason}): expected tokenizer.json, or files from which "
            "transformers.AutoTokenizer makes a fast tokenizer without a network"
        ) from error
    if eos is None or tokenizer.token_to_id(eos) is None:
        raise UserError(
            f"{given}: the tokenizer has no end-of-text token {eos!r} to put between files: "
            'name one of its tokens as "eos_token" in tokenizer_config.json'
        )
    # tokenizer.json may carry the settings of some fine-tuning; a cut file would be lost text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, eos


def encode_files(tokenizer: "Tokenizer", eos: str, texts: list[str], log: Log, what: str) -> np.ndarray:
    """Token ids of all texts, each followed by `eos`: uint16 where the vocabulary allows, else uint32."""
    end = tokenizer.token_to_id(eos)
    # Text that spells a special token, such as the "<s>" of HTML, stays text.
    tokenizer.encode_special_tokens = True
    dtype = np.uint16 if vocabulary(tokenizer) <= 1 << 16 else np.uint32
    pieces = [np.empty(0, dtype)]
    for first in range(0, len(texts), FILES_A_BATCH):
        batch = texts[first : first + FILES_A_BATCH]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], dtype))
        log(f"tokenizing the standard library ({what}): {first + len(batch)} of {len(texts)} files")
    return np.concatenate(pieces)


def vocabulary(tokenizer: "Tokenizer") -> int:
    """One more than the largest id the tokenizer can emit: ids may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _cache_key(sources: dict[str, bytes], recipe: str) -> str:
    digest = hashlib.sha256(f"{FORMAT}\n{recipe}\n".encode())
    for name, content in sources.items():
        digest.update(f"{len(content)} {name}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _build(
    folder: Path, sources: dict[str, bytes], user: tuple["Tokenizer", str] | None, vocab_size: int, log: Log
) -> None:
    """Write the whole content of a cache folder into `folder`."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for name, content in sources.items():
        texts["validation" if is_held_out(name) else "train"].append(content.decode("utf-8", errors="replace"))
    if user is None:
        log(f"training a byte-level BPE of {vocab_size} tokens on {len(texts['train'])} files of the standard library")
    tokenizer, eos = user or (train_bpe(texts["train"], vocab_size), END_OF_TEXT)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    fingerprints = {}
    for split, split_texts in texts.items():
        tokens = encode_files(tokenizer, eos, split_texts, log, split)
        np.save(folder / f"{split}.npy", tokens)
        fingerprints[split] = hashlib.sha256(tokens.tobytes()).hexdigest()
    meta = {"vocab_size": vocabulary(tokenizer), "end_of_text": eos, "fingerprints": fingerprints}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def prepare_stdlib(
    cache_folder: str | Path,
    hf_assets_path: str | None = None,
    vocab_size: int = 4096,
    *,
    log: Log,
    source: str | Path | None = None,
) -> Path:
    """Build the tokenized standard library unless it is in the cache; returns its folder.

    In a distributed run one rank a machine calls this, then a barrier, then every rank calls
    `load_stdlib`, which then only reads. Processes that race are safe, merely wasteful: each builds
    in a folder of its own, the first to finish moves it into place, and a killed one leaves only a
    `.partial-` folder that nothing reads.

    `vocab_size` is for the corpus's own BPE; with `hf_assets_path` that tokenizer is used as it is.
    `source`: the folder of the .py files; unset: the standard library of this Python.
    Raises UserError for an unreadable tokenizer, missing sources or an unwritable cache.
    """
    if vocab_size < 257:
        raise UserError(f"a byte-level BPE of {vocab_size} tokens: it needs at least 257 (256 bytes and end-of-text)")
    sources = read_sources(Path(source) if source else None)
    user = read_tokenizer(hf_assets_path) if hf_assets_path else None
    recipe = f"{user[0].to_str()} {user[1]}" if user else f"bpe {vocab_size}"
    final = Path(cache_folder) / f"stdlib-{_cache_key(sources, recipe)}"
    if final.is_dir():
        return final
    partial = final.with_name(f".partial-{final.name}-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"job.cache_folder = {str(cache_folder)!r} cannot be written ({error}): name a folder that can"
        ) from error
    try:
        _build(partial, sources, user, vocab_size, log)
        os.replace(partial, final)
    except OSError:
        if not final.is_dir():  # else another process was first: its content is the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def load_stdlib(
    cache_folder: str | Path,
    seq_len: int,
    split: Literal["train", "validation"],
    hf_assets_path: str | None = None,
    vocab_size: int = 4096,
    *,
    log: Log,
    source: str | Path | None = None,
) -> TokenDataset:
    """One split of the standard library as sequences of `seq_len` tokens, memory-mapped from the cache.

    The validation files (1 in 20) are never trained on, neither by the model nor by the BPE.
    Arguments and errors: see `prepare_stdlib` and `TokenDataset`.
    """
    folder = prepare_stdlib(cache_folder, hf_assets_path, vocab_size, log=log, source=source)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return TokenDataset(
        np.load(folder / f"{split}.npy", mmap_mode="r"),
        seq_len,
        vocab_size=meta["vocab_size"],
        tokenizer_json=str(folder / "tokenizer.json"),
        fingerprint=meta["fingerprints"][split],
        name=f"the {split} split of the standard library",
    )
