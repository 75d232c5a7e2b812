"""`dtron preflight`: its formulas, limits for slow ranks, exit codes, and what happens when a rank hangs."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import warm
from ranks import Ranks
from warm import without_times

from dtron.__main__ import main
from dtron.cluster.preflight import machine as preflight_machine
from dtron.cluster.preflight import measure as preflight_measure
from dtron.cluster.preflight import report as preflight_report
from dtron.cluster.preflight import stages as preflight_stages
from dtron.cluster.preflight.facts import MUST_MATCH, compare_facts, facts, hash_code, machines
from dtron.cluster.preflight.guard import Guard, RankState, stall_report
from dtron.cluster.preflight.measure import Elapsed, Meter, Timer, bus_factor, dimensions, link_rounds
from dtron.cluster.preflight.report import SCHEMA, SLOW_LINK, find_warnings, summarize_dimensions, table, upper_median
from dtron.cluster.preflight.stages import Peers, Plan, compare_versions, measure
from dtron.config import load
from dtron.errors import UserError
from dtron.mesh import Degrees, Mesh
from dtron.ranks.logs import setup_logging
from dtron.ranks.world import World

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FACTS = dict.fromkeys(MUST_MATCH, "1") | {"device": "cpu", "git": None, "host": "n1", "node": 0, "threads": 1}


def facts_of(*hosts: str) -> list[dict[str, Any]]:
    return [FACTS | {"host": host} for host in hosts]


def quick() -> Any:
    """Measurements take almost no time in this process."""
    small = {
        "RATE_BUDGET_S": 0.005,
        "MESSAGE_BUDGET_S": 0.005,
        "MESSAGE_BYTES": {"cpu": (4, 4096, 65536)},
        "COPY_BYTES": {"cpu": 1 << 16},
    }
    return mock.patch.multiple(preflight_measure, MATMUL_SIZE={"cpu": 64}, **small)


def world_of(folder: Path) -> World:
    """The ranks of the pool, with a store of their own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, rank, size, dist.PrefixStore("dtron/0", dist.FileStore(str(folder / "store"), size)))


def redirect_stderr(path: Path) -> None:
    """Write this forked process's stderr to a file, without what pytest has buffered."""
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w")


# --- formulas


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """Its PERFORMANCE.md: a ring of n moves each byte 2(n-1)/n times to reduce it everywhere, (n-1)/n to gather it."""
    assert [bus_factor("all_reduce", n) for n in (2, 4, 8)] == [1, 1.5, 1.75]
    assert [bus_factor("all_gather", n) for n in (2, 4, 8)] == [0.5, 0.75, 0.875]
    assert bus_factor("send_recv", 2) == 1
    sizes = [{"bytes": 4, "seconds": 2e-5}, {"bytes": 1 << 20, "seconds": 2e-3}]
    links = [[{"ranks": [a, b], "sizes": sizes}] for a, b in ((0, 1), (0, 1), (2, 3), (2, 3))]
    measured = [
        [{"names": ["tp"], "ranks": [0, 1, 2, 3], "all_reduce": sizes, "all_gather": sizes, "links": its}]
        for its in links
    ]
    tp = summarize_dimensions(measured, ["n1"] * 4)["tp"]
    assert tp["all_reduce"]["latency_s"] == 2e-5
    assert tp["all_reduce"]["sizes"][1]["bytes_per_s"] == pytest.approx((1 << 20) / 2e-3)
    assert tp["all_reduce"]["sizes"][1]["bus_bytes_per_s"] == pytest.approx(1.5 * (1 << 20) / 2e-3)
    assert tp["all_gather"]["sizes"][1]["bus_bytes_per_s"] == pytest.approx(0.75 * (1 << 20) / 2e-3)
    assert [link["bytes_per_s"] for link in tp["send_recv"]["links"]] == pytest.approx([(1 << 20) / 2e-3] * 2)


class Clockwork(Timer):
    """Every call takes 1 ms, of which the rank has a core for half; the first in a row takes a second more."""

    def elapsed(self, run: Callable[[], Any], calls: int) -> Elapsed:
        run()
        return Elapsed(calls * 1e-3, calls * 5e-4)


def test_rates_are_work_over_time() -> None:
    with quick():
        meter = Meter(CPU, Guard(World(0, 0, 1, dist.HashStore()), 10), Clockwork(CPU))
        assert meter.matmul(torch.float32) == pytest.approx(
            {"matmul_flops_per_s": 2 * 64**3 / 1e-3, "matmul_flops_per_cpu_s": 2 * 64**3 / 5e-4}
        )
        assert meter.memory()["memory_bytes_per_s"] == pytest.approx(2 * (1 << 16) / 1e-3), "read and written"


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_ring_of_links_in_rounds(n: int) -> None:
    rounds = link_rounds(range(10, 10 + n), [0] * 20, in_order=False)
    pairs = [pair for each in rounds for pair in each]
    assert {frozenset(pair) for pair in pairs} == {frozenset((10 + i, 10 + (i + 1) % n)) for i in range(n)}
    assert len(pairs) == len(set(pairs)) and len(rounds) == (1 if n == 2 else 2 + n % 2)
    for each in rounds:
        ranks = [rank for pair in each for rank in pair]
        assert len(ranks) == len(set(ranks)), "one partner at a time"


def test_every_local_rank_has_a_link_to_the_next_machine() -> None:
    rounds = link_rounds([0, 1, 2, 3], [0, 0, 1, 1], in_order=False)
    assert rounds == [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]
    assert (1, 2) in link_rounds([0, 1, 2, 3], [0, 0, 1, 1], in_order=True)[1], "as a pipeline sends"
    assert link_rounds([0, 1, 2], [0, 0, 1], in_order=False) == [[(0, 1)], [(1, 2)], [(2, 0)]]


def test_clock_skew_by_the_ntp_formula() -> None:
    assert preflight_machine.clock_offset(100, 205, 206, 111) == (100, 5), "100 ahead, 5 each way"
    assert preflight_machine.clock_offset(0, 8, 8, 10) == (3, 5), "off by the asymmetry, at most half the round trip"


def ask_or_answer_clock() -> Any:
    if dist.get_rank() == 0:
        return preflight_machine.ask_clock(1)
    return preflight_machine.answer_clock(0, clock=lambda: time.time_ns() - 5_000_000_000)


def test_a_clock_that_is_behind(ranks: Ranks) -> None:
    found = ranks.run(2, ask_or_answer_clock)[0]
    assert found["clock_skew_s"] == pytest.approx(-5, abs=0.1)
    assert abs(found["clock_skew_s"] + 5) <= found["clock_uncertainty_s"]


def test_the_disk_measurement_leaves_no_file(tmp_path: Path) -> None:
    found = preflight_machine.measure_disk_write(tmp_path, 0.05)
    assert found["disk_write_bytes_per_s"] > 0 and found["disk_free_bytes"] > 0
    assert [*tmp_path.iterdir()] == []
    marker = preflight_machine.write_marker(tmp_path / "new")
    assert preflight_machine.sees_marker(tmp_path / "new", marker.name)
    assert not preflight_machine.sees_marker(tmp_path, marker.name, timeout_s=0)


# --- what must match


def test_facts_of_this_machine() -> None:
    found = facts(CPU)
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and set(found) == set(FACTS)
    assert compare_facts([found, found]) == ""


def test_different_code_has_another_hash(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = hash_code(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert hash_code(tmp_path) != before
    (tmp_path / "a.py").write_text("x = 1")
    assert hash_code(tmp_path) == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert hash_code(tmp_path) != before


def test_the_outlier_is_named_first() -> None:
    of_ranks = facts_of("n1", "n1", "n2", "n2")
    of_ranks[3] |= {"torch": "2.11.0", "code": "abc", "git": "123"}
    assert compare_facts(of_ranks) == (
        "the ranks differ: torch is 2.11.0 on rank 3 (n2) and 1 on ranks 0-2 (n1, n2); dtron's code is abc "
        "(commit 123) on rank 3 (n2) and 1 on ranks 0-2 (n1, n2); install the same versions on every machine"
    )
    of_ranks = facts_of("n1", "n2", "n3")
    of_ranks[0] |= {"triton": None, "git": "another, with the same code"}
    assert "triton is not installed on rank 0 (n1) and 1 on ranks 1-2 (n2, n3); install" in compare_facts(of_ranks)


def test_each_agent_of_a_host_is_a_machine() -> None:
    of_ranks = facts_of("a", "a", "b", "a")
    of_ranks[3]["node"] = 2
    assert machines(of_ranks) == [[0, 1], [2], [3]]


def exchange_facts(folder: Path, versions: list[str]) -> Any:
    world = world_of(folder)
    try:
        peers = compare_versions(
            world, Guard(world, 20), FACTS | {"torch": versions[world.rank], "host": f"n{world.rank}"}
        )
    except UserError as error:
        return str(error)
    return peers.hosts, peers.machine_of, len(peers.facts)


def test_every_rank_reports_differing_versions(ranks: Ranks, tmp_path: Path) -> None:
    messages = ranks.run(3, exchange_facts, tmp_path, ["2.13", "2.13", "2.12"])
    assert len(set(messages)) == 1
    assert "torch is 2.12 on rank 2 (n2) and 2.13 on ranks 0-1 (n0, n1)" in messages[0]


def test_matching_ranks_know_each_other(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(2, exchange_facts, tmp_path, ["2.13", "2.13"])
    assert results == [(["n0", "n1"], [0, 1], 2), (["n0", "n1"], [0, 1], 0)]


# --- figures of four ranks on two made-up machines


class Slow(Meter):
    """A rank whose device and network are a million times slower: more than a busy machine makes of any."""

    def matmul(self, dtype: torch.dtype) -> dict[str, float]:
        return {key: rate / 1e6 for key, rate in super().matmul(dtype).items()}

    def links(self, dimension: Any, machine_of: Any) -> Any:
        found = super().links(dimension, machine_of)
        return [link | {"sizes": [s | {"seconds": 1e6 * s["seconds"]} for s in link["sizes"]]} for link in found]


def measuring(folder: Path, slow_rank: int, degrees: Degrees, hosts: list[str]) -> Any:
    world, every = world_of(folder), facts_of(*hosts)
    peers = Peers(world.rank, hosts, [0, 0, 1, 1], every if world.rank == 0 else [])
    guard, plan = Guard(world, 30), Plan(load(["--tp", "1"]), degrees, CPU, folder / "outputs")
    meter = (Slow if world.rank == slow_rank else Meter)(CPU, guard)
    with quick(), mock.patch.object(preflight_stages, "DISK_BUDGET_S", 0.02):
        return measure(plan, guard, meter, Mesh(degrees, "cpu"), peers)


def test_figures_of_a_layout(ranks: Ranks, tmp_path: Path) -> None:
    hosts = ["n1", "n1", "n2", "n2"]
    figures, *others = ranks.run(4, measuring, tmp_path, 2, Degrees(dp_shard=2, tp=2), hosts)
    assert others == [None] * 3
    figures = json.loads(json.dumps(figures))
    assert set(figures["dimensions"]) == {"dp_shard_cp", "tp", "world"}
    tp, world = figures["dimensions"]["tp"], figures["dimensions"]["world"]
    assert tp["groups"] == [[0, 1], [2, 3]] and figures["dimensions"]["dp_shard_cp"]["groups"] == [[0, 2], [1, 3]]
    assert world["groups"] == [[0, 1, 2, 3]] and (tp["degree"], world["degree"]) == (2, 4)
    for op in ("all_reduce", "all_gather", "send_recv"):
        assert [size["bytes"] for size in tp[op]["sizes"]][1:] == [4096, 65536]
        assert tp[op]["latency_s"] == tp[op]["sizes"][0]["seconds"] > 1e-6
    link = tp["send_recv"]["links"][0]  # the other is the slow rank's
    assert link["ranks"] == [0, 1] and link["hosts"] == ["n1", "n1"] and link["bytes"] == 65536
    for bytes_per_s in (link["bytes_per_s"], *(size["bytes_per_s"] for size in tp["all_reduce"]["sizes"])):
        assert 1 < bytes_per_s < 1e12
    assert [link["ranks"] for link in world["send_recv"]["links"]] == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert [(machine["host"], machine["ranks"]) for machine in figures["machines"]] == [("n1", [0, 1]), ("n2", [2, 3])]
    assert all(abs(machine["clock_skew_s"]) <= machine["clock_uncertainty_s"] for machine in figures["machines"])
    assert figures["disk"]["shared"] and [*(tmp_path / "outputs").iterdir()] == []
    # What the slow rank does to them:
    limits = {"SLOW_RATE": {"cpu": 0.01}, "SLOW_LINK": {"cpu": 0.01}}
    with mock.patch.multiple(preflight_report, **limits):
        found = find_warnings(figures)
    slow = {(warning["kind"], tuple(warning["ranks"])): warning["text"] for warning in found}
    assert (
        slow["matmul", (2,)].startswith("matmul: rank 2 (n2), ") and " per CPU second at worst" in slow["matmul", (2,)]
    )
    assert slow["send/recv in tp", (2, 3)].startswith("send/recv in tp: the link between rank 2 (n2) and rank 3 (n2), ")
    assert "rank 2 (n2)" in table(figures | {"took_s": 1.0, "warnings": found})


# --- what is slow


def test_half_of_all_may_be_slow() -> None:
    assert upper_median([1, 3]) == upper_median([1, 1, 3, 3]) == 3
    assert upper_median([1, 3, 3.1, 5]) == 3.1


def warnings_of_ring(rates: dict[tuple[int, int], float], hosts: list[str]) -> list[str]:
    """Warnings about the links of one group that spans several machines."""
    links = [
        {"ranks": [a, b], "hosts": [hosts[a], hosts[b]], "latency_s": 1e-5, "bytes_per_s": rate}
        for (a, b), rate in rates.items()
    ]
    size = {"bytes": 4, "seconds": 1e-5, "seconds_of_groups": [1e-5]}
    one = {"degree": len(hosts), "groups": [[*range(len(hosts))]], "send_recv": {"links": links}}
    one |= {op: {"sizes": [size]} for op in ("all_reduce", "all_gather")}
    rank = {"matmul_flops_per_s": 1e12, "memory_bytes_per_s": 1e12, "memory_free_bytes": 1e9}
    machine = {"clock_skew_s": 0.0, "clock_uncertainty_s": 1e-4, "disk_write_bytes_per_s": 1e9}
    figures = {
        "device_type": "cuda",
        "ranks": [rank | {"rank": i, "host": host} for i, host in enumerate(hosts)],
        "machines": [machine | {"host": host, "ranks": [i]} for i, host in enumerate(hosts)],
        "disk": {"shared": True, "folder": "outputs"},
        "dimensions": {"tp": one, "world": one},
    }
    return [warning["text"] for warning in find_warnings(figures)]


def test_a_slow_link_is_distinguished_from_a_slow_machine() -> None:
    hosts, slow = ["n1", "n2", "n3", "n4"], SLOW_LINK["cuda"] * 0.9e9
    good = {(0, 1): 1e9, (1, 2): 1.1e9, (2, 3): 1e9, (3, 0): 1.05e9}
    assert warnings_of_ring(good, hosts) == []
    assert warnings_of_ring(good | {(1, 2): slow}, hosts) == [
        "send/recv in tp: the link between rank 1 (n2) and rank 2 (n3), 0.63 GB/s, the median is 1.05 GB/s"
    ]
    assert warnings_of_ring(good | {(1, 2): slow, (2, 3): slow / 2}, hosts) == [
        "send/recv in tp: every link of rank 2 (n3), 0.63 GB/s at best, the median is 1.05 GB/s"
    ]
    three = {(0, 1): slow, (1, 2): slow, (2, 0): 1e9}
    assert warnings_of_ring(three, hosts[:3]) == [
        "send/recv in tp: every link of rank 1 (n2), 0.63 GB/s at best, the median is 1 GB/s"
    ], "two slow links of three are one machine"


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., tuple[int, str, str, dict[str, Any]]]:
    """`dtron preflight ...` as one rank, in a forked process that has all modules: exit code, stdout, stderr, JSON."""

    def run(*arguments: str) -> tuple[int, str, str, dict[str, Any]]:
        def child() -> None:
            os.chdir(tmp_path)
            redirect_stderr(tmp_path / "err")
            os.dup2(os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
            sys.stdout = os.fdopen(1, "w")
            with quick(), mock.patch.object(preflight_stages, "DISK_BUDGET_S", 0.02):
                main(["preflight", *arguments])

        process = mp.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        found = tmp_path / "preflight.json"
        figures = json.loads(found.read_text()) if found.exists() else {}
        return process.exitcode, (tmp_path / "out").read_text(), without_times((tmp_path / "err").read_text()), figures

    return run


def test_one_rank(alone: Any, tmp_path: Path) -> None:
    (tmp_path / "preflight.json").write_text(json.dumps({"schema": SCHEMA}))
    code, out, err, figures = alone()
    assert (code, err) == (0, "")
    assert out.startswith("preflight of one rank: 1 x cpu on 1 machine, torch ")
    assert figures["schema"] == 1 and figures["exit_code"] == 0 and figures["world"] == 1
    assert figures["dimensions"] == {} and figures["error"] is None
    assert figures["ranks"][0]["matmul_dtype"] == "float32" and figures["ranks"][0]["matmul_flops_per_s"] > 1e6
    assert figures["versions"]["torch"] == torch.__version__
    assert (tmp_path / "outputs").is_dir() and [*(tmp_path / "outputs").iterdir()] == []


@pytest.mark.parametrize(("strict", "expected"), [([], 0), (["--strict"], 3)])
def test_warnings_count_with_strict(alone: Any, monkeypatch: Any, strict: list[str], expected: int) -> None:
    made_up = {"kind": "matmul", "ranks": [0], "hosts": ["n1"], "text": "matmul: rank 0 (n1) is slow"}
    monkeypatch.setattr(preflight_stages, "find_warnings", lambda figures: [made_up])
    code, out, _, figures = alone(*strict)
    assert code == figures["exit_code"] == expected and figures["warnings"] == [made_up]
    assert "warning: matmul: rank 0 (n1) is slow\n" in out


def test_a_file_of_another_kind_is_kept(alone: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine\n")
    code, _, err, _ = alone("--out", "mine.txt")
    assert code == 2 and "mine.txt exists and was not written by preflight" in err
    assert (tmp_path / "mine.txt").read_text() == "mine\n"


def test_what_makes_training_impossible(alone: Any, tmp_path: Path) -> None:
    (tmp_path / "preflight.json").write_text(json.dumps({"schema": SCHEMA}))
    code, out, err, figures = alone("--tp", "2")
    assert (code, out) == (2, "") and err.startswith("error: ") and "start a multiple of 2 ranks" in err
    assert figures == {}, "the file of an earlier preflight is deleted"
    (tmp_path / "run.toml").write_text("[model]\nn_heads = 3\n")
    code, _, err, _ = alone("--config", "run.toml")
    assert code == 2 and "3 query heads" in err and err.count("\n  * ") == 2, "a run's file is checked as train.py does"
    code, _, err, _ = alone("--tensor", "2")
    assert code == 2 and 'unknown key "tensor"' in err
    code, _, err, _ = alone("--out", "run.toml/figures.json")
    assert code == 2 and "--out run.toml/figures.json cannot be written" in err


def test_a_folder_that_cannot_be_written(alone: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err, figures = alone("--disk", "file/outputs")
    assert code == figures["exit_code"] == 2
    assert re.match(r"error: cannot write to file/outputs on 1 of 1 machines \(.*\): .*; choose another", err)
    assert figures["error"] in err and figures["ranks"][0]["matmul_flops_per_s"] > 0, "what was measured is kept"
    assert "fails" in out


@pytest.mark.parametrize(("needed", "expected"), [(True, "keeps its checkpoints there"), (False, None)])
def test_checkpoints_need_a_folder_that_is_shared(needed: bool, expected: str | None) -> None:
    seen = [{"host": f"n{i}", "disk_error": None, "disk_sees_rank_0": i == 0} for i in range(2)]
    error = preflight_stages._fatal_problem({"machines": seen, "disk": {"folder": "o", "shared": False}}, needed)
    assert error == expected or (expected and error and expected in error and "not visible on n1" in error)


def test_other_commands_take_no_keys(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "a model", "--tp", "2"])
    assert "unrecognized arguments: --tp 2" in capsys.readouterr().err


# --- ranks that hang


def test_the_report_names_the_ranks_waited_for() -> None:
    hosts = ["n1", "n2", "n3", "n4"]
    done, inside = RankState("all_reduce in tp", [0, 1], waiting=True), RankState("all_reduce in tp", [2, 3])
    assert stall_report("it took long", {0: done, 1: done, 2: inside, 3: inside}, hosts).splitlines() == [
        "preflight: it took long",
        "all_reduce in tp of ranks 2-3 (n3, n4) has not finished",
        "check the network between their machines",
    ]
    assert stall_report("x", {0: done, 1: done, 2: inside, 3: None}, hosts).splitlines()[1:] == [
        "rank 3 (n4) did not answer: not started, stopped, exited, or cut off from rank 0's machine",
        "all_reduce in tp of ranks 2-3 (n3, n4) has not finished on rank 2 (n3)",
    ]
    assert stall_report("x", {0: done, 1: RankState("matmul")}, []).splitlines()[1:] == ["rank 1: still at matmul"]


def hang(rank: int, port: int, folder: Path, how: str) -> None:
    """Three ranks share two stages; the last rank does not finish the second."""
    redirect_stderr(folder / f"err{rank}")
    world = World(rank, rank, 3, dist.PrefixStore("p", dist.TCPStore("localhost", port, None, False)))
    guard = Guard(world, 1.0)
    guard.start()
    with guard.stage("the beginning", 30):
        guard.hosts = ["n1", "n2", "n3"]
    with guard.stage("the middle"):
        if rank == 2 and how == "sleeps":
            time.sleep(60)
        if rank == 2 and how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        guard.set_current("all_reduce in tp", [0, 1, 2])
        time.sleep(60 if rank == 1 else 0)
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sleeps", "rank 2 (n3): still at the middle\n"),
        ("stops", "rank 2 (n3) did not answer: not started, stopped, exited, or cut off from rank 0's machine\n"),
    ],
)
def test_a_hanging_rank_is_named_and_all_ranks_exit(tmp_path: Path, how: str, expected: str) -> None:
    server = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    arguments = [(rank, server.port, tmp_path, how) for rank in range(3)]
    processes = [mp.get_context("fork").Process(target=hang, args=each, daemon=True) for each in arguments]
    begin = time.monotonic()
    for process in processes:
        process.start()
    for process in processes[: 3 if how == "sleeps" else 2]:
        process.join(30)
        assert process.exitcode == 2
    assert time.monotonic() - begin < 20
    processes[2].kill()
    messages = [without_times(text) for text in ((tmp_path / f"err{rank}").read_text() for rank in range(3)) if text]
    assert len(messages) == 1, "one rank reports"
    assert (
        messages[0].startswith("error: preflight: the middle has not finished within 1 s\n") and expected in messages[0]
    )
    assert "all_reduce in tp of ranks 0-2 (n1, n2, n3) has not finished on rank 1 (n2)\n" in messages[0]


def cut_off(store: Any, folder: Path) -> None:
    redirect_stderr(folder / "err")
    setup_logging(1)
    guard = Guard(World(1, 1, 2, store), 0.5)
    guard.hosts = ["n1", "n2"]
    guard.start()
    with guard.stage("the middle"):
        time.sleep(60)


class UnreachableStore(dist.HashStore):
    """A store behind a cut link: requests to it block."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(1000)
        return False


def test_a_rank_that_cannot_reach_the_store_reports_it(tmp_path: Path) -> None:
    with mock.patch("dtron.cluster.preflight.guard.OFFLINE_GRACE_S", 0.5):
        process = mp.get_context("fork").Process(target=cut_off, args=(UnreachableStore(), tmp_path), daemon=True)
        process.start()
        process.join(20)
    assert process.exitcode == 2
    assert without_times((tmp_path / "err").read_text()) == (
        "error on rank 1: preflight: the middle has not finished within 0.5 s, and the rendezvous store does not "
        "answer: rank 1 (n2) is cut off from it\n"
    )


def lose_contact(folder: Path) -> None:
    redirect_stderr(folder / "err")
    guard = Guard(World(0, 0, 2, dist.HashStore()), 30)
    with guard.stage("the middle"):
        try:
            guard.contact_lost(RuntimeError("this rank's own"))
        except RuntimeError:
            guard.set_current("all_reduce in tp", [0, 1])
            guard.contact_lost(RuntimeError("[/src/pair.cc:1] Connection closed by peer [::1]\nand so on"))


def test_lost_contact_is_reported(tmp_path: Path) -> None:
    process = mp.get_context("fork").Process(target=lose_contact, args=(tmp_path,), daemon=True)
    process.start()
    process.join(20)
    assert process.exitcode == 2
    assert without_times((tmp_path / "err").read_text()).splitlines()[:2] == [
        "error: preflight: the middle: lost contact with other ranks (Connection closed by peer [::1])",
        "rank 1 did not answer: not started, stopped, exited, or cut off from rank 0's machine",
    ]


# --- torchrun


def torchrun(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "dtron", "preflight", *arguments]
    return warm.run(command, folder, environment, timeout=240)


@pytest.mark.parametrize(
    ("ranks_", "arguments", "expected"),
    [
        (2, "--tp 2", {"tp", "world"}),
        pytest.param(4, "--pp 2 --dp 2", {"pp", "dp_shard_cp", "world"}, marks=pytest.mark.long),
        pytest.param(4, "--cp 2 --dp 2 --config x.toml", {"cp", "dp_shard_cp", "world"}, marks=pytest.mark.long),
    ],
)
def test_by_torchrun(tmp_path: Path, ranks_: int, arguments: str, expected: set[str]) -> None:
    (tmp_path / "x.toml").write_text("[checkpoint]\nenable = true\n")
    done = torchrun(tmp_path, ranks_, *arguments.split())
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.startswith("preflight of ")
    figures = json.loads((tmp_path / "preflight.json").read_text())
    assert figures["world"] == ranks_ and figures["took_s"] < 60
    assert set(figures["dimensions"]) == expected and figures["exit_code"] == 0
    for dimension in figures["dimensions"].values():
        assert all(dimension[op]["latency_s"] < 1 for op in ("all_reduce", "all_gather", "send_recv"))


@pytest.mark.long
def test_a_mistake_is_reported_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "--tp", "4")
    assert done.returncode == 1, "torchrun's own"
    assert without_times(done.stderr).count("\nerror: ") + without_times(done.stderr).startswith("error: ") == 1
    assert "start a multiple of 4 ranks" in done.stderr and not (tmp_path / "preflight.json").exists()


def test_dimensions_with_the_same_ranks_are_measured_once(ranks: Ranks) -> None:
    assert ranks.run(2, dimension_names) == [[("dp_shard_cp", "cp", "world")]] * 2


def dimension_names() -> list[tuple[str, ...]]:
    return [dimension.names for dimension in dimensions(Mesh(dataclasses.replace(Degrees(), cp=2), "cpu"))]
