"""What the ranks agree on before they start: by threads that share a store, as ranks share the rendezvous."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from dtron.config import Config, load
from dtron.errors import UserError
from dtron.ranks import failure
from dtron.ranks import world as world_module
from dtron.ranks.logs import setup_logging
from dtron.ranks.world import World


def compare(configs: list[Config]) -> list[str]:
    """What each rank is told about its configuration; "" where all is well."""
    store = dist.HashStore()
    told = ["nothing"] * len(configs)

    def rank(me: int) -> None:
        try:
            world_module.compare_configs(World(me, me, len(configs), store), configs[me])
            told[me] = ""
        except UserError as error:
            told[me] = str(error)

    run_all([lambda me=me: rank(me) for me in range(len(configs))])
    return told


def run_all(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_equal_configurations() -> None:
    assert compare([load(["--tp", "2"]) for _ in range(4)]) == [""] * 4
    assert compare([load(["--tp", "2"])]) == [""]


def test_one_rank_that_differs_is_named_to_all() -> None:
    configs = [load(["--tp", "2"]) for _ in range(3)] + [load(["--tp", "2", "--debug.seed", "5"])]
    told = compare(configs)
    assert len(set(told)) == 1
    assert "debug.seed is 5 on rank 3 and 0 on rank 0" in told[0] and "start all with one file" in told[0]


def test_rank_0_ends_after_the_others_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun the store is in rank 0: ended at once, it would take the verdict away from slower ranks."""
    store = dist.HashStore()
    world = World(0, 0, 2, store)

    def slow_rank() -> None:
        theirs = json.loads(store.get("config"))
        assert theirs["debug.seed"] == "0"
        store.compare_set("verdict", "", "different")
        store.add("compared", 1)
        time.sleep(0.4)
        store.add("known", 1)

    began = time.monotonic()
    other = threading.Thread(target=slow_rank, daemon=True)
    other.start()
    with pytest.raises(UserError, match="different"):
        world_module.compare_configs(world, load(["--tp", "2"]))
    assert 0.4 <= time.monotonic() - began < 10
    other.join()

    monkeypatch.setattr(world_module, "SILENT_WAIT_S", 0.2)
    began = time.monotonic()
    world_module.wait_until_all_know(World(0, 0, 3, dist.HashStore()))  # nobody answers: bounded
    assert 0.2 <= time.monotonic() - began < 10
    world_module.wait_until_all_know(World(1, 1, 3, dist.HashStore()))  # only rank 0 waits


# --- attempts that share one store, as those of a torchrun do


def meet(store: dist.Store, size: int, late: int, longest_s: float = 20) -> list[str]:
    """One attempt, of which rank `late` comes half a second after the others: the name each rank comes away with."""
    names = ["none"] * size

    def rank(me: int) -> None:
        time.sleep(0.5 if me == late else 0.0)
        try:
            mine = world_module._meet(me, size, store, longest_s)
        except UserError as error:
            names[me] = str(error)
            return
        names[me] = mine.compare_set("name", "", f"chosen by {me}").decode()

    run_all([lambda me=me: rank(me) for me in range(size)])
    return names


def test_attempts_share_nothing_of_the_store() -> None:
    """Whoever comes first, and however many have come before."""
    store, seen = dist.HashStore(), set()
    for size, late in ((2, 0), (2, 1), (2, 0), (3, 2), (1, 1), (3, 0), (2, 0)):
        names = meet(store, size, late)
        assert len(set(names)) == 1 and names[0].startswith("chosen by"), names
        attempt = store.get(world_module.ATTEMPT)
        assert attempt not in seen
        seen.add(attempt)


def test_an_attempt_that_did_not_begin_is_not_joined() -> None:
    """Its rank 0 has ended, after it had come."""
    store = dist.HashStore()
    with pytest.raises(UserError, match=r"^2 of 3 ranks have not come within comm.init_timeout_seconds = 0.2; look"):
        world_module._meet(0, 3, store, 0.2)
    with pytest.raises(UserError, match="^rank 0 has not come within comm.init_timeout_seconds = 0.2; look"):
        world_module._meet(2, 3, store, 0.2)
    assert len(set(meet(store, 3, late=0))) == 1


# --- ranks that fail because others did


class Silent(dist.HashStore):  # type: ignore[misc]
    """A store behind a network that is down."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        time.sleep(1000)
        return b""


def lose_contact(store: str, said: Path) -> None:
    failure.SILENT_WAIT_S, failure.STORE_WAIT_S = 0.3, 0.2
    setup_logging(1)
    world = World(1, 1, 2, {"silent": Silent, "there": dist.HashStore}[store]())
    if store == "there":
        world.store.set(failure.FIRST_FAILURE, "rank 0")
    with said.open("w") as sys.stderr:
        failure.exit_with_traceback(1, world, RuntimeError("timed out waiting"))


@pytest.mark.parametrize(
    ("store", "where"),
    [("silent", "nor can the rendezvous store be reached"), ("there", "rank 0 ended first and says why")],
)
def test_a_rank_that_nobody_stops_says_that_it_lost_contact(
    store: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torchrun of the machine where the first rank failed does not stop it, nor one that cannot be reached."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    process = mp.get_context("fork").Process(target=lose_contact, args=(store, tmp_path / "said"), daemon=True)
    process.start()
    process.join(20)
    assert process.exitcode == 1
    want = f" error on rank 1: rank 1 lost contact with the others, {where}: RuntimeError: timed out waiting\n"
    assert (tmp_path / "said").read_text()[19:] == want
