"""Tokens per second of dtron's sampling against transformers' generate, on the same random weights.

    python scripts/bench/sample.py [--family smollm] [--flavor 135M] [--prompt 512] [--new 64] [--rounds 5]
        [--device cpu] [--dtype float32]

Both continue one prompt of random tokens greedily, with their caches, in alternation. `tokens_per_s` are medians over
the rounds, including the prefill; `dtron_over_transformers` is the median of the ratios per round: above 1 dtron is
faster. `same_tokens`: whether both generated the same tokens. The result is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's dtron, also where another copy is installed

import torch  # noqa: E402

from dtron.hf.generate import generate  # noqa: E402
from dtron.models.families import FAMILIES  # noqa: E402
from dtron.models.hf import to_hf_config  # noqa: E402
from dtron.models.llama import Llama  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", default="smollm")
    parser.add_argument("--flavor", default="135M")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args()
    contestants = build(given)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    texts: dict[str, list[int]] = {}
    for turn in range(given.rounds + 1):  # the first warms up
        for name, contestant in contestants.items():
            start = time.perf_counter()
            texts[name] = contestant()
            if turn:
                rates[name].append(given.new / (time.perf_counter() - start))
    ratios = [ours / theirs for ours, theirs in zip(rates["dtron"], rates["transformers"], strict=True)]
    result = {
        **vars(given),
        "torch": torch.__version__,
        "device_name": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "dtron_over_transformers": statistics.median(ratios),
        "same_tokens": texts["dtron"] == texts["transformers"],
    }
    print(json.dumps(result, indent=1))


def build(given: argparse.Namespace) -> dict[str, Callable[[], list[int]]]:
    """Each gives the new tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, dtype = FAMILIES[given.family][given.flavor], getattr(torch, given.dtype)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(config)), attn_implementation="sdpa")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" not in name:
                p.normal_(0.0, 0.05)  # further apart than at the start of a training, so that rounding decides nothing
    theirs = theirs.to(given.device, dtype).eval()
    with torch.device("meta"):
        ours = Llama(config)
    weights = {name.removeprefix("model."): p for name, p in theirs.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    prompt = torch.randint(0, config.vocab_size, (given.prompt,)).tolist()

    def of_dtron() -> list[int]:
        options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "stop_ids": []}
        return list(generate(ours, prompt, max_new_tokens=given.new, **options))

    @torch.inference_mode()
    def of_transformers() -> list[int]:
        ids = torch.tensor([prompt], device=given.device)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=given.new, min_new_tokens=given.new,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    return {"dtron": of_dtron, "transformers": of_transformers}


if __name__ == "__main__":
    main()
