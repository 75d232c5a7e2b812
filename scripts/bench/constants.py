"""What a device really gives at the sizes of a model: memory, matrix products, attention, optimizer.

    python scripts/bench/constants.py [--models llama3/8B smollm/1.7B] [--tokens 8192] [--toy] [--out FILE]

These are the ceilings that a training step is compared with, and what `dtron plan` assumes about a GPU. A line per
figure as it is measured, then one JSON object on stdout and in --out. Times are medians of 5 blocks of 4 calls, by CUDA
events on a GPU. --toy divides every size by 64, and takes fewer calls: for a CPU, to see that it runs.

* copy: bytes per second, reads and writes both counted.
* matmul: FLOP/s of each different weight matrix of a model [out, in] with `--tokens` rows in bf16: the forward product,
  and the backward's two, for the input and for the weight. On GPUs with float8 also as `torch._scaled_mm` computes it,
  with one scale for each tensor and with one for each row.
* attention: FLOP/s of the causal half, forward and backward, by each of torch's backends and by the one that torch
  chooses; backward counts 2.5 times the forward.
* optimizer: seconds per 1e9 parameters of fused AdamW with fp32 moments, of the gradient norm, and of scaling.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's dtron

from dtron import registry  # noqa: E402
from dtron.cluster.preflight.measure import Timer  # noqa: E402
from dtron.models.spec import ModelConfig, meta_model  # noqa: E402

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOY = 64  # sizes are divided by this
OPTIMIZER_PARAMETERS = 2**30


class Bench:
    """Measures on one device and keeps the figures: name -> {figure: value}, or {"error": text}."""

    def __init__(self, device: torch.device, toy: bool) -> None:
        self.device, self.toy, self.figures = device, toy, dict[str, dict[str, Any]]()
        self._timer = Timer(device)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one call: the median of blocks of calls in a row, whose launches overlap, after some that warm up."""
        blocks, calls = (1, 1) if self.toy else (5, 4)
        self._timer.elapsed(run, 1 if self.toy else 3)
        return statistics.median(self._timer.elapsed(run, calls).wall_s / calls for _ in range(blocks))

    def size(self, n: int) -> int:
        """n, or what a toy has of it, never below 8."""
        return max(8, n // TOY) if self.toy else n

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal random numbers on the device."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def record(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Keep and print what `measure` gives. What a device cannot do is a result too, not the end of the rest."""
        try:
            row = measure()
        except (RuntimeError, NotImplementedError, ValueError) as error:  # torch: no such kernel, no memory
            row = {"error": str(error).strip().splitlines()[0][:200]}
        self.figures[name] = row
        shown = " ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
        )
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def copy(bench: Bench) -> dict[str, Any]:
    """A copy of 1 GiB."""
    source = torch.ones(bench.size(2**28), device=bench.device)
    target = torch.empty_like(source)
    return {"bytes_per_s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source))}


def matmul(bench: Bench, rows: int, out: int, into: int) -> dict[str, Any]:
    """FLOP/s of x w^T and of its two gradients."""
    rows, out, into = bench.size(rows), bench.size(out), bench.size(into)
    flops = 2 * rows * out * into
    x, w, g = bench.random(rows, into), bench.random(out, into), bench.random(rows, out)
    products = {"forward": lambda: x @ w.t(), "input": lambda: g @ w, "weight": lambda: g.t() @ x}
    row = {name: flops / bench.seconds(run) for name, run in products.items()}
    if bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device) >= (8, 9):
        eighth = torch.float8_e4m3fn
        x8, w8 = x.to(eighth), w.to(eighth)
        ones = [torch.ones(shape, device=bench.device) for shape in ((), (rows, 1), (1, out))]
        for name, a, b in (("float8_tensorwise", ones[0], ones[0]), ("float8_rowwise", ones[1], ones[2])):
            product = partial(torch._scaled_mm, x8, w8.t(), a, b, out_dtype=torch.bfloat16, use_fast_accum=True)
            row[name] = flops / bench.seconds(product)
    return row


def attention(bench: Bench, config: ModelConfig, tokens: int, backend: str | None) -> dict[str, Any]:
    """FLOP/s of one layer's causal attention over one sequence of `tokens`, without the projections."""
    s, heads, kv = bench.size(tokens), config.n_heads, config.n_kv_heads
    d = getattr(config, "head_dim", None) or config.dim // heads
    q, k, v = (bench.random(1, h, s, d).requires_grad_() for h in (heads, kv, kv))
    g = bench.random(1, heads, s, d)
    flops = 2 * heads * s * s * d  # two products of 2 heads s s d, of which the mask leaves half
    chosen = sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext()
    with chosen:
        forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=kv != heads)
        forward_s, y = bench.seconds(forward), forward()
        backward_s = bench.seconds(lambda: torch.autograd.grad(y, (q, k, v), g, retain_graph=True))
    return {"forward": flops / forward_s, "backward": 2.5 * flops / backward_s}


@torch.no_grad()
def optimizer(bench: Bench) -> dict[str, Any]:
    """Seconds per 1e9 parameters of each pass over them."""
    n = bench.size(OPTIMIZER_PARAMETERS) // (TOY if bench.toy else 1) // 4
    parameters = [torch.zeros(n, device=bench.device, requires_grad=True) for _ in range(4)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    gradients = [p.grad for p in parameters]
    adamw = torch.optim.AdamW(parameters, fused=True)
    one = torch.ones((), device=bench.device)
    passes: dict[str, Callable[[], Any]] = {
        "adamw_s": adamw.step,
        "norm_s": lambda: torch._foreach_norm(gradients, 2, torch.float64),
        "scale_s": lambda: torch._foreach_mul_(gradients, one),
    }
    return {name: bench.seconds(run) * 1e9 / (4 * n) for name, run in passes.items()}


def measure(bench: Bench, models: list[str], tokens: int) -> None:
    """Everything, most wanted first."""
    bench.record("copy", partial(copy, bench))
    bench.record("matmul 8192 x 8192", partial(matmul, bench, 8192, 8192, 8192))
    for model in models:
        name, flavor = model.split("/")
        spec = registry.look_up("model", name, "--models")
        config = spec.flavors[flavor]
        shapes = dict.fromkeys(
            tuple(m.weight.shape) for m in meta_model(spec, config).modules() if isinstance(m, nn.Linear)
        )
        for out, into in shapes:
            bench.record(f"{model} matmul {out} x {into}", partial(matmul, bench, tokens, out, into))
        for backend in (None, *(BACKENDS if bench.device.type == "cuda" else ())):
            bench.record(
                f"{model} attention {backend or 'default'}", partial(attention, bench, config, tokens, backend)
            )
    bench.record("optimizer", partial(optimizer, bench))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama3/8B", "smollm/1.7B"], metavar="NAME/FLAVOR")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="rows of a product; a sequence's length")
    parser.add_argument("--toy", action="store_true", help=f"sizes divided by {TOY}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON here")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.toy:
        parser.error("no GPU was found; --toy runs small sizes on the CPU")
    bench = Bench(torch.device("cuda" if cuda else "cpu"), options.toy)
    measure(bench, options.models, options.tokens)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    result = json.dumps(
        {"device": name, "torch": torch.__version__, "toy": options.toy, "figures": bench.figures}, indent=1
    )
    print(result)
    if options.out:
        options.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
