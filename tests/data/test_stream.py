"""What is tokenized on the fly is the same, sample for sample, on every layout, worker count and resume point."""

import gc
import gzip
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dtron.config.sections import DataLoader
from dtron.data import router
from dtron.data.order import Mixture
from dtron.data.sources import HubSource, LocalSource, SourceSpec, open_source
from dtron.data.stream import StreamedSource, StreamLoader, merge_states, virtual_shard_count
from dtron.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

S, EOS = 16, 256


class Bytes:
    """One byte per token."""

    vocab_size, fingerprint = 257, "bytes"

    def encode(self, texts):
        return [np.array([*text.encode(), EOS], np.uint16) for text in texts]


def texts_of(n_files, n_documents=90, seed=0):
    """[file][document]: texts of very different lengths; a text is its own name, repeated."""
    chance = random.Random(seed)
    documents = [f"<{i}>" * int(chance.expovariate(1 / 6)) + f"#{i}" for i in range(n_documents)]
    return [documents[file::n_files] for file in range(n_files)]


def write(folder, kind, files):
    folder.mkdir(parents=True)
    for i, texts in enumerate(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if kind == "parquet":
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / f"{i}.parquet", row_group_size=4)
        elif kind == "txt":
            for j, text in enumerate(texts):
                (folder / f"{i}-{j:03}.txt").write_text(text)
        else:
            (folder / f"{i}.{kind}").write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return open_source(SourceSpec("data", path=str(folder)), "unused")


def streamed(source, seed=3, shuffle_documents=10, **kwargs):
    return StreamedSource(source, Bytes(), S, seed=seed, shuffle_documents=shuffle_documents, **kwargs)


def loaders_of(sources, dp=1, workers=0, gbs=16, weights=None, **kwargs):
    mixture = Mixture(weights or [1] * len(sources))
    kwargs |= {"global_batch_size": gbs, "seed": 5, "options": DataLoader(num_workers=workers), "dp_size": dp}
    return [StreamLoader(sources, mixture, dp_rank=rank, **kwargs) for rank in range(dp)]


def take(loaders, n_steps):
    """Global batches of n steps, put together from all ranks [steps, gbs, 2 or 3, S]; the run's state after each."""
    batches, states = [], []
    for _ in range(n_steps):
        parts = [next(loader) for loader in loaders]
        assert all(x.dtype == torch.int64 for part in parts for x in part if x is not None)
        batches.append(torch.cat([torch.stack([x for x in part[:3] if x is not None], 1) for part in parts]))
        states.append(json.loads(json.dumps(merge_states([loader.state() for loader in loaders]))))
    return torch.stack(batches), states


def steps(sources, n_steps, **kwargs):
    return take(loaders_of(sources, **kwargs), n_steps)


KINDS = {"jsonl": 1, "parquet": 3, "jsonl.gz": 8}


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
    """A streamed source of 1, 3 or 8 files, and 14 uninterrupted steps of dp 1 without workers: two epochs and more."""
    folder = tmp_path_factory.mktemp("data") / "source"
    source = streamed(write(folder, request.param, texts_of(KINDS[request.param])), documents=True)
    assert source.source.n_files == KINDS[request.param]
    return source, *steps([source], 14)


LAYOUTS = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 1), (1, 2), (2, 3), (4, 9)]


@pytest.mark.parametrize("dp,workers", LAYOUTS)
def test_batches_and_states_do_not_depend_on_the_layout(reference, dp, workers):
    source, batches, states = reference
    again, again_states = steps([source], 14, dp=dp, workers=workers)
    assert torch.equal(again, batches) and again_states == states


@pytest.mark.parametrize("dp,workers,done", [(1, 0, 1), (2, 0, 5), (8, 0, 9), (1, 2, 3), (4, 2, 7), (16, 0, 13)])
def test_a_resume_continues_exactly(reference, dp, workers, done):
    source, batches, states = reference
    where = {"dp": dp, "workers": workers, "consumed": 16 * done, "state": states[done - 1]}
    loaders = loaders_of([source], **where)
    assert merge_states([loader.state() for loader in loaders]) == states[done - 1]
    again, again_states = take(loaders, 14 - done)
    assert torch.equal(again, batches[done:]) and again_states == states[done:]
    assert {loader.consumed for loader in loaders} == {14 * 16}


def test_a_run_moves_from_layout_to_layout(reference):
    source, batches, _ = reference
    done, state, taken = 0, None, []
    for dp, workers, n in ((4, 1, 3), (2, 0, 4), (8, 0, 2), (1, 2, 5)):
        got, states = steps([source], n, dp=dp, workers=workers, consumed=16 * done, state=state)
        done, state = done + n, states[-1]
        taken.append(got)
    assert torch.equal(torch.cat(taken), batches)


@pytest.mark.parametrize("gbs,dp", [(64, 64), (96, 48), (96, 12)])
def test_ranks_may_share_virtual_shards(reference, gbs, dp):
    source = reference[0]
    assert virtual_shard_count(gbs) == 32
    batches, states = steps([source], 5, gbs=gbs)
    again, again_states = steps([source], 5, gbs=gbs, dp=dp)
    assert torch.equal(again, batches) and again_states == states
    again, _ = steps([source], 3, gbs=gbs, dp=dp, consumed=2 * gbs, state=states[1])
    assert torch.equal(again, batches[2:])


def shards_of(batches, n_shards):
    """The tokens of every virtual shard as one run: the inputs of its rows, one after another."""
    n_steps, gbs = batches.shape[:2]
    rows = batches.view(n_steps, n_shards, gbs // n_shards, *batches.shape[2:]).transpose(0, 1).flatten(1, 2)
    for shard in rows:  # [rows, 2 or 3, S]
        assert torch.equal(shard[:, 0, 1:], shard[:, 1, :-1])
        assert torch.equal(shard[1:, 0, 0], shard[:-1, 1, -1])  # a sequence begins with the last one's last label
    return [shard[:, 0].flatten().tolist() for shard in rows]


def documents_of(tokens):
    """The whole documents of a run of tokens."""
    runs = [list(run) for is_end, run in itertools.groupby(tokens, lambda t: t == EOS) if not is_end]
    return [bytes(run).decode() for run in (runs if tokens[-1] == EOS else runs[:-1])]


def run_of(batches, n_shards):
    """The documents in the order in which they were dealt, as far as all virtual shards have come."""
    shards = [documents_of(tokens) for tokens in shards_of(batches, n_shards)]
    return [text for turn in itertools.takewhile(all, itertools.zip_longest(*shards)) for text in turn]


@pytest.mark.parametrize(
    "kind,sizes,gbs",
    [
        ("jsonl", [40], 8),
        ("jsonl", [30, 30, 30], 8),
        ("parquet", [10] * 8, 4),
        ("txt", [30, 30, 30], 16),
        ("jsonl", [30, 30, 30, 3], 8),  # the last shard is short
        ("jsonl", [80, 3], 4),
    ],
)
def test_every_document_once_an_epoch_in_another_order_each(kind, sizes, gbs, tmp_path):
    texts = texts_of(len(sizes), max(sizes) * len(sizes))
    source = write(tmp_path / "data", kind, [part[:size] for part, size in zip(texts, sizes, strict=True)])
    batches, _ = steps([streamed(source)], 2400 // gbs, gbs=gbs)
    run = run_of(batches, gbs)
    expected = sorted(text for file in range(source.n_files) for text in source.read(file))
    size = len(expected)
    epochs = [run[i : i + size] for i in range(0, len(run) - size + 1, size)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert len(set(map(tuple, epochs))) == len(epochs)


def test_virtual_shards_divide_the_global_batch():
    assert [virtual_shard_count(n) for n in (1, 7, 32, 48, 64, 74, 37)] == [1, 7, 32, 24, 32, 2, 1]


def test_without_shuffle_the_order_is_the_source_s_own(tmp_path):
    files = texts_of(3, 30)
    source = streamed(write(tmp_path / "data", "jsonl", files), shuffle_documents=1)
    batches, _ = steps([source], 400, gbs=2)
    run = run_of(batches, 2)
    epoch = [text for texts in files for text in texts]
    assert len(run) > 60 and run == (epoch * 99)[: len(run)]
    with pytest.raises(UserError, match="shuffle_documents = 0"):
        streamed(source.source, shuffle_documents=0)


def test_a_seed_of_one_s_own_gives_an_order_of_one_s_own(tmp_path):
    source = write(tmp_path / "data", "jsonl", texts_of(2))
    one, two = streamed(source), streamed(source, seed=4)
    assert not torch.equal(steps([one], 2)[0], steps([two], 2)[0])
    others = [two, streamed(source, shuffle_documents=9), streamed(write(tmp_path / "b", "jsonl", texts_of(2, 80)))]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert pickle.loads(pickle.dumps(one)).fingerprint == streamed(source).fingerprint == one.fingerprint


def test_rows_say_where_their_documents_begin(reference):
    tokens, labels, documents = reference[1].flatten(0, 1).unbind(1)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    began = torch.zeros(len(tokens), dtype=torch.int64)
    for i in range(S):
        if i:
            began = torch.where(tokens[:, i - 1] == EOS, i, began)
        assert torch.equal(documents[:, i], began)
    assert began.count_nonzero() > 10


# --- mixtures


class Numbered:
    """A map-style data set: sequence i is i everywhere."""

    vocab_size, tokenizer_json = 1000, None

    def __len__(self):
        return 37

    def __getitem__(self, i):
        return np.full(S, 500 + i), np.full(S, 500 + i)


@pytest.mark.parametrize("dp,workers,done", [(2, 0, 0), (4, 2, 5), (16, 0, 3)])
def test_a_mixture_of_streamed_and_numbered_sources(tmp_path, dp, workers, done):
    files = texts_of(4)
    sources = [
        streamed(write(tmp_path / "a", "jsonl", files)),
        Numbered(),
        streamed(write(tmp_path / "b", "txt", texts_of(1, 40))),
    ]
    weights = [2, 1, 1]
    batches, states = steps(sources, 9, weights=weights)
    where = {"state": states[done - 1], "consumed": 16 * done} if done else {}
    again, again_states = steps(sources, 9 - done, weights=weights, dp=dp, workers=workers, **where)
    assert torch.equal(again, batches[done:]) and again_states == states[done:]
    assert {key.split("/")[0] for key in states[0]["places"]} == {"0", "2"}
    loader = loaders_of(sources, weights=weights)[0]
    taken = torch.cat([next(loader).sources for _ in range(9)])
    shares = torch.from_numpy(Mixture(weights)(0, 144)[0])
    assert torch.equal(taken.view(9, 16).sort().values, shares.view(9, 16).sort().values)
    numbered = batches.flatten(0, 1)[taken == 1][:, 0, 0] - 500
    assert numbered.min() >= 0 and len(set(numbered.tolist())) == 36  # of 37 sequences, 36 taken
    assert batches.flatten(0, 1)[taken != 1].max() <= EOS


def test_ranks_may_share_virtual_shards_of_a_mixture(tmp_path):
    sources = [Numbered(), streamed(write(tmp_path / "a", "jsonl", texts_of(4)))]
    batches, states = steps(sources, 4, gbs=96, weights=[3, 1])
    again, again_states = steps(sources, 2, gbs=96, weights=[3, 1], dp=12, consumed=2 * 96, state=states[1])
    assert torch.equal(again, batches[2:]) and again_states == states[2:]


@pytest.mark.parametrize("gbs", [4, 8, 16, 32])
@pytest.mark.parametrize("weights", [[3, 1], [2, 1], [7, 1], [1, 1, 2]], ids=str)
def test_every_virtual_shard_has_its_share_of_a_source(weights, gbs, tmp_path):
    """So that no document comes again while others wait: a document here is just one row."""
    n_documents, slack = 160, 4  # rows that a virtual shard may be off its share
    texts = [[f"{s}:{i:0{S - 3}}" for i in range(n_documents)] for s in range(len(weights))]
    sources = [Numbered(), *(streamed(write(tmp_path / f"s{s}", "jsonl", [texts[s]])) for s in range(1, len(weights)))]
    [loader] = loaders_of(sources, gbs=gbs, weights=weights)
    last, total = len(weights) - 1, sum(weights)
    rows, seen = np.zeros((len(weights), gbs), int), Counter()
    for _ in range(-(-n_documents * total // (gbs * weights[last]))):  # an epoch of the last source
        batch = next(loader)
        for row, (s, tokens) in enumerate(zip(batch.sources.tolist(), batch.tokens.tolist(), strict=True)):
            rows[s, row] += 1
            if s == last:
                seen[bytes(tokens[:-1]).decode()] += 1
        assert np.abs(rows - rows.mean(1, keepdims=True)).max() < slack
    assert set(seen) <= set(texts[last]) and max(seen.values()) <= 2
    again = sum(n == 2 for n in seen.values())
    untouched = n_documents - len(seen)
    assert max(again, untouched) <= n_documents // 8
    epochs = {p["block"]["epoch"] for key, p in loader.state()["places"].items() if key.startswith(f"{last}/")}
    assert epochs <= {0, 1}


def test_numbered_sources_alone_are_those_of_the_step_loader():
    from dtron.data.loader import StepLoader

    where = {"global_batch_size": 8, "dp_rank": 1, "dp_size": 2, "seed": 9, "options": DataLoader(), "consumed": 64}
    theirs = StepLoader([Numbered(), Numbered()], Mixture([1, 2]), **where)
    ours = StreamLoader(
        [Numbered(), Numbered()], Mixture([1, 2]), **where, state=merge_states([{"columns": 8, "places": {}}])
    )
    for _ in range(20):
        a, b = next(theirs), next(ours)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and torch.equal(a.sources, b.sources)
    assert theirs.consumed == ours.consumed


def test_a_dataset_of_the_hub(tmp_path):
    write(tmp_path / "data", "parquet", texts_of(4))
    files = sorted(map(str, (tmp_path / "data").iterdir()))
    cache = str(tmp_path / "cache")
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
    source = streamed(HubSource("user/name", "text", "fingerprint", dataset.select_columns(["text"])))
    batches, states = steps([source], 8)
    local = streamed(open_source(SourceSpec(str(tmp_path / "data")), "unused"))
    assert torch.equal(batches, steps([local], 8)[0])
    again, again_states = steps([source], 5, dp=2, workers=2, consumed=48, state=states[2])
    assert torch.equal(again, batches[3:]) and again_states == states[3:]


# --- another global batch


def test_another_global_batch_continues_the_same_virtual_shards(reference):
    source, batches, states = reference
    again, _ = steps([source], 5, gbs=32, consumed=64, state=states[3])
    assert torch.equal(again.view(5, 16, 2, 3, S).transpose(1, 2).flatten(0, 1), batches[4:])
    with pytest.raises(UserError, match=r"global_batch_size = 24.* multiple of 16: 32 or 48"):
        loaders_of([source], gbs=24, consumed=64, state=states[3])


def test_an_unknown_position_is_refused(reference):
    source, _, states = reference
    for state in (None, {"columns": 16, "places": {}}):
        with pytest.raises(UserError, match="does not say where"):
            loaders_of([source], consumed=16, state=state)
    with pytest.raises(UserError, match="does not say where"):
        loaders_of([Numbered(), source], consumed=16, state=states[0])


# --- awkward sources


def test_one_huge_document(tmp_path):
    """Longer than all others together: its virtual shard takes nothing else for a while, and the others continue."""
    files, huge = texts_of(1), "".join(f"{i};" for i in range(1000))
    assert len(huge) > 1.5 * sum(map(len, files[0]))
    source = streamed(write(tmp_path / "data", "jsonl", [[*files[0], huge]]))
    batches, states = steps([source], 330, gbs=8)
    assert huge in [text for tokens in shards_of(batches, 8) for text in documents_of(tokens)]
    for done, dp, workers in ((50, 4, 0), (200, 2, 2)):
        where = {"dp": dp, "workers": workers, "consumed": 8 * done, "state": states[done - 1]}
        again, again_states = steps([source], 12, gbs=8, **where)
        assert torch.equal(again, batches[done : done + 12]) and again_states == states[done : done + 12]
    only = streamed(write(tmp_path / "only", "txt", [[huge]]))
    batches, states = steps([only], 250, gbs=2)
    assert [documents_of(tokens) for tokens in shards_of(batches, 2)] == [[huge]] * 2
    again, _ = steps([only], 10, gbs=2, consumed=480, state=states[239], dp=2)
    assert torch.equal(again, batches[240:])


def test_virtual_shards_far_apart_are_read_apart(tmp_path, monkeypatch):
    huge = "x" * 9000
    source = streamed(write(tmp_path / "data", "jsonl", [[huge, *texts_of(1)[0]]]))
    most = [0]
    real = router._Reader.read_block

    def read_block(self):
        real(self)
        for shard, queue in self.waiting.items():
            lengths = [len(document.text) for document in queue]
            assert self.characters[shard] == sum(lengths)
            most[0] = max(most[0], sum(n for n in lengths if n < len(huge)))

    monkeypatch.setattr(router._Reader, "read_block", read_block)
    batches, states = steps([source], 120, gbs=8)
    assert most[0] > 1200
    monkeypatch.setattr(router, "WAITING", 200)
    monkeypatch.setattr(router, "NEAR", 1)
    most[0] = 0
    again, again_states = steps([source], 120, gbs=8)
    assert torch.equal(again, batches) and again_states == states
    assert 0 < most[0] < 600
    again, _ = steps([source], 60, gbs=8, consumed=8 * 60, state=states[59])
    assert torch.equal(again, batches[60:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_source_is_refused(tmp_path, workers):
    empty = streamed(write(tmp_path / "a", "jsonl", [[], [], []]), name="my/data")
    with pytest.raises(UserError) as raised:
        steps([empty], 1, workers=workers)
    assert str(raised.value) == "my/data has no document: give data, or remove empty files"
    assert multiprocessing.active_children() == []  # they ignore signals: at exit Python would wait for them for ever


def test_empty_files_among_others_are_passed_over(tmp_path):
    source = streamed(write(tmp_path / "data", "jsonl", [[], ["aa"], []]))
    batches, states = steps([source], 40, gbs=2)
    assert set(documents_of(shards_of(batches, 2)[0])) == {"aa"}
    again, _ = steps([source], 20, gbs=2, consumed=40, state=states[19])
    assert torch.equal(again, batches[20:])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_source_that_breaks_in_the_middle(tmp_path, workers):
    files = texts_of(1, 400)
    write(tmp_path / "data", "jsonl", files)
    path = tmp_path / "data" / "0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:300], b'{"text": \n', *lines[301:]]))
    source = streamed(open_source(SourceSpec(str(path)), "unused"), shuffle_documents=4)
    others = set(multiprocessing.active_children())  # the pool of ranks, where other tests ran before
    [loader] = loaders_of([source], workers=workers, gbs=4)
    taken = 0
    with pytest.raises(UserError) as raised:
        for _ in range(200):
            next(loader)
            taken += 1
    assert str(raised.value).startswith(f"{path}, line 301 is not JSON (")
    assert "Traceback" not in str(raised.value) and taken > 50
    assert loader.consumed == 4 * taken
    state = loader.state()
    path.write_bytes(b"".join(lines[:300] + lines[301:]))  # fixed, the run resumes
    whole, _ = steps([source], taken + 5, gbs=4)
    assert torch.equal(steps([source], 5, gbs=4, consumed=loader.consumed, state=state)[0], whole[taken:])
    assert set(multiprocessing.active_children()) == others
    if workers == 0:
        assert torch.equal(take([loader], 5)[0], whole[taken:])


@pytest.mark.parametrize("dp,workers", [(1, 0), (1, 3), (2, 2)])
def test_bad_documents_are_left_out_alike_everywhere(tmp_path, dp, workers):
    """As if they were not there, in every epoch; the first few are named once, whichever worker reads them."""
    files = texts_of(2, 60)
    whole, _ = steps([streamed(write(tmp_path / "good", "jsonl", files))], 12)
    write(tmp_path / "data", "jsonl", files)
    path = tmp_path / "data" / "1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:7], b'{"text": null}\n' * 14, *lines[7:], b'{"text": \n']))
    source, named = streamed(open_source(SourceSpec(str(tmp_path / "data")), ""), skip_bad=True), []
    batches, states = take(loaders_of([source], on_bad=named.append), 12)
    assert torch.equal(batches, whole)
    assert len(named) == 10 == len(set(named)) and named[0].startswith(f"{path}, line 8 holds null")
    named.clear()
    done = 9
    where = {"dp": dp, "workers": workers, "consumed": 16 * done, "state": states[done - 1], "on_bad": named.append}
    loaders = loaders_of([source], **where)
    assert loaders[0].skipped >= 15
    again, again_states = take(loaders, 12 - done)
    assert torch.equal(again, whole[done:]) and again_states == states[done:]
    assert 15 * loaders[0].epochs[0] <= loaders[0].skipped <= 15 * (loaders[0].epochs[0] + 2)
    with pytest.raises(UserError, match="line 8 holds null"):
        steps([streamed(source.source)], 12)


def test_a_source_of_bad_documents_only_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n' * 3)
    source = streamed(open_source(SourceSpec(str(tmp_path)), ""), skip_bad=True, name="my/data")
    with pytest.raises(UserError, match=r"my/data has no document that can be used \(3 were skipped\)"):
        steps([source], 1)


def test_the_batch_before_a_problem_comes_with_it(tmp_path):
    """So that all ranks can save before the one that cannot go on."""
    write(tmp_path / "data", "jsonl", texts_of(1, 60))
    with (tmp_path / "data" / "0.jsonl").open("a") as file:
        file.write("{\n")
    for workers in (0, 2):
        source = streamed(open_source(SourceSpec(str(tmp_path / "data")), ""), shuffle_documents=2)
        [loader] = loaders_of([source], workers=workers, gbs=4)
        while not loader.problem:
            next(loader)
        assert "line 61 is not JSON" in loader.problem
        with pytest.raises(UserError, match="line 61 is not JSON"):
            next(loader)


def test_other_files_have_no_position(tmp_path, reference):
    source, _, states = reference
    more = write(tmp_path / "more", "jsonl", texts_of(2))
    with pytest.raises(UserError, match="had other files when the checkpoint was made .[138], now 2."):
        loaders_of([streamed(more)], consumed=64, state=states[3])


# --- costs


class Counting(LocalSource):
    """Counts the documents that are read."""

    read_count = [0]

    def read(self, file, state=None):
        reader = super().read(file, state)
        rows = reader._rows

        def counted():
            for row in rows:
                self.read_count[0] += 1
                yield row

        reader._rows = counted()
        return reader


def test_a_resume_reads_few_blocks_again(tmp_path):
    source = streamed(Counting(**vars(write(tmp_path / "data", "jsonl", texts_of(1, 3000)))))
    _, states = steps([source], 800, gbs=2)
    Counting.read_count[0] = 0
    _, [state] = steps([source], 1, gbs=2, consumed=1600, state=states[799])
    last = max(place["document"] for place in state["places"].values())
    assert last > 700 and Counting.read_count[0] < 100
    assert len(json.dumps(state)) < 2 * 250


def test_states_are_of_what_was_handed_out(reference):
    """Workers are far ahead by then."""
    source, _, states = reference
    [loader] = loaders_of([source], workers=2)
    assert merge_states([loader.state()])["places"].keys() == states[0]["places"].keys()
    for step in range(3):
        next(loader)
        assert merge_states([loader.state()]) == states[step]


def test_workers_end_with_their_loader(reference):
    others = set(multiprocessing.active_children())  # the pool of ranks, where other tests ran before
    [loader] = loaders_of([reference[0]], workers=2)
    next(loader)
    assert len(set(multiprocessing.active_children()) - others) == 2
    gc.disable()
    try:
        del loader
        assert set(multiprocessing.active_children()) <= others
    finally:
        gc.enable()


def test_a_worker_that_is_killed_costs_no_batch(tmp_path):
    source = streamed(write(tmp_path / "source", "jsonl.gz", texts_of(8)))
    batches, states = steps([source], 14)  # more than were loaded ahead when the worker is killed
    others = set(multiprocessing.active_children())  # ranks of the pool
    (loader,) = loaders_of([source], workers=2)
    first, _ = take([loader], 1)
    worker = next(process for process in multiprocessing.active_children() if process not in others)
    os.kill(worker.pid, signal.SIGKILL)
    rest, states_after = take([loader], 13)
    assert "data worker process" in loader.lost_worker
    assert torch.equal(torch.cat([first, rest]), batches[:14]) and states_after == states[1:14]
