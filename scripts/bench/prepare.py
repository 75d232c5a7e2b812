"""Rate of `dtron prepare` beside the bare tokenizer's, per process.

    python scripts/bench/prepare.py [--file FILE.jsonl] [--tokenizer bpe:32000] [--processes 1] [--rounds 5]

bare: `tokenizers`' encode_batch over texts that lie in memory, in lists of a million characters, its results thrown
away. dtron: `prepare` as it is, from the JSON lines to checked shards on the disk, the start of its processes included.
Each has as many processes as asked for, with one thread each; they take turns. Figures are million tokens per second
and process, medians over the rounds; `ratio` is the median of the rounds' own ratios. Without --file the
text is Python's standard library, several times over. The result is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's dtron, also where another copy is installed

from dtron.data.corpus import StdlibSource  # noqa: E402
from dtron.data.prepare import choose_encoder, prepare  # noqa: E402
from dtron.data.sources import SourceSpec, open_source  # noqa: E402

COPIES = 3  # of the standard library
LIST = 1 << 20  # characters


def bare(path: str, tokenizer_json: str, share: int, processes: int, barrier: Any, results: Any) -> None:
    """One process's share of the lists: puts the seconds that encode_batch took."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    lists: list[list[str]] = [[]]
    with open(path, encoding="utf-8") as file:
        for line in file:
            if sum(map(len, lists[-1])) >= LIST:
                lists.append([])
            lists[-1].append(json.loads(line)["text"])
    barrier.wait()
    start = time.perf_counter()
    for texts in lists[share::processes]:
        tokenizer.encode_batch(texts, add_special_tokens=False)
    results.put(time.perf_counter() - start)


def bare_seconds(path: str, tokenizer_json: str, processes: int) -> float:
    """Of the mean process; all work at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    children = [
        context.Process(target=bare, args=(path, tokenizer_json, share, processes, barrier, results))
        for share in range(processes)
    ]
    for child in children:
        child.start()
    seconds = statistics.mean(results.get() for _ in children)
    for child in children:
        child.join()
    return seconds


def write_library(path: Path) -> None:
    texts = [*StdlibSource.open("train").texts()]
    with path.open("w", encoding="utf-8") as file:
        for text in texts * COPIES:
            file.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--file", help="JSON lines with a column text")
    parser.add_argument("--tokenizer", default="bpe:32000")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.file or f"{folder}/library.jsonl"
        if not given.file:
            write_library(Path(path))
        source = open_source(SourceSpec(path), folder)
        encoder = choose_encoder(source, given.tokenizer, folder)
        seconds: dict[str, list[float]] = {"bare": [], "dtron": []}
        for turn in range(given.rounds):
            for who in sorted(seconds, reverse=turn % 2 == 1):
                if who == "bare":
                    took = bare_seconds(path, encoder.json, given.processes)
                else:
                    start = time.perf_counter()
                    store = prepare(source, encoder, f"{folder}/{turn}", processes=given.processes, log=print_to_stderr)
                    took = time.perf_counter() - start
                seconds[who].append(took)
    ratios = [a / b for a, b in zip(seconds["bare"], seconds["dtron"], strict=True)]
    rate = {who: store.n_tokens / given.processes / 1e6 / statistics.median(took) for who, took in seconds.items()}
    rounded = {who: round(value, 3) for who, value in rate.items()}
    result = {"processes": given.processes, "tokens": store.n_tokens, **rounded}
    print(json.dumps(result | {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}))


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
