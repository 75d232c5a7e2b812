"""What the ranks agree on before they start: by threads that share a store, as ranks share the rendezvous."""

import json
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from dtron.config import Config, load
from dtron.errors import UserError
from dtron.train import launch
from dtron.train.launch import World


def compare(configs: list[Config]) -> list[str]:
    """What each rank is told about its configuration; "" where all is well."""
    store = dist.HashStore()
    told = ["nothing"] * len(configs)

    def rank(me: int) -> None:
        try:
            launch.compare_configs(World(me, me, len(configs), store), configs[me])
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
        launch.compare_configs(world, load(["--tp", "2"]))
    assert 0.4 <= time.monotonic() - began < 10
    other.join()

    monkeypatch.setattr(launch, "SILENT_WAIT_S", 0.2)
    began = time.monotonic()
    launch.wait_until_all_know(World(0, 0, 3, dist.HashStore()))  # nobody answers: bounded
    assert 0.2 <= time.monotonic() - began < 10
    launch.wait_until_all_know(World(1, 1, 3, dist.HashStore()))  # only rank 0 waits
