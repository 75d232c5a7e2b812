"""Generating token by token: a cache of keys and values, and the choice of the next token.

The cache replaces each block's attention core only while the model runs. So between two tokens, and whatever becomes of
the iterator, the model is as it was.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dtron.errors import UserError
from dtron.models.attention import CausalAttention, dense_mask
from dtron.models.llama import Llama
from dtron.models.rope import LongRopeScaling

__all__ = ["CachedAttention", "CachedModel", "SampleOptions", "filter_logits", "generate", "options_of"]


@dataclass(frozen=True)
class SampleOptions:
    """How a text is continued; UserError for a value out of range.

    max_new_tokens: an upper bound. temperature: logits are divided by it; 0 always takes the most likely token.
    top_k: draw from this many of the most likely tokens; 0: from all. top_p: of these, from the fewest whose
    probabilities add up to it (Holtzman et al. 2019, arXiv 1904.09751); 1: from all. seed: of the random choice.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (always the most likely token) or more, such as 0.8"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, and at most 1 (off)"),
            ("seed", -(2**63) <= self.seed < 2**64, "a whole number of 64 bits"),
        ):
            if not good:
                raise UserError(f"{name} = {getattr(self, name)}: expected {wanted}")


class CachedAttention(nn.Module):
    """CausalAttention over all tokens so far, whose keys and values it keeps.

    max_len: tokens it has room for. The buffers [B, K, max_len, D] are allocated at the first call and never grow.
    core: whose scale and soft cap are used. window: to how many of the last tokens one attends; None: to all.
    """

    def __init__(self, max_len: int, core: CausalAttention, window: int | None = None) -> None:
        super().__init__()
        self.max_len, self.core, self.window = max_len, core, window
        self.length = 0  # tokens held
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, sinks: Tensor | None = None) -> Tensor:
        """q [B, H, S, D], k and v [B, K, S, D] of the next S tokens -> [B, H, S, D]."""
        if mask is not None:
            raise ValueError("a document mask was given; expected none: a cache holds one document")
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.max_len, k.size(3))
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        begin, new = self.length, k.size(2)
        self.keys.narrow(2, begin, new).copy_(k)
        self.values.narrow(2, begin, new).copy_(v)
        self.length = end = begin + new
        window = self.window or end
        first = max(0, begin + 1 - window)  # what the first of the new tokens sees; the others see less
        positions, seen = (torch.arange(*part, device=q.device)[None] for part in ((begin, end), (first, end)))
        # Without a mask, token i is taken to lie at i, where it lies at begin + i.
        if begin or end > window or self.core.softcap is not None or sinks is not None:
            mask = dense_mask(positions - window + 1, positions, seen)
        out: Tensor = self.core(q, self.keys[:, :, first:end], self.values[:, :, first:end], mask, sinks)
        return out


class CachedModel:
    """A model with the cache of one sequence of at most `max_len` tokens, which is read part by part."""

    def __init__(self, model: Llama, max_len: int) -> None:
        self.model = model
        blocks: list[Any] = list(model.layers.values())
        self.caches = [
            CachedAttention(max_len, block.self_attn.core, model.config.window(i)) for i, block in enumerate(blocks)
        ]
        self.device = next(model.parameters()).device
        self.ids: list[int] = []  # tokens read

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Append `ids` to the sequence; the logits [V] of the token after them, in fp32."""
        first, scaling = len(self.ids), self.model.config.rope_scaling
        self.ids += ids
        if isinstance(scaling, LongRopeScaling) and first <= scaling.original_max_position_embeddings < len(self.ids):
            first = 0  # all frequencies change at this length, so that the keys are computed anew, as in transformers
            for cache in self.caches:
                cache.length = 0
        x = torch.tensor([self.ids[first:]], device=self.device)  # [1, S]
        positions = torch.arange(first, len(self.ids), device=self.device)[None]
        with self._with_caches():
            h = self.model(x, positions)  # [1, S, E]
        return self.model.logits(h[0, -1]).float()  # of the last token alone: [S, V] of a long prompt is gigabytes

    @contextmanager
    def _with_caches(self) -> Iterator[None]:
        """Caches in place of the attention cores, and no head: the model then returns the hidden states.

        The caches make the masks, so that the model is to make none.
        """
        attentions: list[Any] = [block.self_attn for block in self.model.layers.values()]
        cores, head = [attention.core for attention in attentions], self.model.lm_head
        config = self.model.config
        try:
            self.model.config = replace(config, windows=(), attention_softcap=None, attention_sinks=False)
            for attention, cache in zip(attentions, self.caches, strict=True):
                attention.core = cache
            self.model.lm_head = None  # type: ignore[assignment]
            yield
        finally:
            for attention, core in zip(attentions, cores, strict=True):
                attention.core = core
            self.model.lm_head, self.model.config = head, config


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits [V] in fp32 -> those to draw from, -inf where a token is left out.

    Temperature (above 0), top-k and top-p in this order, as in transformers; SampleOptions says what they are.
    """
    # From the largest, so that a small temperature gives -inf for the others and not inf for it.
    logits = (logits - logits.max()) / max(temperature, 1e-30)
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    if top_p < 1:
        ascending, order = logits.sort()
        dropped = ascending.softmax(0).cumsum(0) <= 1 - top_p
        dropped[-1] = False  # where top_p is next to nothing
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -math.inf)
    return logits


def generate(
    model: Llama,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_ids: Collection[int],
) -> Iterator[int]:
    """The tokens after `prompt_ids`, one by one, until one of `stop_ids`, which is not yielded, or the last.

    The options are those of SampleOptions. The same seed gives the same tokens, on one device type and dtype.
    Raises UserError for wrong options, ids that the model does not have, and (at a token) logits that are not finite.
    """
    options = SampleOptions(max_new_tokens, temperature, top_k, top_p, seed)
    vocab_size = model.config.vocab_size
    if not prompt_ids:
        raise UserError("the prompt has no tokens; expected at least one, such as the token that begins a text")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise UserError(
            f"the prompt has token ids from {min(prompt_ids)} to {max(prompt_ids)}, but the model's end at "
            f"{vocab_size - 1}: expected the tokenizer that it was trained with"
        )
    return _generate(model, prompt_ids, options, frozenset(stop_ids))


def options_of(generation: Mapping[str, Any], given: Mapping[str, Any], place: str) -> SampleOptions:
    """`given` on top of a generation_config.json's values on top of the defaults. UserError names `place`, its file.

    Where it says do_sample = false, it is the most likely token, as in transformers.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    theirs = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        theirs["temperature"] = 0.0
    for name, value in theirs.items():
        whole = name in ("max_new_tokens", "top_k")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise UserError(f"{place}: {name} = {value!r}: expected a {'whole ' if whole else ''}number")
    try:
        SampleOptions(**theirs)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return SampleOptions(**{**theirs, **given})


def _generate(
    model: Llama, prompt_ids: Sequence[int], options: SampleOptions, stop_ids: frozenset[int]
) -> Iterator[int]:
    reader = CachedModel(model, len(prompt_ids) + options.max_new_tokens - 1)  # the last token is never read
    generator = torch.Generator(reader.device).manual_seed(options.seed)
    unread = prompt_ids
    for _ in range(options.max_new_tokens):
        token = _choose(reader.read(unread), options, generator)
        if token in stop_ids:
            return
        yield token
        unread = [token]


def _choose(logits: Tensor, options: SampleOptions, generator: torch.Generator) -> int:
    """The next token after logits [V]."""
    if not logits.isfinite().all():
        raise UserError(
            "the model's logits are not finite: expected the weights of a training that did not diverge "
            "(in bfloat16, float32 may help)"
        )
    if options.temperature == 0:
        return int(logits.argmax())
    kept = filter_logits(logits, options.temperature, options.top_k, options.top_p)
    return int(torch.multinomial(kept.softmax(0), 1, generator=generator))
