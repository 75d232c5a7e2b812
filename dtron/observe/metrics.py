"""A run's metrics: one JSON object per line in metrics.jsonl, and the same in TensorBoard and Weights & Biases.

The rows are written by one rank. A row holds any of the keys of `TAGS`, `step` (from 1) and
`attempt` (1, and one more after each resume); other numbers are kept too. Units are in the
keys: `_s` seconds, `_bytes` bytes, `mfu` a share (0.41 is 41%).
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dtron.config.sections import Metrics
from dtron.errors import UserError
from dtron.observe.wandb_run import WandbRun

__all__ = ["LAYOUT", "TAGS", "MetricsWriter", "Tag", "last_row", "read_metrics", "tag_of"]

log = logging.getLogger(__name__)


class Tag(NamedTuple):
    """Where a metric is drawn: its TensorBoard name and what its value is multiplied by."""

    name: str
    factor: float = 1.0


TAGS: dict[str, Tag] = {
    "loss": Tag("loss/train"),
    "validation_loss": Tag("loss/validation"),
    "validation_perplexity": Tag("loss/validation_perplexity"),
    "grad_norm": Tag("optim/grad_norm"),
    "lr": Tag("optim/lr"),
    "mfu": Tag("perf/mfu_percent", 100.0),
    "hfu": Tag("perf/hfu_percent", 100.0),
    "tokens_per_s": Tag("perf/tokens_per_s"),
    "tokens_per_s_per_gpu": Tag("perf/tokens_per_s_per_gpu"),
    "step_s": Tag("time/step_s"),
    "data_s": Tag("time/data_s"),
    "forward_backward_s": Tag("time/forward_backward_s"),
    "optimizer_s": Tag("time/optimizer_s"),
    "longest_wait_s": Tag("time/longest_wait_s"),
    "slowest_rank": Tag("slowest_rank"),
    "max_memory_bytes": Tag("memory/max_gib", 1 / 2**30),
    "max_active_memory_bytes": Tag("memory/max_active_gib", 1 / 2**30),
    "alloc_retries": Tag("memory/alloc_retries"),
    "predicted/mfu": Tag("predicted/mfu_percent", 100.0),
    "predicted/bubble": Tag("predicted/bubble_percent", 100.0),
    "predicted/tokens_per_s_per_gpu": Tag("predicted/tokens_per_s_per_gpu"),
    "predicted/max_memory_bytes": Tag("predicted/max_memory_gib", 1 / 2**30),
    "tokens": Tag("tokens"),
    "epochs": Tag("epochs"),
    "goodput": Tag("goodput/percent", 100.0),
    "checkpoint_stall_s": Tag("checkpoint/stall_s"),
    "checkpoint_save_s": Tag("checkpoint/save_s"),
    "checkpoint_bytes": Tag("checkpoint/gib", 1 / 2**30),
    "checkpoint_slowdown": Tag("checkpoint/slowdown"),
    "failed_saves": Tag("checkpoint/failed_saves"),
    "skipped_steps": Tag("optim/skipped_steps"),
    "skipped_documents": Tag("skipped_documents"),
    "expert_dropped_rows": Tag("experts/dropped_rows"),
}
# Keys that are tags themselves: the words before the first slash.
_AS_THEY_ARE = ("source_loss/", "source_tokens/", "source_epochs/", "spent_s/", "expert_busiest/", "expert_entropy/")
_NOT_DRAWN = {"step", "attempt", "nonfinite", "unix_s"}

# The dashboard: category -> chart -> kind and patterns of tags. One category, as TensorBoard opens only the first.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "Training run": {
        "MFU, HFU (% of the dense bf16 peak)": ["Multiline", ["^perf/(mfu|hfu)_percent$", "^predicted/mfu_percent$"]],
        "Speed of a GPU (tokens/s/GPU)": ["Multiline", ["^(perf|predicted)/tokens_per_s_per_gpu$"]],
        "Speed of the run (tokens/s)": ["Multiline", ["^perf/tokens_per_s$"]],
        "Loss (nats/token): train and validation": ["Multiline", ["^loss/(train|validation)$"]],
        "Gradient norm (before clipping)": ["Multiline", ["^optim/grad_norm$"]],
        "Learning rate": ["Multiline", ["^optim/lr$"]],
        "Step time (s): whole step and its parts": ["Multiline", ["^time/.*$"]],
        "Peak memory (GiB)": ["Multiline", ["^memory/max_.*gib$", "^predicted/max_memory_gib$"]],
        "Tokens seen (all ranks)": ["Multiline", ["^tokens$"]],
        "Goodput (% of wall time in useful steps)": ["Multiline", ["^goodput/percent$"]],
        "Checkpoints: stall, whole save (s)": ["Multiline", ["^checkpoint/.*_s$"]],
        "Where the wall time went (s)": ["Multiline", ["^spent_s/.*$"]],
    }
}

# Drawn beside the others when the data is a mixture.
SOURCE_CHARTS: dict[str, list[Any]] = {
    "Loss of each source (nats/token)": ["Multiline", ["^source_loss/.*$"]],
    "Tokens of each source": ["Multiline", ["^source_tokens/.*$"]],
    "Epochs of each source": ["Multiline", ["^source_epochs/.*$"]],
}

# Drawn beside the others when the model is a mixture of experts.
EXPERT_CHARTS: dict[str, list[Any]] = {
    "Busiest expert of each layer (rows over the mean)": ["Multiline", ["^expert_busiest/.*$"]],
    "Evenness of the experts' load (entropy, 1: even)": ["Multiline", ["^expert_entropy/.*$"]],
}
HEAT_MAP = "experts/load_layer_by_expert"


def tag_of(key: str) -> Tag | None:
    """The tag of a row's key; None: not drawn. Other seconds go under time/, other numbers under other/.

    `source_loss/NAME`, `source_tokens/NAME` and `source_epochs/NAME`, of each source of a mixture, and
    `spent_s/PART`, of the wall time, are tags as they are.
    """
    if key in _NOT_DRAWN:
        return None
    if key in TAGS or key.startswith(_AS_THEY_ARE):
        return TAGS.get(key) or Tag(key)
    return Tag(f"time/{key}" if key.endswith("_s") else f"other/{key}")


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one per step, sorted by step.

    Of a step that was replayed after a resume, the last attempt's row counts; rows of one step
    and attempt are merged. A line cut short by a kill (at most one per attempt) is passed over.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        old = rows.get(row["step"], {})
        rows[row["step"]] = _merge(old, row) if old.get("attempt") == row.get("attempt") else row
    return [rows[step] for step in sorted(rows)]


def last_row(path: Path | str, key: str = "step") -> dict[str, Any] | None:
    """The row that was written last and holds `key`, of whichever attempt; None where there is none, or no file.

    Not always `read_metrics`' last one: an attempt that resumed may have died before it got as far as the one before.
    """
    if not Path(path).exists():
        return None
    for line in reversed(Path(path).read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if key in row:
            return row
    return None


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    nonfinite = sorted({*old.get("nonfinite", []), *new.get("nonfinite", [])})
    return {**old, **new, **({"nonfinite": nonfinite} if nonfinite else {})}


def _to_json(row: dict[str, Any]) -> bytes:
    """One line of valid JSON, which has no NaN: such a value is null and its key named in `nonfinite`."""
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    clean = {key: None if key in bad else value for key, value in row.items()}
    if bad:
        clean["nonfinite"] = bad
    return json.dumps(clean, allow_nan=False).encode() + b"\n"


class MetricsWriter:
    """Appends rows to `run_folder/metrics.jsonl`, to TensorBoard and to Weights & Biases. Make it on one rank only.

    `config_text`: the resolved configuration as TOML, shown in TensorBoard. `hparams`: name ->
    bool, number or string, for TensorBoard's HPARAMS page (other values are shown as text).
    `attempt`: 1 for a fresh run, one more after each resume.
    Raises UserError if TensorBoard or Weights & Biases is enabled and not installed.
    """

    def __init__(
        self, run_folder: Path | str, config_text: str, hparams: dict[str, Any], config: Metrics, attempt: int
    ) -> None:
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt
        self._failed = False
        self._boards: list[_Board | WandbRun] = []
        if config.enable_tensorboard:
            self._boards.append(_Board(folder / config.save_tb_folder, config_text, hparams))
        if config.enable_wandb:
            self._boards.append(WandbRun(folder, hparams, tag_of))
        # Unbuffered: one write per row, so that a kill cuts the last line at worst. Such a stump stays, ended.
        self._file = (folder / "metrics.jsonl").open("a+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write(b"\n")

    def log(self, row: dict[str, Any]) -> None:
        """Append one row; it must hold `step`. `attempt` is added. None: not known here (MFU on a CPU).

        A tensor [layers, experts] is drawn in TensorBoard, as a picture of the experts' load over their mean.
        """
        row = {**row, "attempt": self.attempt}
        with self._forgiving():
            self._file.write(_to_json({key: value for key, value in row.items() if not isinstance(value, Tensor)}))
        for board in self._boards:
            with self._forgiving():
                board.draw(row)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A full disk costs rows, with one warning, and not the training."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning("a row of metrics could not be written: %s; the training continues", error)
            self._failed = True

    def close(self) -> None:
        """Finish all of them; again: nothing. A run that is killed loses nothing but TensorBoard's mark of its end."""
        with self._forgiving():
            self._file.close()
        while self._boards:
            with self._forgiving():
                self._boards.pop().close()


class _Board:
    """The TensorBoard side: scalars, the ready-made dashboard, the configuration, hyper-parameters."""

    def __init__(self, folder: Path, config_text: str, hparams: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams as hparams_summaries
        except ImportError as error:
            raise UserError(
                f"metrics.enable_tensorboard = true needs the package tensorboard, which cannot be imported ({error}). "
                "Install it (pip install tensorboard) or set metrics.enable_tensorboard = false."
            ) from error
        self._make = SummaryWriter
        self._folder = folder
        self._config_text = config_text
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in hparams.items()}
        shown = {TAGS[k].name: 0.0 for k in ("loss", "validation_loss", "tokens_per_s_per_gpu", "mfu")}
        self._begin, self._start, self._end = hparams_summaries(plain, shown)
        self._writer: Any = None

    def draw(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._open(row)
        for key, value in row.items():
            tag = tag_of(key)
            if tag is not None and isinstance(value, (int, float)):
                self._writer.add_scalar(tag.name, value * tag.factor, row["step"])
            elif isinstance(value, Tensor):  # white: none; black: four times the mean or more
                picture = (1 - value.float() / 4).clamp(0, 1).repeat_interleave(8, 0).repeat_interleave(8, 1)
                self._writer.add_image(HEAT_MAP, picture, row["step"], dataformats="HW")
        self._writer.flush()

    def _open(self, row: dict[str, Any]) -> None:
        # purge_step hides what an earlier attempt drew from here on, so that no replayed step is drawn twice.
        self._writer = self._make(str(self._folder), purge_step=row["step"])
        more = SOURCE_CHARTS if any(key.startswith("source_") for key in row) else {}
        more = more | (EXPERT_CHARTS if any(key.startswith("expert_busiest/") for key in row) else {})
        self._writer.add_custom_scalars({name: charts | more for name, charts in LAYOUT.items()})
        self._writer.add_text("config", f"```toml\n{self._config_text}\n```")
        # What SummaryWriter.add_hparams(run_name=".") does, but in this file: it would open a second one in
        # the same folder, and TensorBoard's Python reader leaves a file for good once a later one has data.
        self._writer.file_writer.add_summary(self._begin)
        self._writer.file_writer.add_summary(self._start)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.file_writer.add_summary(self._end)
            self._writer.close()
