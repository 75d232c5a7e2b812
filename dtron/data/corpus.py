"""The embedded corpus: this Python's own standard library, a source that needs no network.

One file in 20, by a hash of its path, is held out for validation: neither the model nor the byte-level BPE, which is
trained on the corpus itself, ever sees it in training.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtron.data.formats import DocumentReader, State
from dtron.data.packed import TokenDataset
from dtron.data.prepare import Log, build_once, prepare
from dtron.data.shards import FORMAT, open_store
from dtron.data.tokenizer import read_tokenizer, train_bpe
from dtron.errors import UserError

__all__ = ["StdlibSource", "load_stdlib", "prepare_stdlib"]

# Tests, and tables of literals (character sets, help topics, HTML entities, locale names), which were 2.4 of 12 MB: the
# small model of the quickstart, once it had seen them, wrote little else.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
LEFT_OUT |= {"entities.py", "stringprep.py", "_compat_pickle.py", "locale.py", "_opcode_metadata.py"}

Split = Literal["train", "validation"]


def read_sources(source: Path | str | None = None) -> dict[str, Path]:
    """The standard library's .py files, {relative posix path: file}, in sorted order.

    Only modules that Python itself lists as its standard library: that leaves out site-packages and
    files of one installation (build configuration, sitecustomize). Test suites and tables are left out too.
    """
    root = Path(source or sysconfig.get_paths()["stdlib"])
    found = {}
    for top in root.iterdir() if root.is_dir() else ():
        if top.stem in sys.stdlib_module_names:
            for path in [top] if top.is_file() else top.rglob("*.py"):
                relative = path.relative_to(root)
                if path.suffix == ".py" and not LEFT_OUT.intersection(relative.parts):
                    found[relative.as_posix()] = path
    if not found:
        raise UserError(
            f"no sources of the standard library under {root}: expected a folder with abc.py, json/ and so on; "
            "use a Python installed with its .py files, or another dataset"
        )
    return {name: found[name] for name in sorted(found)}


def is_held_out(name: str) -> bool:
    """Whether a file is validation text: 1 in 20, by a hash of its path, so that other files do not matter."""
    return int.from_bytes(hashlib.sha256(f"validation/{name}".encode()).digest()[:8], "big") % 20 == 0


@dataclass(frozen=True)
class StdlibSource:
    """One split as a `Source`: each .py file is a file with one document; bytes that are not UTF-8 are replaced."""

    name: str
    files: list[Path]
    fingerprint: str  # of names and contents

    @classmethod
    def open(cls, split: Split, source: Path | str | None = None) -> "StdlibSource":
        """source: the folder of the .py files; unset: the standard library of this Python. UserError without any."""
        named = {name: path for name, path in read_sources(source).items() if is_held_out(name) == (split != "train")}
        digest = hashlib.sha256()
        for name, path in named.items():
            content = path.read_bytes()
            digest.update(f"{len(content)} {name}\n".encode() + content)
        return cls(f"the standard library ({split})", list(named.values()), digest.hexdigest())

    @property
    def n_files(self) -> int:
        return len(self.files)

    def read(self, file: int, state: State | None = None) -> DocumentReader:
        """See `Source.read`."""
        path = self.files[file]
        rows = (("", path.read_bytes().decode(errors="replace"), {"done": True}) for _ in range(0 if state else 1))
        return DocumentReader(str(path), rows, state)

    def texts(self) -> Iterator[str]:
        """All documents."""
        return (text for file in range(self.n_files) for text in self.read(file))


def prepare_stdlib(
    cache_folder: str | Path,
    hf_assets_path: str | None = None,
    vocab_size: int = 4096,
    *,
    log: Log,
    source: str | Path | None = None,
    add_special_tokens: bool | None = None,
) -> Path:
    """Prepare both splits unless they are in the cache; returns the folder of their folders.

    In a distributed run one rank per machine calls this, then a barrier, then every rank calls
    `load_stdlib`, which then only reads. Processes that race are safe: see `build_once`.

    `vocab_size` is for the corpus's own BPE; with `hf_assets_path` that tokenizer is used as it is.
    `source`: see `StdlibSource.open`. `add_special_tokens`: see `read_tokenizer`.
    Raises UserError for an unreadable tokenizer, missing sources or an unwritable cache.
    """
    train, validation = StdlibSource.open("train", source), StdlibSource.open("validation", source)
    user = None
    if hf_assets_path:
        key = "model.hf_assets_path"
        user = read_tokenizer(hf_assets_path, cache_folder, key, add_special_tokens=add_special_tokens)
    tokenizer = user.fingerprint if user else f"bpe {vocab_size}"
    recipe = f"{FORMAT} {train.fingerprint} {validation.fingerprint} {tokenizer}"
    final = Path(cache_folder) / f"stdlib-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"

    def build(folder: Path) -> None:
        if user is None:
            log(f"training a byte-level BPE of {vocab_size} tokens on {train.n_files} files of the standard library")
        encoder = user or train_bpe(train.texts(), vocab_size)
        prepare(train, encoder, folder / "train", log=log)
        prepare(validation, encoder, folder / "validation", log=log)

    build_once(final, build)
    return final


def load_stdlib(
    cache_folder: str | Path,
    seq_len: int,
    split: Split,
    hf_assets_path: str | None = None,
    vocab_size: int = 4096,
    *,
    documents: bool = False,
    log: Log,
    source: str | Path | None = None,
    add_special_tokens: bool | None = None,
) -> TokenDataset:
    """One split of the standard library as sequences of `seq_len` tokens, memory-mapped from the cache.

    Arguments and errors: see `prepare_stdlib` and `TokenDataset`.
    """
    folder = prepare_stdlib(
        cache_folder, hf_assets_path, vocab_size, log=log, source=source, add_special_tokens=add_special_tokens
    )
    name = f"the {split} split of the standard library"
    return TokenDataset(open_store(folder / split), seq_len, documents=documents, name=name)
