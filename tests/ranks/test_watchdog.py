"""Who waits for whom, told from made-up answers of ranks; and what a rank waits in. Real hangs: tests/frontdoor."""

import dataclasses
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from dtron import compat
from dtron.config import load
from dtron.config.sections import Comm
from dtron.errors import UserError
from dtron.ranks import hang_report, watchdog
from dtron.ranks.failure import FIRST_FAILURE
from dtron.ranks.hang_report import State, Wait, format_ranks, recorded_wait, report
from dtron.ranks.watchdog import Watchdog, fire_after, in_communication
from dtron.ranks.world import World
from dtron.train.resolve import resolve

LIMIT = ("comm.train_timeout_seconds", 100.0)
REDUCE = Wait("all_reduce", [0, 1, 2, 3], "", 57, [[2], []])
GATHER = Wait("all_gather", [0, 1], "mesh_dp_shard", 12, [[4, 8]])
MESSAGE = Wait("a point-to-point message (_wait_batch_p2p, line 683 of schedules.py)", [])


def state(wait: Wait | None, step: int = 7, stack: str = "  File x\n    code\n") -> State:
    return State(step, wait, stack)


# --- the report


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 1, 2, 7, 8], "ranks 0-2, 5, 7-8"), ([1, 3], "ranks 1, 3")],
)
def test_names_of_ranks(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text


def test_the_rank_in_no_collective_is_the_cause() -> None:
    states = {0: state(REDUCE), 1: state(GATHER), 2: state(None, step=6, stack="  File loader\n    sleep()\n"), 3: None}
    del states[3]
    states[3] = state(REDUCE)
    assert report(states, 1, 96.51, LIMIT).splitlines() == [
        "the run hangs after step 7: rank 1 has waited 96.5 s for rank 2; comm.train_timeout_seconds is 100",
        "rank 2, after step 6, is in no collective; its main thread:",
        "  File loader",
        "    sleep()",
        "ranks 0, 3 wait in all_reduce of [2], a scalar, collective 57 of all ranks",
        "rank 1 waits in all_gather of [4, 8], collective 12 of ranks 0-1 (mesh_dp_shard)",
        "if rank 2 was only slow, raise comm.train_timeout_seconds",
    ]


def test_a_silent_rank_is_the_cause() -> None:
    text = report({0: state(MESSAGE), 1: None, 2: state(MESSAGE), 3: None}, 0, 96.5, LIMIT)
    assert "rank 0 has waited 96.5 s for ranks 1, 3;" in text
    assert "ranks 1, 3 did not answer within 1.5 s" in text
    assert "ranks 0, 2 wait in a point-to-point message (_wait_batch_p2p, line 683 of schedules.py)\n" in text
    assert text.endswith("if ranks 1, 3 were only slow, raise comm.train_timeout_seconds")
    assert "code" not in text.splitlines()  # nobody's stack


def test_ranks_that_diverged() -> None:
    states = {rank: state(REDUCE) for rank in range(3)} | {3: state(GATHER, stack="  File other\n")}
    text = report(states, 0, 96.5, LIMIT)
    assert "rank 0 has waited 96.5 s; comm" in text
    assert "ranks 0-2 wait in all_reduce of" in text and "rank 3 waits in all_gather of" in text
    assert "every rank waits, in different collectives" in text
    assert "main thread of rank 0:\n  File x" in text and "main thread of rank 3:\n  File other" in text
    assert "only slow" not in text


def test_one_collective_that_does_not_end() -> None:
    text = report({rank: state(REDUCE) for rank in range(4)}, 0, 96.5, LIMIT)
    assert text.endswith("every rank waits in the same collective: look at the network between them")


def test_ranks_that_cannot_end_what_others_have_ended() -> None:
    """As when the link between two of them is down: those whose part of it is done go on to the next."""
    later = dataclasses.replace(REDUCE, number=58)
    text = report({0: state(later), 1: state(REDUCE), 2: state(REDUCE), 3: state(later)}, 0, 96.5, LIMIT)
    assert text.endswith("others have finished what ranks 1-2 still wait in: look at the network of these")
    assert "different" not in text and "File" not in text


def test_a_report_stays_short() -> None:
    states = {rank: state(None) for rank in range(100)}
    states |= {rank: state(Wait("broadcast", [rank], "", rank)) for rank in range(100, 200)}
    text = report(states, 100, 96.5, LIMIT)
    assert text.count("is in no collective") == 4 and "and 96 more ranks like these" in text
    assert text.count("waits in broadcast") == 4 and "and 96 more collectives" in text


@pytest.mark.parametrize("limit_s", [1, 8, 100, 300])
def test_the_report_comes_before_the_timeout(limit_s: float) -> None:
    assert 0.5 * limit_s < fire_after(limit_s)
    if limit_s >= 8:
        assert fire_after(limit_s) + watchdog.POLL_S + hang_report.ANSWER_S < limit_s


# --- what a rank waits in


def entry(
    record_id: int, retired: bool, name: str = "gloo:all_reduce", group: str = "0", **more: Any
) -> dict[str, Any]:
    common = {"time_created_ns": record_id, "timeout_ms": 8000, "collective_seq_id": record_id, "input_sizes": [[2]]}
    return common | {"record_id": record_id, "retired": retired, "profiling_name": name} | {
        "process_group": (group, "default_pg")
    } | more  # fmt: skip


def recorder(monkeypatch: pytest.MonkeyPatch, *entries: dict[str, Any]) -> None:
    """Let torch's recorder hold these."""
    dump = pickle.dumps({"entries": entries, "pg_config": {"": {}}})
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_fr_trace", lambda **_: dump)


def test_unfinished_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder(monkeypatch, entry(3, False), entry(2, True), entry(1, False))
    assert [e["record_id"] for e in compat.unfinished_collectives()] == [1, 3]


def test_single_messages_of_a_batch_on_nccl_are_never_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [entry(1, False, "nccl:send 0->1", "3"), entry(2, True, "nccl:coalesced", "3")]
    other_group, later = entry(0, False, "nccl:all_reduce", "0"), entry(4, False, "nccl:coalesced", "3")
    recorder(monkeypatch, *batch)
    assert compat.unfinished_collectives() == []
    recorder(monkeypatch, other_group, *batch, later)
    assert [e["record_id"] for e in compat.unfinished_collectives()] == [0, 4]


def test_dump_names_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's recorder does not, and torch's analyzer needs them."""
    recorder(monkeypatch, entry(1, True))
    monkeypatch.setattr(compat, "group_ranks", lambda name: [0, 1])
    config = pickle.loads(compat.dump_flight_recorder())["pg_config"]
    assert config["0"] == {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}


def test_an_entry_in_the_terms_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "group_ranks", lambda name: [0, 1])
    assert recorded_wait(entry(5, False)).text(2) == "all_reduce of [2], collective 5 of all ranks"
    mesh = entry(5, False, process_group=("1", "mesh_tp"))
    assert recorded_wait(mesh).text(4) == "all_reduce of [2], collective 5 of ranks 0-1 (mesh_tp)"


def groups() -> list[Any]:
    """group_ranks of a group of its own, and of one that is gone."""
    group = dist.new_group([0, 1])
    return [compat.group_ranks(group.group_name), compat.group_ranks("gone")]


def test_ranks_of_a_group(ranks: Ranks) -> None:
    assert ranks.run(2, groups) == [[[0, 1], []]] * 2


class Pending:
    """A rank of two whose partner sends nothing: its main thread waits in a pipeline's own code."""

    def wait(self) -> None:
        time.sleep(0.5)


def test_a_wait_for_a_message_is_told_by_the_code_it_is_in() -> None:
    """In torch's pipeline schedules, as in our own exchange of tied gradients; not in a loader that sleeps."""
    from torch.distributed.pipelining.schedules import _wait_batch_p2p

    main, seen = threading.get_ident(), []

    def look() -> None:
        time.sleep(0.1)
        # The innermost frame is that of a C call's caller: of `wait` here, which stands for torch's C method.
        frame = sys._current_frames()[main]
        seen.append((in_communication(frame), in_communication(frame.f_back)))

    thread = threading.Thread(target=look)
    thread.start()
    _wait_batch_p2p([Pending()])
    thread.join()
    assert seen == [(False, True)]
    assert not in_communication(sys._getframe())


# --- one rank's watchdog


def after_times(log: str) -> str:
    """The log without the time stamp of each line."""
    return "".join(line[20:] for line in log.splitlines(keepends=True))


@pytest.fixture
def dog(tmp_path: Path) -> Watchdog:
    comm = Comm(train_timeout_seconds=8)
    return Watchdog(World(0, 0, 2, dist.HashStore()), comm, tmp_path, lambda: 7, sees_all=False)


def test_limits(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long up to the end of the first step, then short; a group with a longer timeout keeps it."""
    recorder(monkeypatch, entry(time.time_ns() - 10**10, False))
    began, longest_s = dog._waits_since(0.0) or (0, 0)
    assert time.monotonic() - began == pytest.approx(10, abs=1) and longest_s == 300
    dog.first_step_done()
    assert (dog._waits_since(0.0) or (0, 0))[1] == 8
    recorder(monkeypatch, entry(time.time_ns() - 10**10, False, timeout_ms=24 * 3600 * 1000))
    assert (dog._waits_since(0.0) or (0, 0))[1] == 24 * 3600


def test_waits_for_nobody(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder(monkeypatch, entry(1, True))
    assert dog._waits_since(0.0) is None
    answer = dog._state()
    assert (answer.step, answer.wait) == (7, None) and "answer = dog._state()" in answer.stack


class Ended(Exception):
    """In the place of os._exit."""


def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdog, "tell_torchrun", lambda error: None)
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.1)
    monkeypatch.setattr(watchdog, "KILLED_WAIT_S", 0.0)


def test_only_the_first_failure_is_told(dog: Watchdog, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    exits(monkeypatch)
    dog._store.set(FIRST_FAILURE, "rank 1")
    dog._fire(6.0)
    assert capsys.readouterr().err == "" and not dog._store.check(["hang"])


def test_ask_and_answer(dog: Watchdog, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """Two watchdogs on one store: the one that asks reports what the other answers; then both end."""
    exits(monkeypatch)
    other = Watchdog(World(1, 1, 2, dog._store), Comm(), tmp_path, lambda: 3, sees_all=False)
    recorder(monkeypatch, entry(1, True))
    monkeypatch.setattr(watchdog, "DUMP_S", 0.0)
    with pytest.raises(Ended):
        other._answer_and_end()
    recorder(monkeypatch, entry(1, False))
    with pytest.raises(Ended):
        dog._fire(6.0)
    said = after_times(capsys.readouterr().err)
    assert said.startswith("error: the run hangs after step 7: rank 0 has waited 6.0 s for rank 1;")
    assert "rank 1, after step 3, is in no collective" in said and f"{tmp_path / 'comm_traces'}\n" in said
    files = sorted(path.name for path in (tmp_path / "comm_traces").iterdir())
    assert files == ["rank_0", "rank_1", "stack_0.txt", "stack_1.txt"]
    assert dog._store.get(FIRST_FAILURE) != b"rank 0"  # the main thread is not to think that it was first


def test_a_folder_that_cannot_be_written_is_said(
    dog: Watchdog, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "comm_traces").write_text("")
    dog._write()
    assert "error: the last collectives could not be written: " in capsys.readouterr().err


@pytest.mark.parametrize(("size", "recording", "threads"), [(2, True, 1), (1, True, 0), (2, False, 0)])
def test_who_is_watched(
    dog: Watchdog, monkeypatch: pytest.MonkeyPatch, size: int, recording: bool, threads: int
) -> None:
    started: list[Callable[[], None]] = []
    monkeypatch.setattr(compat, "flight_recorder_is_on", lambda: recording)
    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda thread: started.append(thread.run))
    dog._size = size
    dog.start()
    assert len(started) == threads


def test_a_long_wait_ends_when_the_next_rank_has_no_heartbeat(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group whose timeout is longer than the limit, as for a slow disk: hours, if it lives."""
    fired: list[float] = []
    monkeypatch.setattr(dog, "_fire", fired.append)
    dog.first_step_done()
    recorder(monkeypatch, entry(time.time_ns(), False, timeout_ms=24 * 3600 * 1000))
    now = time.monotonic()
    for later in range(0, 100, 4):
        dog._look(now, now + later)
    assert fired == [], "one that has not begun to give signs"
    for later in range(100, 200, 4):
        dog._store.set("heartbeat/1", str(later))
        dog._look(now, now + later)
    assert fired == [], "one that lives"
    dog._look(now, now + 196 + 5)
    assert fired == []
    dog._look(now, now + 196 + 6)
    assert fired == [pytest.approx(202, abs=2)]
    recorder(monkeypatch, entry(time.time_ns() + 300 * 10**9, False))
    dog._look(now, now + 301)
    assert len(fired) == 1, "a wait in another group has the limit alone"


def test_a_rank_has_heartbeats(dog: Watchdog) -> None:
    signs: list[str] = []

    class Noting:
        def check(self, keys: list[str]) -> bool:
            return False

        def set(self, key: str, sign: str) -> None:
            assert key == "heartbeat/0"
            signs.append(sign)

    dog._store = Noting()
    dog._heartbeat_s, dog._poll_s = 0.3, 0.02
    threading.Timer(1.0, dog.stop).start()
    dog._poll()
    assert 3 <= len(set(signs)) == len(signs) <= 5, "not as often as it polls"


class Lost(dist.HashStore):  # type: ignore[misc]
    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Failed to recv")


@pytest.mark.parametrize("stops", [True, False])
def test_a_rank_that_lost_the_store_ends(
    tmp_path: Path, stops: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """If nobody stops it, and the run does not end by itself."""
    exits(monkeypatch)
    monkeypatch.setattr(watchdog, "SILENT_WAIT_S", 0.5)
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    dog = Watchdog(World(1, 1, 2, Lost()), Comm(), tmp_path, lambda: 3, sees_all=False)
    if stops:
        threading.Timer(0.2, dog.stop).start()
        dog._watch()
    else:
        with pytest.raises(Ended):
            dog._watch()
    said = after_times(capsys.readouterr().err)
    assert said == ("" if stops else "error: rank 1 cannot reach the rendezvous store: Failed to recv\n")


# --- keys


def test_size_of_the_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        monkeypatch.setenv(name, "")  # so that the test's own setting is undone
        monkeypatch.delenv(name)
    assert not compat.flight_recorder_is_on()
    compat.start_flight_recorder(0)
    assert os.environ.pop("TORCH_FR_BUFFER_SIZE") == "0" and not compat.flight_recorder_is_on()
    compat.start_flight_recorder(300)
    assert os.environ.pop("TORCH_FR_BUFFER_SIZE") == "300"
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "17")
    compat.start_flight_recorder(300)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ and compat.flight_recorder_is_on()


@pytest.mark.parametrize(
    ("key", "value"),
    [("folder", "/tmp"), ("folder", "../x"), ("file_prefix", "a/b"), ("file_prefix", "stack_"), ("file_prefix", "")],
)
def test_names_that_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"comm.save_traces_{key} = "):
        resolve(load(["--training.device", "cpu", f"--comm.save_traces_{key}", value]), 1)


@pytest.mark.parametrize("set_by_s", [-2 * 86400, 0, 2 * 86400])
def test_a_clock_that_is_set_during_the_run_makes_no_wait(
    dog: Watchdog, monkeypatch: pytest.MonkeyPatch, set_by_s: int
) -> None:
    """Of collectives that began before and after it."""
    before = time.time()
    clock, clock_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: clock() + set_by_s)
    monkeypatch.setattr(time, "time_ns", lambda: clock_ns() + set_by_s * 10**9)
    for began_s in (before - 3, time.time() - 3):
        recorder(monkeypatch, entry(int(began_s * 1e9), False))
        began, _ = dog._waits_since(0.0) or (0, 0)
        assert time.monotonic() - began == pytest.approx(3, abs=1)
