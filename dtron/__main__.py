"""The command line `dtron`, also `python -m dtron`: tools for before and after a training."""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from dtron.cluster import preflight
from dtron.compare import command as compare
from dtron.data.corpus import StdlibSource
from dtron.data.prepare import SHARD_TOKENS, choose_encoder, prepare
from dtron.data.shards import TokenStore, open_store
from dtron.data.sources import Source, SourceSpec, SplitSource, open_source
from dtron.data.tokenizer import read_tokenizer
from dtron.errors import UserError, quiet_broken_pipe
from dtron.explain import command as explain
from dtron.hf import sample
from dtron.plan import command as plan
from dtron.verify import command as verify

__all__ = ["main"]

SAMPLE_TOKENS = 100  # shown per document


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 1 for a user's mistake, reported on stderr, and 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="dtron", description="Tools for before and after a training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands.add_parser("prepare", help="tokenize a source to a folder of shards, or show one"))
    _add_convert(commands.add_parser("convert", help="convert a Hugging Face folder to a checkpoint, or back"))
    sample.add_arguments(commands.add_parser("sample", help="let a model continue text"))
    text = "check and measure the machines before a run"
    preflight.add_arguments(commands.add_parser("preflight", help=text, allow_abbrev=False))
    text = "rank the layouts of a model on GPUs that need not be there"
    plan.add_arguments(commands.add_parser("plan", help=text, allow_abbrev=False))
    text = "prove that a layout trains as one process does"
    verify.add_arguments(commands.add_parser("verify", help=text, allow_abbrev=False))
    text = "runs side by side: figures, from which step they part, which keys and versions differ"
    compare.add_arguments(commands.add_parser("compare", help=text, allow_abbrev=False))
    text = "show what a layout does: who sends what to whom, what is where"
    explain.add_arguments(commands.add_parser("explain", help=text, allow_abbrev=False))
    arguments = argparse.Namespace(after_interrupt="", takes_keys=False)
    try:
        with quiet_broken_pipe():
            _, others = parser.parse_known_args(argv, arguments)
            arguments.keys = others
            if others and not arguments.takes_keys:
                parser.error(f"unrecognized arguments: {' '.join(others)}")
            return arguments.run(arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted{arguments.after_interrupt}", file=sys.stderr)
        return 130


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize every document of SOURCE to a folder for training.dataset. Run the same command again to resume "
        "after an interruption; a finished folder is not changed."
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="stdlib, a text file or folder, or a dataset of the hub")
    add(
        "--tokenizer",
        metavar="T",
        help="folder, tokenizer.json, hub name, or bpe:N to train one with N tokens on the source",
    )
    specials = "put the special tokens that the tokenizer's own encode adds, such as a BOS, around documents (default)"
    add("--add-special-tokens", action=argparse.BooleanOptionalAction, help=specials)
    add("--out", metavar="DIR", help="folder to create")
    text = "share of the documents, such as 1%%, that goes to DIR-validation instead, by a hash of each text"
    add("--held-out", metavar="SHARE", type=_share, help=text)
    text = "what a document that cannot be used does: end the command (default), or be left out, named and counted"
    add("--on-error", choices=("refuse", "skip"), default="refuse", help=text)
    add("--show", metavar="DIR", help="verify a finished folder and show its contents")
    add("--subset", help="subset (configuration) of a hub dataset")
    add("--split", default="train", help="split of a hub dataset, or of stdlib: train (default) or validation")
    add("--text-column", default="text", help="column with the text (default: text)")
    add("--processes", type=_positive, default=os.cpu_count(), help="tokenizing processes (default: one per core)")
    add("--shard-tokens", type=_positive, default=SHARD_TOKENS, help="tokens per shard (default: %(default)s)")
    add("--cache-folder", default=".cache", help="folder for downloads from the hub (default: .cache)")
    parser.set_defaults(run=_prepare, parser=parser)
    parser.set_defaults(after_interrupt=": run the same command again to resume after the last finished shard")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a Hugging Face folder (safetensors) to a checkpoint of dtron, or a checkpoint to such a folder, "
        "depending on SRC. Weights keep their values and dtype unless --dtype is given. torchtitan's checkpoints of "
        "a Llama 3 are read too."
    )
    add = parser.add_argument
    source = "checkpoint, run folder (its newest checkpoint), Hugging Face folder, or torchtitan's checkpoint"
    add("source", metavar="SRC", help=source)
    add("out", metavar="DST", help="folder to create")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of exported weights (default: unchanged)")
    add("--max-file-gb", type=float, metavar="GB", help="size of exported files (default: 5, as in transformers)")
    config = "for torchtitan's checkpoints: the model's Hugging Face config.json, or its folder"
    add("--config", metavar="FILE", help=config)
    add("--force", action="store_true", help="replace DST if it contains only a model")
    parser.set_defaults(run=_convert)


def _convert(given: argparse.Namespace) -> None:
    from dtron.hf.convert import convert  # imports torch

    convert(given.source, given.out, given.dtype, given.max_file_gb, given.config, force=given.force, say=_say)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def _share(text: str) -> float:
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share of the documents between 0 and 100%, such as 1%")
    return share


def _prepare(given: argparse.Namespace) -> None:
    if given.show:
        if given.source or given.out or given.tokenizer:
            given.parser.error("--show takes no SOURCE, --tokenizer or --out")
        return _show(open_store(given.show))
    if not (given.source and given.out and given.tokenizer):
        given.parser.error("SOURCE, --tokenizer and --out are required (or --show)")
    source_path = Path(given.source).expanduser()
    if source_path.is_dir() and Path(given.out).resolve().is_relative_to(source_path.resolve()):
        raise UserError(
            f"--out {given.out} is inside {given.source}, and would be read as part of it: choose another folder"
        )
    out, skip_bad = str(Path(given.out)), given.on_error == "skip"
    parts: dict[str, Source] = {out: _source(given)}
    if share := given.held_out:  # the small part first, which may turn out to be empty
        parts = {f"{out}-validation": SplitSource(parts[out], share, True), out: SplitSource(parts[out], share, False)}
    specials = given.add_special_tokens
    encoder = choose_encoder(
        parts[out], given.tokenizer, given.cache_folder, skip_bad=skip_bad, add_special_tokens=specials
    )
    for folder, source in parts.items():
        prepare(
            source, encoder, folder, processes=given.processes, shard_tokens=given.shard_tokens, skip_bad=skip_bad,
            log=_say,
        )  # fmt: skip
        _say(f"written to {folder}; to inspect it: dtron prepare --show {folder}")
    if given.held_out:
        _say(f"to train on it: training.dataset = {out}, validation.dataset = {out}-validation")


def _say(line: str) -> None:
    print(line, flush=True)


def _source(given: argparse.Namespace) -> Source:
    if given.source != "stdlib":
        spec = SourceSpec(given.source, None, given.subset, given.split, given.text_column)
        return open_source(spec, given.cache_folder)
    if given.split not in ("train", "validation") or given.subset:
        raise UserError(
            "stdlib has the splits train and validation and no subsets: use --split train or --split validation"
        )
    return StdlibSource.open(given.split)


def _show(store: TokenStore) -> None:
    store.verify()
    _say(f"{store.folder}: {store.source['name']}")
    _say(f"{store.n_documents:,} documents, {store.n_tokens:,} tokens ({store.dtype}, vocabulary {store.vocab_size:,})")
    if store.skipped:
        _say(f"bad documents that were skipped: {store.skipped:,}")
    _say(f"{len(store.shards)} shards, verified: the checksum of every block matches\n")
    _say("tokens per document    documents")
    for power, count in enumerate(_histogram(store)):
        if count:
            bar = "#" * -(-40 * count // store.n_documents)
            _say(f"{1 << power:>9,} to {(2 << power) - 1:<9,} {count:>9,}  {bar}")
    encoder = read_tokenizer(str(store.folder), store.folder, "--show")
    begin, end = encoder.decode(store.begins_with), encoder.decode(store.ends_with)
    _say(f"\ndocuments {f'begin with {begin!r} and ' if begin else ''}end with {end!r}")
    for number in sorted({0, store.n_documents // 2, store.n_documents - 1}):
        start, stop = store.document(number)
        more = " ..." if stop - start > SAMPLE_TOKENS else ""
        text = encoder.decode(store.read(start, min(stop, start + SAMPLE_TOKENS)).tolist())
        _say(f"\n--- document {number:,}: {stop - start:,} tokens\n{text}{more}")


def _histogram(store: TokenStore) -> list[int]:
    """Counts of documents with 1, 2 to 3, 4 to 7, ... tokens, end-of-text included."""
    counts = np.zeros(64, np.int64)
    for shard in range(len(store.shards)):
        counts += np.bincount(np.frexp(store.document_lengths(shard))[1] - 1, minlength=64)
    return counts.tolist()


if __name__ == "__main__":
    sys.exit(main())
