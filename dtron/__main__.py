"""The command line `dtron`, also `python -m dtron`: what is done before and after a training, which is train.py."""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from dtron.cluster import preflight
from dtron.data.corpus import StdlibSource
from dtron.data.prepare import SHARD_TOKENS, choose_encoder, prepare
from dtron.data.shards import TokenStore, open_store
from dtron.data.sources import Source, SourceSpec, open_source
from dtron.data.tokenizer import read_tokenizer
from dtron.errors import UserError, quiet_broken_pipe
from dtron.hf import sample

__all__ = ["main"]

SAMPLE_TOKENS = 100  # shown of a document


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 1 for a user's mistake, told on stderr, and 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="dtron", description="Tools for what comes before and after a training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands.add_parser("prepare", help="tokenize a source into a folder of shards, or show one"))
    _add_convert(commands.add_parser("convert", help="turn a Hugging Face folder into a checkpoint, or back"))
    sample.add_arguments(commands.add_parser("sample", help="let a model continue text"))
    ranks = "check and measure the machines that a run is to start on"
    preflight.add_arguments(commands.add_parser("preflight", help=ranks, allow_abbrev=False))
    arguments = argparse.Namespace(after_interrupt="", takes_keys=False)
    try:
        with quiet_broken_pipe():
            _, others = parser.parse_known_args(argv, arguments)
            arguments.keys = others
            if others and not arguments.takes_keys:
                parser.error(f"unrecognized arguments: {' '.join(others)}")
            arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted{arguments.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize every document of SOURCE into a folder that training.dataset can name. The same command goes on "
        "after a run that was ended; a finished folder is left as it is."
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="stdlib, a file or folder of text, or a dataset of the hub")
    add("--tokenizer", metavar="T", help="folder, tokenizer.json, hub name, or bpe:N: trained on the source, N tokens")
    add("--out", metavar="DIR", help="folder to make")
    add("--show", metavar="DIR", help="check a finished folder and show what is in it")
    add("--subset", help="subset (configuration) of a hub dataset")
    add("--split", default="train", help="split of a hub dataset, or of stdlib: train (the default), validation")
    add("--text-column", default="text", help="column that holds the text (default: text)")
    add("--processes", type=_positive, default=os.cpu_count(), help="that tokenize (default: one for every core)")
    add("--shard-tokens", type=_positive, default=SHARD_TOKENS, help="tokens a shard (default: %(default)s)")
    add("--cache-folder", default=".cache", help="for what comes from the hub (default: .cache)")
    parser.set_defaults(run=_prepare, parser=parser)
    parser.set_defaults(after_interrupt=": the same command goes on after the last finished shard")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn a folder of Hugging Face (safetensors) into a checkpoint of dtron, or a checkpoint into such a folder, "
        "depending on what SRC is. Weights keep their values and dtype unless --dtype names another. torchtitan's "
        "checkpoints of a Llama 3 are read too."
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="checkpoint, run folder (its newest checkpoint), Hugging Face or torchtitan's",
    )
    add("out", metavar="DST", help="folder to make")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of exported weights (default: as they are)")
    add("--max-file-gb", type=float, metavar="GB", help="size of exported files (default: 5, as transformers has it)")
    config = "for torchtitan's checkpoints: the model's Hugging Face config.json, or its folder"
    add("--config", metavar="FILE", help=config)
    add("--force", action="store_true", help="replace DST where it holds a model and nothing else")
    parser.set_defaults(run=_convert)


def _convert(given: argparse.Namespace) -> None:
    from dtron.hf.convert import convert  # and with it torch

    convert(given.source, given.out, given.dtype, given.max_file_gb, given.config, force=given.force, say=_say)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _prepare(given: argparse.Namespace) -> None:
    if given.show:
        if given.source or given.out or given.tokenizer:
            given.parser.error("--show takes no SOURCE, --tokenizer or --out")
        return _show(open_store(given.show))
    if not (given.source and given.out and given.tokenizer):
        given.parser.error("SOURCE, --tokenizer and --out are needed (or --show)")
    place = Path(given.source).expanduser()
    if place.is_dir() and Path(given.out).resolve().is_relative_to(place.resolve()):
        raise UserError(
            f"--out {given.out} lies inside {given.source}, and would be read as a part of it: name another"
        )
    source = _source(given)
    encoder = choose_encoder(source, given.tokenizer, given.cache_folder)
    prepare(source, encoder, given.out, processes=given.processes, shard_tokens=given.shard_tokens, log=_say)
    return _say(f"in {given.out}; to look into it: dtron prepare --show {given.out}")


def _say(line: str) -> None:
    print(line, flush=True)


def _source(given: argparse.Namespace) -> Source:
    if given.source != "stdlib":
        spec = SourceSpec(given.source, None, given.subset, given.split, given.text_column)
        return open_source(spec, given.cache_folder)
    if given.split not in ("train", "validation") or given.subset:
        raise UserError("stdlib has the splits train and validation and no subsets: name one of them as --split")
    return StdlibSource.open(given.split)


def _show(store: TokenStore) -> None:
    store.verify()
    _say(f"{store.folder}: {store.source['name']}")
    _say(f"{store.n_documents:,} documents, {store.n_tokens:,} tokens ({store.dtype}, vocabulary {store.vocab_size:,})")
    _say(f"{len(store.shards)} shards, verified: every block has the checksum it was written with\n")
    _say("tokens a document      documents")
    for power, count in enumerate(_histogram(store)):
        if count:
            bar = "#" * -(-40 * count // store.n_documents)
            _say(f"{1 << power:>9,} to {(2 << power) - 1:<9,} {count:>9,}  {bar}")
    encoder = read_tokenizer(str(store.folder), store.folder, "--show")
    for number in sorted({0, store.n_documents // 2, store.n_documents - 1}):
        start, stop = store.document(number)
        more = " ..." if stop - start > SAMPLE_TOKENS else ""
        text = encoder.decode(store.read(start, min(stop, start + SAMPLE_TOKENS)).tolist())
        _say(f"\n--- document {number:,}: {stop - start:,} tokens\n{text}{more}")


def _histogram(store: TokenStore) -> list[int]:
    """Documents of 1, 2 to 3, 4 to 7, ... tokens, the end-of-text token included."""
    counts = np.zeros(64, np.int64)
    for shard in range(len(store.shards)):
        counts += np.bincount(np.frexp(store.document_lengths(shard))[1] - 1, minlength=64)
    return counts.tolist()


if __name__ == "__main__":
    sys.exit(main())
