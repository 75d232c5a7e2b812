"""The stages of a preflight in their order, on one rank, and its exit code."""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dtron.cluster.preflight.facts import MUST_MATCH, compare_facts, facts, machines
from dtron.cluster.preflight.guard import Guard
from dtron.cluster.preflight.machine import answer_clock, ask_clock, measure_disk_write, sees_marker, write_marker
from dtron.cluster.preflight.measure import OPS, Meter, dimensions
from dtron.cluster.preflight.report import SCHEMA, find_warnings, summarize_dimensions, summarize_ranks, table
from dtron.config import Config, HelpRequested, load, replace
from dtron.errors import UserError, quiet_broken_pipe
from dtron.mesh import Degrees, Mesh, resolve_degrees
from dtron.ranks.failure import exit_on_signals, exit_with_message, exit_with_traceback, tell_torchrun
from dtron.ranks.logs import setup_logging
from dtron.ranks.world import World, check_gpu, compare_configs, join, start_process_group, wait_until_all_know
from dtron.train.folder import saves
from dtron.train.resolve import choose_device_type, resolve

__all__ = ["Peers", "Plan", "compare_versions", "main", "measure"]

START_S = 60.0  # time limit for the ranks to start, unless --timeout is longer
DISK_BUDGET_S = 2.0


@dataclass(frozen=True)
class Peers:
    """This rank, and the hosts and machine numbers of all ranks; `facts` of all ranks on rank 0, empty elsewhere."""

    rank: int
    hosts: list[str]
    machine_of: list[int]
    facts: list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What to measure. needs_shared: the run writes checkpoints to the folder."""

    config: Config
    degrees: Degrees
    device: torch.device
    folder: Path
    needs_shared: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the matmul: the run's on CUDA; float32 on CPUs, which is fast on all of them."""
        return (
            getattr(torch, self.config.training.mixed_precision_param) if self.device.type == "cuda" else torch.float32
        )


def main(given: argparse.Namespace) -> NoReturn:
    """Run the checks and exit the process; `dtron preflight --help` lists the exit codes."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    began, rank = time.monotonic(), int(os.environ.get("RANK", 0))
    setup_logging(rank)
    exit_on_signals(rank)
    world: World | None = None
    guard: Guard | None = None
    try:
        if rank == 0:
            _prepare_output(Path(given.out))
        config, plan = _plan(given)
        world = _join(rank, config)
        guard = Guard(world, given.timeout)
        with guard.stage("the start", max(START_S, given.timeout)):
            guard.start()
            guard.set_waiting()
            compare_configs(world, config)
        peers = compare_versions(world, guard, facts(plan.device))
        with guard.stage("making the process groups"):
            guard.set_current("making the process groups", range(world.size))
            start_process_group(world, config, plan.device.type)
            mesh = Mesh(plan.degrees, plan.device.type)
        figures = measure(plan, guard, Meter(plan.device, guard), mesh, peers)
        _shut_down(world, guard, _conclude(world, guard, figures, given, plan, began))
    except HelpRequested as help_text:
        if rank == 0:
            with quiet_broken_pipe():
                print(help_text)
        os._exit(0)
    except UserError as error:
        exit_with_message(rank, world, error)
    except RuntimeError as error:
        with suppress(RuntimeError):  # re-raised: no other rank is involved
            if guard is not None:
                guard.contact_lost(error)
        exit_with_traceback(rank, world, error)
    except BaseException as error:
        exit_with_traceback(rank, world, error)


def _plan(given: argparse.Namespace) -> tuple[Config, Plan]:
    """The configuration, with torch's timeouts set later than ours, and the plan that follows from it."""
    argv = [*(["--job.config_file", given.config] if given.config else []), *given.keys]
    config, size = load(argv) if argv else Config(), int(os.environ.get("WORLD_SIZE", 1))
    if config.job.config_file is not None:
        setup = resolve(config, size)
        config, degrees, device_type = setup.config, setup.degrees, setup.device_type
    else:
        degrees, device_type = resolve_degrees(config.parallelism, size), choose_device_type(config)
    limit = int(max(START_S, given.timeout)) + 60
    config = replace(replace(config, "comm.init_timeout_seconds", limit), "comm.trace_buf_size", 0)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device_type == "cuda":
        check_gpu(local_rank)
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    folder = Path(given.disk or config.job.dump_folder)
    c = config.checkpoint
    needs_shared = config.job.config_file is not None and saves(c) and "://" not in c.folder and not given.disk
    return config, Plan(config, degrees, device, folder, needs_shared)


def _join(rank: int, config: Config) -> World:
    try:
        return join(rank, config)
    except dist.DistError as error:
        raise UserError(
            f"rank {rank} cannot reach the others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).splitlines()[0]}; check that every machine was started and can reach that address"
        ) from None


def _prepare_output(out: Path) -> None:
    """Delete the file of an earlier preflight, so that a file is always from one that finished.

    UserError if it is another kind of file.
    """
    try:
        if out.exists() and not _is_preflight_file(out):
            raise UserError(f"--out {out} exists and was not written by preflight: choose another file, or move it")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("w").close()
        out.unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}; choose another file") from None


def _is_preflight_file(out: Path) -> bool:
    try:
        return json.loads(out.read_text())["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError):
        return False


def compare_versions(world: World, guard: Guard, mine: dict[str, Any]) -> Peers:
    """Exchange facts. UserError on every rank if their versions differ. mine: this rank's `facts`."""
    with guard.stage("comparing versions"):
        of_ranks = guard.gather("facts", mine)
        found = None
        if of_ranks is not None:
            ranks_of_machines = machines(of_ranks)
            machine_of = {rank: i for i, ranks in enumerate(ranks_of_machines) for rank in ranks}
            found = {
                "differing": compare_facts(of_ranks),
                "names": [of_ranks[ranks[0]]["host"] for ranks in ranks_of_machines],
                "machine_of": [machine_of[rank] for rank in range(world.size)],
            }
        common = guard.broadcast("facts", found)
        guard.hosts = [common["names"][machine] for machine in common["machine_of"]]
    if common["differing"]:
        wait_until_all_know(world)
        raise UserError(common["differing"])
    return Peers(world.rank, guard.hosts, common["machine_of"], of_ranks or [])


def measure(plan: Plan, guard: Guard, meter: Meter, mesh: Mesh, peers: Peers) -> dict[str, Any] | None:
    """All ranks' figures, as in the JSON, without the conclusions; on rank 0, None elsewhere."""
    mine: dict[str, Any] = {}
    with guard.stage("matmul"):
        mine |= meter.matmul(plan.dtype)
    with guard.stage("memory"):
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
            mine["memory_free_bytes"], mine["memory_total_bytes"] = torch.cuda.mem_get_info(plan.device)
        mine |= meter.memory()
    machine = _measure_machine(plan, guard, peers)
    groups = []
    for dimension in dimensions(mesh):
        found: dict[str, Any] = {"names": dimension.names, "ranks": dimension.ranks}
        for op in OPS:
            with guard.stage(f"{op} in {' = '.join(dimension.names)}"):
                found[op] = meter.collective(op, dimension)
        with guard.stage(f"send/recv in {' = '.join(dimension.names)}"):
            found["links"] = meter.links(dimension, peers.machine_of)
        groups.append(found)
    with guard.stage("collecting the figures"):
        clocks = machine.pop("clocks", [])
        of_ranks = guard.gather("figures", {"rank": mine, "machine": machine, "groups": groups})
    if of_ranks is None:
        return None
    rows = [
        {"host": peers.hosts[ranks[0]], "ranks": ranks, **clock, **of_ranks[ranks[0]]["machine"]}
        for ranks, clock in zip(machines(peers.facts), clocks, strict=True)
    ]
    return {
        "device_type": plan.device.type,
        "layout": str(plan.degrees),
        "degrees": asdict(plan.degrees),
        "versions": {key: peers.facts[0][key] for key in (*MUST_MATCH, "git")},
        "disk": {"folder": str(plan.folder), "shared": all(row["disk_sees_rank_0"] for row in rows)},
        "machines": rows,
        "ranks": summarize_ranks(
            [each["rank"] for each in of_ranks], peers.facts, str(plan.dtype).removeprefix("torch.")
        ),
        "dimensions": summarize_dimensions([each["groups"] for each in of_ranks], peers.hosts) if groups else {},
    }


def _measure_machine(plan: Plan, guard: Guard, peers: Peers) -> dict[str, Any]:
    """The disk, on the first rank of each machine; on rank 0 also `clocks`: every machine against its own."""
    leaders = [peers.machine_of.index(machine) for machine in range(max(peers.machine_of) + 1)]
    found: dict[str, Any] = {}
    with guard.stage("comparing clocks"):
        if peers.rank == 0:
            found["clocks"] = [{"clock_skew_s": 0.0, "clock_uncertainty_s": 0.0}]
            for leader in leaders[1:]:
                guard.set_current("asking for the time", [0, leader])
                found["clocks"].append(ask_clock(leader))
        elif peers.rank in leaders:
            guard.set_current("sending the time", [0, peers.rank])
            answer_clock(0)
    marker: Path | None = None
    try:
        with guard.stage(f"writing to {plan.folder}"):
            name, error = "", ""
            if peers.rank == 0:
                try:
                    marker = write_marker(plan.folder)
                    name = marker.name
                except OSError as failed:
                    error = str(failed)
            name = guard.broadcast("marker", name)
            if peers.rank in leaders:
                found |= _measure_disk(plan.folder, name, error)
    finally:
        if marker is not None:
            marker.unlink(missing_ok=True)
    return found


def _measure_disk(folder: Path, marker: str, error: str) -> dict[str, Any]:
    """marker: name of the file that rank 0 wrote, empty if it failed, with the error on rank 0."""
    found = {"disk_sees_rank_0": bool(marker) and sees_marker(folder, marker), "disk_error": error or None}
    found |= {"disk_write_bytes_per_s": None, "disk_free_bytes": None}
    if not error:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found |= measure_disk_write(folder, DISK_BUDGET_S)
        except OSError as failed:
            found["disk_error"] = str(failed)
    return found


def _conclude(
    world: World, guard: Guard, figures: dict[str, Any] | None, given: argparse.Namespace, plan: Plan, began: float
) -> int:
    """The exit code, on all ranks, after rank 0 wrote and printed the figures. UserError on all ranks if it is 2."""
    verdict: dict[str, Any] | None = None
    with guard.stage("writing the figures"):
        if figures is not None:
            found, error = find_warnings(figures), _fatal_problem(figures, plan.needs_shared)
            verdict = {"exit_code": 2 if error else 3 if found and given.strict else 0, "error": error}
            head = {"schema": SCHEMA, "unix_s": time.time(), "took_s": time.monotonic() - began, "world": world.size}
            figures = {**head, **verdict, "warnings": found, **figures}
            Path(given.out).write_text(json.dumps(figures, indent=1) + "\n")
            print(f"{table(figures)}\nfigures: {given.out}", flush=True)  # the result, not a log message
        verdict = guard.broadcast("end", verdict)
    if verdict["error"]:
        wait_until_all_know(world)
        raise UserError(verdict["error"])
    if verdict["exit_code"] and world.rank == 0:
        tell_torchrun(UserError(f"--strict: {len(figures['warnings'])} warnings: see {given.out}"))  # type: ignore
    return verdict["exit_code"]


def _fatal_problem(figures: dict[str, Any], needs_shared: bool) -> str | None:
    """Why these ranks cannot train; None if they can."""
    folder = figures["disk"]["folder"]
    if failed := [machine for machine in figures["machines"] if machine["disk_error"]]:
        hosts = ", ".join(machine["host"] for machine in failed[:4])
        return (
            f"cannot write to {folder} on {len(failed)} of {len(figures['machines'])} machines ({hosts}): "
            f"{failed[0]['disk_error']}; choose another with job.dump_folder, or --disk"
        )
    if needs_shared and not figures["disk"]["shared"]:
        hosts = ", ".join([machine["host"] for machine in figures["machines"] if not machine["disk_sees_rank_0"]][:4])
        return (
            f"what rank 0 writes to {folder} is not visible on {hosts}, but the run keeps its checkpoints there; set "
            "job.dump_folder to a folder that all machines share"
        )
    return None


def _shut_down(world: World, guard: Guard, code: int) -> NoReturn:
    """Exit on all ranks together: torchrun stops the others as soon as one exits with a code other than 0."""
    with guard.stage("the end"):
        dist.destroy_process_group()
    guard.stop()
    wait_until_all_know(world)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of the process groups may still be running
