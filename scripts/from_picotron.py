#!/usr/bin/env python3
"""Print the TOML of dtron for a config.json of picotron, with what differs as comments.

    python scripts/from_picotron.py their/config.json > mine.toml

The training is theirs (AdamW with torch's defaults, a constant learning rate, no clipping); where picotron computes
something else than the configuration says, dtron does what it says. No package is needed but Python.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEDULES = {"1f1b": "1F1B", "afab": "GPipe"}
MODEL = {
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}
# Sections and keys that are read, or that ask for nothing here.
KNOWN = {
    "distributed": {"tp_size", "cp_size", "pp_size", "dp_size", "pp_engine", "backend", "use_cpu"},
    "model": {"name", "dtype", "use_flash_attention", "use_fused_adam", *MODEL},
    "training": {
        "seed", "learning_rate", "total_train_steps", "seq_length", "micro_batch_size", "gradient_accumulation_steps",
        "num_samples", "max_tokens",
    },
    "dataset": {"name", "subset_name", "split", "num_workers", "num_proc"},
    "checkpoint": {"save_dir", "save_frequency", "load_path"},
    "logging": {"use_wandb", "project_name", "run_name"},
    "environment": None,
    "slurm": None,
}  # fmt: skip


def convert(theirs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections and keys of dtron. KeyError, naming it, for a key that picotron itself needs."""
    d, t, m = theirs["distributed"], theirs["training"], theirs["model"]
    data, saving = theirs.get("dataset", {}), theirs.get("checkpoint", {})
    dp, micro, accumulated = d["dp_size"], t["micro_batch_size"], t["gradient_accumulation_steps"]
    pipeline = d["pp_size"] > 1
    steps = t["total_train_steps"]
    if t.get("max_tokens"):
        steps = min(steps, -(-t["max_tokens"] // (micro * accumulated * dp * t["seq_length"])))
    ours: dict[str, dict[str, Any]] = {
        "model": {"hf_config_path": m["name"], "hf_assets_path": m["name"]}
        | {new: m[old] for old, new in MODEL.items() if old in m},
        "optimizer": {"lr": t["learning_rate"], "beta2": 0.999, "weight_decay": 0.01},
        "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
        "training": {
            "dataset": data.get("name", "stdlib"),
            "seq_len": t["seq_length"],
            "local_batch_size": micro * accumulated if pipeline else micro,
            "global_batch_size": micro * accumulated * dp,
            "steps": steps,
            "max_norm": 1e9,
        },
        "parallelism": {
            "data_parallel_shard_degree": dp,
            "tensor_parallel_degree": d["tp_size"],
            "context_parallel_degree": d["cp_size"],
            "pipeline_parallel_degree": d["pp_size"],
        },
        "activation_checkpoint": {"mode": "none"},
        "debug": {"seed": t["seed"]},
    }
    if pipeline:
        ours["parallelism"]["pipeline_parallel_schedule"] = SCHEDULES[d.get("pp_engine", "1f1b")]
        ours["parallelism"]["pipeline_parallel_microbatch_size"] = micro
    if d.get("use_cpu"):
        ours["training"] |= {"device": "cpu", "mixed_precision_param": "float32"}
    for old, new in (("subset_name", "dataset_subset"), ("split", "dataset_split")):
        if data.get(old):
            ours["training"][new] = data[old]
    if saving.get("save_frequency"):
        ours["checkpoint"] = {"enable": True, "interval": saving["save_frequency"]}
    if theirs.get("logging", {}).get("use_wandb"):
        ours["metrics"] = {"enable_wandb": True}
    return ours


def differences(theirs: dict[str, Any]) -> Iterator[str]:
    """What a user of picotron should know of the file."""
    yield "model: a folder with config.json and tokenizer.json, as `hf download NAME` makes it; put its path there"
    yield "weights, gradients and moments are fp32 here and products bfloat16; picotron's weights are bfloat16 alone"
    if theirs["distributed"]["dp_size"] > 1:
        yield "dp shards weights, gradients and moments here (FSDP), with the same losses as copies"
    if theirs["distributed"]["pp_size"] > 1:
        yield "under pipeline picotron's gradients are gradient_accumulation_steps times too large; AdamW hides it"
    if theirs["training"].get("num_samples"):
        yield "num_samples has no key here: prepare a data set of as many by `dtron prepare`"
    if path := theirs.get("checkpoint", {}).get("load_path"):
        yield f"checkpoint.load_path {path}: checkpoints of picotron are not read"
    for section, keys in theirs.items():
        known = KNOWN.get(section, set())
        if isinstance(keys, dict) and known is not None:
            yield from (f"{section}.{key} is not known and was left out" for key in keys if key not in known)


def as_toml(ours: dict[str, dict[str, Any]]) -> str:
    """Numbers, strings and booleans are written in TOML as in JSON."""
    sections = (f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for name, s in ours.items())
    return "\n".join(sections)


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the TOML of dtron for a config.json of picotron.")
    parser.add_argument("config", help="config.json of picotron")
    given = parser.parse_args()
    try:
        theirs = json.loads(Path(given.config).read_text())
        print("\n".join(f"# {line}" for line in differences(theirs)))
        print(f"\n{as_toml(convert(theirs))}", end="")
    except (OSError, json.JSONDecodeError) as error:
        print(f"error: {given.config}: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        print(f"error: {given.config}: no {error}, which picotron's files have; is this one of them?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
