"""The data of a run: what the configuration names, checked to be the same on every rank and on every resume."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtron import compat, registry
from dtron.checkpoint.files import Progress
from dtron.config import Config, replace
from dtron.config.sections import Dataset, Training, Validation
from dtron.data.build import build_by_path, known_tokenizer, stdlib
from dtron.data.loader import IGNORE_INDEX, SequenceDataset, StepLoader, ValidationLoader
from dtron.data.order import Mixture
from dtron.data.shards import is_prepared
from dtron.data.stream import StreamedSource, StreamLoader, merge_states
from dtron.data.tokenizer import documents_have_special_tokens
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.ranks.agree import from_all_ranks, warn_on_rank_0
from dtron.ranks.control import StopBeforeStartError
from dtron.ranks.world import World

log = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 24 * 3600  # ranks wait for the one that tokenizes a validation set, which says how far it is

__all__ = ["HeldOut", "RunData", "check_datasets", "open_data", "open_held_out", "source_names"]


@dataclass
class HeldOut:
    """A validation set, and this rank's batches of it."""

    dataset: SequenceDataset
    loader: ValidationLoader


@dataclass
class RunData:
    """datasets: of the training, one or those of a mixture. sources: names of a mixture's, none without one."""

    loader: StepLoader | StreamLoader
    held_out: HeldOut | None
    datasets: Sequence[SequenceDataset | StreamedSource]
    mixture: Mixture
    sources: list[str]
    told_epochs: dict[str, int] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """Why this rank has no batch for the next step; empty: it has, as far as it has looked."""
        return self.loader.problem

    def metrics(self, consumed: int) -> dict[str, float]:
        """How often the data was gone round, and documents that were skipped, up to a global sample.

        epochs: of a mixture each source's own. Of what is tokenized on the fly whole ones only are known.
        """
        streams = self.loader if isinstance(self.loader, StreamLoader) else None
        whole = streams.epochs if streams else {}
        taken = self.mixture.before(consumed)
        row: dict[str, float] = {}
        for s, dataset in enumerate(self.datasets):
            key = f"source_epochs/{self.sources[s]}" if self.sources else "epochs"
            row[key] = whole.get(s, 0) if isinstance(dataset, StreamedSource) else float(taken[s]) / len(dataset)
        if streams and streams.skipped:
            row["skipped_documents"] = streams.skipped
        return row

    def say_epochs(self, row: dict[str, Any]) -> None:
        """A line where a data set is gone round again; of many times the second, the third and every doubling."""
        for (name, epoch), dataset in zip(self.epochs(row).items(), self.datasets, strict=True):
            told = self.told_epochs.get(name, 1)
            if epoch > told and (epoch <= 3 or epoch >= 2 * told):
                what = name or getattr(dataset, "name", "the data set")
                log.info("step %d: epoch %d of %s: all of it was trained on already", row["step"], epoch, what)
                self.told_epochs[name] = epoch

    def epochs(self, row: dict[str, Any]) -> dict[str, int]:
        """The epoch that each data set is in, from 1, by what `metrics` gave."""
        values = {name: row[f"source_epochs/{name}" if name else "epochs"] for name in self.sources or [""]}
        return {name: 1 + x if isinstance(x, int) else max(1, math.ceil(x)) for name, x in values.items()}

    @property
    def first(self) -> SequenceDataset | StreamedSource:
        """The training set, or of a mixture the first."""
        return self.datasets[0]

    @property
    def lost_worker(self) -> str:
        """What happened to a worker process of this rank; empty: nothing."""
        return self.loader.lost_worker or (self.held_out.loader.lost_worker if self.held_out else "")

    def gathered_state(self) -> dict[str, Any]:
        """All ranks' positions in the streamed sources, on every rank; empty where the count of samples is enough."""
        if not isinstance(self.loader, StreamLoader):
            return {}
        return merge_states(from_all_ranks(self.loader.state()))


def open_data(
    config: Config, vocab_size: int, degrees: Degrees, dp_rank: int, world: World, progress: Progress
) -> RunData:
    """Build the data sets and this rank's loaders, from where `progress` says; records the data's fingerprint.

    UserError if a tokenizer is larger than the model's vocabulary, if two sources have different ones, and if the
    tokens are not those of the other ranks, or of the checkpoint.
    """
    c = config.training
    sections: list[Dataset] = [*c.mixture] or [c]
    mixture = Mixture([getattr(section, "weight", 1.0) for section in sections])
    config = _with_special_tokens(config)
    data = _build_sources(config, sections, vocab_size, world)
    if config.model.add_special_tokens is None and progress.data_fingerprint not in ("", _fingerprint(data, mixture)):
        # Perhaps a run of a version that added no special tokens to text tokenized on the fly.
        without = replace(config, "model.add_special_tokens", False)
        before = _build_sources(without, sections, vocab_size, world)
        if _fingerprint(before, mixture) == progress.data_fingerprint:
            config, data = without, before
    held_out = open_held_out(config, vocab_size, degrees, dp_rank, world) if config.validation.enable else None
    if c.shuffle_documents != Training().shuffle_documents and not any(isinstance(d, StreamedSource) for d in data):
        raise UserError("training.shuffle_documents has no effect on prepared data, which is shuffled as a whole")
    built = [*zip(sections, data, strict=True)]
    _check_one_tokenizer([*built, (config.validation, held_out.dataset)] if held_out else built)
    fingerprint = _fingerprint(data, mixture)
    _check_same_on_all_ranks(fingerprint, _named(sections[0]), world)
    tokenizer = getattr(data[0], "tokenizer_fingerprint", None) or ""
    _check_same_as_before(fingerprint, tokenizer, _named(sections[0]), progress, config.checkpoint.allow_changed_data)
    loader: StepLoader | StreamLoader
    plain = [dataset for dataset in data if not isinstance(dataset, StreamedSource)]
    if len(plain) < len(data):
        loader = StreamLoader(
            data, mixture, global_batch_size=c.global_batch_size, dp_rank=dp_rank, dp_size=degrees.dp,
            seed=config.debug.seed, options=c.dataloader, consumed=progress.consumed, state=progress.streams or None,
            on_bad=lambda what: warn_on_rank_0(f"skipped: {what}"),
        )  # fmt: skip
    else:
        loader = StepLoader(
            plain, mixture, global_batch_size=c.global_batch_size, dp_rank=dp_rank, dp_size=degrees.dp,
            seed=config.debug.seed, options=c.dataloader, consumed=progress.consumed,
        )  # fmt: skip
    found = RunData(loader, held_out, data, mixture, source_names(c.mixture))
    if progress.consumed:
        found.told_epochs = found.epochs(found.metrics(progress.consumed))
    return found


def open_held_out(config: Config, vocab_size: int, degrees: Degrees, dp_rank: int, world: World) -> HeldOut:
    """Build the validation set alone. UserError as from `open_data`."""
    v, config = config.validation, _with_special_tokens(config)
    with _time_to_build(config):
        data = _build(config, v, "validation", v.seq_len or config.training.seq_len, vocab_size, world)
    assert not isinstance(data, StreamedSource)  # `build_by_path` prepares a validation set
    _check_same_on_all_ranks(getattr(data, "fingerprint", ""), _named(v), world)
    n_evaluated = len(data) if v.steps < 0 else min(len(data), v.steps * v.local_batch_size * degrees.dp)
    if not any((data[i][1] != IGNORE_INDEX).any() for i in range(n_evaluated)):  # nearly always the first one has
        raise UserError(
            f"validation.dataset {_named(v)} has no label to predict in the {n_evaluated} sequences that are "
            "evaluated; give it text of at least validation.seq_len tokens, with some of it unmasked"
        )
    loader = ValidationLoader(
        data, global_batch_size=v.local_batch_size * degrees.dp, dp_rank=dp_rank, dp_size=degrees.dp,
        options=v.dataloader, steps=v.steps,
    )  # fmt: skip
    return HeldOut(data, loader)


def _build_sources(
    config: Config, sections: Sequence[Dataset], vocab_size: int, world: World
) -> list[SequenceDataset | StreamedSource]:
    """Everything that is trained on."""
    with _time_to_build(config):
        return [_build(config, s, "train", config.training.seq_len, vocab_size, world) for s in sections]


def _with_special_tokens(config: Config) -> Config:
    """`config` in which model.add_special_tokens is that of the prepared data, where it is unset and there are any."""
    sections = [*config.training.mixture, config.training, *([config.validation] if config.validation.enable else [])]
    prepared = [folder for section in sections if is_prepared(folder := Path(_named(section)))]
    if config.model.add_special_tokens is not None or not prepared:
        return config
    return replace(config, "model.add_special_tokens", documents_have_special_tokens(prepared[0]))


@contextlib.contextmanager
def _time_to_build(config: Config) -> Iterator[None]:
    """Around what one rank may prepare for hours while the others wait."""
    compat.set_timeout(BUILD_TIMEOUT_S)
    yield
    compat.set_timeout(config.comm.init_timeout_seconds)


def source_names(mixture: Sequence[Dataset]) -> list[str]:
    """A short name for each source in the metrics: the end of its path, with its number where two are alike."""
    short = [Path(_named(section)).name for section in mixture]
    return [name if short.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(short)]


def _named(section: Dataset) -> str:
    return section.dataset_path or section.dataset


def _build(
    config: Config, section: Dataset, split: str, seq_len: int, vocab_size: int, world: World
) -> SequenceDataset | StreamedSource:
    """A data set; the first rank of each machine prepares it while the others wait.

    StopBeforeStartError on all ranks if one finds a STOP meanwhile.
    """

    def say(text: str) -> None:
        log.info(text)
        if world.control.stop_requested():
            raise StopBeforeStartError

    build = registry.find_dataset(section, "validation.dataset" if split == "validation" else "training.dataset")
    data, stopped = None, False
    for turn in (True, False):
        if (world.local_rank == 0) == turn:
            try:
                data = build(config, section, split, seq_len, vocab_size, say)
            except StopBeforeStartError:
                stopped = True
        if any(from_all_ranks(stopped)):
            raise StopBeforeStartError
    assert data is not None
    if data.vocab_size > vocab_size:
        raise UserError(
            f"{_named(section)}: the tokenizer has {data.vocab_size} tokens, but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {data.vocab_size} or more"
        )
    masked = config.training.attention_mask == "document"
    if masked and not isinstance(data, StreamedSource) and len(data[0]) < 3:
        raise UserError(
            f"{_named(section)}: the dataset does not say where its documents begin, which "
            "training.attention_mask = document needs; let its items be (inputs, labels, document_start), or set causal"
        )
    return data


def _check_one_tokenizer(built: Sequence[tuple[Dataset, SequenceDataset | StreamedSource]]) -> None:
    """UserError if two data sets were made with different tokenizers: the same id would mean different text."""
    _check_equal([(section, getattr(data, "tokenizer_fingerprint", None)) for section, data in built])


def _check_equal(tokenizers: Sequence[tuple[Dataset, str | None]]) -> None:
    """tokenizers: the fingerprint of each data set's, None where it is not known."""
    known = [(section, print_) for section, print_ in tokenizers if print_ is not None]
    for section, print_ in known[1:]:
        first, first_print = known[0]
        if print_ == first_print:
            continue
        hint = "prepare both alike, or name one tokenizer in model.hf_assets_path for those tokenized on the fly"
        if isinstance(section, Validation):
            beside = f"{_named(first).rstrip('/')}-validation"
            which = (
                beside if is_prepared(beside) else "..., as `dtron prepare --held-out 1%` makes beside the training's"
            )
            hint = (
                f"validate on text prepared with the training's tokenizer (validation.dataset = {which}), or not "
                "at all (--validation.no_enable, in a file validation.enable = false)"
            )
        raise UserError(
            f"{_named(section)} and {_named(first)} have different tokenizers, or only one of them has the tokenizer's "
            f"special tokens around documents: {hint}"
        )


def _fingerprint(data: Sequence[SequenceDataset | StreamedSource], mixture: Mixture) -> str:
    """Of all the training data: equal if and only if every global sample holds the same tokens."""
    prints = [getattr(dataset, "fingerprint", "") for dataset in data]
    if len(prints) == 1:
        return prints[0]
    return hashlib.sha256(json.dumps([prints, mixture.counts.tolist()]).encode()).hexdigest()


def _check_same_on_all_ranks(fingerprint: str, name: str, world: World) -> None:
    """UserError if ranks have different data under the same name."""
    prints = from_all_ranks(fingerprint)
    if other := [rank for rank, print_ in enumerate(prints) if print_ != prints[0]]:
        raise UserError(
            f"rank {other[0]} has other tokens of dataset {name} than rank 0 (another Python version, say); "
            "use the same sources on every machine, or a shared job.cache_folder"
        )


def _check_same_as_before(fingerprint: str, tokenizer: str, name: str, progress: Progress, may_change: bool) -> None:
    """UserError if a resumed run has other data than its checkpoint and must not; records the fingerprints."""
    recorded, recorded_tokenizer = progress.data_fingerprint, progress.tokenizer_fingerprint
    if recorded and fingerprint != recorded:
        if recorded_tokenizer and tokenizer != recorded_tokenizer:
            raise UserError(
                f"dataset {name} has another tokenizer ({tokenizer[:12]}) than the one this run was trained with "
                f"({recorded_tokenizer[:12]}), in which every token means something else: bring that one back, or "
                "start a new run"
            )
        if not may_change:
            raise UserError(
                f"dataset {name} is not the one this run was trained on (other files or another tokenizer or, of "
                f"stdlib, another Python version): its fingerprint is {fingerprint[:12]}, the checkpoint's "
                f"{recorded[:12]}; bring it back, or start a new run, or set checkpoint.allow_changed_data = true to "
                "resume with what is there now, if what comes before the position of the run is unchanged"
            )
        where = (
            "from the same file and byte, so what was appended or corrected after that comes as it is now"
            if progress.streams
            else f"at sequence {progress.consumed} of its own order, so some of its sequences may come twice this epoch"
        )
        warn_on_rank_0(
            f"dataset {name} has changed since the checkpoint, as checkpoint.allow_changed_data allows: "
            f"the run resumes {where}"
        )
    progress.data_fingerprint, progress.tokenizer_fingerprint = fingerprint, tokenizer


# --- what the configuration may say

# Keys that say which data.
NAMED = ("dataset", "dataset_path", "dataset_subset", "dataset_split", "text_column", "on_bad_document")


def check_datasets(c: Config) -> None:
    """Every data set is known by name or place, has the others' tokenizer, and every key that names it takes effect."""
    sections = {} if c.validation.only else _training_sources(c.training)
    if c.validation.enable:
        sections["validation"] = c.validation
    for name, section in sections.items():
        registry.find_dataset(section, f"{name}.dataset")
        given = [key for key in NAMED[1:] if getattr(section, key) != getattr(Dataset(), key)]
        if section.dataset == "stdlib" and given:
            raise UserError(
                f"{name}.{given[0]} has no effect with dataset = stdlib; leave it out or name another dataset"
            )
    # Before anything is tokenized, which takes a while.
    ours = {name: s for name, s in sections.items() if registry.find_dataset(s, name) in (build_by_path, stdlib)}
    _check_equal([(section, known_tokenizer(c, section, f"{name}.dataset")) for name, section in ours.items()])


def _training_sources(t: Training) -> dict[str, Dataset]:
    """What is trained on, under the names that errors give it."""
    if not t.mixture:
        return {"training": t}
    for key in NAMED:
        if getattr(t, key) != getattr(Training(), key):
            raise UserError(f"training.{key} has no effect beside training.mixture; leave one of them out")
    Mixture([source.weight for source in t.mixture])
    return {f"training.mixture[{i}]": source for i, source in enumerate(t.mixture)}
