"""What a step waits for its batch, and what the batch costs: dtron's loader beside torchdata's nodes.

    python scripts/bench/loader.py [--steps 200] [--step-ms 20] [--rounds 3] [--rows 8] [--seq-len 2048]

All give the same batches of the embedded corpus, in the same order; a step sleeps, as a host does that waits for its
GPU. They take turns, each built anew every round. Of each: data_ms, the median over the steps (without the first 10) of
the wait for a batch; cpu_ms, CPU time per step of the process and its workers, the start included. Medians of rounds.

    direct            torch's DataLoader without workers: the step builds its batch
    thread            the loader's default: a thread takes the next batches ahead
    torchdata thread  torchdata's Prefetcher in front of `direct`
    workers           two worker processes of torch's DataLoader
    torchdata workers two processes of torchdata's ParallelMapper

`--kill` measures none of this, but what happens to the two kinds of workers when one of them is killed, and when the
main process is. The result is one JSON object.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's dtron, also where another copy is installed

import torch  # noqa: E402

from dtron.config.sections import DataLoader  # noqa: E402
from dtron.data.corpus import load_stdlib  # noqa: E402
from dtron.data.loader import StepLoader, collate  # noqa: E402
from dtron.data.order import Mixture  # noqa: E402

CACHE = Path(tempfile.gettempdir()) / "dtron-bench"
CONTESTANTS = ("direct", "thread", "torchdata thread", "workers", "torchdata workers")
LIMIT_S = 15  # for an error to arrive, or a process to end


def batches(contestant: str, rows: int, seq_len: int) -> Iterator[Any]:
    """An endless iterator of `rows` sequences a step."""
    data = load_stdlib(CACHE, seq_len, "train", log=lambda line: print(line, file=sys.stderr))

    def loader(workers: int) -> StepLoader:
        return StepLoader(
            [data], Mixture([1]), global_batch_size=rows, dp_rank=0, dp_size=1, seed=0,
            options=DataLoader(num_workers=workers),
        )  # fmt: skip

    if contestant in ("thread", "workers"):
        return iter(loader(2 if contestant == "workers" else 0))
    if contestant == "direct":
        return iter(loader(0)._loader)
    from torchdata.nodes import IterableWrapper, ParallelMapper, Prefetcher

    if contestant == "torchdata thread":
        return iter(Prefetcher(IterableWrapper(loader(0)._loader), 2, snapshot_frequency=0))
    indices = IterableWrapper(loader(0)._sampler)
    mapper = ParallelMapper(
        indices, lambda rows: collate([data[i] for _, i in rows]), 2, method="process", multiprocessing_context="fork"
    )
    return iter(mapper)


def measure(contestant: str, given: argparse.Namespace) -> dict[str, float]:
    """In a process of its own, so that the workers' CPU time is known: they have ended."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        taken, waits = batches(contestant, given.rows, given.seq_len), []
        for _ in range(given.steps):
            began = time.perf_counter()
            next(taken)
            waits.append(time.perf_counter() - began)
            time.sleep(given.step_ms / 1e3)
        del taken
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu_s = sum(u.ru_utime + u.ru_stime for u in used)
        row = {"data_ms": 1e3 * statistics.median(waits[10:]), "cpu_ms": 1e3 * cpu_s / given.steps}
        os.write(write, json.dumps(row).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        row = json.loads(file.read())
    os.waitpid(child, 0)
    return row


def workers_of(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def after(condition: Callable[[], bool]) -> float | None:
    """Seconds until it holds; None where it does not within LIMIT_S."""
    began = time.perf_counter()
    while time.perf_counter() - began < LIMIT_S:
        if condition():
            return round(time.perf_counter() - began, 1)
        time.sleep(0.1)
    return None


def kill(contestant: str, whom: str, given: argparse.Namespace) -> float | None:
    """Seconds until the loss of a worker is an error, or until the workers of a killed process have ended, or None."""
    if (child := os.fork()) == 0:
        try:
            for _ in batches(contestant, given.rows, given.seq_len):
                time.sleep(0.01)
        finally:
            os._exit(1)
    while len(workers := workers_of(child)) < 2:
        time.sleep(0.1)
    time.sleep(2)
    os.kill(workers[0] if whom == "worker" else child, signal.SIGKILL)
    awaited = [child] if whom == "worker" else workers
    seconds = after(lambda: not any(map(alive, awaited)))
    for process in (child, *workers):
        if alive(process):
            os.kill(process, signal.SIGKILL)
    os.waitpid(child, 0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("--steps", 200), ("--step-ms", 20), ("--rounds", 3), ("--rows", 8), ("--seq-len", 2048)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--kill", action="store_true")
    given = parser.parse_args()
    next(batches("direct", given.rows, given.seq_len))  # prepares the corpus
    result: dict[str, Any] = {"torch": torch.__version__}
    if given.kill:
        for contestant in ("workers", "torchdata workers"):
            result[contestant] = {f"{whom}_killed_s": kill(contestant, whom, given) for whom in ("worker", "main")}
    else:
        rows: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in CONTESTANTS}
        for turn in range(given.rounds):
            for contestant in CONTESTANTS[:: 1 if turn % 2 == 0 else -1]:
                rows[contestant].append(measure(contestant, given))
        for contestant, taken in rows.items():
            result[contestant] = {key: round(statistics.median(r[key] for r in taken), 3) for key in taken[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
