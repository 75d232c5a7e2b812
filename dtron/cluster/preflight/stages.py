"""The order of a preflight, on one rank; and how it ends."""

import argparse
import json
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dtron.cluster.preflight.facts import EQUAL, compare, facts, machines
from dtron.cluster.preflight.guard import Guard
from dtron.cluster.preflight.machine import answer_clock, ask_clock, disk_write, sees, write_marker
from dtron.cluster.preflight.measure import OPS, Meter, dimensions
from dtron.cluster.preflight.report import SCHEMA, assemble_dimensions, assemble_ranks, table, warnings_of
from dtron.config import Config, HelpRequested, load, replace
from dtron.errors import UserError, quiet_broken_pipe
from dtron.mesh import Degrees, Mesh, resolve_degrees
from dtron.ranks.failure import exit_when_interrupted, exit_with_message, exit_with_traceback, tell_torchrun
from dtron.ranks.logs import setup_logging
from dtron.ranks.world import World, check_gpu, compare_configs, join, start_process_group, wait_until_all_know
from dtron.train.folder import saves
from dtron.train.resolve import choose_device_type, resolve

__all__ = ["Crew", "Plan", "main", "measure", "meet"]

START_S = 60.0  # longest wait for ranks that are still starting, if --timeout is not longer
DISK_S = 2.0


@dataclass(frozen=True)
class Crew:
    """This rank, and of all ranks the host and the number of the machine; `facts` of all on rank 0."""

    rank: int
    hosts: list[str]
    machine_of: list[int]
    facts: list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is to be measured. needs_shared: the run writes checkpoints to the folder."""

    config: Config
    degrees: Degrees
    device: torch.device
    folder: Path
    needs_shared: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the matmul: the run's on CUDA; on CPUs float32, which all of them do at speed."""
        return (
            getattr(torch, self.config.training.mixed_precision_param) if self.device.type == "cuda" else torch.float32
        )


def main(given: argparse.Namespace) -> NoReturn:
    """Check what the command line says, and end the process; the codes are in `dtron preflight --help`."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    began, rank = time.monotonic(), int(os.environ.get("RANK", 0))
    setup_logging(rank)
    signal.signal(signal.SIGINT, exit_when_interrupted)
    world: World | None = None
    guard: Guard | None = None
    try:
        if rank == 0:
            _begin(Path(given.out))
        config, plan = _plan(given)
        world = _join(rank, config)
        guard = Guard(world, given.timeout)
        with guard.stage("the start", max(START_S, given.timeout)):
            guard.start()
            guard.waits()
            compare_configs(world, config)
        crew = meet(world, guard, facts(plan.device))
        with guard.stage("making the process groups"):
            guard.at("making the process groups", range(world.size))
            start_process_group(world, config, plan.device.type)
            mesh = Mesh(plan.degrees, plan.device.type)
        figures = measure(plan, guard, Meter(plan.device, guard), mesh, crew)
        _end(world, guard, _conclude(world, guard, figures, given, plan, began))
    except HelpRequested as help_text:
        if rank == 0:
            with quiet_broken_pipe():
                print(help_text)
        os._exit(0)
    except UserError as error:
        exit_with_message(rank, world, error)
    except RuntimeError as error:
        with suppress(RuntimeError):  # then nobody is to blame but this rank
            if guard is not None:
                guard.lost(error)
        exit_with_traceback(rank, world, error)
    except BaseException as error:
        exit_with_traceback(rank, world, error)


def _plan(given: argparse.Namespace) -> tuple[Config, Plan]:
    """The configuration, with timeouts of torch's own that come after ours, and what follows from it."""
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
            f"rank {rank} does not meet the others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).splitlines()[0]}; see that every machine was started, and that it reaches that address"
        ) from None


def _begin(out: Path) -> None:
    """Take away the file of an earlier preflight, so that none is there if this one does not come to an end.

    UserError if the file is anything else.
    """
    try:
        if out.exists() and not _is_ours(out):
            raise UserError(f"--out {out} is there, and is not the file of a preflight: name another, or move it away")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("w").close()
        out.unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}; name another file") from None


def _is_ours(out: Path) -> bool:
    try:
        return json.loads(out.read_text())["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError):
        return False


def meet(world: World, guard: Guard, mine: dict[str, Any]) -> Crew:
    """Who the ranks are. UserError on every one of them if their versions are not equal. mine: of `facts`."""
    with guard.stage("comparing versions"):
        everyone = guard.gather("facts", mine)
        found = None
        if everyone is not None:
            of_machines = machines(everyone)
            machine_of = {rank: i for i, ranks in enumerate(of_machines) for rank in ranks}
            found = {
                "unequal": compare(everyone),
                "names": [everyone[ranks[0]]["host"] for ranks in of_machines],
                "machine_of": [machine_of[rank] for rank in range(world.size)],
            }
        told = guard.tell("facts", found)
        guard.hosts = [told["names"][machine] for machine in told["machine_of"]]
    if told["unequal"]:
        wait_until_all_know(world)
        raise UserError(told["unequal"])
    return Crew(world.rank, guard.hosts, told["machine_of"], everyone or [])


def measure(plan: Plan, guard: Guard, meter: Meter, mesh: Mesh, crew: Crew) -> dict[str, Any] | None:
    """All ranks' figures, as the JSON holds them but for what is concluded from them; on rank 0, None elsewhere."""
    mine: dict[str, Any] = {}
    with guard.stage("matmul"):
        mine |= meter.matmul(plan.dtype)
    with guard.stage("memory"):
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
            mine["memory_free_bytes"], mine["memory_total_bytes"] = torch.cuda.mem_get_info(plan.device)
        mine |= meter.memory()
    machine = _measure_machine(plan, guard, crew)
    groups = []
    for dimension in dimensions(mesh):
        found: dict[str, Any] = {"names": dimension.names, "ranks": dimension.ranks}
        for op in OPS:
            with guard.stage(f"{op} in {' = '.join(dimension.names)}"):
                found[op] = meter.collective(op, dimension)
        with guard.stage(f"send/recv in {' = '.join(dimension.names)}"):
            found["links"] = meter.links(dimension, crew.machine_of)
        groups.append(found)
    with guard.stage("collecting the figures"):
        clocks = machine.pop("clocks", [])
        everyone = guard.gather("figures", {"rank": mine, "machine": machine, "groups": groups})
    if everyone is None:
        return None
    rows = [
        {"host": crew.hosts[ranks[0]], "ranks": ranks, **clock, **everyone[ranks[0]]["machine"]}
        for ranks, clock in zip(machines(crew.facts), clocks, strict=True)
    ]
    return {
        "device_type": plan.device.type,
        "layout": str(plan.degrees),
        "degrees": asdict(plan.degrees),
        "versions": {key: crew.facts[0][key] for key in (*EQUAL, "git")},
        "disk": {"folder": str(plan.folder), "shared": all(row["disk_sees_rank_0"] for row in rows)},
        "machines": rows,
        "ranks": assemble_ranks(
            [each["rank"] for each in everyone], crew.facts, str(plan.dtype).removeprefix("torch.")
        ),
        "dimensions": assemble_dimensions([each["groups"] for each in everyone], crew.hosts) if groups else {},
    }


def _measure_machine(plan: Plan, guard: Guard, crew: Crew) -> dict[str, Any]:
    """The disk, on the first rank of each machine; `clocks`, on rank 0: of every machine against its own."""
    leaders = [crew.machine_of.index(machine) for machine in range(max(crew.machine_of) + 1)]
    found: dict[str, Any] = {}
    with guard.stage("comparing clocks"):
        if crew.rank == 0:
            found["clocks"] = [{"clock_skew_s": 0.0, "clock_uncertainty_s": 0.0}]
            for leader in leaders[1:]:
                guard.at("asking for the time", [0, leader])
                found["clocks"].append(ask_clock(leader))
        elif crew.rank in leaders:
            guard.at("telling the time", [0, crew.rank])
            answer_clock(0)
    marker: Path | None = None
    try:
        with guard.stage(f"writing to {plan.folder}"):
            name, error = "", ""
            if crew.rank == 0:
                try:
                    marker = write_marker(plan.folder)
                    name = marker.name
                except OSError as failed:
                    error = str(failed)
            name = guard.tell("marker", name)
            if crew.rank in leaders:
                found |= _measure_disk(plan.folder, name, error)
    finally:
        if marker is not None:
            marker.unlink(missing_ok=True)
    return found


def _measure_disk(folder: Path, marker: str, error: str) -> dict[str, Any]:
    """marker: a file that rank 0 has written, empty if it could not, with its error on rank 0."""
    found = {"disk_sees_rank_0": bool(marker) and sees(folder, marker), "disk_error": error or None}
    found |= {"disk_write_bytes_per_s": None, "disk_free_bytes": None}
    if not error:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found |= disk_write(folder, DISK_S)
        except OSError as failed:
            found["disk_error"] = str(failed)
    return found


def _conclude(
    world: World, guard: Guard, figures: dict[str, Any] | None, given: argparse.Namespace, plan: Plan, began: float
) -> int:
    """The exit code, on all ranks, after rank 0 has written and printed the figures. UserError on all if it is 2."""
    told: dict[str, Any] | None = None
    with guard.stage("writing the figures"):
        if figures is not None:
            found, error = warnings_of(figures), _impossible(figures, plan.needs_shared)
            told = {"exit_code": 2 if error else 3 if found and given.strict else 0, "error": error}
            head = {"schema": SCHEMA, "unix_s": time.time(), "took_s": time.monotonic() - began, "world": world.size}
            figures = {**head, **told, "warnings": found, **figures}
            Path(given.out).write_text(json.dumps(figures, indent=1) + "\n")
            print(f"{table(figures)}\nfigures: {given.out}", flush=True)  # the result, not a line of a log
        told = guard.tell("end", told)
    if told["error"]:
        wait_until_all_know(world)
        raise UserError(told["error"])
    if told["exit_code"] and world.rank == 0:
        tell_torchrun(UserError(f"--strict, and {len(figures['warnings'])} warnings: see {given.out}"))  # type: ignore
    return told["exit_code"]


def _impossible(figures: dict[str, Any], needs_shared: bool) -> str | None:
    """What keeps these ranks from training."""
    folder = figures["disk"]["folder"]
    if failed := [machine for machine in figures["machines"] if machine["disk_error"]]:
        hosts = ", ".join(machine["host"] for machine in failed[:4])
        return (
            f"nothing can be written to {folder} on {len(failed)} of {len(figures['machines'])} machines ({hosts}): "
            f"{failed[0]['disk_error']}; name another by job.dump_folder, or --disk"
        )
    if needs_shared and not figures["disk"]["shared"]:
        hosts = ", ".join([machine["host"] for machine in figures["machines"] if not machine["disk_sees_rank_0"]][:4])
        return (
            f"what rank 0 writes to {folder} is not seen on {hosts}, but the run keeps its checkpoints there; name a "
            "folder that all machines share by job.dump_folder"
        )
    return None


def _end(world: World, guard: Guard, code: int) -> NoReturn:
    """All at once: torchrun stops the others as soon as one has ended with another code than 0."""
    with guard.stage("the end"):
        dist.destroy_process_group()
    guard.stop()
    wait_until_all_know(world)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of the groups may still be ending
