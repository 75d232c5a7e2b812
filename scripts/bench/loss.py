"""The head and the cross-entropy of one microbatch, forward and backward, in each way that dtron can compute them.

    python scripts/bench/loss.py [--tokens 16384] [--vocab 128256] [--dim 4096] [--chunks 2048] [--toy] [--out FILE]

* whole, whole compiled: the logits of all tokens, as `training.loss_chunk_tokens = 0` makes them.
* chunks, chunks compiled, chunks triton: of each size in --chunks, by `training.loss_kernel`; Triton on a GPU alone.

A line per way as it is measured, then one JSON object on stdout and in --out: milliseconds (medians of 5 blocks of 4
calls), the peak of memory beside the inputs (of a GPU), and the relative errors of loss and gradients against float64,
of the first 512 tokens. --toy divides every size by 32: for a CPU, to see that it runs.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's dtron

from dtron.cluster.preflight.measure import Timer  # noqa: E402
from dtron.models.loss import IGNORE_INDEX, cross_entropy, linear_cross_entropy, torch_kernel  # noqa: E402

TOY, EXACT_TOKENS = 32, 512
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, E], weight [V, E], labels [N] -> mean loss


def whole(token_loss: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_loss(F.linear(hidden, weight)[None], labels[None]).sum() / len(labels)


def chunked(rows: int, kernel: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scale = torch.full((), 1 / len(labels), device=hidden.device)
    return linear_cross_entropy(hidden, weight, None, labels, scale, rows, kernel=kernel)[0]


def ways(chunks: list[int], device: torch.device) -> Iterator[tuple[str, Loss]]:
    yield "whole", functools.partial(whole, cross_entropy)
    yield "whole compiled", functools.partial(whole, torch.compile(cross_entropy, fullgraph=True))
    kernels = {"": torch_kernel, " compiled": torch.compile(torch_kernel, fullgraph=True, dynamic=False)}
    if device.type == "cuda":
        from dtron.models.loss_triton import triton_kernel

        kernels[" triton"] = triton_kernel
    for rows in chunks:
        for name, kernel in kernels.items():
            yield f"chunks of {rows}{name}", functools.partial(chunked, rows, kernel)


def inputs(tokens: int, vocab: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, dim, device=device), torch.randn(vocab, dim, device=device) / dim**0.5
    labels = torch.randint(0, vocab, (tokens,), device=device)
    labels[::8] = IGNORE_INDEX
    return hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), labels


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """[loss, gradient of hidden, gradient of weight]."""
    value = loss(hidden, weight, labels)
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call takes; on a CPU None."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def measure(loss: Loss, given: tuple[Tensor, Tensor, Tensor], toy: bool) -> dict[str, Any]:
    device, timer = given[0].device, Timer(given[0].device)
    hidden, weight, labels = given
    run = functools.partial(gradients, loss, *given)
    few = (hidden.detach()[:EXACT_TOKENS].requires_grad_(), weight, labels[:EXACT_TOKENS])
    exact = [t.detach().double().requires_grad_() for t in few[:2]]
    truth = gradients(functools.partial(whole, _exact), *exact, few[2])
    errors = [float((got.double() - t).norm() / t.norm()) for got, t in zip(gradients(loss, *few), truth, strict=True)]
    del truth, exact
    blocks, calls = (1, 1) if toy else (5, 4)
    timer.elapsed(run, 1 if toy else 3)
    times = [timer.elapsed(run, calls) for _ in range(blocks)]
    return {
        "ms": 1e3 * statistics.median(t.wall_s for t in times) / calls,
        "peak_bytes": peak_bytes(run, device),
        **dict(zip(("error_loss", "error_hidden", "error_weight"), errors, strict=True)),
    }


def _exact(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 16384), ("vocab", 128256), ("dim", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.toy:
        parser.error("there is no GPU here; --toy runs at small sizes on a CPU")
    divisor = TOY if args.toy else 1
    sizes = {name: getattr(args, name) // divisor for name in ("tokens", "vocab", "dim")}
    given, figures = inputs(**sizes, device=device), dict[str, Any]()
    for name, loss in ways([rows // divisor for rows in args.chunks], device):
        try:
            figures[name] = measure(loss, given, args.toy)
        except torch.OutOfMemoryError as error:
            figures[name] = {"error": str(error).splitlines()[0]}
        print(f"{name:24} {figures[name]}", file=sys.stderr, flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    text = json.dumps({"torch": torch.__version__, "device": machine, "toy": args.toy, **sizes, "figures": figures})
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
