"""What float8 changes in the time of a step: the rate of the blocks' products, casts, and bytes that FSDP gathers."""

from dataclasses import dataclass

from dtron.config import Config
from dtron.parallel.float8 import FLOAT8
from dtron.plan.layout import Sizes

__all__ = ["Float8", "float8_of"]

# The rate of products with a scale for each tensor, and for each row, over bf16's; the data sheets have 2. Chosen, with
# the casts below, for published speeds of Llama 3 8B on 8 H100s: torchao's +25% and +10%, torchtitan's +28%.
TENSORWISE, ROWWISE = 1.75, 1.45
# Bytes for each element that is cast: read, and written in 8 bits; a gradient twice, in the layouts of two products.
# The largest value is taken to be found where the element is made, by the compiler.
CAST, CAST_GRADIENT = 2 + 1, 2 + 1 + 1
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
MODULES = tuple(f"self_attn.{name}" for name in ATTENTION) + tuple(f"mlp.{name}" for name in FFN)


@dataclass(frozen=True)
class Float8:
    """rate: of products, over bf16's. weights: whether the gradients of weights are such products, too. gathered:
    whether FSDP gathers weights in 8 bits. modules: of `MODULES`, those that are converted; experts are not.
    """

    rate: float
    weights: bool = True
    gathered: bool = False
    modules: frozenset[str] = frozenset(MODULES)

    def faster(self, s: Sizes) -> list[float]:
        """Of each product of a block's forward the rate over bf16's: attention, feed-forward (or experts), shared."""
        ffn = FFN[-s.matrices :]
        names = [*MODULES[:4], *("" if s.experts else f"mlp.{name}" for name in ffn)]
        names += [f"mlp.{name}" for name in FFN] if s.shared else []
        return [self.rate if name in self.modules else 1.0 for name in names]

    def _widths(self, s: Sizes) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each converted layer of a block."""
        heads, kv, ffn = s.heads * s.head_size, s.kv_heads * s.head_size, s.shared if s.experts else s.ffn
        shapes = [(s.dim, heads), (s.dim, kv), (s.dim, kv), (heads, s.dim), (s.dim, ffn), (s.dim, ffn), (ffn, s.dim)]
        known = dict(zip(MODULES, shapes, strict=True))
        if s.matrices == 2:
            del known["mlp.gate_proj"]
        return {name: shape for name, shape in known.items() if name in self.modules and min(shape)}

    def cast_bytes(self, s: Sizes, tp: int, tokens: int) -> tuple[float, float]:
        """Of a block's forward and backward and `tokens` tokens. Layers with one input cast it once, which the backward
        does again; weights are cast in both, unless they were gathered as float8.
        """
        widths = self._widths(s)
        groups = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
        inputs = 0.0
        for group in groups:
            here = [shape[0] for name, shape in widths.items() if name.split(".")[1] in group]
            split = tp if group[0] in ("o_proj", "down_proj") else 1  # the others' are gathered
            inputs += max(here, default=0) / split
        gradients = sum(n / (1 if name.endswith(("o_proj", "down_proj")) else tp) for name, (_, n) in widths.items())
        weights = 0.0 if self.gathered else CAST * sum(k * n for k, n in widths.values()) / tp
        again = CAST * inputs if self.weights else 0.0
        return CAST * inputs * tokens + weights, (again + CAST_GRADIENT * gradients) * tokens + weights

    def gathered_parameters(self, s: Sizes) -> int:
        """Of a block those that are gathered as float8, without tensor parallel."""
        return sum(k * n for k, n in self._widths(s).values()) if self.gathered else 0


def float8_of(config: Config) -> Float8 | None:
    """What a configuration asks for; None without float8, and where it is emulated, for which there is no price.

    A filter is looked for in the names of a block's layers.
    """
    f = config.quantize.linear.float8
    if f.emulate or not any(name in FLOAT8 for name in config.model.converters):
        return None
    recipe = f.recipe_name or "tensorwise"
    modules = frozenset(name for name in MODULES if not any(part in name for part in f.filter_fqns))
    rate = TENSORWISE if recipe == "tensorwise" else ROWWISE
    return Float8(rate, recipe != "rowwise_with_gw_hp", f.enable_fsdp_float8_all_gather, modules)
